// The sweep: the least |x|^2/2 - q x of each query over each tile of keys, in fp16 with fp32 sums (mma.sync).
//
// A warp holds 8 to 64 keys as matrix operands in registers while all queries pass through shared memory, so a
// key is read, centred, rounded and normed once. The sums start at minus the half norms, which the instruction
// takes as a separate operand: per element only one maximum is left to do.
#include <math_constants.h>

#include "common.cuh"

namespace ndm_cuda {
namespace {

constexpr int kWarps = 4;
constexpr float kHalfMax = 65504.0f;

__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&start)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(start[0]), "f"(start[1]), "f"(start[2]),
        "f"(start[3]));
}

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

// A key's coordinate, centred and scaled; 0 outside of the subspace and for rows that are not there.
__device__ inline float coordinate(const Sweep& a, int64_t row, int64_t column, int within, float scale) {
  if (row >= a.key_count || within >= a.width) return 0.0f;
  const float value = load(a.keys, a.key_type, row * a.key_stride + column + within);
  return (value - (a.origin ? a.origin[column + within] : 0.0f)) * scale;
}

__device__ inline __half saturated(float value) { return __float2half_rn(fminf(fmaxf(value, -kHalfMax), kHalfMax)); }

// Eight keys as the right operand of the product, and minus the half norms of keys 2 (lane % 4) and the next.
template <int kSteps>
__device__ void load_keys(const Sweep& a, int64_t first, int s, int lane, uint32_t (&operand)[kSteps][2], float (&start)[4]) {
  const int64_t row = first + lane / 4, column = int64_t(s) * a.width;
  const float scale = a.scales[s];
  float squared = 0.0f;
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float x = coordinate(a, row, column, step * 16 + (part / 2) * 8 + (lane % 4) * 2 + part % 2, scale);
      squared += x * x;
    }
  squared = sum_of_lanes(squared, 4);
  const bool usable = row < a.key_count && squared == squared;
  const float inverse = a.cosine ? inverse_norm(squared) : 1.0f;
  float rounded = 0.0f;
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int within = step * 16 + part * 8 + (lane % 4) * 2;
      const __half low = saturated(usable ? coordinate(a, row, column, within, scale) * inverse : 0.0f);
      const __half high = saturated(usable ? coordinate(a, row, column, within + 1, scale) * inverse : 0.0f);
      const __half2 both = __halves2half2(low, high);
      operand[step][part] = *reinterpret_cast<const uint32_t*>(&both);
      rounded += to_float(low) * to_float(low) + to_float(high) * to_float(high);
    }
  rounded = sum_of_lanes(rounded, 4);
  float minus_half_norm = -0.5f * rounded;
  // An error moves a unit vector e |x|^-1, and half a squared distance by at most twice that.
  if (a.cosine) minus_half_norm = inverse > 0 ? minus_half_norm + 2 * a.errors[s] * inverse : -0.5f;
  if (!usable) minus_half_norm = -CUDART_INF_F;
  const int source = (lane % 4) * 8;
  start[0] = start[2] = __shfl_sync(0xffffffffu, minus_half_norm, source);
  start[1] = start[3] = __shfl_sync(0xffffffffu, minus_half_norm, source + 4);
}

template <int kPadded, int kQueries>
__device__ void fetch(__half* to, const __half* from) {
  constexpr int kPieces = kPadded / 8;
  for (int i = threadIdx.x; i < kQueries * kPieces; i += kWarps * 32)
    copy_16_bytes(to + (i / kPieces) * (kPadded + 8) + i % kPieces * 8, from + int64_t(i) * 8);
  asm volatile("cp.async.commit_group;\n");
}

