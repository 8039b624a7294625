// Proposal pass of nearest_neighbors.
//
// Formula   score(q, k) = |k|^2 / 2 - q.k, whose least value over keys is at the nearest key.
// Layout    keys of one subspace are transposed to panels [p][2 vectors of lanes]; queries are packed
//           negated as [p][query block]. One pack of keys (<= 24 KB) stays in the first-level cache while
//           all queries pass by (32 keys at least, so very wide subspaces spill to the second level).
// Mapping   query block x 2 vectors of accumulators, started at the half norms, so that the epilogue is one
//           min per accumulator. The running minimum of each (query, tile, lane mod 8) is all that is kept;
//           no index is tracked: search_rerank.h finds the key again, exactly.
// Encoding  Fp32: rows as they are. Bf16Pairs (AVX512-BF16): rows rounded to bf16, two columns in a lane, twice
//           the products per instruction. Norms are those of the rounded rows, so a score is the exact one of
//           a row that is off by a known distance, |x - bf16(x)|: a bound, like that of the fp32 rotation.
// Limit     one FMA per (query, key, column): the FMA units; 1/p of that again for the minima.
#pragma once

#include <cmath>
#include <limits>

#include "rows.h"
#include "types.h"

namespace ndm {
namespace {

constexpr float kUnit = 5.9604645e-8f;  // 2^-24, unit roundoff of fp32

// One column per lane.
struct Fp32 {
  static constexpr int columns = 1;
  static constexpr int64_t extra_words = 0;  // of a query beyond one for each column
  template <class V>
  static V multiply_add(V query, V key, V sum) {
    return V::fma(query, key, sum);
  }
  static int64_t words(int64_t p) { return p; }
  // Rows of a packed panel of keys.
  static int64_t key_words(int64_t p) { return words(p); }
  // Rows stay where they are, unrounded.
  template <class V, int Panel>
  static void encode(float*, int64_t, float*, float*, float*) {}
  // Query columns j .. j + columns - 1 as one lane.
  static float encode_query(const float* x) { return *x; }
  static float decode_query(float word, int) { return word; }
};

// Where the packed queries of a subspace begin.
template <class E>
float* packed_queries_of(const Search& a, int64_t s) {
  return a.packed_queries + a.padded * (a.offsets[s] + s * E::extra_words);
}

// Where a key goes. A pack of `size` keys from row `first` on is cut into 8 runs of consecutive rows, one per
// lane group, so that the exact pass reads neighboring rows: row first + g * size / 8 + r is in group g.
struct Pack {
  int64_t first;
  int size;
  int64_t column, p;

