// Eight fp32 lanes in AVX2 + FMA intrinsics.
#pragma once

#include <immintrin.h>

namespace ndm {
namespace {

struct Vec8 {
  static constexpr int lanes = 8;
  __m256 v;

  static Vec8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec8 set1(float x) { return {_mm256_set1_ps(x)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  friend Vec8 operator-(Vec8 a, Vec8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec8 operator+(Vec8 a, Vec8 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec8 operator*(Vec8 a, Vec8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec8 operator/(Vec8 a, Vec8 b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Vec8 sqrt(Vec8 a) { return {_mm256_sqrt_ps(a.v)}; }
  static Vec8 fma(Vec8 a, Vec8 b, Vec8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec8 min(Vec8 a, Vec8 b) { return {_mm256_min_ps(a.v, b.v)}; }
  static Vec8 max(Vec8 a, Vec8 b) { return {_mm256_max_ps(a.v, b.v)}; }
  void store_groups(float* p) const { store(p); }

  // Bit l is set where a[l] <= b[l].
  static int bits_less_equal(Vec8 a, Vec8 b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)); }
  static int bits_less(Vec8 a, Vec8 b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)); }
  // Writes the lanes whose bits are set one after the other; returns how many there are.
  static int pick(Vec8 a, int bits, float* out) {
    float all[lanes];
    a.store(all);
    int count = 0;
    for (; bits; bits &= bits - 1) out[count++] = all[__builtin_ctz(static_cast<unsigned>(bits))];
    return count;
  }
  // Keeps the lesser value and, beside it, where it was.
  static void track_min(Vec8& least, Vec8& at, Vec8 now, Vec8 here) {
    const __m256 less = _mm256_cmp_ps(now.v, least.v, _CMP_LT_OQ);
    least.v = _mm256_blendv_ps(least.v, now.v, less);
    at.v = _mm256_blendv_ps(at.v, here.v, less);
  }
};

// Integer lanes: how often a < b held, per lane.
struct Count8 {
  __m256i v = _mm256_setzero_si256();
  void add_less(Vec8 a, Vec8 b) { v = _mm256_sub_epi32(v, _mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))); }
  void add_to(int* count) const {
    __m256i* at = reinterpret_cast<__m256i*>(count);
    _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), v));
  }
};

inline Count8 no_counts(Vec8) { return {}; }

typedef double Double4 __attribute__((vector_size(32)));

inline Double4 to_double(const float* p) { return (Double4)_mm256_cvtps_pd(_mm_loadu_ps(p)); }

inline void transpose_8x8(const float* from, long from_stride, float* to, long to_stride) {
  __m256 row[8], t[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    row[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    row[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    row[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    row[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(row[i], row[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(row[i], row[i + 4], 0x31));
  }
}

}  // namespace
}  // namespace ndm
