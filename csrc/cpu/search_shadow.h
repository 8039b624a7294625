// Proposal pass of nearest_neighbors over shadows: most keys are ruled out by a part of their columns.
//
// Formula   The shadow of a row x of p columns is (x_1 .. x_h, |(x_h+1 .. x_p)|). By the triangle inequality shadows are
//           no farther apart than rows, so with |k| the same the score |k|^2/2 - q.k of shadows is never above that
//           of the rows. Where it is not below the best score that the query has met, the rest of the columns can
//           not matter; else they are multiplied too. So a minimum is the least score of its group, or a lower
//           bound of it that is in no query's reach: search_rerank.h needs no more, and decides as ever.
// Layout    As in search_sweep.h, with one row more in a panel of keys: the lengths of the rest. Queries carry the
//           lengths for every choice of h.
// Mapping   A query block's partial sums stay in registers; a query that may gain goes on alone, with half of the
//           products a cycle.
// Choice    h = p (i + 1) / 8, one i for a tile. Its cost is measured on each tile, in columns; the next tile takes
//           the cheapest, and now and then a neighbor of it. i = 7 takes all p columns: no shadow.
// Rounding  Lengths are rounded up; what else is rounded is less than what alpha in search_groups.h allows p columns.
// Limit     (h + 1) / p of what search_sweep.h takes, and the rest's share of it.
#pragma once

#include <cmath>
#include <limits>

#include "search_sweep.h"

