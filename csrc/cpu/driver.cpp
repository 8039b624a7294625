#include "driver.h"

#include <algorithm>
#include <limits>

#include "parallel.h"
#include "scratch.h"

namespace ndm {
namespace {

constexpr int64_t kMinimaBytes = 16 << 20;   // group minima of one round
constexpr int64_t kFewCrowded = 32;  // 1 in so many queries

// Floats that sweep_tile and rerank need for one thread (layouts are written there).
int64_t search_scratch_floats(const Search& a) {
  const int64_t p = widest(a.offsets, a.subspaces);
  int64_t packed = 0;
  for (int64_t s = 0; s < a.subspaces; ++s) {
    const int64_t width = a.offsets[s + 1] - a.offsets[s];
    packed = std::max(packed, pack_size(width, a.tile) * (width + (a.shadows ? 1 : 0)));
  }
  const int64_t plain = a.bf16 ? 32 * a.width : 0;
  const int64_t sweep = kMaxPack + 8 * a.width + 16 + plain + packed;
  const int64_t rerank = 2 * (4 * a.width + 16 * p) + a.width;
  return ceil_div(std::max(sweep, rerank), 16) * 16;
}

// Enough tiles to find the nearest key again quickly, few enough that the minima stay small.
int64_t tile_size(int64_t keys, int64_t average_width) {
  int64_t tile = std::max(64, pack_size(average_width, kMaxPack));
  while (keys > 256 * tile) tile *= 2;
  return tile;
}

// One search on one set of kernels: all that its phases share.
class SearchRun {
 public:
  SearchRun(const Search& search, const Kernels& kernels, int threads)
      : kernels_(kernels), threads_(threads), each_(search_scratch_floats(search)), scratch_(each_ * threads) {}

  void pack(const Search& a, int64_t first, int64_t last) {
    share(last - first, [&](int64_t item, float*) { proposal(a).pack_queries(a, first + item); });
  }
  // Subspaces a.first .. a.last - 1.
  void sweep(const Search& a) {
    share(a.tiles, [&](int64_t tile, float* scratch) { proposal(a).sweep(a, tile, scratch); });
  }
  void rerank(const Search& a) {
    const int64_t blocks = ceil_div(a.queries, kRerankQueries);
    share(blocks * (a.last - a.first), [&](int64_t item, float* scratch) {
      const int64_t q = item % blocks * kRerankQueries;
      kernels_.rerank(a, a.first + item / blocks, q, std::min(q + kRerankQueries, a.queries), scratch);
    });
  }
  // Queries of a subspace that its bf16 sweep left open: a few are read in full, many are swept again in fp32.
  void settle_crowded(Search a, int64_t s) {
    uint8_t* crowded = a.crowded + (s - a.first) * a.queries;
    const int64_t count = std::count(crowded, crowded + a.queries, 1);
    if (!count) return;
    a.minima += (s - a.first) * a.tiles * a.padded * kGroups;
    a.crowded = crowded;
    a.first = s;
    a.last = s + 1;
    if (count * kFewCrowded <= a.queries) {
      a.crowded_only = true;
    } else {
      a.bf16 = false;
      pack(a, s, s + 1);
      sweep(a);
    }
    rerank(a);
  }

 private:
  const Proposal& proposal(const Search& a) const {
    return a.shadows ? kernels_.shadow : a.bf16 ? kernels_.bf16 : kernels_.fp32;
  }

  template <class F>
  void share(int64_t items, F&& work) {
    ndm::share(threads_, items, [&](int64_t item, int thread) { work(item, scratch_.get() + each_ * thread); });
  }

  const Kernels& kernels_;
  int threads_;
  int64_t each_;
  Aligned<float> scratch_;
};

}  // namespace

void nearest_neighbors(Search a, const Kernels& kernels, int threads) {
  // Cosine scores take all rows for unit vectors, which rounded ones are not.
  a.bf16 = a.bf16 && !a.shadows && kernels.bf16.sweep && !a.cosine;
  if (!a.swept_keys.data) a.swept_keys = a.rotated_keys;
  a.tile = tile_size(a.keys, a.width / a.subspaces);
  a.tiles = ceil_div(a.keys, a.tile);
  a.padded = ceil_div(a.queries, kernels.query_block) * kernels.query_block;
  const int64_t per_subspace = a.tiles * a.padded * kGroups;
  const int64_t at_once = std::clamp<int64_t>(kMinimaBytes / (per_subspace * 4), 1, a.subspaces);
  Aligned<float> packed_queries(a.padded * (a.width + (a.shadows ? kShadows * a.subspaces : 0))), query_norm(a.subspaces * a.padded);
  Aligned<float> minima(at_once * per_subspace);
  Aligned<float> group_norm(a.subspaces * a.tiles * kGroups), group_error(a.subspaces * a.tiles * kGroups);
  Aligned<uint8_t> irregular(a.subspaces * a.tiles);
  Aligned<float> query_rounding(a.subspaces * a.padded);
  Aligned<uint8_t> crowded(at_once * a.queries);
  Aligned<float> nearest_score(a.shadows ? a.subspaces * a.padded : 0);
  Aligned<float> shadow_costs(a.shadows ? a.subspaces * kShadows : 0);
  SearchRun run(a, kernels, threads);
  a.packed_queries = packed_queries.get();
  a.query_norm = query_norm.get();
  a.minima = minima.get();
  a.group_norm = group_norm.get();
  a.group_error = group_error.get();
  a.irregular = irregular.get();
  a.query_rounding = query_rounding.get();
  a.crowded = crowded.get();
  if (a.shadows) {
    a.nearest_score = nearest_score.get();
    a.shadow_costs = shadow_costs.get();
    std::fill(a.nearest_score, a.nearest_score + a.subspaces * a.padded, std::numeric_limits<float>::infinity());
    std::fill(a.shadow_costs, a.shadow_costs + a.subspaces * kShadows, 0.0f);
  }

  run.pack(a, 0, a.subspaces);
  for (a.first = 0; a.first < a.subspaces; a.first = a.last) {
    a.last = std::min(a.first + at_once, a.subspaces);
    std::fill(a.crowded, a.crowded + (a.last - a.first) * a.queries, uint8_t{0});
    run.sweep(a);
    run.rerank(a);
    if (a.bf16)
      for (int64_t s = a.first; s < a.last; ++s) run.settle_crowded(a, s);
  }
}

}  // namespace ndm
