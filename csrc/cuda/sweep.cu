// The sweep: the least |x|^2/2 - q x of each query over each tile of keys, in fp16 with fp32 sums (mma.sync).
//
// A warp holds 8 to 64 keys as matrix operands in registers while all queries pass through shared memory, so a
// key is read, centred, rounded and normed once. The sums start at minus the half norms, which the instruction
// takes as a separate operand: per element only one maximum is left to do.
#include "common.cuh"

namespace ndm_cuda {
namespace {

constexpr int kWarps = 4;
constexpr float kHalfMax = 65504.0f;

// Two neighboring coordinates of a key, centred and scaled; 0 outside of the subspace and for rows that are not there.
template <class T>
__device__ inline float2 coordinates(const Sweep& a, int64_t row, int64_t column, int within, float scale) {
  float2 pair = {0.0f, 0.0f};
  if (row >= a.key_count || within >= a.width) return pair;
  const T* const at = static_cast<const T*>(a.keys) + row * a.key_stride + column + within;
  const bool both = within + 1 < a.width;
  if (a.paired) {
    pair = to_floats(*reinterpret_cast<const PairOf<T>*>(at));
  } else {
    pair.x = to_float(at[0]);
    if (both) pair.y = to_float(at[1]);
  }
  if (a.origin) {
    pair.x -= a.origin[column + within];
    if (both) pair.y -= a.origin[column + within + 1];
  }
  pair.x *= scale;
  pair.y *= scale;
  return pair;
}

__device__ inline __half saturated(float value) { return __float2half_rn(fminf(fmaxf(value, -kHalfMax), kHalfMax)); }

// 1 / |x| of the key that four lanes hold together.
template <class T, int kSteps>
__device__ float inverse_norm_of_key(const Sweep& a, int64_t row, int64_t column, int lane, float scale) {
  float squared = 0.0f;
  for (int within = lane % 4 * 2; within < kSteps * 16; within += 8) {
    const float2 x = coordinates<T>(a, row, column, within, scale);
    squared += x.x * x.x + x.y * x.y;
  }
  return inverse_norm(sum_of_lanes(squared, 4));
}

// Eight keys as the right operand of the product, and minus the half norms of keys 2 (lane % 4) and the next.
template <class T, int kSteps>
__device__ void load_keys(const Sweep& a, int64_t first, int s, int lane, uint32_t (&operand)[kSteps][2], float (&start)[4]) {
  const int64_t row = first + lane / 4, column = int64_t(s) * a.width;
  const float scale = a.scales[s];
  const float inverse = a.cosine ? inverse_norm_of_key<T, kSteps>(a, row, column, lane, scale) : 1.0f;
  float rounded = 0.0f, as_given = 0.0f;
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const float2 x = coordinates<T>(a, row, column, step * 16 + part * 8 + lane % 4 * 2, scale);
      const __half low = saturated(x.x * inverse), high = saturated(x.y * inverse);
      const __half2 both = __halves2half2(low, high);
      memcpy(&operand[step][part], &both, sizeof both);
      rounded += to_float(low) * to_float(low) + to_float(high) * to_float(high);
      as_given += x.x * x.x + x.y * x.y;
    }
  rounded = sum_of_lanes(rounded, 4);
  as_given = sum_of_lanes(as_given, 4);
  float minus_half_norm = -0.5f * rounded;
  // An error moves a unit vector e |x|^-1, and half a squared distance by at most twice that.
  if (a.cosine) minus_half_norm = inverse > 0 ? minus_half_norm + 2 * a.errors[s] * inverse : -0.5f;
  // NaN has been saturated above, so that the products are finite and the infinite norm stays.
  if (row >= a.key_count || as_given != as_given) minus_half_norm = -CUDART_INF_F;
  const int source = lane % 4 * 8;
  start[0] = start[2] = __shfl_sync(0xffffffffu, minus_half_norm, source);
  start[1] = start[3] = __shfl_sync(0xffffffffu, minus_half_norm, source + 4);
}

template <int kPadded, int kQueries>
__device__ void fetch(__half* to, const __half* from) {
  constexpr int kPieces = kPadded / 8;
  for (int i = threadIdx.x; i < kQueries * kPieces; i += kWarps * 32)
    copy_16_bytes(to + (i / kPieces) * (kPadded + 8) + i % kPieces * 8, from + int64_t(i) * 8);
  commit_copies();
}

// Grid (tiles, S); kGroups groups of 8 keys a warp. Shared memory: two blocks of queries, rows padded by 16 bytes so that
// the eight rows of a matrix load fall on different banks, and each warp's maxima.
template <class T, int kPadded, int kGroups, int kQueries>
__global__ void __launch_bounds__(kWarps * 32, 4) sweep_kernel(Sweep a) {
  constexpr int kSteps = kPadded / 16, kRow = kPadded + 8;
  __half* const buffer = reinterpret_cast<__half*>(shared_memory());
  float* const most = reinterpret_cast<float*>(buffer + 2 * kQueries * kRow);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, s = blockIdx.y;
  uint32_t keys[kGroups][kSteps][2];
  float start[kGroups][4];
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
    load_keys<T, kSteps>(a, (int64_t(blockIdx.x) * kWarps + warp) * kGroups * 8 + group * 8, s, lane, keys[group], start[group]);

  const __half* const packed = static_cast<const __half*>(a.packed) + int64_t(s) * a.query_slots * kPadded;
  fetch<kPadded, kQueries>(buffer, packed);
  for (int64_t first = 0, turn = 0; first < a.query_slots; first += kQueries, ++turn) {
    if (first + kQueries < a.query_slots) {
      fetch<kPadded, kQueries>(buffer + (turn + 1) % 2 * kQueries * kRow, packed + (first + kQueries) * kPadded);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
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
        most[warp * kQueries + query + lane / 4] = low;
        most[warp * kQueries + query + lane / 4 + 8] = high;
      }
    }
    __syncthreads();
    const int query = threadIdx.x;
    if (query < kQueries && first + query < a.query_count) {
      float value = most[query];
      for (int other = 1; other < kWarps; ++other) value = fmaxf(value, most[other * kQueries + query]);
      a.minima[(s * a.query_count + first + query) * gridDim.x + blockIdx.x] = -value;
    }
  }
}

