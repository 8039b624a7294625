// Tile pass of ksg_radius and ksg_counts, apart or in one.
//
// Formula   D_s(q, k)^2 = sum_j (q_j - k_j)^2 / variance_s over the columns of s;
//           radius^2 = min_k max(D_a^2, D_b^2); count = #{k : D^2 < limit}.
// Layout    64 keys of all subspaces transposed to panels [p][2 or 4 vectors]; D^2 of a query block as
//           [S][query][64], and as many bits.
// Mapping   per query block and tile the S rows of D^2 once (direct differences: nothing cancels, and the
//           subtraction runs beside the FMA), and one bit per key: is it within the subspace's reach, the
//           largest radius so far (or limit) of its pairs? Few are: a radius spans about sqrt(K) of K keys.
//           Radius: a pair looks at a tile only where both rows have a bit in common. Counts: only keys with
//           their bit set are compared with the limits of the subspace's pairs, a vector of pairs at once. In
//           one pass, keys within reach are noted while the radius shrinks, and counted at the end.
//           All passes run the same distances, so `<` is strict where it has to be. Squares are compared.
// Limit     the distances: a subtraction and an FMA per (query, key, column), in each pass.
// Versions  1 every pair met every key: 2 min/max, or 2 compares and 2 additions, per (pair, query, key);
//           2 bits, one pass instead of two, and four vectors of keys a query where there are registers.
#pragma once

#include <algorithm>
#include <limits>

#include "types.h"

namespace ndm {
namespace {

constexpr int kKsgTile = 64;    // one bit each
constexpr int kReachEvery = 8;  // tiles

// One tile, every subspace transposed to panels. Rows past the end are 0. Eight rows at a time from end to end:
// the hardware fetches ahead what is read in order.
template <int Panel>
void ksg_pack_keys(const Ksg& a, int64_t start, float* packed, float* buffer) {
  for (int at = 0; at < kKsgTile; at += 8) {
    const float* rows = a.rotated_keys + (start + at) * a.width;
    if (start + at + 8 > a.keys) {
      for (int i = 0; i < 8; ++i)
        for (int64_t j = 0; j < a.width; ++j)
          buffer[i * a.width + j] = start + at + i < a.keys ? rows[i * a.width + j] : 0.0f;
      rows = buffer;
    }
    for (int64_t s = 0; s < a.subspaces; ++s) {
      const int64_t p = a.offsets[s + 1] - a.offsets[s];
      const float* from = rows + a.offsets[s];
      float* panel = packed + a.offsets[s] * kKsgTile + (at / Panel) * Panel * p + at % Panel;
      int64_t j = 0;
      for (; j + 8 <= p; j += 8) transpose_8x8(from + j, a.width, panel + j * Panel, Panel);
      for (; j < p; ++j)
        for (int i = 0; i < 8; ++i) panel[j * Panel + i] = from[i * a.width + j];
    }
  }
}

// D^2 = factor |q - k|^2 of Block queries to the keys of a packed subspace: out[m][key], scaled at the end, because
// scaled rows would be rounded before they cancel. Bit `key` of near[m * near_stride] is set where D^2 < reach[m].
template <class V, int Block, int Vectors>
void ksg_distances(const float* packed, int64_t p, const float* queries, float factor, const float* reach, float* out,
                   uint64_t* near, int64_t near_stride) {
  constexpr int panel = Vectors * V::lanes;
  const V scale = V::set1(factor), zero = V::set1(0);
  for (int m = 0; m < Block; ++m) near[m * near_stride] = 0;
  for (int at = 0; at < kKsgTile; at += panel) {
    const float* key = packed + at * p;
    const float* query = queries;
    V sum[Block][Vectors];
    for (int m = 0; m < Block; ++m)
      for (int v = 0; v < Vectors; ++v) sum[m][v] = zero;
    for (int64_t j = 0; j < p; ++j) {
      V keys[Vectors];
      for (int v = 0; v < Vectors; ++v) keys[v] = V::load(key + v * V::lanes);
      for (int m = 0; m < Block; ++m) {
        const V x = V::set1(query[m]);
        for (int v = 0; v < Vectors; ++v) {
          const V difference = x - keys[v];
          sum[m][v] = V::fma(difference, difference, sum[m][v]);
        }
      }
      key += panel;
      query += Block;
    }
    for (int m = 0; m < Block; ++m) {
      const V limit = V::set1(reach[m]);
      uint64_t bits = 0;
      for (int v = 0; v < Vectors; ++v) {
        const V distance = V::fma(sum[m][v], scale, zero);
        distance.store(out + m * kKsgTile + at + v * V::lanes);
        bits |= static_cast<uint64_t>(V::bits_less(distance, limit)) << (at + v * V::lanes);
      }
      near[m * near_stride] |= bits;
    }
  }
}

// Floats that another thread may read or write meanwhile; an old value does no harm.
inline float shared_load(const float* from) {
  float value;
  __atomic_load(from, &value, __ATOMIC_RELAXED);
  return value;
}
inline void shared_store(float* to, float value) { __atomic_store(to, &value, __ATOMIC_RELAXED); }

// What one query keeps from tile to tile while its radii shrink.
struct KsgRadii {
  float* radius;   // [P] least so far, squared; other threads read it
  float* reach;    // [S] at least the largest radius of the subspace's pairs
  int32_t* chunk;  // [S] the last one of the keys noted

