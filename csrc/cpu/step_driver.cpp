// The ops of an optimiser step: their scratch, and their items over threads.
#include "driver.h"
#include "parallel.h"
#include "scratch.h"

namespace ndm {
namespace {

// Every thread has its own scratch of `floats`.
template <class F>
void share_with_scratch(int threads, int64_t items, int64_t floats, F&& work) {
  const int64_t each = ceil_div(floats, 16) * 16;
  Aligned<float> scratch(each * threads);
  share(threads, items, [&](int64_t item, int thread) { work(item, scratch.get() + each * thread); });
}

}  // namespace

void mean_distance_gradient(const Gradient& a, const Kernels& kernels, int threads) {
  const int64_t lanes = kernels.gradient.lanes, rows = kernels.gradient.row_block;
  const int64_t padded = ceil_div(widest(a.offsets, a.subspaces), lanes) * lanes;
  // As in GradientScratch.
  const int64_t floats = (kGradientQueries + rows) * (a.width + padded) + rows +
                         (kGradientDepth + kGradientRows + rows) * padded + a.width;
  share_with_scratch(threads, a.subspaces, floats,
                     [&](int64_t s, float* scratch) { kernels.gradient.gradient(a, s, scratch); });
}

void lie_update(const LieUpdate& a, const Kernels& kernels, int threads) {
  share_with_scratch(threads, ceil_div(a.width, kLieTile), kLieTile * (kLieTile + 1),
                     [&](int64_t item, float* scratch) { kernels.lie_update(a, item * kLieTile, scratch); });
}

}  // namespace ndm
