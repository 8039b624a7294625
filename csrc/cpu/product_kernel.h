// Matrix product in fp32, of rows that may be half precision and have an origin: what a rotation is.
//
// Formula   out = factor * base + scale * (left - origin) right.
// Layout    right is packed once, as panels [columns / 2 vectors][depth][2 vectors of lanes]. left is packed in blocks of
//           rows, cut into slabs of depth: [block][slab][row][depth of the slab], or where it lies transposed
//           [block][slab][depth of the slab][row], so that both packs copy runs. Every address in the micro-kernel
//           is then one register and a constant.
// Mapping   row block x 2 vectors of accumulators. A slab of a panel stays in the first-level cache while the rows of an
//           item pass by, their slabs in the second level. An item is a group of row blocks and of panels.
// Order     A sum is of slabs, each added up from 0, whoever works: the result depends neither on the number of threads
//           nor on which other rows there are.
// Limit     the FMA units: 12 broadcasts and 2 loads of right for 24 FMA.
// Gained    MKL keeps to AVX2 on processors that are not Intel's: on a Zen 5 this takes half of its time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "rows.h"
#include "types.h"

namespace ndm {
namespace {

// Columns [2 lanes panel, ...) of right, zeros beyond the last.
template <class V>
void pack_right(const Product& a, int64_t panel) {
  constexpr int64_t size = 2 * V::lanes;
  float* out = a.packed_right + panel * a.depth * size;
  const int64_t column = panel * size, count = std::min(size, a.columns - column);
  for (int64_t k = 0; k < a.depth; ++k, out += size) {
    std::memcpy(out, a.right + k * a.right_stride + column, static_cast<size_t>(count) * 4);
    std::fill(out + count, out + size, 0.0f);
  }
}

// One row of a slab: centred and scaled in place; adds to the sum of squares, before scaling.
template <class V>
void centre_run(const float* origin, float scale, int64_t count, float* run, double* squared) {
  const V factor = V::set1(scale), zero = V::set1(0);
  V sum = zero;
  int64_t j = 0;
  for (; j + V::lanes <= count; j += V::lanes) {
    V x = V::load(run + j);
    if (origin) x = x - V::load(origin + j);
    sum = V::fma(x, x, sum);
    (x * factor).store(run + j);
  }
  float lanes[V::lanes];
  sum.store(lanes);
  for (float lane : lanes) *squared += lane;
  for (; j < count; ++j) {
    const float x = run[j] - (origin ? origin[j] : 0.0f);
    *squared += x * x;
    run[j] = x * scale;
  }
}

// Block rows of left from row `block` * Block on, and their norms; rows past the end are 0.
template <class V, int Block>
void pack_left(const Product& a, int64_t block) {
  float* out = a.packed_left + (block - a.first_block) * a.slabs() * Block * kProductDepth;
  const int64_t first = block * Block, count = std::min<int64_t>(Block, a.rows - first);
  double squared[Block] = {};
  for (int64_t from = 0; from < a.depth; from += kProductDepth, out += Block * kProductDepth) {
    const int64_t depth = std::min<int64_t>(kProductDepth, a.depth - from);
    if (a.transposed) {
      const float* row = static_cast<const float*>(a.left.data) + from * a.left.stride + first;
      for (int64_t k = 0; k < depth; ++k, row += a.left.stride)
        for (int m = 0; m < Block; ++m) out[k * Block + m] = m < count ? a.scale * row[m] : 0.0f;
      continue;
    }
    for (int64_t m = 0; m < count; ++m) {
      read_row(a.left, first + m, from, depth, out + m * kProductDepth);
      centre_run<V>(a.origin ? a.origin + from : nullptr, a.scale, depth, out + m * kProductDepth, squared + m);
    }
    for (int64_t m = count; m < Block; ++m) std::fill_n(out + m * kProductDepth, depth, 0.0f);
  }
  if (a.norms)
    for (int64_t m = 0; m < count; ++m) a.norms[first + m] = static_cast<float>(std::sqrt(squared[m]));
}

// out [Block][2 vectors] = factor * base + left right over one slab; a null base is 0.
template <class V, int Block, bool Transposed>
void multiply_slab(int64_t depth, const float* left, const float* right, const float* base, int64_t base_stride,
                   float factor, float* out, int64_t stride) {
  V sum0[Block], sum1[Block];
  for (int m = 0; m < Block; ++m) sum0[m] = sum1[m] = V::set1(0);
  for (int64_t k = 0; k < depth; ++k) {
    const V right0 = V::load(right), right1 = V::load(right + V::lanes);
    for (int m = 0; m < Block; ++m) {
      const V x = V::set1(left[Transposed ? m : m * kProductDepth]);
      sum0[m] = V::fma(x, right0, sum0[m]);
      sum1[m] = V::fma(x, right1, sum1[m]);
    }
    left += Transposed ? Block : 1;
    right += 2 * V::lanes;
  }
  const V share = V::set1(factor);
  for (int m = 0; m < Block; ++m, out += stride) {
    if (base) {
      sum0[m] = V::fma(share, V::load(base), sum0[m]);
      sum1[m] = V::fma(share, V::load(base + V::lanes), sum1[m]);
      base += base_stride;
    }
    sum0[m].store(out);
    sum1[m].store(out + V::lanes);
  }
}

// The same for `rows` rows and `columns` columns at the edge of out.
template <class V, int Block, bool Transposed>
void multiply_edge(int64_t rows, int64_t columns, int64_t depth, const float* left, const float* right,
                   const float* base, int64_t base_stride, float factor, float* out, int64_t stride) {
  alignas(64) float whole[Block * 2 * V::lanes];
  multiply_slab<V, Block, Transposed>(depth, left, right, nullptr, 0, 0, whole, 2 * V::lanes);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t j = 0; j < columns; ++j) {
      const float sum = whole[m * 2 * V::lanes + j];
      out[m * stride + j] = base ? factor * base[m * base_stride + j] + sum : sum;
    }
}

// Row blocks [first, last) times panels [first_panel, last_panel).
template <class V, int Block, bool Transposed>
void multiply_blocks(const Product& a, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel) {
  constexpr int64_t size = 2 * V::lanes;
  for (int64_t slab = 0; slab < a.slabs(); ++slab) {
    const int64_t from = slab * kProductDepth, depth = std::min<int64_t>(kProductDepth, a.depth - from);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const float* right = a.packed_right + (panel * a.depth + from) * size;
      const int64_t column = panel * size, columns = std::min(size, a.columns - column);
      for (int64_t block = first; block < last; ++block) {
        const int64_t row = block * Block, rows = std::min<int64_t>(Block, a.rows - row);
        const float* left = a.packed_left + ((block - a.first_block) * a.slabs() + slab) * Block * kProductDepth;
        float* out = a.out + row * a.out_stride + column;
        const float* base = slab ? out : a.base ? a.base + row * a.base_stride + column : nullptr;
        const int64_t base_stride = slab ? a.out_stride : a.base_stride;
        const float factor = slab ? 1.0f : a.factor;
        if (rows == Block && columns == size)
          multiply_slab<V, Block, Transposed>(depth, left, right, base, base_stride, factor, out, a.out_stride);
        else
          multiply_edge<V, Block, Transposed>(rows, columns, depth, left, right, base, base_stride, factor, out,
                                              a.out_stride);
      }
    }
  }
}

template <class V, int Block>
void multiply(const Product& a, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel) {
  if (a.transposed) multiply_blocks<V, Block, true>(a, first, last, first_panel, last_panel);
  else multiply_blocks<V, Block, false>(a, first, last, first_panel, last_panel);
}

template <class V, int Block>
constexpr ProductKernels product_kernels() {
  return {Block, 2 * V::lanes, pack_right<V>, pack_left<V, Block>, multiply<V, Block>};
}

}  // namespace
}  // namespace ndm
