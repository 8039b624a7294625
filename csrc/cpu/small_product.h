// c += a b for blocks that stay in the caches: a micro-kernel, no packing.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ndm {
namespace {

// How a lies in memory: rows one after the other, or columns. A stride that is known to be 1 saves address
// registers, of which 8 rows would need all.
struct ByRow {
  const float* data;
  int64_t stride;
  const float* at(int64_t row, int64_t k) const { return data + row * stride + k; }
};
struct ByColumn {
  const float* data;
  int64_t stride;
  const float* at(int64_t row, int64_t k) const { return data + k * stride + row; }
};

// Rows x Vectors accumulators; b is [depth, stride], c [Rows, stride], both in whole vectors.
template <class V, int Rows, int Vectors, class Left>
void multiply_add_block(int64_t depth, Left a, const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  V sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sum[r][v] = V::load(c + r * c_stride + v * V::lanes);
  for (int64_t k = 0; k < depth; ++k) {
    V right[Vectors];
    for (int v = 0; v < Vectors; ++v) right[v] = V::load(b + k * b_stride + v * V::lanes);
    for (int r = 0; r < Rows; ++r) {
      const V left = V::set1(*a.at(r, k));
      for (int v = 0; v < Vectors; ++v) sum[r][v] = V::fma(left, right[v], sum[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sum[r][v].store(c + r * c_stride + v * V::lanes);
}

template <class V, int Rows, int Most, class Left>
void multiply_add_strip(int vectors, int64_t depth, Left a, const float* b, int64_t b_stride, float* c,
                        int64_t c_stride) {
  if constexpr (Most > 1)
    if (vectors < Most) return multiply_add_strip<V, Rows, Most - 1>(vectors, depth, a, b, b_stride, c, c_stride);
  multiply_add_block<V, Rows, Most>(depth, a, b, b_stride, c, c_stride);
}

// c [rows, columns] += a [rows, depth] b [depth, columns]; rows a multiple of Rows, columns of V::lanes.
template <class V, int Rows, int Most, class Left>
void multiply_add(int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, int64_t b_stride, float* c,
                  int64_t c_stride) {
  int64_t left = columns / V::lanes;
  for (int64_t strips = (left + Most - 1) / Most, column = 0; strips > 0; --strips) {
    const int vectors = static_cast<int>((left + strips - 1) / strips);
    for (int64_t r = 0; r < rows; r += Rows)
      multiply_add_strip<V, Rows, Most>(vectors, depth, Left{a.at(r, 0), a.stride}, b + column, b_stride,
                                        c + r * c_stride + column, c_stride);
    left -= vectors;
    column += vectors * V::lanes;
  }
}

}  // namespace
}  // namespace ndm
