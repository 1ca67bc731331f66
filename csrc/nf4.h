// The NF4 format of bitsandbytes: two values a byte, the first in the high bits; one float32 scale a block.
#pragma once

#include <cstdint>

namespace mowe {

constexpr int64_t kNestedBlock = 256;

#define MOWE_NF4_CODE                                                                                          \
  {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,           \
   -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,            \
   0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, \
   1.0f}

// One matrix of one encoder; without double quantisation `absmax` holds the scales, else `absmax8` their 8 bits.
struct Matrix {
  const uint8_t* codes;
  const float* absmax;
  const uint8_t* absmax8;
  const float* nested_absmax;
  const float* nested_code;
  float nested_offset;
  int64_t count;
  int64_t blocksize;
};

}  // namespace mowe
