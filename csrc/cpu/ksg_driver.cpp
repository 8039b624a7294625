#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "driver.h"
#include "parallel.h"
#include "scratch.h"

namespace ndm {
namespace {

constexpr int64_t kStateBytes = 8 << 20;   // of all threads
constexpr int64_t kNotesBytes = 40 << 20;  // of all threads

int64_t scratch_floats(const Ksg& a, const Kernels& kernels) {
  const int64_t tile = kernels.ksg.tile, block = kernels.ksg.query_block;
  const int64_t rows = (a.width + block * a.subspaces) * tile + 3 * block * a.subspaces;
  return ceil_div(rows + a.pairs + 8 * a.width, 16) * 16;
}

int64_t queries_at_once(const Ksg& a, const Kernels& kernels, int threads) {
  const int64_t block = kernels.ksg.query_block, bytes = ksg_per_query(a) * 4 * threads;
  const int64_t rounds = ceil_div(a.queries, std::max<int64_t>(kStateBytes / bytes / block, 1) * block);
  return ceil_div(ceil_div(a.queries, rounds), block) * block;
}

// Room for the notes of all threads.
class Notes {
 public:
  Notes(int threads, int64_t bytes)
      : chunks_(bytes / (4 * KsgNotes::kChunk * threads)),
        distance_(threads * chunks_ * KsgNotes::kChunk),
        links_(static_cast<size_t>(2 * threads * chunks_)),
        of_(static_cast<size_t>(threads)) {
    for (int t = 0; t < threads; ++t) {
      of_[t].distance = distance_.get() + t * chunks_ * KsgNotes::kChunk;
      of_[t].filled = links_.data() + 2 * t * chunks_;
      of_[t].previous = of_[t].filled + chunks_;
      of_[t].size = static_cast<int32_t>(chunks_);
    }
  }
  KsgNotes& operator[](int thread) { return of_[thread]; }
  void clear() {
    for (KsgNotes& notes : of_) notes.used = 0;
  }

 private:
  int64_t chunks_;
  Aligned<float> distance_;
  std::vector<int32_t> links_;
  std::vector<KsgNotes> of_;
};

std::vector<KsgRun> runs_of(const Ksg& a) {
  std::vector<KsgRun> runs;
  for (int64_t i = 0; i < a.pairs; ++i) {
    const int64_t x = a.pair[2 * i], y = a.pair[2 * i + 1];
    if (!runs.empty() && runs.back().a == x && runs.back().b + runs.back().count == y)
      ++runs.back().count;
    else
      runs.push_back({x, y, i, 1});
  }
  return runs;
}

// Runs the tile pass over all keys, for as many queries at once as the state allows. `reset` gets the
// state of a query and thread, `finish` the round, with the states of all threads.
template <class Reset, class Finish>
void run_passes(Ksg a, const Kernels& kernels, int threads, Notes* notes, Reset reset, Finish finish) {
  const std::vector<KsgRun> runs = runs_of(a);
  a.run = runs.data();
  a.runs = static_cast<int64_t>(runs.size());
  a.threads = threads;
  const int64_t per_query = ksg_per_query(a), at_once = queries_at_once(a, kernels, threads);
  const int64_t each_scratch = scratch_floats(a, kernels);
  a.state_stride = at_once * per_query;
  Aligned<float> states(a.state_stride * threads), scratch(each_scratch * threads), packed(at_once * a.width);
  a.states = states.get();
  a.packed_queries = packed.get();
  const int64_t tiles = ceil_div(a.keys, kernels.ksg.tile);
  for (a.first = 0; a.first < a.queries; a.first = a.last) {
    a.last = std::min(a.first + at_once, a.queries);
    if (notes) notes->clear();
    for (int64_t i = 0; i < at_once * threads; ++i) reset(a.states + i * per_query);
    kernels.ksg.pack_queries(a);
    share(threads, tiles, [&](int64_t tile, int thread) {
      kernels.ksg.tile_pass(a, tile, scratch.get() + each_scratch * thread, a.states + a.state_stride * thread,
                            notes ? &(*notes)[thread] : nullptr);
    });
    finish(a);
  }
}

// Least x with sqrt(x) >= radius in fp32: distance < radius is then the same as squared distance < x.
float squared_limit(float radius) {
  if (!(radius > 0)) return radius;  // 0: nothing is below it; NaN stays
  float x = radius * radius;
  if (!(x <= std::numeric_limits<float>::max())) return x;
  while (std::sqrt(x) < radius) x = std::nextafter(x, std::numeric_limits<float>::infinity());
  for (float below; x > 0 && std::sqrt(below = std::nextafter(x, 0.0f)) >= radius;) x = below;
  return x;
}

// Where the limit of a pair's side stands among the entries of its subspace.
struct Entries {
  std::vector<int64_t> begin;  // [S + 1]
  std::vector<int64_t> place;  // [P, 2]

