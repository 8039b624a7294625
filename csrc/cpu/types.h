// Plain data passed between the driver and the kernels. No torch, no Python, no allocation.
//
// Glossary: Q queries, K keys, d width, S subspaces, p width of one subspace, o its first column.
#pragma once

#include <cstdint>

namespace ndm {

enum class Type : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// Row-major matrix whose rows may be strided; columns are contiguous.
struct Rows {
  const void* data = nullptr;
  Type type = Type::float32;
  int64_t stride = 0;  // elements from one row to the next
};

// Lanes of the stored minima; which keys of a tile are in a group is the same on every ISA (search_sweep.h).
constexpr int kGroups = 8;
// Queries that the exact pass handles together, so that minima are read in whole lines.
constexpr int kRerankQueries = 8;
// Choices of the columns of a shadow beside all of them, and the one to begin with (search_shadow.h).
constexpr int kShadows = 7, kFirstShadow = 3;
// Entries of a subspace in a KSG pass come in whole vectors of the widest instruction set.
constexpr int kEntries = 16;
// Largest number of keys packed at once (bounds stack buffers).
constexpr int kMaxPack = 128;

// Rows of the gradient made at once, queries summed at once, and rotated columns read at once.
constexpr int kGradientRows = 256, kGradientQueries = 128, kGradientDepth = 128;
// Rows and columns of a tile of the update.
constexpr int kLieTile = 64;
// Depth that a product sums up at once: 24 KB of a panel of 32 columns.
constexpr int64_t kProductDepth = 192;

// One call of nearest_neighbors. Three forms of input:
//   rotated: `rotated_keys` are the caller's, `exact_queries` are the rotated queries in fp64;
//   turned:  the same, but the sweep reads `swept_keys` and `rotated_queries`, copies in other axes, off by the
//            error bounds; the exact distance comes from the rows as given;
//   raw:     `rotated_keys` are our fp32 copy, and the exact distance comes from raw rows and `rotation`.
struct Search {
  int64_t queries = 0, keys = 0, width = 0, subspaces = 0;
  const int64_t* offsets = nullptr;  // [S + 1]
  bool cosine = false;
  bool bf16 = false;     // propose from rows rounded to bf16: see search_sweep.h

  bool shadows = false;  // propose from a part of the columns first: see search_shadow.h

  Rows rotated_keys;
  Rows swept_keys;                         // turned form: centred; else none, and rotated_keys are swept
  const float* center = nullptr;           // [d] subtracted from rotated_keys, or null
  const float* rotated_queries = nullptr;  // [Q, d] raw and turned form: centred like the keys that are swept
  const double* exact_queries = nullptr;   // [Q, d] rotated and turned form: nothing subtracted

  Rows raw_queries, raw_keys;            // raw form only
  const float* rotation = nullptr;       // [d, d] raw form only
  const float* query_error = nullptr;    // [Q] bound on |rounding error of a rotated row|, raw and turned form
  const float* key_error = nullptr;      // [K]

  float* distance = nullptr;  // [S, Q]
  int64_t* index = nullptr;   // [S, Q]

  // Scratch, owned by the driver.
  int64_t first = 0, last = 0;           // subspaces of this round
  int64_t tile = 0, tiles = 0;           // keys per stored minimum x 8, number of such tiles
  int64_t padded = 0;                    // queries rounded up to whole query blocks
  float* packed_queries = nullptr;       // subspace s at padded * offsets[s]: [block][p][query], negated
  float* query_norm = nullptr;           // [S, padded] of the packed query
  float* query_rounding = nullptr;       // [S, padded] norm of what packing rounded away
  float* minima = nullptr;               // [last - first, tiles, padded, 8] least score of the group
  float* group_norm = nullptr;           // [S, tiles, 8] largest norm in the group
  float* group_error = nullptr;          // [S, tiles, 8] largest error bound in the group
  uint8_t* irregular = nullptr;          // [S, tiles] a norm is NaN or Inf: bounds do not hold
  float* nearest_score = nullptr;        // [S, padded] least score met, shadows only
  float* shadow_costs = nullptr;         // [S, kShadows] columns that a key takes by choice, shadows only
  uint8_t* crowded = nullptr;            // [last - first, Q] more groups are in reach than the exact pass reads
  bool crowded_only = false;             // read all groups in reach, for crowded queries alone
};

// Pairs (a, b), (a, b + 1) ... that follow each other, from pair number `first` on.
struct KsgRun {
  int64_t a, b, first, count;
};

// One call of ksg_radius, ksg_counts or both, over already rotated and centred fp32 rows.
struct Ksg {
  int64_t queries = 0, keys = 0, width = 0, subspaces = 0, pairs = 0;
  const int64_t* offsets = nullptr;        // [S + 1]
  const float* inverse_variance = nullptr; // [S] 0 where there is no variance
  const float* rotated_queries = nullptr;  // [Q, d]
  const float* rotated_keys = nullptr;     // [K, d]
  const int64_t* pair = nullptr;           // [P, 2]
  const KsgRun* run = nullptr;             // [runs] the same pairs
  int64_t runs = 0;

