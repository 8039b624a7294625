// Exact pass of nearest_neighbors: from group minima to the nearest key and its distance.
//
// Every computed quantity carries a bound, so that no key that could be nearest is missed:
//   score     off by a few roundings of its terms (search_groups.h);
//   rows      a row in the sweep is off by e_q or e_k in norm, so a distance by e_q + e_k at most. In raw
//             form the bound of the fp32 rotation is 2 sqrt(d) 2^-24 |h| (see cpu.py).
// Steps for a query in a subspace, with U an upper bound of the least distance:
//   1 the group with the least score gives a first U, from fp64 distances of its keys;
//   2 every group that can hold a key within U is read again; normally none is;
//   3 rotated form: the fp64 distance decides. Raw form: keys within U of the rotated copy are measured
//     from the raw rows (search_waiting.h, search_raw.h).
// A bf16 sweep (Search::bf16) knows rows only to 2^-8. There a neighbor within kLoosened of the least distance
// will do, so step 2 asks for groups that hold a key within U (1 - kLoosened); where more than kCrowded are, the
// query is left to the driver, which decides whether to read them or to sweep that subspace again in fp32.
// Limit: fp32 product of Q x d x p per subspace in raw form (in fp64, as it was, it took 1.2 times as long as the
// sweep at d = 2304); memory latency of 8-16 rows otherwise.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "search_groups.h"
#include "search_query.h"
#include "search_sweep.h"
#include "search_waiting.h"

namespace ndm {
namespace {

constexpr int kCrowded = 24;

template <class V>
struct Rerank {
  const Search& a;
  int64_t s, column, p;
  int64_t first;          // first query of the block
  Query query[kRerankQueries];
  double* query_rows;     // scratch: [8][p]
  float* row;             // scratch: [d]
  WaitingKeys<V> waiting;  // its scratch: [4 d] and [8 p] doubles, and `row`

  // scratch: see search_scratch_floats()
  Rerank(const Search& search, int64_t subspace, int64_t first_query, float* scratch)
      : a(search), s(subspace), column(search.offsets[subspace]), p(search.offsets[subspace + 1] - column),
        first(first_query), query_rows(reinterpret_cast<double*>(scratch)),
        row(reinterpret_cast<float*>(query_rows + 16 * p + 4 * a.width)),
        waiting(query, first, {a, column, p, query_rows + 8 * p, query_rows + 8 * p + 4 * a.width, row}) {}

  bool raw() const { return a.exact_queries == nullptr; }

  const float* key_row(int64_t key) {
    if (a.rotated_keys.type == Type::float32)
      return reinterpret_cast<const float*>(row_address(a.rotated_keys, key, column));
    read_row(a.rotated_keys, key, column, p, row);
    return row;
  }

  void start_query(int i) {
    Query& q = query[i];
    if (raw()) {
      double* copy = query_rows + i * p;
      for (int64_t j = 0; j < p; ++j) copy[j] = a.rotated_queries[(first + i) * a.width + column + j];
      q.row = copy;
    } else {
      q.row = a.exact_queries + (first + i) * a.width + column;
    }
    double norm2 = 0;
    for (int64_t j = 0; j < p; ++j) norm2 += q.row[j] * q.row[j];
    q.norm = std::sqrt(norm2);
    const float packed = a.query_norm[s * a.padded + first + i];
    const float given = a.query_error ? a.query_error[first + i] : 0.0f;
    q.sweep_norm2 = a.cosine ? 2.0 : static_cast<double>(packed) * packed;
    q.error = a.cosine && raw() ? unit_error(given, packed, p) : given;
    q.sweep_error = a.cosine ? unit_error(given, packed, p)
                             : given + 2 * kUnit * packed + a.query_rounding[s * a.padded + first + i];
    if (a.cosine && q.norm > 0 && packed < 1e-15f) q.sweep_error = 2;
    q.upper = std::numeric_limits<double>::infinity();
    q.best = Best();
  }

  // Squared distance to a row of the rotated keys, fp64; for cosine 2 - 2 cos. `norm` is the key's.
  double squared_to(const Query& q, int64_t key, double* norm) {
    const float* k = key_row(key);
    Double4 s0 = {0, 0, 0, 0}, s1 = {0, 0, 0, 0};
    double rest0 = 0, rest1 = 0;
    int64_t j = 0;
    for (; j + 4 <= p; j += 4) {
      Double4 x, y = to_double(k + j);
      std::memcpy(&x, q.row + j, 32);
      if (a.cosine) {
        s0 += x * y;
        s1 += y * y;
      } else {
        s0 += (x - y) * (x - y);
      }
    }
    for (; j < p; ++j) {
      const double x = q.row[j], y = k[j];
      rest0 += a.cosine ? x * y : (x - y) * (x - y);
      rest1 += y * y;
    }
    const double total = sum(s0) + rest0;
    if (!a.cosine) return total;
    *norm = std::sqrt(sum(s1) + rest1);
    return chord(total, q.norm, *norm);
  }

  void consider(int i, int64_t key) {
    double norm = 0;
    const double squared = squared_to(query[i], key, &norm);
    judge(i, key, squared, norm);
  }

  void judge(int i, int64_t key, double squared, double norm) {
    Query& q = query[i];
    if (!raw()) {
      improve(q.best, squared, key);
      q.upper = std::sqrt(q.best.squared);
      return;
    }
    double error = q.error + a.key_error[key];
    if (a.cosine) error = q.error + unit_error(a.key_error[key], static_cast<float>(norm), p);
    const double distance = std::sqrt(squared);
    if (distance + error < q.upper) q.upper = distance + error;
    // Written so that NaN passes: it has to reach the result.
    if (distance - error > q.upper * (1 + 1e-14)) return;
    waiting.add({key, i, distance - error});
  }

