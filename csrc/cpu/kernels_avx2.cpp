// Kernels for AVX2 + FMA + F16C. Compiled with those flags on x86-64 only; never called elsewhere.
#include "types.h"

#if defined(__AVX2__) && defined(__FMA__)

#include "vector_avx2.h"

#include "gradient_kernel.h"
#include "ksg_kernel.h"
#include "lie_kernel.h"
#include "product_kernel.h"
#include "search_rerank.h"
#include "search_shadow.h"

namespace ndm {

// 6 x 2 accumulators + 2 keys + 1 query: 15 of 16 registers.
const Kernels* avx2_kernels() {
  static const Kernels kernels = {"avx2",   6,        {pack_queries<6, Fp32>, sweep_tile<Vec8, 6, Fp32>},
                                  {},       {pack_shadow_queries<6>, sweep_shadow_tile<Vec8, 6>}, rerank<Vec8>, ksg_kernels<Vec8, 6, 2>(),
                                  gradient_kernels<Vec8, 6, 2>(), lie_update<Vec8>, product_kernels<Vec8, 6>()};
  return &kernels;
}

}  // namespace ndm

#else

namespace ndm {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace ndm

#endif
