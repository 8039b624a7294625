// Sixteen fp32 lanes in AVX-512F intrinsics; the eight-lane parts come from vector_avx2.h.
#pragma once

#include "vector_avx2.h"

namespace ndm {
namespace {

struct Vec16 {
  static constexpr int lanes = 16;
  __m512 v;

  static Vec16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec16 set1(float x) { return {_mm512_set1_ps(x)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  friend Vec16 operator-(Vec16 a, Vec16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec16 operator+(Vec16 a, Vec16 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec16 operator*(Vec16 a, Vec16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec16 operator/(Vec16 a, Vec16 b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Vec16 sqrt(Vec16 a) { return {_mm512_sqrt_ps(a.v)}; }
  static Vec16 fma(Vec16 a, Vec16 b, Vec16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec16 min(Vec16 a, Vec16 b) { return {_mm512_min_ps(a.v, b.v)}; }
  static Vec16 max(Vec16 a, Vec16 b) { return {_mm512_max_ps(a.v, b.v)}; }
  // Lanes l and l + 8 are both group l: the groups are the same on every ISA.
  void store_groups(float* p) const {
    __m256 low = _mm512_castps512_ps256(v);
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    _mm256_storeu_ps(p, _mm256_min_ps(low, high));
  }

  // Keeps the lesser value and, beside it, where it was.
  static void track_min(Vec16& least, Vec16& at, Vec16 now, Vec16 here) {
    const __mmask16 less = _mm512_cmp_ps_mask(now.v, least.v, _CMP_LT_OQ);
    least.v = _mm512_mask_mov_ps(least.v, less, now.v);
    at.v = _mm512_mask_mov_ps(at.v, less, here.v);
  }
  // Bit l is set where a[l] < b[l].
  static int bits_less(Vec16 a, Vec16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
  // Writes the lanes whose bits are set one after the other, and as many lanes in all; returns how many are set.
  static int pick(Vec16 a, int bits, float* out) {
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), a.v));
    return __builtin_popcount(static_cast<unsigned>(bits));
  }
};

struct Count16 {
  __m512i v = _mm512_setzero_si512();
  void add_less(Vec16 a, Vec16 b) {
    v = _mm512_mask_add_epi32(v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), v, _mm512_set1_epi32(1));
  }
  void add_to(int* count) const { _mm512_storeu_si512(count, _mm512_add_epi32(_mm512_loadu_si512(count), v)); }
};

inline Count16 no_counts(Vec16) { return {}; }

}  // namespace
}  // namespace ndm
