// Tile pass of ksg_radius and ksg_counts.
//
// Formula   D_s(q, k)^2 = sum_j (q_j - k_j)^2 / variance_s over the columns of s;
//           radius^2 = min_k max(D_a^2, D_b^2); count = #{k : D^2 < limit}.
// Layout    64 keys of all subspaces transposed to panels [p][2 vectors]; D^2 of a query block as [query][S][64].
// Mapping   per query block and tile the S rows of D^2 once (direct differences: nothing cancels, and the
//           subtraction runs beside the FMA), then every pair reads two rows of 256 bytes from the
//           first-level cache. Both passes run the same code, so `<` is strict where it has to be.
//           Squares are compared: no square root per element.
// Limit     radius: 2 min/max per (pair, query, key), a vector at once; counts: 2 compares + 2 subtractions.
#pragma once

#include <cmath>
#include <limits>

#include "types.h"

namespace ndm {
namespace {

constexpr int kKsgTile = 64;

// One subspace of one tile, transposed to panels. Rows past the end are 0.
template <int Panel>
void ksg_pack_keys(const Ksg& a, int64_t s, int64_t start, float* packed, float* buffer) {
  const int64_t column = a.offsets[s], p = a.offsets[s + 1] - column;
  for (int at = 0; at < kKsgTile; at += 8) {
    float* panel = packed + (at / Panel) * Panel * p + at % Panel;
    const float* from = a.rotated_keys + (start + at) * a.width + column;
    int64_t stride = a.width;
    if (start + at + 8 > a.keys) {
      for (int i = 0; i < 8; ++i)
        for (int64_t j = 0; j < p; ++j) buffer[i * p + j] = start + at + i < a.keys ? from[i * stride + j] : 0.0f;
      from = buffer;
      stride = p;
    }
    int64_t j = 0;
    for (; j + 8 <= p; j += 8) transpose_8x8(from + j, stride, panel + j * Panel, Panel);
    for (; j < p; ++j)
      for (int i = 0; i < 8; ++i) panel[j * Panel + i] = from[i * stride + j];
  }
}

// D^2 = factor |q - k|^2 of Block queries to the keys of a packed subspace: out[m * stride + key]. Scaled at the
// end: scaled rows would be rounded before they cancel.
template <class V, int Block>
void ksg_distances(const float* packed, int64_t p, const float* queries, float factor, float* out, int64_t stride) {
  const V scale = V::set1(factor), zero = V::set1(0);
  for (int at = 0; at < kKsgTile; at += 2 * V::lanes) {
    const float* key = packed + at * p;
    const float* query = queries;
    V sum0[Block], sum1[Block];
    for (int m = 0; m < Block; ++m) sum0[m] = sum1[m] = V::set1(0);
    for (int64_t j = 0; j < p; ++j) {
      const V key0 = V::load(key), key1 = V::load(key + V::lanes);
      for (int m = 0; m < Block; ++m) {
        const V x = V::set1(query[m]);
        const V difference0 = x - key0, difference1 = x - key1;
        sum0[m] = V::fma(difference0, difference0, sum0[m]);
        sum1[m] = V::fma(difference1, difference1, sum1[m]);
      }
      key += 2 * V::lanes;
      query += Block;
    }
    for (int m = 0; m < Block; ++m) {
      V::fma(sum0[m], scale, zero).store(out + m * stride + at);
      V::fma(sum1[m], scale, zero).store(out + m * stride + at + V::lanes);
    }
  }
}

// rows: [S][64] squared distances of one query; state: [P][8].
template <class V>
void ksg_pairs_radius(const Ksg& a, const float* rows, float* state) {
  constexpr int step = 2 * V::lanes;  // two chains: one would wait for its own minimum
  for (int64_t pair = 0; pair < a.pairs; ++pair, state += 8) {
    const float* x = rows + a.pair[2 * pair] * kKsgTile;
    const float* y = rows + a.pair[2 * pair + 1] * kKsgTile;
    V least = V::max(V::load(x), V::load(y)), other = V::max(V::load(x + V::lanes), V::load(y + V::lanes));
    for (int i = step; i < kKsgTile; i += step) {
      least = V::min(least, V::max(V::load(x + i), V::load(y + i)));
      other = V::min(other, V::max(V::load(x + i + V::lanes), V::load(y + i + V::lanes)));
    }
    alignas(64) float groups[8];
    V::min(least, other).store_groups(groups);
    Vec8::min(Vec8::load(groups), Vec8::load(state)).store(state);
  }
}

template <class V>
void ksg_pairs_counts(const Ksg& a, const float* rows, const float* limits, int32_t* state) {
  using Count = decltype(no_counts(V{}));
  for (int64_t pair = 0; pair < a.pairs; ++pair, state += 8) {
    const float* x = rows + a.pair[2 * pair] * kKsgTile;
    const float* y = rows + a.pair[2 * pair + 1] * kKsgTile;
    const V limit = V::set1(limits[pair]);
    Count below_x = no_counts(limit), below_y = no_counts(limit);
    for (int i = 0; i < kKsgTile; i += V::lanes) {
      below_x.add_less(V::load(x + i), limit);
      below_y.add_less(V::load(y + i), limit);
    }
    Count::accumulate(below_x, below_y, state);
  }
}

template <class V, int Block>
void ksg_tile_pass(const Ksg& a, int64_t tile, float* scratch, void* state) {
  float* packed = scratch;                              // [d][64]
  float* rows = packed + a.width * kKsgTile;            // [Block][S][64]
  float* buffer = rows + Block * a.subspaces * kKsgTile;  // [8][p]
  const int64_t start = tile * kKsgTile, stride = a.subspaces * kKsgTile;
  const int valid = static_cast<int>(a.keys - start < kKsgTile ? a.keys - start : kKsgTile);
  for (int64_t s = 0; s < a.subspaces; ++s) ksg_pack_keys<2 * V::lanes>(a, s, start, packed + a.offsets[s] * kKsgTile, buffer);
  for (int64_t q = a.first; q < a.last; q += Block) {
    for (int64_t s = 0; s < a.subspaces; ++s) {
      const int64_t p = a.offsets[s + 1] - a.offsets[s];
      const float* queries = a.packed_queries + (q - a.first) * a.width + a.offsets[s] * Block;
      ksg_distances<V, Block>(packed + a.offsets[s] * kKsgTile, p, queries, a.inverse_variance[s], rows + s * kKsgTile, stride);
      for (int m = 0; m < Block; ++m)
        for (int i = valid; i < kKsgTile; ++i)
          rows[m * stride + s * kKsgTile + i] = std::numeric_limits<float>::infinity();
    }
    for (int m = 0; m < Block && q + m < a.last; ++m) {
      const int64_t at = (q + m - a.first) * a.pairs * 8;
      if (a.limit) {
        ksg_pairs_counts<V>(a, rows + m * stride, a.limit + (q + m) * a.pairs, static_cast<int32_t*>(state) + at);
      } else {
        ksg_pairs_radius<V>(a, rows + m * stride, static_cast<float*>(state) + at);
      }
    }
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

}  // namespace
}  // namespace ndm
