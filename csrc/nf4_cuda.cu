// NF4 on the GPU: one launch for all matrices of a layer, idle encoders leave at once.
#include <cuda_bf16.h>

#include "nf4.h"

namespace mowe {

struct Stack {
  const uint8_t* codes;          // [E, bytes]
  const void* absmax;            // [E, blocks], float32, or uint8 where nested_absmax is there
  const float* nested_absmax;    // [E, ceil(blocks / 256)] or null
  const float* nested_offset;    // [E]
  const float* nested_code;      // [E, 256]
  __nv_bfloat16* out;            // [E, count]
  int64_t count;                 // values of one matrix
};

constexpr int kMaxStacks = 8;
constexpr int kThreads = 256;

struct Layer {
  Stack stacks[kMaxStacks];
};

__constant__ float kCode[16] = MOWE_NF4_CODE;

// grid: (tiles of 8 kThreads values, E, stacks). A thread turns 4 bytes into 8 values of one block.
__global__ void nf4_dequantize_grouped_kernel(Layer layer, const int32_t* group_offsets, int blocksize) {
  const int e = blockIdx.y;
  if (group_offsets[e] == group_offsets[e + 1]) return;
  const Stack s = layer.stacks[blockIdx.z];
  const int64_t bytes = (s.count + 1) / 2, blocks = (s.count + blocksize - 1) / blocksize;
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 8;
  if (first >= s.count) return;


  const int64_t block = first / blocksize;
  float scale;
  if (s.nested_absmax) {
    const int64_t nested = (blocks + kNestedBlock - 1) / kNestedBlock;
    const uint8_t index = static_cast<const uint8_t*>(s.absmax)[e * blocks + block];
    const float product = __fmul_rn(s.nested_code[e * 256 + index], s.nested_absmax[e * nested + block / kNestedBlock]);
    scale = __fadd_rn(product, s.nested_offset[e]);
  } else {
    scale = static_cast<const float*>(s.absmax)[e * blocks + block];
  }
  for (int64_t i = first; i < first + 8 && i < s.count; ++i) {
    const uint8_t byte = s.codes[e * bytes + i / 2];
    s.out[e * s.count + i] = __float2bfloat16_rn(kCode[i % 2 ? byte & 15 : byte >> 4] * scale);
  }
}

}  // namespace mowe
