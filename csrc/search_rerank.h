// Exact pass of nearest_neighbors: from group minima to the nearest key and its distance.
//
// Every computed quantity carries a bound, so that no key that could be nearest is missed:
//   score     |computed - true for the rounded rows| <= alpha (|q||k| + |k|^2), alpha = (p + 5) 2^-24
//             (any order of summation; Higham 2002, section 3.1);
//   rows      a row in the sweep is off by e_q or e_k in norm, so a distance by e_q + e_k at most. In raw
//             form the bound of the fp32 rotation is 2 sqrt(d) 2^-24 |h| (see cpu.py).
// Steps for a query in a subspace, with U an upper bound of the least distance:
//   1 the group with the least score gives a first U, from fp64 distances of its keys;
//   2 every group that can hold a key within U is read again; normally none is;
//   3 rotated form: the fp64 distance decides. Raw form: keys within U of the rotated copy are measured
//     from the raw rows. A query's only such key is measured in fp32, eight queries at once, with sums of 32
//     terms added up in fp64: the error is at most 2 sqrt(32) 2^-24 |q - k| (as above, in probability). Where
//     that is too much, or there are several keys, fp64 decides, four at a time.
// A bf16 sweep (Search::bf16) knows rows only to 2^-8. There a neighbour within kLoosened of the least distance
// will do, so step 2 asks for groups that hold a key within U (1 - kLoosened); where more than kCrowded are, the
// query is left to the driver, which decides whether to read them or to sweep that subspace again in fp32.
// Limit: fp32 product of Q x d x p per subspace in raw form (in fp64, as it was, it took 1.2 times as long as the
// sweep at d = 2304); memory latency of 8-16 rows otherwise.
#pragma once

#include <algorithm>

#include "search_sweep.h"

namespace ndm {
namespace {

constexpr int kRerankQueries = 8;  // queries handled together, so that minima are read in whole lines
constexpr int kPending = 64;
constexpr int64_t kChunk = 32;  // terms summed in fp32
constexpr double kDistanceError = 8e-6;  // relative; 1e-5 is promised
constexpr double kLoosened = 8e-3;
constexpr int kCrowded = 24;

inline double sum(Double4 x) { return (x[0] + x[2]) + (x[1] + x[3]); }

struct Best {
  double squared = std::numeric_limits<double>::infinity();
  int64_t index = -1;
};

// Lowest index wins among values that differ by rounding only.
inline void improve(Best& best, double squared, int64_t index) {
  // Factors, not differences: those of two infinities are NaN.
  if (best.index < 0 || squared < best.squared * (1 - 1e-14) ||
      (squared <= best.squared * (1 + 1e-14) && index < best.index) ||
      (squared != squared && best.squared == best.squared))
    best = {squared, index};
}

// One query in one subspace.
struct Query {
  const double* row;      // [p] rotated, fp64
  double norm;            // of that row
  double sweep_norm2;     // |q|^2 as the scores mean it: squared distance = 2 score + this
  double sweep_error;     // e_q between the packed query and the true one
  double error;           // e_q between `row` and the true one: 0 in rotated form
  double upper;           // U
  Best best;
};

// One lane, for the columns that fill no vector.
struct Scalar {
  static constexpr int lanes = 1;
  float v;
  static Scalar load(const float* p) { return {*p}; }
  static Scalar set1(float x) { return {x}; }
  void store(float* p) const { *p = v; }
  static Scalar fma(Scalar a, Scalar b, Scalar c) { return {a.v * b.v + c.v}; }
};

struct Pending {
  int64_t key;
  int query;
  double lower;
};

template <class V>
struct Rerank {
  static constexpr int kAtOnce = V::lanes / 2;  // rows of an fp32 measurement: 2 vectors of sums each

  const Search& a;
  int64_t s, column, p;
  int64_t first;          // first query of the block
  Query query[kRerankQueries];
  Pending pending[kPending];
  int waiting = 0;
  double* doubles;        // scratch: [4 d] rows, [8 p] projections, [8 p] query rows
  float* row;             // scratch: [d]