  KsgRadii(const Ksg& a, float* state)
      : radius(state), reach(radius + a.pairs), chunk(reinterpret_cast<int32_t*>(reach + a.subspaces)) {}
};

// Learns what the other threads found, and how far a key of query number `query` may now be.
inline void ksg_update_reach(const Ksg& a, int64_t query, KsgRadii& mine) {
  for (int t = 0; t < a.threads; ++t) {
    const float* theirs = a.states + t * a.state_stride + query * ksg_per_query(a);
    for (int64_t pair = 0; pair < a.pairs && theirs != mine.radius; ++pair)
      shared_store(mine.radius + pair, std::min(shared_load(theirs + pair), mine.radius[pair]));
  }
  std::fill(mine.reach, mine.reach + a.subspaces, 0.0f);
  for (int64_t i = 0; i < 2 * a.pairs; ++i) {
    float& reach = mine.reach[a.pair[i]];
    reach = std::max(reach, mine.radius[i / 2]);
  }
}

template <class V>
float least_lane(V v) {
  alignas(64) float groups[8];
  v.store_groups(groups);
  return *std::min_element(groups, groups + 8);
}

// rows: [S] rows of D^2 of one query, Block apart; near: [S] their bits; open: [P] scratch.
template <class V, int Block>
void ksg_lower_radii(const Ksg& a, int64_t query, const float* rows, const uint64_t* near, KsgRadii& mine,
                     int32_t* open) {
  int64_t count = 0, lowered = 0;
  for (int64_t r = 0; r < a.runs; ++r) {
    const KsgRun& run = a.run[r];
    const uint64_t bits = near[run.a];
    for (int64_t i = 0; i < run.count; ++i) {  // without a branch: which way it goes cannot be guessed
      open[count] = static_cast<int32_t>(run.first + i);
      count += (bits & near[run.b + i]) != 0;
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const float* x = rows + a.pair[2 * open[i]] * Block * kKsgTile;
    const float* y = rows + a.pair[2 * open[i] + 1] * Block * kKsgTile;
    V least = V::max(V::load(x), V::load(y));
    for (int k = V::lanes; k < kKsgTile; k += V::lanes) least = V::min(least, V::max(V::load(x + k), V::load(y + k)));
    float* radius = mine.radius + open[i];
    if (V::bits_less(least, V::set1(*radius))) {  // seldom
      shared_store(radius, least_lane(least));
      ++lowered;
    }
  }
  if (4 * lowered > a.pairs) ksg_update_reach(a, query, mine);
}

// Writes the distances of the keys whose bits are set to out, which has room for kKsgTile; returns their number.
template <class V>
int ksg_pick(const float* row, uint64_t bits, float* out) {
  int count = 0;
  for (int at = 0; at < kKsgTile; at += V::lanes)
    count += V::pick(V::load(row + at), static_cast<int>(bits >> at & ((uint64_t{1} << V::lanes) - 1)), out + count);
  return count;
}

template <class V>
void ksg_note(const float* row, uint64_t bits, int32_t* chunk, KsgNotes& notes) {
  if (!bits || *chunk == KsgNotes::kCrowded) return;
  if (*chunk == KsgNotes::kNone || notes.filled[*chunk] + kKsgTile > KsgNotes::kChunk) {
    if (notes.used == notes.size) {
      *chunk = KsgNotes::kCrowded;
      return;
    }
    notes.previous[notes.used] = *chunk;
    notes.filled[notes.used] = 0;
    *chunk = notes.used++;
  }
  int32_t& filled = notes.filled[*chunk];
  filled += ksg_pick<V>(row, bits, notes.distance + static_cast<int64_t>(*chunk) * KsgNotes::kChunk + filled);
}

// counts[e] += #{i : distance[i] < limits[e]} for the entries of one subspace, a vector of them at once.
template <class V>
void ksg_count(const float* distance, int count, const float* limits, int64_t entries, int32_t* counts) {
  for (int64_t e = 0; e < entries; e += V::lanes) {
    const V limit = V::load(limits + e);
    auto less = no_counts(limit);
    for (int i = 0; i < count; ++i) less.add_less(V::set1(distance[i]), limit);
    less.add_to(counts + e);
  }
}

// limits, counts: [entries] of one query.
template <class V>
void ksg_count_noted(const Ksg& a, float* state, const KsgNotes& notes, const float* limits, int32_t* counts) {
  const KsgRadii mine(a, state);
  for (int64_t s = 0; s < a.subspaces; ++s)
    for (int32_t chunk = mine.chunk[s]; chunk != KsgNotes::kNone; chunk = notes.previous[chunk])
      ksg_count<V>(notes.distance + static_cast<int64_t>(chunk) * KsgNotes::kChunk, notes.filled[chunk],
                   limits + a.entries[s], a.entries[s + 1] - a.entries[s], counts + a.entries[s]);
}

// rows, near: as for ksg_lower_radii. limits, counts: [entries] of one query.
template <class V, int Block>
void ksg_count_near(const Ksg& a, const float* rows, const uint64_t* near, const float* limits, int32_t* counts) {
  for (int64_t s = 0; s < a.subspaces; ++s) {
    if (!near[s]) continue;
    float distance[kKsgTile];
    const int count = ksg_pick<V>(rows + s * Block * kKsgTile, near[s], distance);
    ksg_count<V>(distance, count, limits + a.entries[s], a.entries[s + 1] - a.entries[s], counts + a.entries[s]);
  }
}

// What a thread needs beside the state: packed keys [d][64], D^2 [S][Block][64], bits [Block][S], reach [S][Block],
// pairs to look at [P], and the last rows of all [8][d].
template <int Block>
struct KsgScratch {
  float* packed;
  float* rows;
  uint64_t* near;
  float* reach;
  int32_t* open;
  float* buffer;

  KsgScratch(const Ksg& a, float* scratch)
      : packed(scratch),
        rows(packed + a.width * kKsgTile),
        near(reinterpret_cast<uint64_t*>(rows + a.subspaces * Block * kKsgTile)),
        reach(reinterpret_cast<float*>(near + a.subspaces * Block)),
        open(reinterpret_cast<int32_t*>(reach + a.subspaces * Block)),
        buffer(reinterpret_cast<float*>(open + a.pairs)) {}
};

// D^2 and bits of the block of queries that begins with q; only `valid` keys of the tile are there.
template <class V, int Block, int Vectors>
void ksg_block_distances(const Ksg& a, int64_t q, int valid, const KsgScratch<Block>& mine, float* state) {
  const int64_t left = a.last - q;
  for (int64_t s = 0; s < a.subspaces; ++s) {
    float* reach = mine.reach + s * Block;
    for (int m = 0; m < Block; ++m) {
      const int64_t i = q - a.first + std::min<int64_t>(m, left - 1);
      reach[m] = a.limits ? a.widest[(a.first + i) * a.subspaces + s] : KsgRadii(a, state + i * ksg_per_query(a)).reach[s];
    }
    const float* queries = a.packed_queries + (q - a.first) * a.width + a.offsets[s] * Block;
    float* rows = mine.rows + s * Block * kKsgTile;
    ksg_distances<V, Block, Vectors>(mine.packed + a.offsets[s] * kKsgTile, a.offsets[s + 1] - a.offsets[s], queries,
                                     a.inverse_variance[s], reach, rows, mine.near + s, a.subspaces);
    for (int m = 0; m < Block && valid < kKsgTile; ++m) {
      mine.near[m * a.subspaces + s] &= ~(~uint64_t{0} << valid);
      std::fill(rows + m * kKsgTile + valid, rows + (m + 1) * kKsgTile, std::numeric_limits<float>::infinity());
    }
  }
}

// `notes` where the counts will be wanted, else null.
template <class V, int Block, int Vectors>
void ksg_tile_pass(const Ksg& a, int64_t tile, float* scratch, float* state, KsgNotes* notes) {
  const KsgScratch<Block> mine(a, scratch);
  const int64_t start = tile * kKsgTile, per_query = ksg_per_query(a);
  const int valid = static_cast<int>(std::min<int64_t>(a.keys - start, kKsgTile));
  ksg_pack_keys<Vectors * V::lanes>(a, start, mine.packed, mine.buffer);
  for (int64_t q = a.first; q < a.last; ++q) {
    const int64_t i = q - a.first, m = i % Block;
    if (m == 0) ksg_block_distances<V, Block, Vectors>(a, q, valid, mine, state);
    const float* rows = mine.rows + m * kKsgTile;
    const uint64_t* near = mine.near + m * a.subspaces;
    if (a.limits) {
      ksg_count_near<V, Block>(a, rows, near, a.limits + q * per_query, reinterpret_cast<int32_t*>(state) + i * per_query);
      continue;
    }
    KsgRadii radii(a, state + i * per_query);
    ksg_lower_radii<V, Block>(a, i, rows, near, radii, mine.open);
    for (int64_t s = 0; notes && s < a.subspaces; ++s)
      ksg_note<V>(rows + s * Block * kKsgTile, near[s], radii.chunk + s, *notes);
    if (tile % kReachEvery == 0) ksg_update_reach(a, i, radii);
  }
}

// Queries first .. last as [block][d][query]; 0 past the end.
template <int Block>
void ksg_pack_queries(const Ksg& a) {
  for (int64_t q = a.first; q < (a.last - a.first + Block - 1) / Block * Block + a.first; ++q) {
    float* out = a.packed_queries + ((q - a.first) / Block) * Block * a.width + (q - a.first) % Block;
    for (int64_t j = 0; j < a.width; ++j) out[j * Block] = q < a.last ? a.rotated_queries[q * a.width + j] : 0.0f;
  }
}

// Vectors: accumulators of a query side by side; Block x Vectors of them have to fit the registers.
template <class V, int Block, int Vectors>
constexpr KsgKernels ksg_kernels() {
  return {Block, kKsgTile, ksg_pack_queries<Block>, ksg_tile_pass<V, Block, Vectors>, ksg_count_noted<V>};
}

}  // namespace
}  // namespace ndm
