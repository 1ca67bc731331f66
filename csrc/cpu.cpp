// NF4 on the CPU. AVX-512, AVX2 or neither is chosen when the library runs, so that one binary suits every x86-64.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "nf4.h"

// Functions are compiled once for each of these instruction sets, and the loader picks one by what the CPU has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MOWE_EVERY_CPU __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define MOWE_EVERY_CPU
#endif

namespace mowe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kCode[16] = MOWE_NF4_CODE;
constexpr int64_t kGrain = 16384;  // values a thread takes at least

inline float to_float(float value) { return value; }

struct BFloat16 {
  uint16_t bits;
};
inline float to_float(BFloat16 value) {
  uint32_t wide = uint32_t{value.bits} << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}
inline void store(float* out, float value) { *out = value; }
inline void store(BFloat16* out, float value) {  // to nearest, ties to even; the values are finite
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  out->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The two values of every byte, so that a byte is one lookup.
struct Pairs {
  float values[256][2];
  constexpr Pairs() : values() {
    for (int byte = 0; byte < 256; ++byte) {
      values[byte][0] = kCode[byte >> 4];
      values[byte][1] = kCode[byte & 15];
    }
  }
};
constexpr Pairs kPairs;

float scale_of(const Matrix& m, int64_t block) {
  if (m.absmax) return m.absmax[block];
  const float product = m.nested_code[m.absmax8[block]] * m.nested_absmax[block / kNestedBlock];
  return product + m.nested_offset;
}

template <typename T>
inline __attribute__((always_inline)) void dequantize_block(const uint8_t* codes, float scale, T* out, int64_t count) {
  for (int64_t i = 0; i < count / 2; ++i) {
    store(out + 2 * i, kPairs.values[codes[i]][0] * scale);
    store(out + 2 * i + 1, kPairs.values[codes[i]][1] * scale);
  }
  if (count % 2) store(out + count - 1, kPairs.values[codes[count / 2]][0] * scale);
}

MOWE_EVERY_CPU void dequantize_blocks(const Matrix& m, float* out, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    const int64_t start = b * m.blocksize;
    dequantize_block(m.codes + start / 2, scale_of(m, b), out + start, std::min(m.blocksize, m.count - start));
  }
}

MOWE_EVERY_CPU void dequantize_blocks(const Matrix& m, BFloat16* out, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    const int64_t start = b * m.blocksize;
    dequantize_block(m.codes + start / 2, scale_of(m, b), out + start, std::min(m.blocksize, m.count - start));
  }
}

#if defined(__x86_64__)
#define MOWE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

MOWE_AVX512 inline void store16(float* out, __m512 values) { _mm512_storeu_ps(out, values); }
MOWE_AVX512 inline void store16(BFloat16* out, __m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// 8 bytes, 16 values a step: all 16 codes lie in one register.
template <typename T>
MOWE_AVX512 void dequantize_blocks_avx512(const Matrix& m, T* out, int64_t first, int64_t last) {
  const __m512 code = _mm512_loadu_ps(kCode);
  const __m128i low = _mm_set1_epi8(15);
  for (int64_t b = first; b < last; ++b) {
    const int64_t start = b * m.blocksize, count = std::min(m.blocksize, m.count - start);
    const uint8_t* codes = m.codes + start / 2;
    const float scale = scale_of(m, b);
    const __m512 scales = _mm512_set1_ps(scale);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2));
      const __m128i firsts = _mm_and_si128(_mm_srli_epi16(bytes, 4), low), seconds = _mm_and_si128(bytes, low);
      const __m512i index = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(firsts, seconds));
      store16(out + start + i, _mm512_mul_ps(_mm512_permutexvar_ps(index, code), scales));
    }
    dequantize_block(codes + i / 2, scale, out + start + i, count - i);
  }
}

const bool kHasAvx512 =
    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif

template <typename T>
void dequantize(const Matrix& m, T* out) {
  const int64_t blocks = (m.count + m.blocksize - 1) / m.blocksize;
  auto run = [](const Matrix& m, T* out, int64_t first, int64_t last) { dequantize_blocks(m, out, first, last); };
  void (*kernel)(const Matrix&, T*, int64_t, int64_t) = run;
#if defined(__x86_64__)
  if (kHasAvx512) kernel = dequantize_blocks_avx512<T>;
#endif
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / m.blocksize), [&](int64_t first, int64_t last) {
    kernel(m, out, first, last);
  });
}

// How many of the midpoints between two codes lie below a value: the index of the nearest code.
inline __attribute__((always_inline)) int nearest(float value) {
  int index = 0;
  for (int i = 0; i < 15; ++i) index += (kCode[i] + kCode[i + 1]) / 2 < value;
  return index;
}

// bitsandbytes multiplies a whole block by the reciprocal of its scale, and divides the last, shorter one.
template <typename T>
inline __attribute__((always_inline)) void quantize_block(
    const T* values, uint8_t* codes, float* absmax, int64_t count, bool whole) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(to_float(values[i])));
  const float scale = std::max(largest, 1e-38f), reciprocal = 1.0f / scale;
  *absmax = whole ? largest : scale;
  uint8_t index[4096 + 1];
  for (int64_t i = 0; i < count; ++i) {
    const float value = to_float(values[i]);
    index[i] = static_cast<uint8_t>(nearest(whole ? value * reciprocal : value / scale));
  }
  index[count] = 7;  // a zero after an odd number of values
  for (int64_t i = 0; i < (count + 1) / 2; ++i) codes[i] = static_cast<uint8_t>(index[2 * i] << 4 | index[2 * i + 1]);
}

