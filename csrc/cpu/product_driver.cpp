// A product over threads: packs right once, then left by as many rows as fit, and multiplies.
#include <algorithm>

#include "driver.h"
#include "parallel.h"
#include "scratch.h"

namespace ndm {
namespace {

constexpr int64_t kLeftFloats = 2 << 20;  // packed rows of left at once: 8 MB
constexpr int64_t kMostBlocks = 16, kMostPanels = 8;

// Row blocks and panels of an item: large enough to use what is packed often, small enough that all threads get some.
struct Grain {
  int64_t blocks, panels;
  Grain(int64_t all_blocks, int64_t all_panels, int threads) : blocks(kMostBlocks), panels(kMostPanels) {
    const auto items = [&] { return ceil_div(all_blocks, blocks) * ceil_div(all_panels, panels); };
    while (blocks > 4 && items() < 4 * threads) blocks /= 2;
    while (panels > 2 && items() < 4 * threads) panels /= 2;
  }
};

}  // namespace

void product(Product a, const Kernels& kernels, int threads) {
  const ProductKernels& with = kernels.product;
  const int64_t panels = ceil_div(a.columns, with.panel), blocks = ceil_div(a.rows, with.row_block);
  const int64_t block_floats = a.slabs() * with.row_block * kProductDepth;
  const int64_t most = std::min(blocks, std::max<int64_t>(kMostBlocks, kLeftFloats / block_floats));
  Aligned<float> right(panels * with.panel * a.depth), left(most * block_floats);
  a.packed_right = right.get();
  a.packed_left = left.get();
  share(threads, panels, [&](int64_t panel, int) { with.pack_right(a, panel); });
  for (a.first_block = 0; a.first_block < blocks; a.first_block += most) {
    const int64_t here = std::min(most, blocks - a.first_block);
    share(threads, here, [&](int64_t block, int) { with.pack_left(a, a.first_block + block); });
    const Grain grain(here, panels, threads);
    const int64_t groups = ceil_div(here, grain.blocks);
    share(threads, groups * ceil_div(panels, grain.panels), [&](int64_t item, int) {
      const int64_t block = item % groups * grain.blocks, panel = item / groups * grain.panels;
      with.multiply(a, a.first_block + block, a.first_block + std::min(here, block + grain.blocks), panel,
                    std::min(panels, panel + grain.panels));
    });
  }
}

}  // namespace ndm
