// Proposal pass of nearest_neighbors.
//
// Formula   score(q, k) = |k|^2 / 2 - q.k, whose least value over keys is at the nearest key.
// Layout    keys of one subspace are transposed to panels [p][2 vectors of lanes]; queries are packed
//           negated as [p][query block]. One pack of keys (<= 24 KB) stays in the first-level cache while
//           all queries pass by.
// Mapping   query block x 2 vectors of accumulators, started at the half norms, so that the epilogue is one
//           min per accumulator. The running minimum of each (query, tile, key mod 8) is all that is kept;
//           no index is tracked: search_rerank.h finds the key again, exactly.
// Limit     one FMA per (query, key, column): the FMA units; 1/p of that again for the minima.
#pragma once

#include <cmath>
#include <limits>

#include "rows.h"
#include "types.h"

namespace ndm {
namespace {

constexpr float kUnit = 5.9604645e-8f;  // 2^-24, unit roundoff of fp32

// Eight rows of one subspace, transposed into lanes [lane0, lane0 + 8) of a panel. Rows past the end are 0.
template <int Panel>
void transpose_rows(const Search& a, int64_t first, int64_t column, int64_t p, float* panel, float* buffer) {
  const bool direct = a.rotated_keys.type == Type::float32 && first + 8 <= a.keys;
  const float* from = buffer;
  int64_t stride = p;
  if (direct) {
    from = reinterpret_cast<const float*>(row_address(a.rotated_keys, first, column));
    stride = a.rotated_keys.stride;
  } else {
    for (int i = 0; i < 8; ++i) {
      if (first + i < a.keys) {
        read_row(a.rotated_keys, first + i, column, p, buffer + i * p);
      } else {
        for (int64_t j = 0; j < p; ++j) buffer[i * p + j] = 0;
      }
    }
  }
  int64_t j = 0;
  for (; j + 8 <= p; j += 8) transpose_8x8(from + j, stride, panel + j * Panel, Panel);
  for (; j < p; ++j)
    for (int i = 0; i < 8; ++i) panel[j * Panel + i] = from[i * stride + j];
}

// Subtracts the centre and sums squares, lane by lane.
template <class V, int Panel>
void center_panel(const float* center, int64_t p, float* panel, float* squared) {
  V sum0 = V::set1(0), sum1 = V::set1(0);
  for (int64_t j = 0; j < p; ++j) {
    V x0 = V::load(panel + j * Panel), x1 = V::load(panel + j * Panel + V::lanes);
    if (center) {
      V shift = V::set1(center[j]);
      x0 = x0 - shift;
      x1 = x1 - shift;
      x0.store(panel + j * Panel);
      x1.store(panel + j * Panel + V::lanes);
    }
    sum0 = V::fma(x0, x0, sum0);
    sum1 = V::fma(x1, x1, sum1);
  }
  sum0.store(squared);
  sum1.store(squared + V::lanes);
}

// Bound on the distance between the unit vector of a true row and that of a computed row.
inline float unit_error(float error, float norm, int64_t p) {
  float rounding = static_cast<float>(p + 4) * kUnit;
  if (norm < 1e-15f) return error == 0 && norm == 0 ? 0.0f : 2.0f;  // squares may have underflowed
  float bound = 2 * error / norm + rounding;
  return bound < 2 ? bound : 2.0f;
}

template <int Panel>
bool lane_is_zero(const float* panel, int64_t p, int lane) {
  for (int64_t j = 0; j < p; ++j)
    if (panel[j * Panel + lane] != 0) return false;
  return true;
}

// Half norms (the accumulators' start), error bounds per group, and for cosine the unit vectors.
template <int Panel>
void finish_panel(const Search& a, int64_t s, int64_t tile, int64_t first, int64_t p, float* panel,
                  const float* squared, float* half) {
  float* norms = a.group_norm + (s * a.tiles + tile) * kGroups;
  float* errors = a.group_error + (s * a.tiles + tile) * kGroups;
  for (int lane = 0; lane < Panel; ++lane) {
    if (first + lane >= a.keys) {
      half[lane] = std::numeric_limits<float>::infinity();
      continue;
    }
    float norm = std::sqrt(squared[lane]);
    float error = a.key_error ? a.key_error[first + lane] : 0.0f;
    if (!(norm <= std::numeric_limits<float>::max())) a.irregular[s * a.tiles + tile] = 1;
    half[lane] = squared[lane] / 2;
    if (a.cosine) {
      // A lane whose squares underflowed but which is not zero must stay a candidate: error 2.
      bool vanished = norm < 1e-15f && !lane_is_zero<Panel>(panel, p, lane);
      error = vanished ? 2.0f : unit_error(error, norm, p);
      float inverse = norm > 0 ? 1 / norm : 0;
      for (int64_t j = 0; j < p; ++j) panel[j * Panel + lane] *= inverse;
      half[lane] = 0;
      norm = 1;
    } else if (a.center) {
      error += 2 * kUnit * norm;
    }
    int g = lane % kGroups;
    norms[g] = norm > norms[g] ? norm : norms[g];
    errors[g] = error > errors[g] ? error : errors[g];
  }
}

template <class V>
void pack_keys(const Search& a, int64_t s, int64_t tile, int64_t first, int count, float* packed, float* half,
               float* buffer) {
  constexpr int panel_size = 2 * V::lanes;
  const int64_t column = a.offsets[s], p = a.offsets[s + 1] - column;
  alignas(64) float squared[panel_size];
  for (int done = 0; done < count; done += panel_size) {
    float* panel = packed + done * p;
    for (int lane = 0; lane < panel_size; lane += 8)
      transpose_rows<panel_size>(a, first + done + lane, column, p, panel + lane, buffer);
    center_panel<V, panel_size>(a.center ? a.center + column : nullptr, p, panel, squared);
    finish_panel<panel_size>(a, s, tile, first + done, p, panel, squared, half + done);
  }
}

// The micro-kernel: Block queries against all panels of a pack; minima [Block][8].
template <class V, int Block>
void sweep_block(const float* packed, const float* half, int count, int64_t p, const float* queries, float* minima,
                 bool first) {
  V least[Block];
  for (int m = 0; m < Block; ++m) least[m] = V::set1(std::numeric_limits<float>::infinity());
  for (int done = 0; done < count; done += 2 * V::lanes) {
    const float* key = packed + done * p;
    const float* query = queries;
    V sum0[Block], sum1[Block];
    const V half0 = V::load(half + done), half1 = V::load(half + done + V::lanes);
    for (int m = 0; m < Block; ++m) {
      sum0[m] = half0;
      sum1[m] = half1;
    }
    for (int64_t j = 0; j < p; ++j) {
      const V key0 = V::load(key), key1 = V::load(key + V::lanes);
      for (int m = 0; m < Block; ++m) {
        const V x = V::set1(query[m]);
        sum0[m] = V::fma(x, key0, sum0[m]);
        sum1[m] = V::fma(x, key1, sum1[m]);
      }
      key += 2 * V::lanes;
      query += Block;
    }
    for (int m = 0; m < Block; ++m) least[m] = V::min(least[m], V::min(sum0[m], sum1[m]));
  }
  for (int m = 0; m < Block; ++m) {
    alignas(64) float groups[kGroups];
    least[m].store_groups(groups);
    Vec8 value = Vec8::load(groups);
    if (!first) value = Vec8::min(value, Vec8::load(minima + m * kGroups));
    value.store(minima + m * kGroups);
  }
}

// All subspaces of the round against one tile of keys. scratch: see search_scratch_floats().
template <class V, int Block>
void sweep_tile(const Search& a, int64_t tile, float* scratch) {
  float* half = scratch;
  float* buffer = half + kMaxPack;
  float* packed = buffer + (8 * a.width + 15) / 16 * 16;
  const int64_t start = tile * a.tile;
  const int64_t stop = start + a.tile < a.keys ? start + a.tile : a.keys;
  for (int64_t s = a.first; s < a.last; ++s) {
    const int64_t p = a.offsets[s + 1] - a.offsets[s];
    const int size = pack_size(p);
    float* norms = a.group_norm + (s * a.tiles + tile) * kGroups;
    float* errors = a.group_error + (s * a.tiles + tile) * kGroups;
    for (int g = 0; g < kGroups; ++g) norms[g] = errors[g] = 0;
    a.irregular[s * a.tiles + tile] = 0;
    float* minima = a.minima + ((s - a.first) * a.tiles + tile) * a.padded * kGroups;
    const float* queries = a.packed_queries + a.padded * a.offsets[s];
    for (int64_t at = start; at < stop; at += size) {
      pack_keys<V>(a, s, tile, at, size, packed, half, buffer);
      for (int64_t q = 0; q < a.padded; q += Block)
        sweep_block<V, Block>(packed, half, size, p, queries + q * p, minima + q * kGroups, at == start);
    }
  }
}

// Negated queries in blocks, and their norms; unit vectors for cosine. Padding queries are 0.
template <int Block>
void pack_queries(const Search& a, int64_t s) {
  const int64_t column = a.offsets[s], p = a.offsets[s + 1] - column;
  for (int64_t q = 0; q < a.padded; ++q) {
    float* out = a.packed_queries + a.padded * column + (q / Block) * Block * p + q % Block;
    const float* row = a.rotated_queries + q * a.width + column;
    double squared = 0;
    if (q < a.queries)
      for (int64_t j = 0; j < p; ++j) squared += static_cast<double>(row[j]) * row[j];
    const float norm = static_cast<float>(std::sqrt(squared));
    float factor = q < a.queries ? -1.0f : 0.0f;
    if (a.cosine && norm > 0) factor = -1 / norm;
    for (int64_t j = 0; j < p; ++j) out[j * Block] = q < a.queries ? factor * row[j] : 0.0f;
    a.query_norm[s * a.padded + q] = norm;
  }
}

}  // namespace
}  // namespace ndm
