// Kernels for any target: GCC/clang vector extensions, no instruction set beyond the platform's own.
#include "types.h"

#include "vector_portable.h"

#include "gradient_kernel.h"
#include "ksg_kernel.h"
#include "lie_kernel.h"
#include "product_kernel.h"
#include "search_rerank.h"
#include "search_shadow.h"

namespace ndm {

// A lane group is two registers here: 2 x 4 accumulators of 16 on SSE2, 4 x 4 of 32 on NEON.
#if defined(__aarch64__)
constexpr int kBlock = 4;
#else
constexpr int kBlock = 2;
#endif

const Kernels* portable_kernels() {
  static const Kernels kernels = {"portable", kBlock, {pack_queries<kBlock, Fp32>, sweep_tile<Vec8, kBlock, Fp32>},
                                  {},         {pack_shadow_queries<kBlock>, sweep_shadow_tile<Vec8, kBlock>}, rerank<Vec8>, ksg_kernels<Vec8, kBlock, 2>(),
                                  gradient_kernels<Vec8, kBlock, 2>(), lie_update<Vec8>, product_kernels<Vec8, kBlock>()};
  return &kernels;
}

}  // namespace ndm
