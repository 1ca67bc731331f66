// NF4 on the GPU: one launch for all matrices of a layer; nothing is read back, idle encoders leave at once.
#include <algorithm>
#include <tuple>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "nf4.h"

namespace mowe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMaxStacks = 8;  // in one launch; a layer has four
constexpr int kThreads = 256;
constexpr int kStep = 8;   // values a thread writes at once: 4 bytes of codes, one store of 16 bits a value
constexpr int kTurns = 4;  // of such steps: what they read is on its way together

struct Layer {
  Stack stacks[kMaxStacks];
};

__device__ inline float rounded(float value, float) { return value; }
__device__ inline __half rounded(float value, __half) { return __float2half_rn(value); }
__device__ inline __nv_bfloat16 rounded(float value, __nv_bfloat16) { return __float2bfloat16_rn(value); }

// The scale of a value; block sizes are powers of two, and a division would take longer than everything else here.
__device__ inline float scale_of(const Stack& s, int64_t e, int64_t value) {
  const int shift = __ffsll(s.blocksize) - 1;
  const int64_t blocks = (s.count + s.blocksize - 1) >> shift, block = value >> shift;
  if (!s.nested_absmax) return static_cast<const float*>(s.absmax)[e * blocks + block];
  const int64_t nested = (blocks + kNestedBlock - 1) / kNestedBlock;
  const uint8_t index = static_cast<const uint8_t*>(s.absmax)[e * blocks + block];
  const float product = __fmul_rn(s.nested_code[e * 256 + index], s.nested_absmax[e * nested + block / kNestedBlock]);
  return __fadd_rn(product, s.nested_offset[e]);
}

// The codes of up to kStep values, the first in the lowest byte.
__device__ inline uint32_t codes_at(const uint8_t* codes, int count) {
  if (count == kStep && reinterpret_cast<uintptr_t>(codes) % 4 == 0) return *reinterpret_cast<const uint32_t*>(codes);
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kStep / 2; ++i)
    if (2 * i < count) word |= uint32_t{codes[i]} << 8 * i;
  return word;
}

// grid: (tiles of kTurns kThreads kStep values, E, stacks).
template <typename T>
__global__ void nf4_dequantize_grouped_kernel(Layer layer, const int32_t* group_offsets) {
  constexpr float kCode[16] = MOWE_NF4_CODE;
  __shared__ float code[16];  // lanes look up different values, which constant memory serves one by one
  const int64_t e = blockIdx.y;
  if (group_offsets[e] == group_offsets[e + 1]) return;
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (threadIdx.x == i) code[i] = kCode[i];
  __syncthreads();
  const Stack s = layer.stacks[blockIdx.z];
  auto first = [](int turn) { return ((int64_t{blockIdx.x} * kTurns + turn) * kThreads + threadIdx.x) * kStep; };
  uint32_t words[kTurns];
  float scales[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int64_t value = first(turn);
    if (value >= s.count) break;
    words[turn] = codes_at(s.codes + e * ((s.count + 1) / 2) + value / 2, min(int64_t{kStep}, s.count - value));
    scales[turn] = scale_of(s, e, value);
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int64_t value = first(turn);
    if (value >= s.count) break;
    const int count = min(int64_t{kStep}, s.count - value);
    T* out = static_cast<T*>(s.out) + e * s.count + value;
    alignas(16) T values[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i)
      values[i] = rounded(__fmul_rn(code[words[turn] >> (i % 2 ? 4 * i - 4 : 4 * i + 4) & 15], scales[turn]), T());
    if (count == kStep && reinterpret_cast<uintptr_t>(out) % 16 == 0)
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(values) / 16); ++i)
        reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(values)[i];
    else
#pragma unroll
      for (int i = 0; i < kStep; ++i)  // no index that only the device knows: that would put `values` into memory
        if (i < count) out[i] = values[i];
  }
}

// How many of the midpoints between two codes lie below a value: the index of the nearest code. NaN gets the last.
__device__ inline int nearest(float value) {
  constexpr float kCode[16] = MOWE_NF4_CODE;
  int index = 15;
#pragma unroll
  for (int i = 0; i < 15; ++i) index -= value <= (kCode[i] + kCode[i + 1]) / 2;
  return index;
}