  // Calls f(first, stop) for the runs of rows that make up a group (see Pack).
  template <class F>
  void each_run(int64_t tile, int group, F f) const {
    const int64_t size = pack_size(p, a.tile), step = size / kGroups;
    const int64_t end = (tile + 1) * a.tile < a.keys ? (tile + 1) * a.tile : a.keys;
    for (int64_t at = tile * a.tile; at < end; at += size) {
      const int64_t begin = at + group * step;
      f(begin, begin + step < end ? begin + step : end);
    }
  }

  void consider_group(int i, int64_t tile, int group) {
    each_run(tile, group, [&](int64_t begin, int64_t end) {
      // Distances first: a mispredicted branch between them would wait for each row's miss in turn.
      double squared[kMaxPack / kGroups], norm[kMaxPack / kGroups] = {};
      for (int64_t key = begin; key < end; ++key) squared[key - begin] = squared_to(query[i], key, norm + key - begin);
      for (int64_t key = begin; key < end; ++key) judge(i, key, squared[key - begin], norm[key - begin]);
    });
  }

  void prefetch_group(int64_t tile, int group) {
    each_run(tile, group, [&](int64_t begin, int64_t end) {
      for (int64_t key = begin; key < end; ++key) {
        const auto from = reinterpret_cast<uintptr_t>(row_address(a.rotated_keys, key, column));
        const uintptr_t to = from + static_cast<uintptr_t>(p * element_size(a.rotated_keys.type));
        for (uintptr_t line = from / 64 * 64; line < to; line += 64) prefetch(reinterpret_cast<const void*>(line));
      }
    });
  }

  void write(int i) {
    const Best& best = query[i].best;
    const int64_t at = s * a.queries + first + i;
    a.distance[at] = static_cast<float>(a.cosine ? best.squared / 2 : std::sqrt(best.squared));
    a.index[at] = best.index;
  }
};

// Reads the group with the least score; what else has to be read for the query.
template <class V>
Threshold first_group(Rerank<V>& work, int i, int64_t tile, int group, bool irregular, float alpha) {
  const Search& a = work.a;
  work.start_query(i);
  if (irregular || !(work.query[i].sweep_norm2 <= std::numeric_limits<float>::max())) {
    // No bound holds: look at every key.
    for (int64_t key = 0; key < a.keys; ++key) work.consider(i, key);
    return kNothing;
  }
  if (a.cosine && work.query[i].norm == 0 && work.query[i].error == 0) {  // cosine 0 with every key
    work.consider(i, 0);
    return kNothing;
  }
  work.consider_group(i, tile, group);
  return threshold(work.query[i], alpha, a.cosine, a.bf16);
}

template <class V>
void rerank(const Search& a, int64_t s, int64_t first, int64_t last, float* scratch) {
  uint8_t* crowded = a.crowded + (s - a.first) * a.queries + first;
  const int count = static_cast<int>(last - first);
  if (a.crowded_only && !std::any_of(crowded, crowded + count, [](uint8_t x) { return x; })) return;
  Rerank<V> work(a, s, first, scratch);
  const float* minima = a.minima + ((s - a.first) * a.tiles * a.padded + first) * kGroups;
  const float alpha = static_cast<float>(work.p + 5) * kUnit;
  int64_t tile[kRerankQueries];
  int group[kRerankQueries];
  least_groups<V>(minima, a.tiles, a.padded * kGroups, count, tile, group);
  Threshold limit[kRerankQueries];
  const AllGroups groups(a, s);
  // All at once: the misses of one query are too many to hide behind the work of another.
  for (int i = 0; i < count; ++i) work.prefetch_group(tile[i], group[i]);
  for (int i = 0; i < count; ++i)
    limit[i] = a.crowded_only && !crowded[i] ? kNothing : first_group(work, i, tile[i], group[i], groups.irregular, alpha);
  int64_t budget[kRerankQueries];
  TileFilter<V> filter;
  for (int i = 0; i < kRerankQueries; ++i) filter.set(i, i < count ? limit[i] : kNothing, groups);
  for (int i = 0; i < count; ++i)
    budget[i] = a.bf16 && !a.crowded_only ? kCrowded : std::numeric_limits<int64_t>::max();
  for (int64_t t = 0; t < a.tiles; ++t) {
    const float* norms = a.group_norm + (s * a.tiles + t) * kGroups;
    const float* errors = a.group_error + (s * a.tiles + t) * kGroups;
    const float* here = minima + t * a.padded * kGroups;
    for (int i = 0; i < count; ++i) {
      if (i % TileFilter<V>::each == 0 && !filter.passes(i, here)) {
        i += TileFilter<V>::each - 1;
        continue;
      }
      int bits = groups_within(limit[i], here + i * kGroups, norms, errors);
      if (t == tile[i]) bits &= ~(1 << group[i]);
      if ((budget[i] -= __builtin_popcount(static_cast<unsigned>(bits))) < 0) {
        crowded[i] = 1;
        limit[i] = kNothing;
        continue;
      }
      for (; bits; bits &= bits - 1) work.consider_group(i, t, __builtin_ctz(static_cast<unsigned>(bits)));
    }
  }
  work.waiting.measure_all();
  for (int i = 0; i < count; ++i)
    if (!a.crowded_only || crowded[i]) work.write(i);
}

}  // namespace
}  // namespace ndm
