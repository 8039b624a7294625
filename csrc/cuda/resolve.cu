// The search that decides: one warp for each query and subspace visits tiles in the order of their least value,
// until none can hold a nearer key (kernels/sweep.py has the bound). Ties go to the lowest index.
#include "common.cuh"

namespace ndm_cuda {
namespace {

constexpr int kMostRows = 8;  // of a tile, a lane
constexpr int64_t kNoRow = INT64_MAX;

// The least value over all lanes, and the lowest row that has it.
template <class T>
__device__ void least_of_lanes(T& value, int64_t& row) {
  for (int step = 16; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, step);
    const int64_t other_row = __shfl_xor_sync(0xffffffffu, row, step);
    if (other < value || (other == value && other_row < row)) {
      value = other;
      row = other_row;
    }
  }
}

__device__ float threshold(const Resolve& a, float reach, float size, float half_norm, float error) {
  const float around = 2 * size + reach;
  const float far = reach + a.rounding * around + a.absolute + (a.sweep.cosine ? 0.0f : error);
  // fp32 accumulation in the tensor cores, which may truncate, and of the norms.
  const float accumulation = (a.sweep.width / 8.0f + 8.0f) * 1.2e-7f;
  return 0.5f * far * far - half_norm + accumulation * around * around;
}

__device__ float reach_of(double best, float scale, bool cosine) {
  return cosine ? float(sqrt(2 * fmax(best, 0.0))) : float(sqrt(best) * scale);
}

// Squared distance, or 1 - cos, of a rotated key in fp64; by one lane.
__device__ double exact_rotated(const Resolve& a, int64_t row, int64_t column, const double* query, double norm) {
  double dot = 0, squared = 0;
  for (int i = 0; i < a.sweep.width; ++i) {
    const double key = load(a.sweep.keys, a.sweep.key_type, row * a.sweep.key_stride + column + i);
    const double delta = a.sweep.cosine ? key : key - query[i];
    squared += delta * delta;
    dot += key * query[i];
  }
  return a.sweep.cosine ? 1 - dot * inverse_norm(squared * norm) : squared;
}

// The same of a raw key, by all lanes of the warp, each with its columns.
__device__ double exact_raw(const Resolve& a, int64_t q, int64_t row, int64_t column, const double* query, double norm,
                            int lane) {
  double dot = 0, squared = 0;
  for (int i = lane; i < a.sweep.width; i += 32) {
    double sum = 0;
    for (int64_t deep = 0; deep < a.depth; ++deep) {
      double value = load(a.raw_keys, a.raw_key_type, row * a.raw_key_stride + deep);
      if (!a.sweep.cosine) value -= double(load(a.raw_queries, a.raw_query_type, q * a.raw_query_stride + deep));
      sum += value * double(a.rotation[deep * a.rotation_stride + column + i]);
    }
    squared += sum * sum;
    dot += sum * query[i];
  }
  squared = sum_of_lanes(squared);
  return a.sweep.cosine ? 1 - sum_of_lanes(dot) * inverse_norm(squared * norm) : squared;
}

// Scaled distance of a key of the rotated copy, less the error of its rotation, by one lane.
__device__ float near_distance(const Resolve& a, int s, int64_t row, int64_t column, const double* query,
                               float query_scale, float query_inverse) {
  const Sweep& w = a.sweep;
  const float scale = w.scales[s];
  const auto coordinate = [&](int i) {
    const float x = load(w.keys, w.key_type, row * w.key_stride + column + i);
    return (x - (w.origin ? w.origin[column + i] : 0.0f)) * scale;
  };
  float squared = 0, inverse = 1;
  if (w.cosine) {
    for (int i = 0; i < w.width; ++i) squared += coordinate(i) * coordinate(i);
    inverse = inverse_norm(squared);
    squared = 0;
  }
  for (int i = 0; i < w.width; ++i) {
    const float delta = coordinate(i) * inverse - float(query[i] * query_scale) * query_inverse;
    squared += delta * delta;
  }
  float near = sqrtf(squared);
  if (w.cosine && (inverse == 0 || query_inverse == 0)) near = 1.4142135f;  // cosine 0 with everything
  return near == near ? fmaxf(near - w.errors[s] * (w.cosine ? inverse : 1.0f), 0.0f) : CUDART_INF_F;
}

// Grid (Q, S), one warp. Values of the sweep that have been dealt with are overwritten with +inf.
__global__ void __launch_bounds__(32, 16) resolve_kernel(Resolve a, int tiles, int tile) {
  const int lane = threadIdx.x, s = blockIdx.y;
  const int64_t q = blockIdx.x, at = s * int64_t(gridDim.x) + q, column = int64_t(s) * a.sweep.width;
  float* const minima = a.sweep.minima + at * tiles;
  const double* const exact_query = a.exact_queries + q * a.query_stride + column;
  const double* const query = a.queries + q * a.query_stride + column;
  const float query_scale = a.sweep.scales[s], error = a.sweep.errors[s];
  double norm = 0, centred = 0;
  for (int i = lane; i < a.sweep.width; i += 32) {
    norm += exact_query[i] * exact_query[i];
    centred += query[i] * query[i];
  }
  norm = sum_of_lanes(norm);
  centred = sum_of_lanes(centred);
  const float span = float(sqrt(centred)) * query_scale;
  const float query_inverse = a.sweep.cosine ? float(inverse_norm(centred) / query_scale) : 1.0f;
  const float size = a.sweep.cosine ? 1.0f : span;
  double best = a.best[at];
  int64_t index = a.index[at];
  while (true) {
    float low = CUDART_INF_F;
    int64_t number = kNoRow;
    for (int i = lane; i < tiles; i += 32)
      if (minima[i] < low) {
        low = minima[i];
        number = i;
      }
    least_of_lanes(low, number);
    float reach = reach_of(best, query_scale, a.sweep.cosine);
    if (!(low < CUDART_INF_F) || !(low <= threshold(a, reach, a.sizes[at], a.half_norms[at], error))) break;
    if (lane == 0) minima[number] = CUDART_INF_F;
    __syncwarp();
    if (!a.raw_keys) {
      for (int i = lane; i < tile; i += 32) {
        const int64_t row = number * tile + i;
        if (row >= a.sweep.key_count) break;
        const double found = exact_rotated(a, row, column, exact_query, norm);
        if (found < best || (found == best && row + a.first_key < index)) {
          best = found;
          index = row + a.first_key;
        }
      }
      least_of_lanes(best, index);
      continue;
    }
    float near[kMostRows];
#pragma unroll
    for (int i = 0; i < kMostRows; ++i) {
      const int64_t row = number * tile + i * 32 + lane;
      near[i] = i * 32 < tile && row < a.sweep.key_count
                    ? near_distance(a, s, row, column, query, query_scale, query_inverse)
                    : CUDART_INF_F;
    }
    while (true) {
      float nearest = CUDART_INF_F;
      int64_t row = kNoRow;
#pragma unroll
      for (int i = 0; i < kMostRows; ++i)
        if (near[i] < nearest) {
          nearest = near[i];
          row = number * tile + i * 32 + lane;
        }
      least_of_lanes(nearest, row);
      // What the copy's rounding and the sums above are off by.
      const float farthest = reach * (1 + a.copy_rounding + 1e-6f) + (a.copy_rounding + 1e-6f) * size;
      if (!(nearest < CUDART_INF_F) || nearest > farthest) break;
#pragma unroll
      for (int i = 0; i < kMostRows; ++i)
        if (number * tile + i * 32 + lane == row) near[i] = CUDART_INF_F;
      const double found = exact_raw(a, q, row, column, exact_query, norm, lane);
      if (found < best || (found == best && row + a.first_key < index)) {
        best = found;
        index = row + a.first_key;
        reach = reach_of(best, query_scale, a.sweep.cosine);
      }
    }
  }
  if (lane == 0) {
    a.best[at] = best;
    a.index[at] = index;
  }
}

}  // namespace

const char* resolve(const Resolve& a, void* stream) {
  const int64_t tile = tile_keys(a.sweep.padded);
  if (tile == 0 || tile > kMostRows * 32) return "no kernel for this width";
  const int64_t tiles = (a.sweep.key_count + tile - 1) / tile;
  const dim3 grid(unsigned(a.sweep.query_count), unsigned(a.sweep.subspaces));
  return launch(resolve_kernel, grid, 32, 0, stream, a, int(tiles), int(tile));
}

}  // namespace ndm_cuda
