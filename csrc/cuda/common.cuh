// Loads of any element type, reductions over lanes, and checked launches.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

#include "instructions.cuh"
#else  // tests without a GPU
#include "../tests/cuda_on_cpu.h"
#endif
#include "search.h"

namespace ndm_cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Two neighbors, loaded at once.
template <class T>
struct TypeOfPair;
template <>
struct TypeOfPair<float> {
  using type = float2;
};
template <>
struct TypeOfPair<__half> {
  using type = __half2;
};
template <>
struct TypeOfPair<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <class T>
using PairOf = typename TypeOfPair<T>::type;

template <class Pair>
__device__ inline float2 to_floats(Pair pair) {
  return {to_float(pair.x), to_float(pair.y)};
}

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

// Queues a kernel; what went wrong, or null.
template <class... Arguments>
const char* launch(void (*kernel)(Arguments...), dim3 grid, int threads, int shared_bytes, void* stream,
                   const Arguments&... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ndm_cuda
