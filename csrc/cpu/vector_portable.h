// Eight fp32 lanes in GCC/clang vector extensions: SSE2, NEON or plain code, as the target has it.
#pragma once

#include <cmath>
#include <cstring>

namespace ndm {
namespace {

struct Vec {
  static constexpr int lanes = 8;
  typedef float Half __attribute__((vector_size(16)));
  Half low, high;

  static Vec load(const float* p) {
    Vec v;
    std::memcpy(&v.low, p, 16);
    std::memcpy(&v.high, p + 4, 16);
    return v;
  }
  static Vec set1(float x) { return {Half{x, x, x, x}, Half{x, x, x, x}}; }
  void store(float* p) const {
    std::memcpy(p, &low, 16);
    std::memcpy(p + 4, &high, 16);
  }
  friend Vec operator-(Vec a, Vec b) { return {a.low - b.low, a.high - b.high}; }
  friend Vec operator+(Vec a, Vec b) { return {a.low + b.low, a.high + b.high}; }
  friend Vec operator*(Vec a, Vec b) { return {a.low * b.low, a.high * b.high}; }
  friend Vec operator/(Vec a, Vec b) { return {a.low / b.low, a.high / b.high}; }
  static Vec sqrt(Vec a) {
    for (int l = 0; l < 4; ++l) {
      a.low[l] = std::sqrt(a.low[l]);
      a.high[l] = std::sqrt(a.high[l]);
    }
    return a;
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {a.low * b.low + c.low, a.high * b.high + c.high}; }
  static Vec min(Vec a, Vec b) {
    return {a.low < b.low ? a.low : b.low, a.high < b.high ? a.high : b.high};
  }
  static Vec max(Vec a, Vec b) {
    return {a.low > b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
  }
  void store_groups(float* p) const { store(p); }

  // Bit l is set where a[l] <= b[l].
  static int bits_less_equal(Vec a, Vec b) {
    int bits = 0;
    for (int l = 0; l < 4; ++l) bits |= (a.low[l] <= b.low[l]) << l | (a.high[l] <= b.high[l]) << (l + 4);
    return bits;
  }
  static int bits_less(Vec a, Vec b) {
    int bits = 0;
    for (int l = 0; l < 4; ++l) bits |= (a.low[l] < b.low[l]) << l | (a.high[l] < b.high[l]) << (l + 4);
    return bits;
  }
  // Writes the lanes whose bits are set one after the other; returns how many there are.
  static int pick(Vec a, int bits, float* out) {
    float all[lanes];
    a.store(all);
    int count = 0;
    for (; bits; bits &= bits - 1) out[count++] = all[__builtin_ctz(static_cast<unsigned>(bits))];
    return count;
  }
  // Keeps the lesser value and, beside it, where it was.
  static void track_min(Vec& least, Vec& at, Vec now, Vec here) {
    at.low = now.low < least.low ? here.low : at.low;
    at.high = now.high < least.high ? here.high : at.high;
    least.low = now.low < least.low ? now.low : least.low;
    least.high = now.high < least.high ? now.high : least.high;
  }
};

// Integer lanes: how often a < b held, per lane.
struct Count8 {
  typedef int Half __attribute__((vector_size(16)));
  Half low = {}, high = {};
  void add_less(Vec a, Vec b) {
    low -= a.low < b.low;
    high -= a.high < b.high;
  }
  void add_to(int* count) const {
    for (int l = 0; l < 4; ++l) {
      count[l] += low[l];
      count[l + 4] += high[l];
    }
  }
};

inline Count8 no_counts(Vec) { return {}; }

typedef double Double4 __attribute__((vector_size(32)));

inline Double4 to_double(const float* p) { return Double4{p[0], p[1], p[2], p[3]}; }

inline void transpose_8x8(const float* from, long from_stride, float* to, long to_stride) {
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}

using Vec8 = Vec;

}  // namespace
}  // namespace ndm