  int64_t step() const { return size / kGroups; }
  int64_t key(int panel_size, int panel_start, int lane) const {
    return first + lane % kGroups * step() + panel_start / kGroups + lane / kGroups % (panel_size / kGroups);
  }
};

// Rows first, first + step, ... (8 of them) of one subspace into lanes of a panel. Rows past the end are 0.
template <int Panel>
void transpose_rows(const Search& a, const Pack& pack, int64_t first, float* panel, float* buffer) {
  const int64_t p = pack.p, step = pack.step();
  const bool direct = a.swept_keys.type == Type::float32 && first + 7 * step < a.keys;
  const float* from = buffer;
  int64_t stride = p;
  if (direct) {
    from = reinterpret_cast<const float*>(row_address(a.swept_keys, first, pack.column));
    stride = a.swept_keys.stride * step;
  } else {
    for (int i = 0; i < 8; ++i) {
      if (first + i * step < a.keys) {
        read_row(a.swept_keys, first + i * step, pack.column, p, buffer + i * p);
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

// What is known of the keys of each group of a tile.
struct GroupStats {
  Vec8 squared = Vec8::set1(0);  // largest squared norm
  Vec8 error = Vec8::set1(0);    // largest error bound
  Vec8 irregular = Vec8::set1(0);  // NaN where a norm was NaN or Inf: 0 * Inf is NaN
};

// Cosine: scales the lanes to unit vectors; `squared` becomes 1.
template <int Panel>
void normalize_panel(const Search& a, const Pack& pack, int start, float* panel, float* squared, float* error) {
  for (int lane = 0; lane < Panel; ++lane) {
    const int64_t key = pack.key(Panel, start, lane);
    if (key >= a.keys) continue;
    const float norm = std::sqrt(squared[lane]);
    bool zero = true;
    if (norm < 1e-15f)
      for (int64_t j = 0; j < pack.p; ++j) zero = zero && panel[j * Panel + lane] == 0;
    // A row whose squares underflowed but which is not zero must stay a candidate: error 2.
    error[lane] = zero ? unit_error(a.key_error ? a.key_error[key] : 0.0f, norm, pack.p) : 2.0f;
    const float inverse = norm > 0 ? 1 / norm : 0;
    for (int64_t j = 0; j < pack.p; ++j) panel[j * Panel + lane] *= inverse;
    squared[lane] = norm <= std::numeric_limits<float>::max() ? 1.0f : norm;
  }
}

// Half norms (the accumulators' start) and error bounds of one panel. `error` holds what encoding lost.
template <int Panel>
void finish_panel(const Search& a, const Pack& pack, int start, float* panel, float* squared, float* error, float* half,
                  GroupStats& stats) {
  if (a.cosine) {
    normalize_panel<Panel>(a, pack, start, panel, squared, error);
  } else if (a.key_error) {
    for (int lane = 0; lane < Panel; ++lane) {
      const int64_t key = pack.key(Panel, start, lane);
      error[lane] += key < a.keys ? a.key_error[key] : 0.0f;
    }
  }
  const bool partial = pack.first + pack.size > a.keys;
  if (partial)
    for (int lane = 0; lane < Panel; ++lane)
      if (pack.key(Panel, start, lane) >= a.keys) squared[lane] = 0;
  const Vec8 zero = Vec8::set1(0), factor = Vec8::set1(a.cosine ? 0.0f : 0.5f);
  for (int lane = 0; lane < Panel; lane += 8) {
    const Vec8 x = Vec8::load(squared + lane);
    stats.squared = Vec8::max(stats.squared, x);
    stats.error = Vec8::max(stats.error, Vec8::load(error + lane));
    stats.irregular = Vec8::fma(x, zero, stats.irregular);
    Vec8::fma(x, factor, zero).store(half + lane);
  }
  if (partial)  // no score is above infinity
    for (int lane = 0; lane < Panel; ++lane)
      if (pack.key(Panel, start, lane) >= a.keys) half[lane] = std::numeric_limits<float>::infinity();
}

// `plain`: [p][2 vectors], where rows are encoded from.
template <class V, class E>
void pack_keys(const Search& a, const Pack& pack, float* packed, float* half, float* buffer, float* plain,
               GroupStats& stats) {
  constexpr int panel_size = 2 * V::lanes;
  for (int start = 0; start < pack.size; start += panel_size) {
    alignas(64) float squared[panel_size], error[panel_size] = {};
    float* panel = E::columns == 1 ? packed + start * E::key_words(pack.p) : plain;
    for (int lane = 0; lane < panel_size; lane += 8)
      transpose_rows<panel_size>(a, pack, pack.key(panel_size, start, lane), panel + lane, buffer);
    center_panel<V, panel_size>(a.center ? a.center + pack.column : nullptr, pack.p, panel, squared);
    E::template encode<V, panel_size>(panel, pack.p, packed + start * E::key_words(pack.p), squared, error);
    finish_panel<panel_size>(a, pack, start, panel, squared, error, half + start, stats);
  }
}

inline void write_stats(const Search& a, int64_t s, int64_t tile, const GroupStats& stats) {
  float squared[kGroups], error[kGroups], irregular[kGroups];
  stats.squared.store(squared);
  stats.error.store(error);
  stats.irregular.store(irregular);
  const int64_t at = s * a.tiles + tile;
  a.irregular[at] = 0;
  for (int g = 0; g < kGroups; ++g) {
    const float norm = std::sqrt(squared[g]);
    a.group_norm[at * kGroups + g] = norm;
    a.group_error[at * kGroups + g] = error[g] + (a.center ? 2 * kUnit * norm : 0.0f);
    if (irregular[g] != 0) a.irregular[at] = 1;
  }
}

// The micro-kernel: Block queries against all panels of a pack; minima [Block][8]. Rows are `words` lanes long, and
// `stride` of them from one panel to the next.
template <class V, int Block, class E>
void sweep_block(const float* packed, const float* half, int count, int64_t words, const float* queries, float* minima,
                 bool first, int64_t stride) {
  V least[Block];
  for (int m = 0; m < Block; ++m) least[m] = V::set1(std::numeric_limits<float>::infinity());
  for (int done = 0; done < count; done += 2 * V::lanes) {
    const float* key = packed + done * stride;
    const float* query = queries;
    V sum0[Block], sum1[Block];
    const V half0 = V::load(half + done), half1 = V::load(half + done + V::lanes);
    for (int m = 0; m < Block; ++m) {
      sum0[m] = half0;
      sum1[m] = half1;
    }
    for (int64_t j = 0; j < words; ++j) {
      const V key0 = V::load(key), key1 = V::load(key + V::lanes);
      for (int m = 0; m < Block; ++m) {
        const V x = V::set1(query[m]);
        sum0[m] = E::multiply_add(x, key0, sum0[m]);
        sum1[m] = E::multiply_add(x, key1, sum1[m]);
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

// Brings the rows of the next pack to the second-level cache while this one is swept: they are d apart, too
// far for the hardware to foresee. At 128 queries the misses were a fifth of the sweep.
struct NextRows {
  const char* row = nullptr;
  int64_t stride = 0, bytes = 0, left = 0;

  NextRows(const Search& a, int64_t first, int64_t count, int64_t s) {
    const int64_t size = element_size(a.swept_keys.type);
    row = row_address(a.swept_keys, first, a.offsets[s]);
    stride = a.swept_keys.stride * size;
    bytes = (a.offsets[s + 1] - a.offsets[s]) * size;
    left = first + count < a.keys ? count : a.keys - first;
  }
  void prefetch(int64_t rows) {
    for (; rows > 0 && left > 0; --rows, --left, row += stride)
      for (int64_t i = 0; i < bytes; i += 64) ndm::prefetch(row + i);
  }
};

// All subspaces of the round against one tile of keys. scratch: see search_scratch_floats().
template <class V, int Block, class E>
void sweep_tile(const Search& a, int64_t tile, float* scratch) {
  float* half = scratch;
  float* buffer = half + kMaxPack;
  float* plain = buffer + (8 * a.width + 15) / 16 * 16;
  float* packed = plain + (E::columns == 1 ? 0 : 2 * V::lanes * a.width);
  const int64_t start = tile * a.tile;
  const int64_t stop = start + a.tile < a.keys ? start + a.tile : a.keys;
  for (int64_t s = a.first; s < a.last; ++s) {
    const int64_t p = a.offsets[s + 1] - a.offsets[s], words = E::words(p);
    const int size = pack_size(p, a.tile);
    GroupStats stats;
    float* minima = a.minima + ((s - a.first) * a.tiles + tile) * a.padded * kGroups;
    const float* queries = packed_queries_of<E>(a, s);
    for (int64_t at = start; at < stop; at += size) {
      pack_keys<V, E>(a, Pack{at, size, a.offsets[s], p}, packed, half, buffer, plain, stats);
      const bool more = at + size < stop, turn = s + 1 < a.last;
      NextRows next(a, more ? at + size : start, more || !turn ? size : pack_size(a.offsets[s + 2] - a.offsets[s + 1], a.tile),
                    more || !turn ? s : s + 1);
      const int64_t rows = more || turn ? next.left * Block / a.padded + 1 : 0;
      for (int64_t q = 0; q < a.padded; q += Block) {
        next.prefetch(rows);
        sweep_block<V, Block, E>(packed, half, size, words, queries + q * words, minima + q * kGroups, at == start, words);
      }
    }
    write_stats(a, s, tile, stats);
  }
}

// The value that the sweep uses: fp32, centred.
inline float sweep_value(const Search& a, int64_t query, int64_t column) {
  if (a.rotated_queries) return a.rotated_queries[query * a.width + column];
  const double shift = a.center ? a.center[column] : 0.0;
  return static_cast<float>(a.exact_queries[query * a.width + column] - shift);
}

// Negated queries in blocks, and their norms; unit vectors for cosine. Padding queries are 0.
template <int Block, class E>
void pack_queries(const Search& a, int64_t s) {
  const int64_t column = a.offsets[s], p = a.offsets[s + 1] - column, words = E::words(p);
  for (int64_t q = 0; q < a.padded; ++q) {
    float* out = packed_queries_of<E>(a, s) + (q / Block) * Block * words + q % Block;
    double squared = 0, lost = 0;
    for (int64_t word = 0; word < words; ++word) {
      float x[E::columns];
      for (int c = 0; c < E::columns; ++c) {
        const int64_t j = word * E::columns + c;
        x[c] = j < p && q < a.queries ? -sweep_value(a, q, column + j) : 0.0f;
      }
      out[word * Block] = E::encode_query(x);
      for (int c = 0; c < E::columns; ++c) {
        const double kept = E::decode_query(out[word * Block], c);
        squared += kept * kept;
        lost += (x[c] - kept) * (x[c] - kept);
      }
    }
    const float norm = static_cast<float>(std::sqrt(squared));
    if (a.cosine && norm > 0)
      for (int64_t j = 0; j < p; ++j) out[j * Block] /= norm;
    a.query_norm[s * a.padded + q] = norm;
    a.query_rounding[s * a.padded + q] = static_cast<float>(std::sqrt(lost) * (1 + 1e-6));
  }
}

}  // namespace
}  // namespace ndm
