// The ops of an optimiser step: their scratch, and their items over threads.
#include <atomic>

#include "driver.h"
#include "parallel.h"
#include "scratch.h"

namespace ndm {
namespace {

// Dynamic shares, each thread with its own scratch of `floats`.
template <class F>
void share(int threads, int64_t items, int64_t floats, F&& work) {
  const int64_t each = ceil_div(floats, 16) * 16;
  Aligned<float> scratch(each * threads);
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int thread) {
    for (int64_t item; (item = next.fetch_add(1)) < items;) work(item, scratch.get() + each * thread);
  });
}

}  // namespace

void mean_distance_gradient(const Gradient& a, const Kernels& kernels, int threads) {
  const int64_t lanes = kernels.gradient.lanes, rows = kernels.gradient.row_block;
  const int64_t padded = ceil_div(widest(a.offsets, a.subspaces), lanes) * lanes;
  // As in GradientScratch.
  const int64_t floats = (kGradientQueries + rows) * (a.width + padded) + rows +
                         (kGradientDepth + kGradientRows + rows) * padded + a.width;
  share(threads, a.subspaces, floats, [&](int64_t s, float* scratch) { kernels.gradient.gradient(a, s, scratch); });
}

void lie_update(const LieUpdate& a, const Kernels& kernels, int threads) {
  share(threads, ceil_div(a.width, kLieTile), kLieTile * (kLieTile + 1),
        [&](int64_t item, float* scratch) { kernels.lie_update(a, item * kLieTile, scratch); });
}

}  // namespace ndm