  explicit Entries(const Ksg& a) : begin(static_cast<size_t>(a.subspaces + 1)), place(static_cast<size_t>(2 * a.pairs)) {
    for (int64_t i = 0; i < 2 * a.pairs; ++i) place[i] = begin[a.pair[i] + 1]++;
    for (int64_t s = 0; s < a.subspaces; ++s) begin[s + 1] = begin[s] + ceil_div(begin[s + 1], kEntries) * kEntries;
    for (int64_t i = 0; i < 2 * a.pairs; ++i) place[i] += begin[a.pair[i]];
  }
  int64_t count() const { return begin.back(); }

  // limits: [entries] of query q, 0 beyond the pairs.
  void write_limits(const Ksg& a, const float* radius, int64_t q, float* limits) const {
    std::fill(limits, limits + count(), 0.0f);
    for (int64_t pair = 0; pair < a.pairs; ++pair)
      limits[place[2 * pair]] = limits[place[2 * pair + 1]] = squared_limit(radius[pair * a.queries + q]);
  }
  template <class Count>
  void read_counts(const Ksg& a, const Count* found, int64_t q, int64_t* counts) const {
    for (int64_t i = 0; i < 2 * a.pairs; ++i) counts[i * a.queries + q] = found[place[i]];
  }
};

void reset_radii(const Ksg& a, float* state) {
  std::fill(state, state + a.pairs + a.subspaces, std::numeric_limits<float>::infinity());
  auto* chunk = reinterpret_cast<int32_t*>(state + a.pairs + a.subspaces);
  std::fill(chunk, chunk + a.subspaces, KsgNotes::kNone);
}

// radius [P, Q] of the queries of a round.
void read_radii(const Ksg& a, float* radius) {
  for (int64_t q = a.first; q < a.last; ++q)
    for (int64_t pair = 0; pair < a.pairs; ++pair) {
      const float* found = a.states + (q - a.first) * ksg_per_query(a) + pair;
      float least = *found;
      for (int t = 1; t < a.threads; ++t) least = std::min(least, found[t * a.state_stride]);
      radius[pair * a.queries + q] = std::sqrt(least);
    }
}

bool is_crowded(const Ksg& a, int64_t q) {
  for (int t = 0; t < a.threads; ++t) {
    const float* state = a.states + t * a.state_stride + (q - a.first) * ksg_per_query(a);
    const auto* chunk = reinterpret_cast<const int32_t*>(state + a.pairs + a.subspaces);
    if (std::count(chunk, chunk + a.subspaces, KsgNotes::kCrowded)) return true;
  }
  return false;
}

// Counts of the queries of a round from the keys that they noted; `crowded` gets those that had no room.
void count_noted(const Ksg& a, const Kernels& kernels, Notes& notes, const Entries& entries, const float* radius,
                 int64_t* counts, std::vector<int64_t>* crowded) {
  std::atomic<int64_t> next{a.first};
  parallel(a.threads, [&](int) {
    std::vector<float> limits(static_cast<size_t>(entries.count()));
    std::vector<int32_t> found(limits.size());
    for (int64_t q; (q = next.fetch_add(1)) < a.last;) {
      if (is_crowded(a, q)) continue;
      entries.write_limits(a, radius, q, limits.data());
      std::fill(found.begin(), found.end(), 0);
      for (int t = 0; t < a.threads; ++t)
        kernels.ksg.count_noted(a, a.states + t * a.state_stride + (q - a.first) * ksg_per_query(a), notes[t],
                                limits.data(), found.data());
      entries.read_counts(a, found.data(), q, counts);
    }
  });
  for (int64_t q = a.first; q < a.last; ++q)
    if (is_crowded(a, q)) crowded->push_back(q);
}

// Counts of some queries alone, by a pass of their own.
void count_again(const Ksg& a, const Kernels& kernels, int threads, const std::vector<int64_t>& some,
                 const float* radius, int64_t* counts) {
  const int64_t n = static_cast<int64_t>(some.size());
  std::vector<float> rows(static_cast<size_t>(n * a.width)), their_radius(static_cast<size_t>(a.pairs * n));
  std::vector<int64_t> found(static_cast<size_t>(2 * a.pairs * n));
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(a.rotated_queries + some[i] * a.width, a.width, rows.data() + i * a.width);
    for (int64_t pair = 0; pair < a.pairs; ++pair) their_radius[pair * n + i] = radius[pair * a.queries + some[i]];
  }
  Ksg part = a;
  part.queries = n;
  part.rotated_queries = rows.data();
  ksg_counts(part, kernels, threads, their_radius.data(), found.data());
  for (int64_t side = 0; side < 2 * a.pairs; ++side)
    for (int64_t i = 0; i < n; ++i) counts[side * a.queries + some[i]] = found[side * n + i];
}

}  // namespace

