// NF4 on the CPU. AVX-512, AVX2 or neither is chosen when the library runs, so that one binary suits every x86-64.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOWE_PORTABLE)
#include <immintrin.h>
#define MOWE_X86 1
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "nf4.h"
#include "scratch.h"

// Functions are compiled once for each of these instruction sets, and the loader picks one by what the CPU has.
#if defined(MOWE_X86) && !defined(__clang__)
#define MOWE_EVERY_CPU __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define MOWE_EVERY_CPU
#endif
#define MOWE_INLINE inline __attribute__((always_inline))

namespace mowe {
namespace {

using c10::BFloat16;
using c10::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kCode[16] = MOWE_NF4_CODE;
constexpr int64_t kPiece = 16384;           // values handled at a time, a multiple of every block size
constexpr int64_t kBytesAThread = 2 << 20;  // written in the time that it takes to wake a thread
// Results of so many bytes are written past the caches: they would not stay there, but be fetched before and evict others.
constexpr int64_t kBytesAroundCache = 16 << 20;

// What one encoder's matrix is made of.
struct Matrix {
  const uint8_t* codes;
  const float* absmax;
  const uint8_t* absmax8;
  const float* nested_absmax;
  const float* nested_code;
  float nested_offset;
  void* out;
  int64_t count;
  int64_t blocksize;

  Matrix(const Stack& s, int64_t e) : absmax(), absmax8(), nested_absmax(), nested_code(), nested_offset() {
    const int64_t blocks = (s.count + s.blocksize - 1) / s.blocksize;
    codes = s.codes + e * ((s.count + 1) / 2);
    out = s.out;
    count = s.count;
    blocksize = s.blocksize;
    if (s.nested_absmax) {
      absmax8 = static_cast<const uint8_t*>(s.absmax) + e * blocks;
      nested_absmax = s.nested_absmax + e * ((blocks + kNestedBlock - 1) / kNestedBlock);
      nested_code = s.nested_code + e * 256;
      nested_offset = s.nested_offset[e];
    } else {
      absmax = static_cast<const float*>(s.absmax) + e * blocks;
    }
  }