// grid: (warps, E), a warp for each block. bitsandbytes multiplies a whole block by the reciprocal of its scale, and
// divides the last, shorter one.
template <typename T>
__global__ void nf4_quantize_kernel(const T* weight, uint8_t* codes, float* absmax, int64_t count, int64_t blocksize) {
  const int64_t block = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32, start = block * blocksize;
  const int64_t blocks = (count + blocksize - 1) / blocksize, bytes = (count + 1) / 2, e = blockIdx.y;
  const int lane = threadIdx.x % 32;
  if (block >= blocks) return;
  const int64_t size = min(blocksize, count - start);
  const bool whole = size == blocksize;
  const T* values = weight + e * count + start;

  uint32_t bits = 0;  // magnitudes are in the order of their bits, and NaN comes last: it is not lost
  for (int64_t i = lane; i < size; i += 32) bits = max(bits, __float_as_uint(fabsf(static_cast<float>(values[i]))));
  for (int distance = 16; distance; distance /= 2) bits = max(bits, __shfl_xor_sync(0xffffffff, bits, distance));
  const float largest = __uint_as_float(bits), scale = largest < 1e-38f ? 1e-38f : largest;
  const float reciprocal = __fdiv_rn(1.0f, scale);
  if (lane == 0) absmax[e * blocks + block] = whole ? largest : scale;

  auto index = [&](int64_t i) {
    if (i >= size) return 7;  // a zero after an odd number of values
    const float value = static_cast<float>(values[i]);
    return nearest(whole ? __fmul_rn(value, reciprocal) : __fdiv_rn(value, scale));
  };
  for (int64_t i = lane; i < (size + 1) / 2; i += 32)
    codes[e * bytes + start / 2 + i] = static_cast<uint8_t>(index(2 * i) << 4 | index(2 * i + 1));
}

int64_t tiles(int64_t count, int64_t each) { return (count + each - 1) / each; }

void check(cudaError_t status) { STD_TORCH_CHECK(status == cudaSuccess, "mowe NF4: ", cudaGetErrorString(status)); }

// torch's current stream on the device of a tensor.
cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Calls launch with a value of the C++ type that a tensor's type stands for.
template <typename Launch>
void with_type(ScalarType type, Launch launch) {
  if (type == ScalarType::Float) launch(float());
  else if (type == ScalarType::BFloat16) launch(__nv_bfloat16());
  else launch(__half());
}

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& weight, int64_t blocksize) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const int64_t encoders = weight.size(0), count = weight.size(1) * weight.size(2), blocks = tiles(count, blocksize);
  Tensor codes = torch::stable::new_empty(weight, {encoders, tiles(count, 2)}, ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(weight, {encoders, blocks}, ScalarType::Float);
  const dim3 grid(tiles(blocks, kThreads / 32), encoders);
  with_type(weight.scalar_type(), [&](auto type) {
    nf4_quantize_kernel<<<grid, kThreads, 0, stream_of(weight)>>>(
        static_cast<const decltype(type)*>(weight.data_ptr()), static_cast<uint8_t*>(codes.data_ptr()),
        static_cast<float*>(absmax.data_ptr()), count, blocksize);
  });
  check(cudaGetLastError());
  return {codes, absmax};
}

Tensors nf4_dequantize_grouped(
    const Tensors& codes, const Tensors& absmax, const Tensors& nested_absmax, const Tensors& nested_offset,
    const Tensors& nested_code, const std::vector<int64_t>& sizes, const Tensor& group_offsets, ScalarType dtype) {
  const torch::stable::accelerator::DeviceGuard guard(group_offsets.get_device_index());
  Tensors out;
  for (size_t m = 0; m < codes.size(); ++m)
    out.push_back(torch::stable::new_empty(codes[m], {codes[m].size(0), sizes[3 * m], sizes[3 * m + 1]}, dtype));
  const auto stacks = stacks_of(codes, absmax, nested_absmax, nested_offset, nested_code, sizes, out);
  for (size_t first = 0; first < stacks.size(); first += kMaxStacks) {
    const size_t number = std::min(stacks.size() - first, size_t{kMaxStacks});
    Layer layer{};
    std::copy_n(stacks.begin() + first, number, layer.stacks);
    int64_t largest = 0;
    for (const Stack& s : layer.stacks) largest = std::max(largest, s.count);
    const dim3 grid(tiles(largest, kTurns * kThreads * kStep), group_offsets.size(0) - 1, number);
    with_type(dtype, [&](auto type) {
      nf4_dequantize_grouped_kernel<decltype(type)><<<grid, kThreads, 0, stream_of(group_offsets)>>>(
          layer, static_cast<const int32_t*>(group_offsets.data_ptr()));
    });
    check(cudaGetLastError());
  }
  return out;
}

}  // namespace
}  // namespace mowe

STABLE_TORCH_LIBRARY_IMPL(mowe, CUDA, m) {
  m.impl("nf4_quantize.csrc", TORCH_BOX(&mowe::nf4_quantize));
  m.impl("nf4_dequantize_grouped.csrc", TORCH_BOX(&mowe::nf4_dequantize_grouped));
}
