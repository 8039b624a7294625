// Gradient of the mean distance to given neighbors, or of its logarithm.
//
// Formula   delta = q - n_s(q), r = delta R_s, dL/dR_s = 1/(S Q) sum_q delta' r / |r| (docs/method.md), or with a
//           floor f_s for the logarithm p_s/(d Q) sum_q delta' r / (|r|^2 + f_s^2).
// Layout    the differences [Q, d] of one subspace at a time are gathered into scratch that stays in the second or
//           third-level cache, and read from there by both products; rows of the subspace are padded to whole
//           vectors. The [S, Q, d] differences are never in memory.
// Mapping   an item is a subspace: more threads than subspaces do not help. Up to 128 queries at a time: product with
//           R_s in slabs of 128 of its rows, then with the unit rows for 256 rows of the gradient. No sum crosses
//           threads, so the result does not depend on their number.
// Limit     4 Q d^2 FLOP at the FMA units; 4 S Q d bytes of keys from random rows.
// Gained    over gathering in both products, in parallel over (subspace, block): 1.57 at d 768, 1.08 at 2304, where
//           each key came from memory twice.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "rows.h"
#include "small_product.h"
#include "types.h"

namespace ndm {
namespace {

// Columns [column, column + count) of a row where they are, or converted into a buffer.
inline const float* as_floats(const Rows& rows, int64_t row, int64_t column, int64_t count, float* buffer) {
  if (rows.type == Type::float32) return reinterpret_cast<const float*>(row_address(rows, row, column));
  read_row(rows, row, column, count, buffer);
  return buffer;
}

// query - key in columns [column, column + count); fetches those of the next query's key ahead.
inline void difference(const Gradient& a, int64_t s, int64_t q, int64_t column, int64_t count, float* buffer,
                       float* out) {
  const int64_t* index = a.index + s * a.index_stride;
  if (q + 1 < a.queries) {
    const char* next = row_address(a.raw_keys, index[q + 1], column);
    for (int64_t byte = 0; byte < count * element_size(a.raw_keys.type); byte += 64) prefetch(next + byte);
  }
  const float* query = as_floats(a.raw_queries, q, column, count, buffer);
  const float* key = as_floats(a.raw_keys, index[q], column, count, out);
  for (int64_t j = 0; j < count; ++j) out[j] = query[j] - key[j];
}

template <class V>
float squared_norm(const float* row, int64_t padded) {
  V sum = V::set1(0);
  for (int64_t j = 0; j < padded; j += V::lanes) {
    const V x = V::load(row + j);
    sum = V::fma(x, x, sum);
  }
  float lanes[V::lanes], total = 0;
  sum.store(lanes);
  for (float lane : lanes) total += lane;
  return total;
}

// Where a subspace's pieces are in the scratch of its thread; `padded` is its width in whole vectors.
struct GradientScratch {
  int64_t padded;
  float *delta, *unit, *slab, *sum, *buffer;
  GradientScratch(const Gradient& a, int64_t padded_width, int64_t rows, float* scratch)
      : padded(padded_width),
        delta(scratch),
        unit(delta + (kGradientQueries + rows) * a.width + rows),
        slab(unit + (kGradientQueries + rows) * padded),
        sum(slab + kGradientDepth * padded),
        buffer(sum + (kGradientRows + rows) * padded) {}
};

// Differences of queries [first, first + count), and their rows in the subspace, not yet of unit length.
template <class V, int Rows, int Most>
void project(const Gradient& a, int64_t s, int64_t first, int64_t count, const GradientScratch& at) {
  const int64_t d = a.width, p = a.offsets[s + 1] - a.offsets[s], padded = at.padded;
  const int64_t rows = (count + Rows - 1) / Rows * Rows;
  for (int64_t i = 0; i < count; ++i) difference(a, s, first + i, 0, d, at.buffer, at.delta + i * d);
  std::fill(at.delta + count * d, at.delta + rows * d, 0.0f);
  std::fill(at.unit, at.unit + rows * padded, 0.0f);
  std::fill(at.slab, at.slab + kGradientDepth * padded, 0.0f);
  for (int64_t from = 0; from < d; from += kGradientDepth) {
    const int64_t depth = std::min<int64_t>(kGradientDepth, d - from);
    for (int64_t k = 0; k < depth; ++k)
      std::memcpy(at.slab + k * padded, a.rotation + (from + k) * d + a.offsets[s], static_cast<size_t>(p) * 4);
    multiply_add<V, Rows, Most>(rows, padded, depth, ByRow{at.delta + from, d}, at.slab, padded, at.unit, padded);
  }
}

// What a row of squared length `squared` is divided by, and what it adds to the loss: its length, or with a floor the
// logarithm of its length. A row of length 0 has no direction: its divisor is 0.
struct Weight {
  float divisor, loss;
};

inline Weight weight_of(float squared, const float* floor) {
  if (!floor) {
    const float norm = std::sqrt(squared);
    return {norm, norm};
  }
  const float floored = squared + *floor * *floor;
  return {floored, floored == 0 ? 0.0f : 0.5f * std::log(floored)};
}

// Scales rows to their share of the gradient, those that do not count to 0; returns the sum of their losses.
template <class V>
double normalise(const Gradient& a, int64_t s, int64_t first, int64_t count, const GradientScratch& at) {
  const float* floor = a.log_floor ? a.log_floor + s : nullptr;
  const double part = floor ? static_cast<double>(a.offsets[s + 1] - a.offsets[s]) / static_cast<double>(a.width)
                            : 1.0 / static_cast<double>(a.subspaces);
  const float share = static_cast<float>(part / static_cast<double>(a.queries));
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    float* row = at.unit + i * at.padded;
    const bool counts = !a.counted || a.counted[s * a.counted_stride + first + i];
    const Weight weight = counts ? weight_of(squared_norm<V>(row, at.padded), floor) : Weight{0.0f, 0.0f};
    for (int64_t j = 0; j < at.padded; ++j)
      row[j] = weight.divisor == 0 ? 0.0f : row[j] / weight.divisor * share;  // NaN stays
    total += static_cast<double>(weight.loss);
  }
  return total;
}

// Rows [top, top + 256) of the gradient, from `count` queries; added to those of queries before them.
template <class V, int Rows, int Most>
void accumulate(const Gradient& a, int64_t s, int64_t top, int64_t count, bool add, const GradientScratch& at) {
  const int64_t p = a.offsets[s + 1] - a.offsets[s], padded = at.padded, d = a.width;
  const int64_t here = std::min<int64_t>(kGradientRows, d - top), rows = (here + Rows - 1) / Rows * Rows;
  float* out = a.gradient + top * d + a.offsets[s];
  std::fill(at.sum, at.sum + rows * padded, 0.0f);
  if (add)
    for (int64_t i = 0; i < here; ++i) std::memcpy(at.sum + i * padded, out + i * d, static_cast<size_t>(p) * 4);
  multiply_add<V, Rows, Most>(rows, padded, count, ByColumn{at.delta + top, d}, at.unit, padded, at.sum, padded);
  for (int64_t i = 0; i < here; ++i) std::memcpy(out + i * d, at.sum + i * padded, static_cast<size_t>(p) * 4);
}

template <class V, int Rows, int Most>
void gradient(const Gradient& a, int64_t s, float* scratch) {
  const int64_t padded = (a.offsets[s + 1] - a.offsets[s] + V::lanes - 1) / V::lanes * V::lanes;
  const GradientScratch at(a, padded, Rows, scratch);
  double total = 0;
  for (int64_t first = 0; first < a.queries; first += kGradientQueries) {
    const int64_t count = std::min<int64_t>(kGradientQueries, a.queries - first);
    project<V, Rows, Most>(a, s, first, count, at);
    total += normalise<V>(a, s, first, count, at);
    for (int64_t top = 0; top < a.width; top += kGradientRows)
      accumulate<V, Rows, Most>(a, s, top, count, first > 0, at);
  }
  a.mean[s] = static_cast<float>(total / static_cast<double>(a.queries));
}

template <class V, int Rows, int Most>
constexpr GradientKernels gradient_kernels() {
  return {V::lanes, Rows, gradient<V, Rows, Most>};
}

}  // namespace
}  // namespace ndm