  Rerank(const Search& search, int64_t subspace, int64_t first_query, float* scratch)
      : a(search), s(subspace), column(search.offsets[subspace]), p(search.offsets[subspace + 1] - column),
        first(first_query), doubles(reinterpret_cast<double*>(scratch)),
        row(scratch + 2 * (4 * search.width + 16 * p)) {}

  bool raw() const { return a.exact_queries == nullptr; }

  const float* key_row(int64_t key) {
    if (a.rotated_keys.type == Type::float32)
      return reinterpret_cast<const float*>(row_address(a.rotated_keys, key, column));
    read_row(a.rotated_keys, key, column, p, row);
    return row;
  }

  void start_query(int i) {
    Query& q = query[i];
    if (raw()) {
      double* copy = doubles + 4 * a.width + 8 * p + i * p;
      for (int64_t j = 0; j < p; ++j) copy[j] = a.rotated_queries[(first + i) * a.width + column + j];
      q.row = copy;
    } else {
      q.row = a.exact_queries + (first + i) * a.width + column;
    }
    double norm2 = 0;
    for (int64_t j = 0; j < p; ++j) norm2 += q.row[j] * q.row[j];
    q.norm = std::sqrt(norm2);
    const float packed = a.query_norm[s * a.padded + first + i];
    const float given = a.query_error ? a.query_error[first + i] : 0.0f;
    q.sweep_norm2 = a.cosine ? 2.0 : static_cast<double>(packed) * packed;
    q.error = a.cosine && raw() ? unit_error(given, packed, p) : given;
    q.sweep_error = a.cosine ? unit_error(given, packed, p)
                             : given + 2 * kUnit * packed + a.query_rounding[s * a.padded + first + i];
    if (a.cosine && q.norm > 0 && packed < 1e-15f) q.sweep_error = 2;
    q.upper = std::numeric_limits<double>::infinity();
    q.best = Best();
  }

  // Squared distance to a row of the rotated keys, fp64; for cosine 2 - 2 cos. `norm` is the key's.
  double squared_to(const Query& q, int64_t key, double* norm) {
    const float* k = key_row(key);
    Double4 s0 = {0, 0, 0, 0}, s1 = {0, 0, 0, 0};
    double rest0 = 0, rest1 = 0;
    int64_t j = 0;
    for (; j + 4 <= p; j += 4) {
      Double4 x, y = to_double(k + j);
      std::memcpy(&x, q.row + j, 32);
      if (a.cosine) {
        s0 += x * y;
        s1 += y * y;
      } else {
        s0 += (x - y) * (x - y);
      }
    }
    for (; j < p; ++j) {
      const double x = q.row[j], y = k[j];
      rest0 += a.cosine ? x * y : (x - y) * (x - y);
      rest1 += y * y;
    }
    const double total = sum(s0) + rest0;
    if (!a.cosine) return total;
    *norm = std::sqrt(sum(s1) + rest1);
    return chord(total, q.norm, *norm);
  }

  // 2 - 2 cos: the squared distance of the unit vectors. A zero vector has cosine 0.
  static double chord(double dot, double norm_q, double norm_k) {
    const double scale = norm_q * norm_k;
    const double cosine = scale == 0 ? 0 : dot / scale;
    return cosine > 1 ? 0 : 2 - 2 * cosine;
  }

  void consider(int i, int64_t key) {
    double norm = 0;
    const double squared = squared_to(query[i], key, &norm);
    judge(i, key, squared, norm);
  }

  void judge(int i, int64_t key, double squared, double norm) {
    Query& q = query[i];
    if (!raw()) {
      improve(q.best, squared, key);
      q.upper = std::sqrt(q.best.squared);
      return;
    }
    double error = q.error + a.key_error[key];
    if (a.cosine) error = q.error + unit_error(a.key_error[key], static_cast<float>(norm), p);
    const double distance = std::sqrt(squared);
    if (distance + error < q.upper) q.upper = distance + error;
    // Written so that NaN passes: it has to reach the result.
    if (distance - error > q.upper * (1 + 1e-14)) return;
    if (waiting == kPending) resolve(false);
    pending[waiting++] = {key, i, distance - error};
  }