template <int kPadded, int kGroups, int kQueries>
const char* start_sweep(const Sweep& a, void* stream) {
  static_assert(kQueries <= kWarps * 32);
  const int bytes = 2 * kQueries * (kPadded + 8) * int(sizeof(__half)) + kWarps * kQueries * int(sizeof(float));
  const int64_t tile = kWarps * kGroups * 8;
  const dim3 grid(unsigned((a.key_count + tile - 1) / tile), unsigned(a.subspaces));
  const auto kernel = a.key_type == Type::f16    ? sweep_kernel<__half, kPadded, kGroups, kQueries>
                      : a.key_type == Type::bf16 ? sweep_kernel<__nv_bfloat16, kPadded, kGroups, kQueries>
                                                 : sweep_kernel<float, kPadded, kGroups, kQueries>;
  return launch(kernel, grid, kWarps * 32, bytes, stream, a);
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

const char* sweep(const Sweep& a, void* stream) {
  switch (a.padded) {
    case 16: return start_sweep<16, 8, 64>(a, stream);
    case 32: return start_sweep<32, 8, 64>(a, stream);
    case 48: return start_sweep<48, 4, 64>(a, stream);
    case 64: return start_sweep<64, 4, 64>(a, stream);
    case 80: return start_sweep<80, 4, 64>(a, stream);
    case 96: return start_sweep<96, 4, 64>(a, stream);
    case 128: return start_sweep<128, 4, 64>(a, stream);
    case 256: return start_sweep<256, 2, 32>(a, stream);
    case 512: return start_sweep<512, 1, 32>(a, stream);
    default: return "no kernel for this width";
  }
}

}  // namespace ndm_cuda