  MOWE_INLINE float scale(int64_t block) const {
    if (absmax) return absmax[block];
    const float product = nested_code[absmax8[block]] * nested_absmax[block / kNestedBlock];
    return product + nested_offset;
  }
};

// A block has 16 different values: they are scaled and rounded once, and looked up by every code.
template <typename T>
MOWE_INLINE void look_up(const uint8_t* codes, float scale, T* out, int64_t count) {
  T table[16];
  for (int i = 0; i < 16; ++i) table[i] = static_cast<T>(kCode[i] * scale);
  for (int64_t i = 0; i < count / 2; ++i) {
    out[2 * i] = table[codes[i] >> 4];
    out[2 * i + 1] = table[codes[i] & 15];
  }
  if (count % 2) out[count - 1] = table[codes[count / 2] >> 4];
}

template <typename T>
MOWE_INLINE void dequantize_some(const Matrix& m, T* out, int64_t first, int64_t last) {
  for (int64_t start = first; start < last; start += m.blocksize)
    look_up(m.codes + start / 2, m.scale(start / m.blocksize), out + start, std::min(m.blocksize, last - start));
}

// Values first to last of a matrix; first begins a block.
MOWE_EVERY_CPU void dequantize(const Matrix& m, float* out, int64_t first, int64_t last) {
  dequantize_some(m, out, first, last);
}
MOWE_EVERY_CPU void dequantize(const Matrix& m, BFloat16* out, int64_t first, int64_t last) {
  dequantize_some(m, out, first, last);
}
MOWE_EVERY_CPU void dequantize(const Matrix& m, Half* out, int64_t first, int64_t last) {
  dequantize_some(m, out, first, last);
}

#if defined(MOWE_X86)
#define MOWE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define MOWE_AVX512_INLINE MOWE_AVX512 inline

const bool kHasAvx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");

// The 16 values of a block in one register, twice where they have 16 bits.
MOWE_AVX512_INLINE __m512i table_of(__m512 values, float) { return _mm512_castps_si512(values); }
MOWE_AVX512_INLINE __m512i table_of(__m512 values, Half) {
  return _mm512_broadcast_i64x4(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
MOWE_AVX512_INLINE __m512i table_of(__m512 values, BFloat16) {  // to nearest, ties to even; the values are finite
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// 64 bytes of results: every lane gets a byte, shifted so that its own code is in its low bits; a lookup ignores the rest.
MOWE_AVX512_INLINE __m512i look_up(const uint8_t* codes, __m512i table, float) {  // 16 values of 8 bytes
  int64_t eight;
  __builtin_memcpy(&eight, codes, 8);
  const __m512i place = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i bytes = _mm512_shuffle_epi8(_mm512_set1_epi64(eight), place);
  return _mm512_permutexvar_epi32(_mm512_srlv_epi32(bytes, _mm512_set4_epi32(0, 4, 0, 4)), table);
}
template <typename T>
MOWE_AVX512_INLINE __m512i look_up(const uint8_t* codes, __m512i table, T) {  // 32 values of 16 bytes
  const __m512i sixteen = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i place = _mm512_set_epi32(
      0x0f000f, 0x0e000e, 0x0d000d, 0x0c000c, 0x0b000b, 0x0a000a, 0x090009, 0x080008, 0x070007, 0x060006, 0x050005,
      0x040004, 0x030003, 0x020002, 0x010001, 0);
  const __m512i bytes = _mm512_shuffle_epi8(sixteen, place);
  return _mm512_permutexvar_epi16(_mm512_srlv_epi16(bytes, _mm512_set1_epi32(4)), table);
}

// around_cache: past the caches, which takes a result that starts at 64 bytes.
template <typename T>
MOWE_AVX512 void dequantize_avx512(const Matrix& m, T* out, int64_t first, int64_t last, bool around_cache) {
  constexpr int64_t kStep = 64 / sizeof(T);
  around_cache &= reinterpret_cast<uintptr_t>(out + first) % 64 == 0;  // then every block does: it has 64 bytes or more
  const __m512 code = _mm512_loadu_ps(kCode);
  for (int64_t start = first; start < last; start += m.blocksize) {
    const int64_t count = std::min(m.blocksize, last - start);
    const uint8_t* codes = m.codes + start / 2;
    const float scale = m.scale(start / m.blocksize);
    const __m512i table = table_of(_mm512_mul_ps(code, _mm512_set1_ps(scale)), T());
    int64_t i = 0;
    if (around_cache)
      for (; i + kStep <= count; i += kStep)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + start + i), look_up(codes + i / 2, table, T()));
    else
      for (; i + kStep <= count; i += kStep) _mm512_storeu_si512(out + start + i, look_up(codes + i / 2, table, T()));
    if (i < count) look_up(codes + i / 2, scale, out + start + i, count - i);
  }
}
#endif

template <typename T>
void dequantize_piece(const Matrix& m, int64_t piece, [[maybe_unused]] bool around_cache) {
  const int64_t first = piece * kPiece, last = std::min(first + kPiece, m.count);
#if defined(MOWE_X86)
  if (kHasAvx512) return dequantize_avx512(m, static_cast<T*>(m.out), first, last, around_cache);
#endif
  dequantize(m, static_cast<T*>(m.out), first, last);
}

// All pieces of all matrices lie in one range, which the threads share.
template <typename T>
void dequantize_all(const std::vector<Matrix>& matrices) {
  std::vector<int64_t> ends;
  int64_t total = 0, bytes = 0;
  for (const Matrix& m : matrices) {
    ends.push_back(total += (m.count + kPiece - 1) / kPiece);
    bytes += m.count * static_cast<int64_t>(sizeof(T));
  }
  const bool around_cache = bytes >= kBytesAroundCache;
  const int64_t grain = kBytesAThread / (kPiece * static_cast<int64_t>(sizeof(T)));
  torch::stable::parallel_for(0, total, grain, [&](int64_t first, int64_t last) {
    size_t m = std::upper_bound(ends.begin(), ends.end(), first) - ends.begin();
    for (int64_t piece = first; piece < last; ++piece) {
      while (piece >= ends[m]) ++m;
      dequantize_piece<T>(matrices[m], piece - (m ? ends[m - 1] : 0), around_cache);
    }
#if defined(MOWE_X86)
    if (around_cache) _mm_sfence();  // such stores are seen by other threads after this alone
#endif
  });
}

// How many of the midpoints between two codes lie below a value: the index of the nearest code. NaN gets the last.
MOWE_INLINE int nearest(float value) {
  int index = 15;
  for (int i = 0; i < 15; ++i) index -= value <= (kCode[i] + kCode[i + 1]) / 2;
  return index;
}

MOWE_INLINE uint32_t magnitude_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits & 0x7fffffff;
}

// bitsandbytes multiplies a whole block by the reciprocal of its scale, and divides the last, shorter one.
template <typename T>
MOWE_INLINE void quantize_block(const T* values, uint8_t* codes, float* absmax, int64_t count, bool whole) {
  uint32_t bits = 0;  // magnitudes are in the order of their bits, and NaN comes last: it is not lost
  for (int64_t i = 0; i < count; ++i) bits = std::max(bits, magnitude_bits(static_cast<float>(values[i])));
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  const float scale = std::max(largest, 1e-38f), reciprocal = 1.0f / scale;
  *absmax = whole ? largest : scale;
  uint8_t index[4096 + 1];
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(values[i]);
    index[i] = static_cast<uint8_t>(nearest(whole ? value * reciprocal : value / scale));
  }
  index[count] = 7;  // a zero after an odd number of values
  for (int64_t i = 0; i < (count + 1) / 2; ++i) codes[i] = static_cast<uint8_t>(index[2 * i] << 4 | index[2 * i + 1]);
}

template <typename T>
MOWE_INLINE void quantize_some(
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
MOWE_EVERY_CPU void quantize_blocks(
    const Half* v, uint8_t* codes, float* absmax, int64_t count, int64_t blocksize, int64_t first, int64_t last) {
  quantize_some(v, codes, absmax, count, blocksize, first, last);
}

template <typename T>
void quantize(const void* weight, uint8_t* codes, float* absmax, int64_t encoders, int64_t count, int64_t blocksize) {
  const int64_t blocks = (count + blocksize - 1) / blocksize, bytes = (count + 1) / 2;
  for (int64_t e = 0; e < encoders; ++e) {
    const T* values = static_cast<const T*>(weight) + e * count;
    torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kPiece / blocksize), [&](int64_t first, int64_t last) {
      quantize_blocks(values, codes + e * bytes, absmax + e * blocks, count, blocksize, first, last);
    });
  }
}

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& weight, int64_t blocksize) {
  const int64_t encoders = weight.size(0), count = weight.size(1) * weight.size(2);
  const std::vector<int64_t> bytes{encoders, (count + 1) / 2}, blocks{encoders, (count + blocksize - 1) / blocksize};
  Tensor codes = torch::stable::new_empty(weight, bytes, ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(weight, blocks, ScalarType::Float);
  auto run = [&](auto kernel) {
    kernel(
        weight.data_ptr(), static_cast<uint8_t*>(codes.data_ptr()), static_cast<float*>(absmax.data_ptr()), encoders,
        count, blocksize);
  };
  const auto type = weight.scalar_type();
  if (type == ScalarType::Float) run(quantize<float>);
  else if (type == ScalarType::BFloat16) run(quantize<BFloat16>);
  else run(quantize<Half>);
  return {codes, absmax};
}

Tensors nf4_dequantize_grouped(
    const Tensors& codes, const Tensors& absmax, const Tensors& nested_absmax, const Tensors& nested_offset,
    const Tensors& nested_code, const std::vector<int64_t>& sizes, const Tensor& group_offsets, ScalarType dtype) {
  Tensors out;
  for (size_t m = 0; m < codes.size(); ++m)
    out.push_back(Scratch::empty({codes[m].size(0), sizes[3 * m], sizes[3 * m + 1]}, dtype));
  const int64_t width = dtype == ScalarType::Float ? 4 : 2, encoders = group_offsets.size(0) - 1;
  const auto* offsets = static_cast<const int32_t*>(group_offsets.data_ptr());
  std::vector<Matrix> matrices;
  for (const Stack& s : stacks_of(codes, absmax, nested_absmax, nested_offset, nested_code, sizes, out)) {
    for (int64_t e = 0; e < encoders; ++e) {
      if (offsets[e] == offsets[e + 1]) continue;
      matrices.emplace_back(s, e);
      matrices.back().out = static_cast<char*>(s.out) + e * s.count * width;
    }
  }
  if (dtype == ScalarType::Float) dequantize_all<float>(matrices);
  else if (dtype == ScalarType::BFloat16) dequantize_all<BFloat16>(matrices);
  else dequantize_all<Half>(matrices);
  return out;
}

}  // namespace
}  // namespace mowe

STABLE_TORCH_LIBRARY_FRAGMENT(mowe, m) {
  m.def("nf4_quantize.csrc(Tensor weight, int blocksize) -> (Tensor, Tensor)");
  m.def(
      "nf4_dequantize_grouped.csrc(Tensor[] codes, Tensor[] absmax, Tensor[] nested_absmax, Tensor[] nested_offset,"
      " Tensor[] nested_code, int[] sizes, Tensor group_offsets, ScalarType dtype) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(mowe, CPU, m) {
  m.impl("nf4_quantize.csrc", TORCH_BOX(&mowe::nf4_quantize));
  m.impl("nf4_dequantize_grouped.csrc", TORCH_BOX(&mowe::nf4_dequantize_grouped));
}