  // Calls f(first, stop) for the runs of rows that make up a group (see Pack).
  template <class F>
  void each_run(int64_t tile, int group, F f) const {
    const int64_t size = pack_size(p, a.tile), step = size / kGroups;
    const int64_t end = (tile + 1) * a.tile < a.keys ? (tile + 1) * a.tile : a.keys;
    for (int64_t at = tile * a.tile; at < end; at += size) {
      const int64_t begin = at + group * step;
      f(begin, begin + step < end ? begin + step : end);
    }
  }

  void consider_group(int i, int64_t tile, int group) {
    each_run(tile, group, [&](int64_t begin, int64_t end) {
      // Distances first: a mispredicted branch between them would wait for each row's miss in turn.
      double squared[kMaxPack / kGroups], norm[kMaxPack / kGroups] = {};
      for (int64_t key = begin; key < end; ++key) squared[key - begin] = squared_to(query[i], key, norm + key - begin);
      for (int64_t key = begin; key < end; ++key) judge(i, key, squared[key - begin], norm[key - begin]);
    });
  }

  void prefetch_group(int64_t tile, int group) {
    each_run(tile, group, [&](int64_t begin, int64_t end) {
      for (int64_t key = begin; key < end; ++key) {
        const auto from = reinterpret_cast<uintptr_t>(row_address(a.rotated_keys, key, column));
        const uintptr_t to = from + static_cast<uintptr_t>(p * element_size(a.rotated_keys.type));
        for (uintptr_t line = from / 64 * 64; line < to; line += 64) prefetch(reinterpret_cast<const void*>(line));
      }
    });
  }

  // [4][d] rows in `doubles` (interleaved: [d][4]) times the subspace's columns of R -> [p][4].
  void project() {
    const double* rows = doubles;
    double* out = doubles + 4 * a.width;
    const int64_t d = a.width;
    int64_t c = 0;
    for (; c + 8 <= p; c += 8) project_columns<8>(rows, c, out, d);
    for (; c < p; ++c) project_columns<1>(rows, c, out, d);
  }

  template <int Columns>
  void project_columns(const double* rows, int64_t c, double* out, int64_t d) {
    const float* basis = a.rotation + column + c;
    Double4 sums[Columns];
    for (int j = 0; j < Columns; ++j) sums[j] = Double4{0, 0, 0, 0};
    for (int64_t i = 0; i < d; ++i) {
      Double4 x;
      std::memcpy(&x, rows + 4 * i, 32);
      for (int j = 0; j < Columns; ++j) {
        const double r = basis[i * d + j];
        sums[j] += x * Double4{r, r, r, r};
      }
    }
    std::memcpy(out + 4 * c, sums, sizeof sums);
  }

  void load_row(const Rows& from, int64_t index, int slot, double factor, bool add) {
    read_row(from, index, 0, a.width, row);
    double* rows = doubles + slot;
    for (int64_t j = 0; j < a.width; ++j) rows[4 * j] = (add ? rows[4 * j] : 0.0) + factor * row[j];
  }

  bool same_as_best(const Pending& x) {
    const Best& best = query[x.query].best;
    if (best.index < 0 || x.key < best.index) return false;
    const size_t bytes = static_cast<size_t>(a.width * element_size(a.raw_keys.type));
    return std::memcmp(row_address(a.raw_keys, x.key, 0), row_address(a.raw_keys, best.index, 0), bytes) == 0;
  }

  // Measures the waiting keys from the raw rows. Only at the end is a query's only key known to be the only one.
  void resolve(bool at_the_end) {
    drop_if([&](const Pending& x) { return out_of_reach(x); });
    if (at_the_end && !a.cosine) measure_single_keys();
    const int at_once = a.cosine ? 2 : 4;
    const int total = waiting;
    waiting = 0;
    for (int begin = 0; begin < total;) {
      Pending batch[4];
      int size = 0;
      for (; begin < total && size < at_once; ++begin) {
        const Pending& x = pending[begin];
        // Copies of the best row (padding and first tokens come in thousands) cannot win.
        if (out_of_reach(x) || same_as_best(x)) continue;
        batch[size++] = x;
      }
      if (size) measure(batch, size);
    }
  }