void ksg_radius(Ksg a, const Kernels& kernels, int threads, float* radius) {
  run_passes(
      a, kernels, threads, nullptr, [&](float* state) { reset_radii(a, state); },
      [&](const Ksg& round) { read_radii(round, radius); });
}

void ksg_counts(Ksg a, const Kernels& kernels, int threads, const float* radius, int64_t* counts) {
  const Entries entries(a);
  const size_t each = static_cast<size_t>(entries.count()), subspaces = static_cast<size_t>(a.subspaces);
  std::vector<float> limits(each * static_cast<size_t>(a.queries)), widest(subspaces * static_cast<size_t>(a.queries));
  for (int64_t q = 0; q < a.queries; ++q) {
    float* theirs = limits.data() + q * each;
    entries.write_limits(a, radius, q, theirs);
    for (size_t s = 0; s < subspaces; ++s)
      for (int64_t e = entries.begin[s]; e < entries.begin[s + 1]; ++e)
        widest[q * subspaces + s] = std::max(widest[q * subspaces + s], theirs[e]);
  }
  a.entries = entries.begin.data();
  a.limits = limits.data();
  a.widest = widest.data();
  run_passes(
      a, kernels, threads, nullptr, [&](float* state) { std::memset(state, 0, each * 4); },
      [&](const Ksg& round) {
        std::vector<int64_t> total(each);
        for (int64_t q = round.first; q < round.last; ++q) {
          std::fill(total.begin(), total.end(), 0);
          for (int t = 0; t < threads; ++t) {
            const float* state = round.states + t * round.state_stride + (q - round.first) * entries.count();
            for (size_t e = 0; e < each; ++e) total[e] += reinterpret_cast<const int32_t*>(state)[e];
          }
          entries.read_counts(a, total.data(), q, counts);
        }
      });
}

void ksg_radius_and_counts(Ksg a, const Kernels& kernels, int threads, float* radius, int64_t* counts) {
  const Entries entries(a);
  Notes notes(threads, std::min(kNotesBytes, 4 * a.queries * a.subspaces * (a.keys + KsgNotes::kChunk) * threads));
  std::vector<int64_t> crowded;
  Ksg noting = a;
  noting.entries = entries.begin.data();
  run_passes(
      noting, kernels, threads, &notes, [&](float* state) { reset_radii(a, state); },
      [&](const Ksg& round) {
        read_radii(round, radius);
        count_noted(round, kernels, notes, entries, radius, counts, &crowded);
      });
  if (!crowded.empty()) count_again(a, kernels, threads, crowded, radius, counts);
}

}  // namespace ndm
