// Adam on the Lie algebra: the update of a rotation from R'G, one pass over all that it reads and writes.
//
// Formula   A = M - M' with M = R'G; m <- m + (1 - fast)(A - m); v <- slow v + (1 - slow) A^2;
//           U = -scale m / (sqrt(v) + guard) (docs/method.md; scale and guard hold Adam's bias corrections).
// Layout    64 x 64 tiles; a tile of M' is transposed into scratch. Both halves of the skew matrices are computed,
//           from the same operations, so that U' = -U holds to the bit.
// Mapping   an item is 64 rows.
// Limit     memory: M is read twice, moments read and written, U written: 28 bytes an entry.
#pragma once

#include <algorithm>
#include <cstring>

#include "rows.h"
#include "types.h"

namespace ndm {
namespace {

// The constants of a call in all lanes.
template <class V>
struct LieFactors {
  V take_first, keep_second, take_second, scale, guard;
  explicit LieFactors(const LieUpdate& a)
      : take_first(V::set1(static_cast<float>(1 - a.fast))),
        keep_second(V::set1(static_cast<float>(a.slow))),
        take_second(V::set1(static_cast<float>(1 - a.slow))),
        scale(V::set1(-a.scale)),
        guard(V::set1(a.guard)) {}
};

// One vector of every matrix; `product` null leaves the moments.
template <class V>
void lie_vector(const LieFactors<V>& f, const float* product, const float* mirrored, float* first, float* second,
                float* update) {
  V m = V::load(first), v = V::load(second);
  if (product) {
    const V tangent = V::load(product) - V::load(mirrored);
    m = V::fma(tangent - m, f.take_first, m);
    v = V::fma(tangent, tangent * f.take_second, v * f.keep_second);
    m.store(first);
    v.store(second);
  }
  (f.scale * m / (V::sqrt(v) + f.guard)).store(update);
}

// `count` entries of a row. Those beyond the last whole vector go through padded copies: the mirror of an entry must
// come from the same operations.
template <class V>
void lie_segment(const LieFactors<V>& f, int64_t count, const float* product, const float* mirrored, float* first,
                 float* second, float* update) {
  int64_t j = 0;
  for (; j + V::lanes <= count; j += V::lanes)
    lie_vector<V>(f, product ? product + j : nullptr, mirrored + j, first + j, second + j, update + j);
  if (j == count) return;
  const size_t bytes = static_cast<size_t>(count - j) * 4;
  float rest[4][V::lanes] = {};
  if (product) std::memcpy(rest[0], product + j, bytes);
  std::memcpy(rest[1], mirrored + j, bytes);
  std::memcpy(rest[2], first + j, bytes);
  std::memcpy(rest[3], second + j, bytes);
  float result[V::lanes];
  lie_vector<V>(f, product ? rest[0] : nullptr, rest[1], rest[2], rest[3], result);
  std::memcpy(first + j, rest[2], bytes);
  std::memcpy(second + j, rest[3], bytes);
  std::memcpy(update + j, result, bytes);
}

// to[i][j] = from[j][i], `rows` x `columns` of `to`, whose rows are kLieTile long.
inline void transpose_tile(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t j = 0; j < columns; j += 8)
    for (int64_t i = 0; i < rows; i += 8) {
      if (i + 8 <= rows && j + 8 <= columns) {
        transpose_8x8(from + j * stride + i, stride, to + i * kLieTile + j, kLieTile);
        continue;
      }
      for (int64_t x = i; x < std::min(i + 8, rows); ++x)
        for (int64_t y = j; y < std::min(j + 8, columns); ++y) to[x * kLieTile + y] = from[y * stride + x];
    }
}

// Scratch: a tile, and a row of one.
template <class V>
void lie_update(const LieUpdate& a, int64_t top, float* scratch) {
  const LieFactors<V> factors(a);
  const int64_t d = a.width, rows = std::min<int64_t>(kLieTile, d - top);
  float* tile = scratch;
  float* row = tile + kLieTile * kLieTile;
  for (int64_t left = 0; left < d; left += kLieTile) {
    const int64_t columns = std::min<int64_t>(kLieTile, d - left);
    if (a.product) transpose_tile(a.product + left * d + top, d, rows, columns, tile);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (top + i) * d + left;
      float* update = a.update ? a.update + at : row;
      lie_segment<V>(factors, columns, a.product ? a.product + at : nullptr, tile + i * kLieTile, a.first + at,
                     a.second + at, update);
      if (a.half_update)
        for (int64_t j = 0; j < columns; ++j) a.half_update[at + j] = to_bfloat16(row[j]);
    }
  }
}

}  // namespace
}  // namespace ndm