  // Takes those keys off the list whose fp32 distance will do: the only ones of their query.
  void measure_single_keys() {
    int keys_of[kRerankQueries] = {};
    for (int i = 0; i < waiting; ++i) ++keys_of[pending[i].query];
    int at[kRerankQueries], size = 0;
    for (int i = 0; i < waiting; ++i)
      if (keys_of[pending[i].query] == 1 && query[pending[i].query].best.index < 0) at[size++] = i;
    for (int begin = 0; begin < size; begin += kAtOnce)
      measure_in_fp32(at + begin, size - begin < kAtOnce ? size - begin : kAtOnce);
    drop_if([](const Pending& x) { return x.key < 0; });
  }

  // Since it was put on the list, a nearer key was seen.
  bool out_of_reach(const Pending& x) const { return x.lower > query[x.query].upper * (1 + 1e-14); }

  template <class F>
  void drop_if(F condition) {
    waiting = static_cast<int>(std::remove_if(pending, pending + waiting, condition) - pending);
  }

  void measure_in_fp32(const int* at, int size) {
    auto rows = reinterpret_cast<float*>(doubles);  // [kAtOnce][d] differences
    double squared_norm[kAtOnce];
    for (int b = 0; b < kAtOnce; ++b) {
      const Pending& x = pending[at[b < size ? b : 0]];
      float* difference = rows + b * a.width;
      read_row(a.raw_queries, first + x.query, 0, a.width, difference);
      read_row(a.raw_keys, x.key, 0, a.width, row);
      for (int64_t i = 0; i < a.width; ++i) difference[i] -= row[i];
      squared_norm[b] = sum_of_squares(difference, a.width);
    }
    double* out = doubles + 4 * a.width;  // [kAtOnce][p]
    std::fill(out, out + kAtOnce * p, 0.0);
    int64_t c = 0;
    for (; c + 2 * V::lanes <= p; c += 2 * V::lanes) add_products<V, 2>(rows, c, out);
    for (; c + V::lanes <= p; c += V::lanes) add_products<V, 1>(rows, c, out);
    for (; c + 8 <= p; c += 8) add_products<Vec8, 1>(rows, c, out);
    for (; c < p; ++c) add_products<Scalar, 1>(rows, c, out);
    for (int b = 0; b < size; ++b) {
      double squared = 0;
      for (int64_t j = 0; j < p; ++j) squared += out[b * p + j] * out[b * p + j];
      const double error = 2 * kUnit * std::sqrt(static_cast<double>(kChunk) * squared_norm[b]);
      Pending& x = pending[at[b]];
      // NaN and overflow stay for fp64.
      if (!(error <= kDistanceError * std::sqrt(squared)) || !(error <= std::numeric_limits<float>::max())) continue;
      improve(query[x.query].best, squared, x.key);
      x.key = -1;
    }
  }

  static double sum_of_squares(const float* x, int64_t count) {
    Double4 sums = {0, 0, 0, 0};
    double rest = 0;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) sums += to_double(x + i) * to_double(x + i);
    for (; i < count; ++i) rest += static_cast<double>(x[i]) * x[i];
    return sum(sums) + rest;
  }

  // out[b][c ..] += rows[b][.] . R[., column + c ..], for a few vectors of columns.
  template <class W, int Vectors>
  void add_products(const float* rows, int64_t c, double* out) {
    const float* basis = a.rotation + column + c;
    for (int64_t begin = 0; begin < a.width; begin += kChunk) {
      const int64_t end = begin + kChunk < a.width ? begin + kChunk : a.width;
      W sums[kAtOnce][Vectors];
      for (auto& of_row : sums)
        for (W& sum : of_row) sum = W::set1(0);
      for (int64_t i = begin; i < end; ++i) {
        W r[Vectors];
        for (int v = 0; v < Vectors; ++v) r[v] = W::load(basis + i * a.width + v * W::lanes);
        for (int b = 0; b < kAtOnce; ++b) {
          const W x = W::set1(rows[b * a.width + i]);
          for (int v = 0; v < Vectors; ++v) sums[b][v] = W::fma(x, r[v], sums[b][v]);
        }
      }
      for (int b = 0; b < kAtOnce; ++b)
        for (int v = 0; v < Vectors; ++v) {
          alignas(64) float parts[W::lanes];
          sums[b][v].store(parts);
          for (int l = 0; l < W::lanes; ++l) out[b * p + c + v * W::lanes + l] += parts[l];
        }
    }
  }

