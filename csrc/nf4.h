// The NF4 format of bitsandbytes: two values a byte, the first in the high bits; one float32 scale a block.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace mowe {

constexpr int64_t kNestedBlock = 256;

#define MOWE_NF4_CODE                                                                                          \
  {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,           \
   -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,            \
   0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, \
   1.0f}

// The matrices of all encoders; without double quantisation nested_absmax is null and absmax holds float32 scales.
struct Stack {
  const uint8_t* codes;        // [E, ceil(count / 2)]
  const void* absmax;          // [E, blocks], float32, or uint8 where it is quantised itself
  const float* nested_absmax;  // [E, ceil(blocks / 256)]
  const float* nested_offset;  // [E]
  const float* nested_code;    // [E, 256]
  void* out;                   // [E, count]
  int64_t count;               // values of one matrix
  int64_t blocksize;
};

using Tensors = std::vector<torch::stable::Tensor>;

// The stacks as the op takes them; all tensors are contiguous. sizes: rows, columns and block size of each.
inline std::vector<Stack> stacks_of(
    const Tensors& codes, const Tensors& absmax, const Tensors& nested_absmax, const Tensors& nested_offset,
    const Tensors& nested_code, const std::vector<int64_t>& sizes, const Tensors& out) {
  std::vector<Stack> stacks;
  for (size_t m = 0; m < codes.size(); ++m) {
    const bool nested = nested_absmax[m].numel() > 0;
    auto scales = [nested](const torch::stable::Tensor& t) {
      return nested ? static_cast<const float*>(t.data_ptr()) : nullptr;
    };
    stacks.push_back(
        {static_cast<const uint8_t*>(codes[m].data_ptr()), absmax[m].data_ptr(), scales(nested_absmax[m]),
         scales(nested_offset[m]), scales(nested_code[m]), out[m].data_ptr(), sizes[3 * m] * sizes[3 * m + 1],
         sizes[3 * m + 2]});
  }
  return stacks;
}

}  // namespace mowe
