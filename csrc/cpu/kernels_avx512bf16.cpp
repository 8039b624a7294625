// AVX-512 with the proposal pass in bf16 (Cooper Lake, Sapphire Rapids, Zen 4 and later).
#include "types.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BW__)

#include "vector_avx512bf16.h"

#include "gradient_kernel.h"
#include "ksg_kernel.h"
#include "lie_kernel.h"
#include "product_kernel.h"
#include "search_rerank.h"
#include "search_shadow.h"

namespace ndm {

const Kernels* avx512bf16_kernels() {
  static const Kernels kernels = {"avx512bf16", 12, {pack_queries<12, Fp32>, sweep_tile<Vec16, 12, Fp32>},
                                  {pack_queries<12, Bf16Pairs>, sweep_tile<Vec16, 12, Bf16Pairs>},
                                  {pack_shadow_queries<12>, sweep_shadow_tile<Vec16, 12>}, rerank<Vec16>, ksg_kernels<Vec16, 6, 4>(),
                                  gradient_kernels<Vec16, 8, 3>(), lie_update<Vec16>, product_kernels<Vec16, 12>()};
  return &kernels;
}

}  // namespace ndm

#else

namespace ndm {
const Kernels* avx512bf16_kernels() { return nullptr; }
}  // namespace ndm

#endif