  void measure(const Pending* batch, int size) {
    for (int64_t j = 0; j < 4 * a.width; ++j) doubles[j] = 0;
    for (int b = 0; b < size; ++b) {
      const int64_t q = first + batch[b].query;
      if (a.cosine) {
        load_row(a.raw_queries, q, 2 * b, 1, false);
        load_row(a.raw_keys, batch[b].key, 2 * b + 1, 1, false);
      } else {
        load_row(a.raw_queries, q, b, 1, false);
        load_row(a.raw_keys, batch[b].key, b, -1, true);
      }
    }
    project();
    const double* out = doubles + 4 * a.width;
    for (int b = 0; b < size; ++b) {
      double first_sum = 0, dot = 0, second_sum = 0;
      for (int64_t j = 0; j < p; ++j) {
        const double x = out[4 * j + (a.cosine ? 2 * b : b)], y = a.cosine ? out[4 * j + 2 * b + 1] : 0;
        first_sum += x * x;
        dot += x * y;
        second_sum += y * y;
      }
      Query& q = query[batch[b].query];
      improve(q.best, a.cosine ? chord(dot, std::sqrt(first_sum), std::sqrt(second_sum)) : first_sum, batch[b].key);
      const double distance = std::sqrt(q.best.squared);
      if (distance < q.upper) q.upper = distance;
    }
  }

