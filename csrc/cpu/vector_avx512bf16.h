// Rows in bf16 for the proposal pass: vdpbf16ps multiplies and adds two columns per lane.
#pragma once

#include <cmath>
#include <cstring>

#include "rows.h"
#include "vector_avx512.h"

namespace ndm {
namespace {

// bf16 nearest to x in the upper half of a word.
inline uint32_t bfloat16_bits(float x) { return static_cast<uint32_t>(to_bfloat16(x)) << 16; }

// Two columns per lane, the even one in the low half.
struct Bf16Pairs {
  static constexpr int columns = 2;
  static constexpr int64_t extra_words = 0;

  static Vec16 multiply_add(Vec16 query, Vec16 key, Vec16 sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)query.v, (__m512bh)key.v)};
  }
  static int64_t words(int64_t p) { return (p + 1) / 2; }
  static int64_t key_words(int64_t p) { return words(p); }

  static float encode_query(const float* x) {
    const uint32_t bits = bfloat16_bits(x[0]) >> 16 | bfloat16_bits(x[1]);
    float word;
    std::memcpy(&word, &bits, 4);
    return word;
  }
  static float decode_query(float word, int column) {
    uint32_t bits;
    std::memcpy(&bits, &word, 4);
    bits = column ? bits & 0xFFFF0000u : bits << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }

  // [p][Panel] fp32 -> [words][Panel] pairs; squared norms of the rounded lanes, and norms of what was lost.
  template <class V, int Panel>
  static void encode(float* panel, int64_t p, float* packed, float* squared, float* error) {
    for (int lane = 0; lane < Panel; lane += V::lanes) {
      __m512 norm = _mm512_setzero_ps(), lost = _mm512_setzero_ps();
      for (int64_t j = 0; j < p; j += 2) {
        const __m512 low = _mm512_loadu_ps(panel + j * Panel + lane);
        const __m512 high = j + 1 < p ? _mm512_loadu_ps(panel + (j + 1) * Panel + lane) : _mm512_setzero_ps();
        const __m512i low_bits = widened(low), high_bits = widened(high);
        add_squares(low, low_bits, norm, lost);
        add_squares(high, high_bits, norm, lost);
        _mm512_storeu_si512(packed + j / 2 * Panel + lane, _mm512_or_si512(_mm512_srli_epi32(low_bits, 16), high_bits));
      }
      _mm512_storeu_ps(squared + lane, norm);
      // Sums of p squares are right to p 2^-24; the square root halves that.
      _mm512_storeu_ps(error + lane, _mm512_mul_ps(_mm512_sqrt_ps(lost), _mm512_set1_ps(1 + p * 6e-8f)));
    }
  }

 private:
  // The lanes rounded to bf16, as fp32 bits.
  static __m512i widened(__m512 x) {
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16);
  }
  static void add_squares(__m512 x, __m512i rounded, __m512& norm, __m512& lost) {
    const __m512 kept = _mm512_castsi512_ps(rounded), gone = _mm512_sub_ps(x, kept);
    norm = _mm512_fmadd_ps(kept, kept, norm);
    lost = _mm512_fmadd_ps(gone, gone, lost);
  }
};

}  // namespace
}  // namespace ndm
