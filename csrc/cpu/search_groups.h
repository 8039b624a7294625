// Which groups of keys the exact pass of nearest_neighbors has to read, from the minima of the sweep.
//
// A computed score is off by at most alpha (|q||k| + |k|^2), with alpha = (p + 5) 2^-24 (any order of summation;
// Higham 2002, section 3.1), and a row by e_q or e_k; so no group that can hold a key within U is left out.
#pragma once

#include <cmath>
#include <limits>

#include "search_query.h"
#include "search_sweep.h"

namespace ndm {
namespace {

constexpr double kLoosened = 8e-3;  // see search_rerank.h

// Tile and group of the least score of each query of the block.
inline void least_groups(const float* minima, int64_t tiles, int64_t padded, int count, int64_t* tile, int* group) {
  constexpr int at_once = 4;  // 8 registers of state; minima are read in whole lines
  for (int begin = 0; begin < count; begin += at_once) {
    const int end = begin + at_once < count ? begin + at_once : count;
    Vec8 least[at_once], at[at_once];
    for (int i = 0; i < at_once; ++i) {
      least[i] = Vec8::set1(std::numeric_limits<float>::infinity());
      at[i] = Vec8::set1(0);
    }
    const float* now = minima + begin * kGroups;
    for (int64_t t = 0; t < tiles; ++t, now += padded * kGroups) {
      const Vec8 here = Vec8::set1(static_cast<float>(t));
      if (end - begin == at_once) {
        for (int i = 0; i < at_once; ++i) Vec8::track_min(least[i], at[i], Vec8::load(now + i * kGroups), here);
      } else {
        for (int i = 0; i < end - begin; ++i) Vec8::track_min(least[i], at[i], Vec8::load(now + i * kGroups), here);
      }
    }
    for (int i = begin; i < end; ++i) {
      float values[kGroups], tiles_of[kGroups];
      least[i - begin].store(values);
      at[i - begin].store(tiles_of);
      group[i] = 0;
      for (int g = 1; g < kGroups; ++g)
        if (values[g] < values[group[i]]) group[i] = g;
      tile[i] = static_cast<int64_t>(tiles_of[group[i]]);
    }
  }
}

struct Threshold {
  float alpha_norm;  // alpha |q|
  float alpha;
  float reach;       // U + e_q
  float score;       // largest score of a key within reach, without e_k
};

inline Threshold threshold(const Query& q, float alpha, bool cosine, bool loosened) {
  const double norm = cosine ? 1.0 : std::sqrt(q.sweep_norm2);
  const double reach = q.upper * (loosened ? 1 - kLoosened : 1.0) + q.sweep_error;
  const double score = (reach * reach - q.sweep_norm2) / 2;
  // The test itself is done in fp32: a few units of what enters it, and what underflows.
  const double slack = 4 * kUnit * (reach * reach + q.sweep_norm2) + 1e-35;
  return {static_cast<float>(alpha * norm * (1 + 1e-6)), alpha, static_cast<float>(reach * (1 + 1e-6)),
          static_cast<float>(score + slack)};
}

// Bit g is set where group g may hold a key within reach: score - its error <= ((U + e_q + e_k)^2 - |q|^2) / 2.
inline int groups_within(const Threshold& t, const float* minima, const float* norms, const float* errors) {
  const Vec8 n = Vec8::load(norms), e = Vec8::load(errors), zero = Vec8::set1(0);
  const Vec8 score_error = Vec8::fma(Vec8::set1(t.alpha), n, Vec8::set1(t.alpha_norm));
  const Vec8 row_error = Vec8::fma(e, Vec8::set1(1), Vec8::set1(t.reach));
  const Vec8 error = Vec8::fma(n, score_error, Vec8::fma(e, row_error, zero));
  return Vec8::bits_less_equal(Vec8::load(minima) - error, Vec8::set1(t.score));
}

inline bool any_irregular(const Search& a, int64_t s) {
  uint8_t any = 0;
  for (int64_t t = 0; t < a.tiles; ++t) any |= a.irregular[s * a.tiles + t];
  return any;
}

// No comparison with NaN holds, not even that of a score of minus infinity.
constexpr Threshold kNothing = {0, 0, 0, std::numeric_limits<float>::quiet_NaN()};

}  // namespace
}  // namespace ndm