  void write(int i) {
    const Best& best = query[i].best;
    const int64_t at = s * a.queries + first + i;
    a.distance[at] = static_cast<float>(a.cosine ? best.squared / 2 : std::sqrt(best.squared));
    a.index[at] = best.index;
  }
};

// Tile and group of the least score of each query of the block.
inline void least_groups(const float* minima, int64_t tiles, int64_t padded, int count, int64_t* tile, int* group) {
  constexpr int at_once = 4;  // 8 registers of state; minima are read in whole lines
  for (int begin = 0; begin < count; begin += at_once) {
    const int end = begin + at_once < count ? begin + at_once : count;
    Vec8 least[at_once], at[at_once];
    for (int i = 0; i < at_once; ++i) {
      least[i] = Vec8::set1(std::numeric_limits<float>::infinity());
      at[i] = Vec8::set1(0);
    }
    const float* now = minima + begin * kGroups;
    for (int64_t t = 0; t < tiles; ++t, now += padded * kGroups) {
      const Vec8 here = Vec8::set1(static_cast<float>(t));
      if (end - begin == at_once) {
        for (int i = 0; i < at_once; ++i) Vec8::track_min(least[i], at[i], Vec8::load(now + i * kGroups), here);
      } else {
        for (int i = 0; i < end - begin; ++i) Vec8::track_min(least[i], at[i], Vec8::load(now + i * kGroups), here);
      }
    }
    for (int i = begin; i < end; ++i) {
      float values[kGroups], tiles_of[kGroups];
      least[i - begin].store(values);
      at[i - begin].store(tiles_of);
      group[i] = 0;
      for (int g = 1; g < kGroups; ++g)
        if (values[g] < values[group[i]]) group[i] = g;
      tile[i] = static_cast<int64_t>(tiles_of[group[i]]);
    }
  }
}

struct Threshold {
  float alpha_norm;  // alpha |q|
  float alpha;
  float reach;       // U + e_q
  float score;       // largest score of a key within reach, without e_k
};

inline Threshold threshold(const Query& q, float alpha, bool cosine, bool loosened) {
  const double norm = cosine ? 1.0 : std::sqrt(q.sweep_norm2);
  const double reach = q.upper * (loosened ? 1 - kLoosened : 1.0) + q.sweep_error;
  const double score = (reach * reach - q.sweep_norm2) / 2;
  // The test itself is done in fp32: a few units of what enters it, and what underflows.
  const double slack = 4 * kUnit * (reach * reach + q.sweep_norm2) + 1e-35;
  return {static_cast<float>(alpha * norm * (1 + 1e-6)), alpha, static_cast<float>(reach * (1 + 1e-6)),
          static_cast<float>(score + slack)};
}

// Bit g is set where group g may hold a key within reach: score - its error <= ((U + e_q + e_k)^2 - |q|^2) / 2.
inline int groups_within(const Threshold& t, const float* minima, const float* norms, const float* errors) {
  const Vec8 n = Vec8::load(norms), e = Vec8::load(errors), zero = Vec8::set1(0);
  const Vec8 score_error = Vec8::fma(Vec8::set1(t.alpha), n, Vec8::set1(t.alpha_norm));
  const Vec8 row_error = Vec8::fma(e, Vec8::set1(1), Vec8::set1(t.reach));
  const Vec8 error = Vec8::fma(n, score_error, Vec8::fma(e, row_error, zero));
  return Vec8::bits_less_equal(Vec8::load(minima) - error, Vec8::set1(t.score));
}

inline bool any_irregular(const Search& a, int64_t s) {
  uint8_t any = 0;
  for (int64_t t = 0; t < a.tiles; ++t) any |= a.irregular[s * a.tiles + t];
  return any;
}

// No comparison with NaN holds, not even that of a score of minus infinity.
constexpr Threshold kNothing = {0, 0, 0, std::numeric_limits<float>::quiet_NaN()};

// Reads the group with the least score; what else has to be read for the query.
template <class V>
Threshold first_group(Rerank<V>& work, int i, int64_t tile, int group, bool irregular, float alpha) {
  const Search& a = work.a;
  work.start_query(i);
  if (irregular || !(work.query[i].sweep_norm2 <= std::numeric_limits<float>::max())) {
    // No bound holds: look at every key.
    for (int64_t key = 0; key < a.keys; ++key) work.consider(i, key);
    return kNothing;
  }
  if (a.cosine && work.query[i].norm == 0 && work.query[i].error == 0) {  // cosine 0 with every key
    work.consider(i, 0);
    return kNothing;
  }
  work.consider_group(i, tile, group);
  return threshold(work.query[i], alpha, a.cosine, a.bf16);
}

template <class V>
void rerank(const Search& a, int64_t s, int64_t first, int64_t last, float* scratch) {
  uint8_t* crowded = a.crowded + (s - a.first) * a.queries + first;
  const int count = static_cast<int>(last - first);
  if (a.crowded_only && !std::any_of(crowded, crowded + count, [](uint8_t x) { return x; })) return;
  Rerank<V> work(a, s, first, scratch);
  const float* minima = a.minima + ((s - a.first) * a.tiles * a.padded + first) * kGroups;
  const float alpha = static_cast<float>(work.p + 5) * kUnit;
  int64_t tile[kRerankQueries];
  int group[kRerankQueries];
  least_groups(minima, a.tiles, a.padded, count, tile, group);
  Threshold limit[kRerankQueries];
  const bool irregular = any_irregular(a, s);
  // All at once: the misses of one query are too many to hide behind the work of another.
  for (int i = 0; i < count; ++i) work.prefetch_group(tile[i], group[i]);
  for (int i = 0; i < count; ++i)
    limit[i] = a.crowded_only && !crowded[i] ? kNothing : first_group(work, i, tile[i], group[i], irregular, alpha);
  int64_t budget[kRerankQueries];
  for (int i = 0; i < count; ++i)
    budget[i] = a.bf16 && !a.crowded_only ? kCrowded : std::numeric_limits<int64_t>::max();
  for (int64_t t = 0; t < a.tiles; ++t) {
    const float* norms = a.group_norm + (s * a.tiles + t) * kGroups;
    const float* errors = a.group_error + (s * a.tiles + t) * kGroups;
    for (int i = 0; i < count; ++i) {
      int bits = groups_within(limit[i], minima + (t * a.padded + i) * kGroups, norms, errors);
      if (t == tile[i]) bits &= ~(1 << group[i]);
      if ((budget[i] -= __builtin_popcount(static_cast<unsigned>(bits))) < 0) {
        crowded[i] = 1;
        limit[i] = kNothing;
        continue;
      }
      for (; bits; bits &= bits - 1) work.consider_group(i, t, __builtin_ctz(static_cast<unsigned>(bits)));
    }
  }
  work.resolve(true);
  for (int i = 0; i < count; ++i)
    if (!a.crowded_only || crowded[i]) work.write(i);
}

}  // namespace
}  // namespace ndm
