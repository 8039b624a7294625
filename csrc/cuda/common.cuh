// Loads of any element type, and reductions over lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "search.h"

namespace ndm_cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline float load(const void* rows, Type type, int64_t at) {
  switch (type) {
    case Type::f16: return to_float(static_cast<const __half*>(rows)[at]);
    case Type::bf16: return to_float(static_cast<const __nv_bfloat16*>(rows)[at]);
    default: return static_cast<const float*>(rows)[at];
  }
}

template <class T>
__device__ T sum_of_lanes(T value, int lanes = 32) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <class T>
__device__ T inverse_norm(T squared) {
  return squared > 0 ? T(1) / sqrt(squared) : T(0);
}

}  // namespace ndm_cuda