namespace ndm {
namespace {

// Columns in which a comparison and its branch, and a column of a query that goes on alone, are measured.
constexpr int64_t kFirstTiles = 2;  // which no cost is taken from: no query has met a near key
constexpr float kCheckCost = 3.0f, kAloneCost = 2.0f, kMissCost = 20.0f;

struct Shadow : Fp32 {
  static constexpr int64_t extra_words = kShadows;
  static int64_t key_words(int64_t p) { return p + 1; }
  static int64_t words(int64_t p) { return p + kShadows; }
  static int64_t columns_of(int choice, int64_t p) {
    const int64_t h = p * (choice + 1) / (kShadows + 1);
    return h > 0 ? h : 1;
  }
};

// A length that no rounding has made shorter.
inline float length_of(double squared, int64_t p) {
  return static_cast<float>(std::sqrt(squared) * (1 + static_cast<double>(p + 8) * kUnit));
}

template <int Block>
void pack_shadow_queries(const Search& a, int64_t s) {
  pack_queries<Block, Shadow>(a, s);
  const int64_t p = a.offsets[s + 1] - a.offsets[s], words = Shadow::words(p);
  for (int64_t q = 0; q < a.padded; ++q) {
    float* out = packed_queries_of<Shadow>(a, s) + (q / Block) * Block * words + q % Block;
    for (int choice = 0; choice < kShadows; ++choice) {
      double squared = 0;
      for (int64_t j = Shadow::columns_of(choice, p); j < p; ++j) squared += static_cast<double>(out[j * Block]) * out[j * Block];
      out[(p + choice) * Block] = -length_of(squared, p);
    }
  }
}

// Row p of the panels: lengths of the rows from column h on.
template <class V>
void pack_lengths(float* packed, int count, int64_t p, int64_t h) {
  const V up = V::set1(1 + static_cast<float>(p + 8) * kUnit);
  for (int done = 0; done < count; done += 2 * V::lanes) {
    float* panel = packed + done * (p + 1);
    V sum0 = V::set1(0), sum1 = V::set1(0);
    for (int64_t j = h; j < p; ++j) {
      const V x0 = V::load(panel + j * 2 * V::lanes), x1 = V::load(panel + j * 2 * V::lanes + V::lanes);
      sum0 = V::fma(x0, x0, sum0);
      sum1 = V::fma(x1, x1, sum1);
    }
    const V zero = V::set1(0);
    V::fma(V::sqrt(sum0), up, zero).store(panel + p * 2 * V::lanes);
    V::fma(V::sqrt(sum1), up, zero).store(panel + p * 2 * V::lanes + V::lanes);
  }
}

// Block queries against all panels of a pack; minima [Block][8]; `nearest` [Block] is the best score of each so far.
// Returns how many of the (query, panel) took all columns.
template <class V, int Block>
int64_t sweep_shadows(const float* packed, const float* half, int count, int64_t p, int64_t h, const float* queries,
                      const float* rest, float* minima, bool first, float* nearest) {
  constexpr int panel = 2 * V::lanes;
  int64_t alone = 0;
  V least[Block];
  float best[Block];
  for (int m = 0; m < Block; ++m) {
    least[m] = V::set1(std::numeric_limits<float>::infinity());
    __atomic_load(nearest + m, best + m, __ATOMIC_RELAXED);
  }
  for (int done = 0; done < count; done += panel) {
    const float* keys = packed + done * (p + 1);
    V sum0[Block], sum1[Block];
    const V half0 = V::load(half + done), half1 = V::load(half + done + V::lanes);
    for (int m = 0; m < Block; ++m) {
      sum0[m] = half0;
      sum1[m] = half1;
    }
    const float* query = queries;
    const float* key = keys;
    for (int64_t j = 0; j < h; ++j) {
      const V key0 = V::load(key), key1 = V::load(key + V::lanes);
      for (int m = 0; m < Block; ++m) {
        const V x = V::set1(query[m]);
        sum0[m] = V::fma(x, key0, sum0[m]);
        sum1[m] = V::fma(x, key1, sum1[m]);
      }
      key += panel;
      query += Block;
    }
    const V length0 = V::load(keys + p * panel), length1 = V::load(keys + p * panel + V::lanes);
    V bound[Block], gain = V::set1(-1);
    for (int m = 0; m < Block; ++m) {
      const V x = V::set1(rest[m]);
      bound[m] = V::min(V::fma(x, length0, sum0[m]), V::fma(x, length1, sum1[m]));
      gain = V::max(gain, V::set1(best[m]) - bound[m]);
    }
    if (V::bits_less(V::set1(0), gain)) {
      for (int m = 0; m < Block; ++m) {
        if (!V::bits_less(bound[m], V::set1(best[m]))) continue;
        ++alone;
        V all0 = sum0[m], all1 = sum1[m];
        for (int64_t j = h; j < p; ++j) {
          const V y = V::set1(queries[j * Block + m]);
          all0 = V::fma(y, V::load(keys + j * panel), all0);
          all1 = V::fma(y, V::load(keys + j * panel + V::lanes), all1);
        }
        bound[m] = V::min(all0, all1);
        if (V::bits_less(bound[m], V::set1(best[m]))) {
          alignas(64) float lanes[V::lanes];
          bound[m].store(lanes);
          for (int l = 0; l < V::lanes; ++l) best[m] = lanes[l] < best[m] ? lanes[l] : best[m];
        }
      }
    }
    for (int m = 0; m < Block; ++m) least[m] = V::min(least[m], bound[m]);
  }
  for (int m = 0; m < Block; ++m) {
    // Another thread may have written a lower one: that costs a few products, no more.
    float now;
    __atomic_load(nearest + m, &now, __ATOMIC_RELAXED);
    if (best[m] < now) __atomic_store(nearest + m, best + m, __ATOMIC_RELAXED);
    alignas(64) float groups[kGroups];
    least[m].store_groups(groups);
    Vec8 value = Vec8::load(groups);
    if (!first) value = Vec8::min(value, Vec8::load(minima + m * kGroups));
    value.store(minima + m * kGroups);
  }
  return alone;
}

// The choice for a tile, from the costs measured so far: [kShadows], 0 where there is none.
inline int choose_shadow(const float* costs, int64_t p, int64_t tile) {
  if (tile < kFirstTiles) return kShadows - 1;
  int cheapest = kShadows;
  float least = static_cast<float>(p);
  for (int i = 0; i < kShadows; ++i) {
    float cost;
    __atomic_load(costs + i, &cost, __ATOMIC_RELAXED);
    if (cost == 0 && i == kFirstShadow) return kFirstShadow;
    if (cost > 0 && cost < least) {
      least = cost;
      cheapest = i;
    }
  }
  const int64_t often = cheapest == kShadows ? 32 : 4;
  if (tile % often == 1 && cheapest > 0) return cheapest - 1;
  if (tile % often == 3 && cheapest < kShadows) return cheapest + 1;
  return cheapest;
}

inline void note_cost(float* costs, int choice, float cost) {
  float before;
  __atomic_load(costs + choice, &before, __ATOMIC_RELAXED);
  cost = before > 0 ? 0.5f * (before + cost) : cost;
  __atomic_store(costs + choice, &cost, __ATOMIC_RELAXED);
}

template <class V, int Block>
void sweep_shadow_tile(const Search& a, int64_t tile, float* scratch) {
  float* half = scratch;
  float* buffer = half + kMaxPack;
  float* packed = buffer + (8 * a.width + 15) / 16 * 16;
  const int64_t start = tile * a.tile;
  const int64_t stop = start + a.tile < a.keys ? start + a.tile : a.keys;
  for (int64_t s = a.first; s < a.last; ++s) {
    const int64_t p = a.offsets[s + 1] - a.offsets[s], words = Shadow::words(p);
    const int size = pack_size(p, a.tile);
    float* costs = a.shadow_costs + s * kShadows;
    const int choice = choose_shadow(costs, p, tile);
    const int64_t h = choice == kShadows ? p : Shadow::columns_of(choice, p);
    GroupStats stats;
    float* minima = a.minima + ((s - a.first) * a.tiles + tile) * a.padded * kGroups;
    const float* queries = packed_queries_of<Shadow>(a, s);
    float* nearest = a.nearest_score + s * a.padded;
    int64_t alone = 0, seen = 0;
    for (int64_t at = start; at < stop; at += size) {
      pack_keys<V, Shadow>(a, Pack{at, size, a.offsets[s], p}, packed, half, buffer, nullptr, stats);
      if (choice < kShadows) pack_lengths<V>(packed, size, p, h);
      const bool more = at + size < stop, turn = s + 1 < a.last;
      NextRows next(a, more ? at + size : start, more || !turn ? size : pack_size(a.offsets[s + 2] - a.offsets[s + 1], a.tile),
                    more || !turn ? s : s + 1);
      const int64_t rows = more || turn ? next.left * Block / a.padded + 1 : 0;
      for (int64_t q = 0; q < a.padded; q += Block) {
        next.prefetch(rows);
        const float* block = queries + q * words;
        if (choice == kShadows) {
          sweep_block<V, Block, Fp32>(packed, half, size, p, block, minima + q * kGroups, at == start, p + 1);
        } else {
          alone += sweep_shadows<V, Block>(packed, half, size, p, h, block, block + (p + choice) * Block,
                                           minima + q * kGroups, at == start, nearest + q);
          seen += Block * (size / (2 * V::lanes));
        }
      }
    }
    if (seen && tile >= kFirstTiles) {
      const float share = static_cast<float>(alone) / static_cast<float>(seen);
      note_cost(costs, choice, static_cast<float>(h) + 1 + kCheckCost + share * (kAloneCost * static_cast<float>(p - h) + kMissCost));
    }
    write_stats(a, s, tile, stats);
  }
}

}  // namespace
}  // namespace ndm