  // Scratch, owned by the driver.
  int64_t first = 0, last = 0;        // queries of this round
  float* packed_queries = nullptr;    // [block][d][query]
  float* states = nullptr;            // of all threads, see ksg_per_query
  int64_t state_stride = 0;
  int threads = 0;
  // Counts only. Every subspace has an entry for each pair it is in, padded to kEntries with limits of 0.
  const int64_t* entries = nullptr;   // [S + 1] where the entries of a subspace begin
  const float* limits = nullptr;      // [Q, entries] squared thresholds; null: the radius is wanted
  const float* widest = nullptr;      // [Q, S] largest limit of the subspace
};

// Keys that one thread noted, in chunks that are linked from the last one back.
struct KsgNotes {
  static constexpr int kChunk = 256;
  static constexpr int32_t kNone = -1;     // in place of a chunk
  static constexpr int32_t kCrowded = -2;  // there was no room for more
  float* distance = nullptr;    // [size, kChunk]
  int32_t* filled = nullptr;    // [size]
  int32_t* previous = nullptr;  // [size]
  int32_t used = 0, size = 0;
};

// Floats, or int32, that a query has in the state of a pass: counts [entries], or see KsgRadii.
inline int64_t ksg_per_query(const Ksg& a) {
  return a.limits ? a.entries[a.subspaces] : a.pairs + 2 * a.subspaces;
}

// One call of mean_distance_gradient.
struct Gradient {
  int64_t queries = 0, width = 0, subspaces = 0;
  const int64_t* offsets = nullptr;     // [S + 1]
  Rows raw_queries, raw_keys;
  const int64_t* index = nullptr;       // [S, Q] the key that is near
  int64_t index_stride = 0;             // from one subspace to the next
  const uint8_t* counted = nullptr;     // [S, Q] 0 where a neighbor contributes nothing; null: all do
  int64_t counted_stride = 0;
  const float* log_floor = nullptr;     // [S] for the logarithm of the distance; null: the distance itself
  const float* rotation = nullptr;      // [d, d]
  float* mean = nullptr;                // [S] distance, or its logarithm
  float* gradient = nullptr;            // [d, d]
};

// One call of lie_update.
struct LieUpdate {
  int64_t width = 0;
  const float* product = nullptr;       // [d, d] R'G, or null: the moments stay
  float* first = nullptr;               // [d, d] Adam's moments of the tangent
  float* second = nullptr;
  double fast = 0, slow = 0;            // their decays, near 1
  float scale = 0, guard = 0;
  float* update = nullptr;              // [d, d], or null
  uint16_t* half_update = nullptr;      // the same rounded to bf16, or null
};

// One call of product: out = factor * base + scale * (left - origin) right.
struct Product {
  int64_t rows = 0, depth = 0, columns = 0;
  Rows left;                       // [rows, depth]; fp32 [depth, rows] where `transposed`, then without origin and norms
  bool transposed = false;
  const float* origin = nullptr;   // [depth], or null
  float scale = 1;
  const float* right = nullptr;    // [depth, columns]
  int64_t right_stride = 0;
  const float* base = nullptr;     // [rows, columns], or null; may be out
  int64_t base_stride = 0;
  float factor = 1;
  float* out = nullptr;            // [rows, columns], none of left and right
  int64_t out_stride = 0;
  float* norms = nullptr;          // [rows] of left - origin, or null

  int64_t slabs() const { return (depth + kProductDepth - 1) / kProductDepth; }

  // Scratch, owned by the driver.
  float* packed_right = nullptr;   // [panels][depth][panel]
  float* packed_left = nullptr;    // of the row blocks from first_block on
  int64_t first_block = 0;
};

// How rows enter the proposal pass: as they are, or rounded.
struct Proposal {
  void (*pack_queries)(const Search&, int64_t subspace);
  void (*sweep)(const Search&, int64_t tile, float* scratch);
};

struct KsgKernels {
  int query_block;  // queries at once
  int tile;         // keys handled per item
  void (*pack_queries)(const Ksg&);
  void (*tile_pass)(const Ksg&, int64_t tile, float* scratch, float* state, KsgNotes* notes);
  void (*count_noted)(const Ksg&, float* state, const KsgNotes& notes, const float* limits, int32_t* counts);
};

struct GradientKernels {
  int lanes, row_block;  // of the products
  void (*gradient)(const Gradient&, int64_t subspace, float* scratch);
};

struct ProductKernels {
  int row_block, panel;  // rows and columns of a micro-kernel call
  void (*pack_right)(const Product&, int64_t panel);
  void (*pack_left)(const Product&, int64_t block);
  void (*multiply)(const Product&, int64_t first_block, int64_t last_block, int64_t first_panel, int64_t last_panel);
};

// What one instruction set offers. `threads` share a call through the item index alone.
struct Kernels {
  const char* name;
  int query_block;  // queries per micro-kernel call
  Proposal fp32;
  Proposal bf16;  // null where the instruction set has no such products
  Proposal shadow;
  void (*rerank)(const Search&, int64_t subspace, int64_t first_query, int64_t last_query, float* scratch);
  KsgKernels ksg;
  GradientKernels gradient;
  void (*lie_update)(const LieUpdate&, int64_t first_row, float* scratch);
  ProductKernels product;
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where not compiled
const Kernels* avx512_kernels();  // null where not compiled
const Kernels* avx512bf16_kernels();  // null where not compiled

// Keys packed at once for a subspace of width p: about 3/4 of a 32 KB first-level cache, at most a tile.
inline int pack_size(int64_t p, int64_t tile) {
  int size = 32;
  while (size < kMaxPack && size < tile && 2 * size * p <= 6144) size *= 2;
  return size;
}

}  // namespace ndm