template <typename T>
inline __attribute__((always_inline)) void quantize_some(
    const T* values, uint8_t* codes, float* absmax, int64_t count, int64_t blocksize, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    const int64_t start = b * blocksize, size = std::min(blocksize, count - start);
    quantize_block(values + start, codes + start / 2, absmax + b, size, size == blocksize);
  }
}

MOWE_EVERY_CPU void quantize_blocks(
    const float* v, uint8_t* codes, float* absmax, int64_t count, int64_t blocksize, int64_t first, int64_t last) {
  quantize_some(v, codes, absmax, count, blocksize, first, last);
}

MOWE_EVERY_CPU void quantize_blocks(
    const BFloat16* v, uint8_t* codes, float* absmax, int64_t count, int64_t blocksize, int64_t first, int64_t last) {
  quantize_some(v, codes, absmax, count, blocksize, first, last);
}

template <typename T>
void quantize(const void* weight, uint8_t* codes, float* absmax, int64_t encoders, int64_t count, int64_t blocksize) {
  const int64_t blocks = (count + blocksize - 1) / blocksize, bytes = (count + 1) / 2;
  for (int64_t e = 0; e < encoders; ++e) {
    const T* values = static_cast<const T*>(weight) + e * count;
    torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / blocksize), [&](int64_t first, int64_t last) {
      quantize_blocks(values, codes + e * bytes, absmax + e * blocks, count, blocksize, first, last);
    });
  }
}

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& weight, int64_t blocksize) {
  const int64_t encoders = weight.size(0), count = weight.size(1) * weight.size(2);
  const auto type = weight.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "nf4_quantize: unsupported type");
  STD_TORCH_CHECK(weight.is_contiguous() && blocksize <= 4096, "nf4_quantize: unsupported layout");
  const std::vector<int64_t> bytes{encoders, (count + 1) / 2}, blocks{encoders, (count + blocksize - 1) / blocksize};
  Tensor codes = torch::stable::new_empty(weight, bytes, ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(weight, blocks, ScalarType::Float);
  auto* c = static_cast<uint8_t*>(codes.data_ptr());
  auto* a = static_cast<float*>(absmax.data_ptr());
  if (type == ScalarType::Float)
    quantize<float>(weight.data_ptr(), c, a, encoders, count, blocksize);
  else
    quantize<BFloat16>(weight.data_ptr(), c, a, encoders, count, blocksize);
  return {codes, absmax};
}

// Writes out[e] for the encoders that have rows. nested: absmax, offset and code of the scales, empty without them.
void nf4_dequantize(
    const Tensor& codes, const Tensor& absmax, const Tensor& nested_absmax, const Tensor& nested_offset,
    const Tensor& nested_code, int64_t blocksize, const Tensor& group_offsets, const Tensor& out) {
  const int64_t encoders = out.size(0), count = out.size(1) * out.size(2);
  const bool nested = nested_absmax.numel() > 0;
  const auto type = out.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "nf4_dequantize: unsupported type");
  const auto* offsets = static_cast<const int32_t*>(group_offsets.data_ptr());
  for (int64_t e = 0; e < encoders; ++e) {
    if (offsets[e] == offsets[e + 1]) continue;
    Matrix m{static_cast<const uint8_t*>(codes.data_ptr()) + e * codes.size(1), nullptr, nullptr, nullptr, nullptr, 0,
             count, blocksize};
    if (nested) {
      m.absmax8 = static_cast<const uint8_t*>(absmax.data_ptr()) + e * absmax.size(1);
      m.nested_absmax = static_cast<const float*>(nested_absmax.data_ptr()) + e * nested_absmax.size(1);
      m.nested_code = static_cast<const float*>(nested_code.data_ptr()) + e * 256;
      m.nested_offset = static_cast<const float*>(nested_offset.data_ptr())[e];
    } else {
      m.absmax = static_cast<const float*>(absmax.data_ptr()) + e * absmax.size(1);
    }
    if (type == ScalarType::Float)
      dequantize(m, static_cast<float*>(out.data_ptr()) + e * count);
    else
      dequantize(m, static_cast<BFloat16*>(out.data_ptr()) + e * count);
  }
}

}  // namespace
}  // namespace mowe

STABLE_TORCH_LIBRARY_FRAGMENT(mowe, m) {
  m.def("nf4_quantize.csrc(Tensor weight, int blocksize) -> (Tensor, Tensor)");
  m.def(
      "nf4_dequantize_grouped.csrc(Tensor codes, Tensor absmax, Tensor nested_absmax, Tensor nested_offset,"
      " Tensor nested_code, int blocksize, Tensor group_offsets, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mowe, CPU, m) {
  m.impl("nf4_quantize.csrc", TORCH_BOX(&mowe::nf4_quantize));
  m.impl("nf4_dequantize_grouped.csrc", TORCH_BOX(&mowe::nf4_dequantize));
}
