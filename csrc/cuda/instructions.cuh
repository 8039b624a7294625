// What has no name in CUDA C++: matrix units, asynchronous copies, dynamic shared memory. csrc/tests/cuda_on_cpu.h has the same
// for a CPU.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace ndm_cuda {

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// sum = a b + start: 16 x 16 fp16 times 16 x 8, in fp32.
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&start)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(start[0]), "f"(start[1]), "f"(start[2]),
        "f"(start[3]));
}

// Four 8 x 8 matrices of fp16; lane i names the row i % 8 of matrix i / 8.
__device__ inline void load_matrix(uint32_t (&a)[4], const __half* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address));
}

__device__ inline void copy_16_bytes(__half* to, const __half* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(address), "l"(from));
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n"); }

// Until at most so many groups of this thread's copies are under way.
template <int kGroups>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups));
}

}  // namespace ndm_cuda