// Grid (tiles, S); kGroups groups of 8 keys a warp. Dynamic shared memory: two blocks of queries, rows padded by
// 16 bytes so that the eight rows of a matrix load fall on different banks.
template <int kPadded, int kGroups, int kQueries>
__global__ void __launch_bounds__(kWarps * 32, 4) sweep_kernel(const Sweep a) {
  extern __shared__ __align__(16) unsigned char shared[];
  __half* const buffer = reinterpret_cast<__half*>(shared);
  __shared__ float most[kWarps][kQueries];
  constexpr int kSteps = kPadded / 16, kRow = kPadded + 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, s = blockIdx.y;
  uint32_t keys[kGroups][kSteps][2];
  float start[kGroups][4];
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
    load_keys<kSteps>(a, (int64_t(blockIdx.x) * kWarps + warp) * kGroups * 8 + group * 8, s, lane, keys[group], start[group]);

  const __half* const packed = static_cast<const __half*>(a.packed) + int64_t(s) * a.query_slots * kPadded;
  fetch<kPadded, kQueries>(buffer, packed);
  for (int64_t first = 0, turn = 0; first < a.query_slots; first += kQueries, ++turn) {
    if (first + kQueries < a.query_slots) {
      fetch<kPadded, kQueries>(buffer + (turn + 1) % 2 * kQueries * kRow, packed + (first + kQueries) * kPadded);
      asm volatile("cp.async.wait_group 1;\n");
    } else {
      asm volatile("cp.async.wait_group 0;\n");
    }
    __syncthreads();
    const __half* const block = buffer + turn % 2 * kQueries * kRow + lane % 16 * kRow + lane / 16 * 8;
    for (int query = 0; query < kQueries; query += 16) {
      float sums[kGroups][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t part[4];
        load_matrix(part, block + query * kRow + step * 16);
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
          multiply(sums[group], part, keys[group][step], step ? sums[group] : start[group]);
      }
      float low = -CUDART_INF_F, high = -CUDART_INF_F;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        low = fmaxf(low, fmaxf(sums[group][0], sums[group][1]));
        high = fmaxf(high, fmaxf(sums[group][2], sums[group][3]));
      }
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        low = fmaxf(low, __shfl_xor_sync(0xffffffffu, low, step));
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, step));
      }
      if (lane % 4 == 0) {
        most[warp][query + lane / 4] = low;
        most[warp][query + lane / 4 + 8] = high;
      }
    }
    __syncthreads();
    const int query = threadIdx.x;
    if (query < kQueries && first + query < a.query_count) {
      float value = most[0][query];
      for (int other = 1; other < kWarps; ++other) value = fmaxf(value, most[other][query]);
      a.minima[(s * a.query_count + first + query) * gridDim.x + blockIdx.x] = -value;
    }
  }
}

template <int kPadded, int kGroups, int kQueries>
const char* launch(const Sweep& a, cudaStream_t stream) {
  static_assert(kQueries <= kWarps * 32);
  const auto kernel = sweep_kernel<kPadded, kGroups, kQueries>;
  const int bytes = 2 * kQueries * (kPadded + 8) * int(sizeof(__half));
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t tile = kWarps * kGroups * 8;
  const dim3 grid(unsigned((a.key_count + tile - 1) / tile), unsigned(a.subspaces));
  kernel<<<grid, kWarps * 32, bytes, stream>>>(a);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int tile_keys(int padded) {
  switch (padded) {
    case 16:
    case 32: return kWarps * 64;
    case 48:
    case 64:
    case 80:
    case 96:
    case 128: return kWarps * 32;
    case 256: return kWarps * 16;
    case 512: return kWarps * 8;
    default: return 0;
  }
}

const char* sweep(const Sweep& a, void* queue) {
  const auto stream = static_cast<cudaStream_t>(queue);
  switch (a.padded) {
    case 16: return launch<16, 8, 64>(a, stream);
    case 32: return launch<32, 8, 64>(a, stream);
    case 48: return launch<48, 4, 64>(a, stream);
    case 64: return launch<64, 4, 64>(a, stream);
    case 80: return launch<80, 4, 64>(a, stream);
    case 96: return launch<96, 4, 64>(a, stream);
    case 128: return launch<128, 4, 64>(a, stream);
    case 256: return launch<256, 2, 32>(a, stream);
    case 512: return launch<512, 1, 32>(a, stream);
    default: return "no kernel for this width";
  }
}

}  // namespace ndm_cuda
