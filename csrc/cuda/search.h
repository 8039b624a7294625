// Nearest key of every query in every subspace on a CUDA device: the arguments of the two kernels.
// kernels/sweep.py explains the method and its bounds; names and meanings are the same here.
#pragma once

#include <cstdint>

namespace ndm_cuda {

enum class Type : int { f32 = 0, f16 = 1, bf16 = 2 };

struct Sweep {
  const void* keys;  // [K, d] rotated, from the first column of these subspaces on
  Type key_type;
  int64_t key_stride;
  int64_t key_count;
  bool paired;  // every second coordinate of a subspace lies at a multiple of the size of two
  const float* origin;  // [d] to subtract, or null
  const float* scales;  // [S]
  const float* errors;  // [S]
  const void* packed;   // [S, query_slots, padded] fp16, zero beyond the width
  int64_t query_count;
  int64_t query_slots;
  float* minima;  // [S, Q, tiles]
  int subspaces;
  int width;
  int padded;  // one of padded_widths
  bool cosine;
};

struct Resolve {
  Sweep sweep;
  const double* queries;        // [Q, d] rotated, centred as the keys are after the origin is off
  const double* exact_queries;  // [Q, d] rotated, not centred
  int64_t query_stride;
  const float* sizes;       // [S, Q]
  const float* half_norms;  // [S, Q]
  // Raw rows decide; without them the rotated keys are exact already.
  const void* raw_queries;  // [Q, d] or null
  Type raw_query_type;
  int64_t raw_query_stride;
  const void* raw_keys;  // [K, d]
  Type raw_key_type;
  int64_t raw_key_stride;
  const float* rotation;  // [d, d], from the first column of these subspaces on
  int64_t rotation_stride;
  int64_t depth;
  int64_t first_key;
  float rounding;       // of the sweep's numbers
  float copy_rounding;  // of the rotated keys as they are stored
  float absolute;
  double* best;    // [S, Q] squared distance, or 1 - cos; goes on from what is there
  int64_t* index;  // [S, Q]
};

// Keys a tile holds, or 0 where no kernel takes that padded width.
int tile_keys(int padded);

// Both return a message, or null; work is queued on the stream.
const char* sweep(const Sweep& arguments, void* stream);
const char* resolve(const Resolve& arguments, void* stream);

}  // namespace ndm_cuda
