// Kernels for AVX-512 F/BW/VL. Compiled with those flags where the compiler has them.
// The eight-lane parts (transposes, minima of groups, fp64) are the AVX2 code under this file's flags.
#include "types.h"

#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BW__)

#include "vector_avx512.h"

#include "gradient_kernel.h"
#include "ksg_kernel.h"
#include "lie_kernel.h"
#include "product_kernel.h"
#include "search_rerank.h"
#include "search_shadow.h"

namespace ndm {

// 12 x 2 accumulators + 2 keys + 1 query: 27 of 32 registers.
const Kernels* avx512_kernels() {
  static const Kernels kernels = {"avx512", 12,       {pack_queries<12, Fp32>, sweep_tile<Vec16, 12, Fp32>},
                                  {},       {pack_shadow_queries<12>, sweep_shadow_tile<Vec16, 12>}, rerank<Vec16>, ksg_kernels<Vec16, 6, 4>(),
                                  gradient_kernels<Vec16, 8, 3>(), lie_update<Vec16>, product_kernels<Vec16, 12>()};
  return &kernels;
}

}  // namespace ndm

#else

namespace ndm {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace ndm

#endif
