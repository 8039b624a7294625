// Reading rows of fp32, fp16 or bf16. Included by every kernel file, so that each ISA gets its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace ndm {
namespace {

// To the second-level cache and on. GCC 12 takes a function that only prefetches for one without effect and
// drops the calls; the empty asm keeps them.
inline void prefetch(const void* address) {
  __builtin_prefetch(address, 0, 2);
  __asm__ volatile("");
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float from_bfloat16(uint16_t half) { return from_bits(static_cast<uint32_t>(half) << 16); }

inline float from_float16(uint16_t half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  uint32_t rest = half & 0x7FFFu;
  if (rest >= 0x7C00u) return from_bits(sign | 0x7F800000u | ((rest & 0x3FFu) << 13));  // Inf, NaN
  // Shift into fp32 position and repair the exponent by a product: exact, subnormals included.
  return from_bits(sign | (rest << 13)) * 0x1p112f;
}

// Nearest, ties to even.
inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}

inline int64_t element_size(Type type) { return type == Type::float32 ? 4 : 2; }

inline const char* row_address(const Rows& rows, int64_t row, int64_t column) {
  return static_cast<const char*>(rows.data) + (row * rows.stride + column) * element_size(rows.type);
}

// `count` values of a row from `column` on, as fp32.
inline void read_row(const Rows& rows, int64_t row, int64_t column, int64_t count, float* out) {
  const char* from = row_address(rows, row, column);
  if (rows.type == Type::float32) {
    std::memcpy(out, from, static_cast<size_t>(count) * 4);
    return;
  }
  int64_t i = 0;
#if defined(__F16C__)
  if (rows.type == Type::float16)
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i))));
#endif
  for (; i < count; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, 2);
    out[i] = rows.type == Type::float16 ? from_float16(half) : from_bfloat16(half);
  }
}

}  // namespace
}  // namespace ndm
