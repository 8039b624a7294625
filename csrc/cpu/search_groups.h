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

// Tile and group of the least score of each query of the block; `stride` from one tile to the next.
template <class V>
void least_groups(const float* minima, int64_t tiles, int64_t stride, int count, int64_t* tile, int* group) {
  constexpr int vectors = 4, each = V::lanes / kGroups;  // 8 registers of state; minima are read in whole lines
  for (int begin = 0; begin < count; begin += vectors * each) {
    V least[vectors], at[vectors];
    for (int v = 0; v < vectors; ++v) {
      least[v] = V::set1(std::numeric_limits<float>::infinity());
      at[v] = V::set1(0);
    }
    const int here = (count - begin + each - 1) / each, used = here < vectors ? here : vectors;
    const float* now = minima + begin * kGroups;
    for (int64_t t = 0; t < tiles; ++t, now += stride) {
      const V number = V::set1(static_cast<float>(t));
      if (used == vectors) {
        for (int v = 0; v < vectors; ++v) V::track_min(least[v], at[v], V::load(now + v * V::lanes), number);
      } else {
        for (int v = 0; v < used; ++v) V::track_min(least[v], at[v], V::load(now + v * V::lanes), number);
      }
    }
    float values[vectors * V::lanes], tiles_of[vectors * V::lanes];
    for (int v = 0; v < used; ++v) {
      least[v].store(values + v * V::lanes);
      at[v].store(tiles_of + v * V::lanes);
    }
    for (int i = 0; i < vectors * each && begin + i < count; ++i) {
      int best = 0;
      for (int g = 1; g < kGroups; ++g)
        if (values[i * kGroups + g] < values[i * kGroups + best]) best = g;
      group[begin + i] = best;
      tile[begin + i] = static_cast<int64_t>(tiles_of[i * kGroups + best]);
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

// By how much the scores of groups, and the rows of their keys, may be off for this query.
inline Vec8 group_errors(const Threshold& t, const float* norms, const float* errors) {
  const Vec8 n = Vec8::load(norms), e = Vec8::load(errors), zero = Vec8::set1(0);
  const Vec8 score_error = Vec8::fma(Vec8::set1(t.alpha), n, Vec8::set1(t.alpha_norm));
  const Vec8 row_error = Vec8::fma(e, Vec8::set1(1), Vec8::set1(t.reach));
  return Vec8::fma(n, score_error, Vec8::fma(e, row_error, zero));
}

// Bit g is set where group g may hold a key within reach: score - its error <= ((U + e_q + e_k)^2 - |q|^2) / 2.
inline int groups_within(const Threshold& t, const float* minima, const float* norms, const float* errors) {
  const Vec8 error = group_errors(t, norms, errors);
  return Vec8::bits_less_equal(Vec8::load(minima) - error, Vec8::set1(t.score));
}

// What holds for the keys of all groups of a subspace.
struct AllGroups {
  bool irregular = false;
  float norms[kGroups], errors[kGroups];  // the largest of each group number

  AllGroups(const Search& a, int64_t s) {
    Vec8 norm = Vec8::set1(0), error = Vec8::set1(0);
    for (int64_t t = s * a.tiles; t < (s + 1) * a.tiles; ++t) {
      irregular |= a.irregular[t] != 0;
      norm = Vec8::max(norm, Vec8::load(a.group_norm + t * kGroups));
      error = Vec8::max(error, Vec8::load(a.group_error + t * kGroups));
    }
    norm.store(norms);
    error.store(errors);
  }
};

// Rules out most tiles for the queries of a block by one comparison, with the largest error that any group of the subspace
// has: what groups_within() lets pass passes here, as no step of the arithmetic turns a larger error into a smaller one.
template <class V>
struct TileFilter {
  static constexpr int each = V::lanes / kGroups;  // queries in a vector
  static constexpr int all = (1 << V::lanes) - 1;
  alignas(64) float error[kRerankQueries * kGroups], score[kRerankQueries * kGroups];

  void set(int i, const Threshold& t, const AllGroups& groups) {
    group_errors(t, groups.norms, groups.errors).store(error + i * kGroups);
    // NaN asks for nothing, here as in groups_within().
    Vec8::set1(t.score == t.score ? t.score : -std::numeric_limits<float>::infinity()).store(score + i * kGroups);
  }
  // Whether a group of a tile may be within reach of query i or one of those in the same vector.
  bool passes(int i, const float* minima) const {
    const V least = V::load(minima + i * kGroups) - V::load(error + i * kGroups);
    return V::bits_less(V::load(score + i * kGroups), least) != all;
  }
};

// No comparison with NaN holds, not even that of a score of minus infinity.
constexpr Threshold kNothing = {0, 0, 0, std::numeric_limits<float>::quiet_NaN()};

}  // namespace
}  // namespace ndm
