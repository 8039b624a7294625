// Keys that wait to be measured from the raw rows, for the queries that are handled together.
//
// A query's only key is measured in fp32 where that is exact enough; the others, and what fp32 leaves, in fp64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "rows.h"
#include "search_query.h"
#include "search_raw.h"

namespace ndm {
namespace {

constexpr int kWaiting = 64;

struct WaitingKey {
  int64_t key;
  int query;     // of those handled together
  double lower;  // bound of its distance
};

template <class V>
class WaitingKeys {
 public:
  // queries: [kRerankQueries], number `first` of all and on; their `best` and `upper` are brought up to date.
  WaitingKeys(Query* queries, int64_t first, const RawRows<V>& raw_rows)
      : a_(raw_rows.a), queries_(queries), first_(first), raw_rows_(raw_rows) {}

  void add(const WaitingKey& key) {
    if (count_ == kWaiting) measure(false);
    keys_[count_++] = key;
  }

  // Only now is a query's only key known to be the only one.
  void measure_all() { measure(true); }

 private:
  void measure(bool at_the_end) {
    drop_if([&](const WaitingKey& x) { return out_of_reach(x); });
    if (at_the_end && !a_.cosine) measure_single_keys();
    const int at_once = a_.cosine ? 2 : 4;
    const int total = count_;
    count_ = 0;
    for (int begin = 0; begin < total;) {
      WaitingKey batch[4];
      int size = 0;
      for (; begin < total && size < at_once; ++begin) {
        const WaitingKey& x = keys_[begin];
        // Copies of the best row (padding and first tokens come in thousands) cannot win.
        if (out_of_reach(x) || same_as_best(x)) continue;
        batch[size++] = x;
      }
      if (size) measure_in_fp64(batch, size);
    }
  }

  // Takes those keys off the list whose fp32 distance will do.
  void measure_single_keys() {
    constexpr int at_once = RawRows<V>::kAtOnce;
    int keys_of[kRerankQueries] = {};
    for (int i = 0; i < count_; ++i) ++keys_of[keys_[i].query];
    int at[kRerankQueries], size = 0;
    for (int i = 0; i < count_; ++i)
      if (keys_of[keys_[i].query] == 1 && queries_[keys_[i].query].best.index < 0) at[size++] = i;
    for (int begin = 0; begin < size; begin += at_once)
      measure_in_fp32(at + begin, size - begin < at_once ? size - begin : at_once);
    drop_if([](const WaitingKey& x) { return x.key < 0; });
  }

  void measure_in_fp32(const int* at, int size) {
    constexpr int at_once = RawRows<V>::kAtOnce;
    RawPair pairs[at_once];
    double squared[at_once];
    bool exact[at_once];
    for (int b = 0; b < size; ++b) pairs[b] = raw_pair(keys_[at[b]]);
    raw_rows_.measure_in_fp32(pairs, size, squared, exact);
    for (int b = 0; b < size; ++b) {
      if (!exact[b]) continue;
      WaitingKey& x = keys_[at[b]];
      improve(queries_[x.query].best, squared[b], x.key);
      x.key = -1;
    }
  }

  void measure_in_fp64(const WaitingKey* batch, int size) {
    RawPair pairs[4];
    double squared[4];
    for (int b = 0; b < size; ++b) pairs[b] = raw_pair(batch[b]);
    raw_rows_.measure_in_fp64(pairs, size, squared);
    for (int b = 0; b < size; ++b) {
      Query& q = queries_[batch[b].query];
      improve(q.best, squared[b], batch[b].key);
      const double distance = std::sqrt(q.best.squared);
      if (distance < q.upper) q.upper = distance;
    }
  }

  RawPair raw_pair(const WaitingKey& x) const { return {first_ + x.query, x.key}; }

  // Since it was put on the list, a nearer key was seen.
  bool out_of_reach(const WaitingKey& x) const { return x.lower > queries_[x.query].upper * (1 + 1e-14); }

  bool same_as_best(const WaitingKey& x) const {
    const Best& best = queries_[x.query].best;
    if (best.index < 0 || x.key < best.index) return false;
    const size_t bytes = static_cast<size_t>(a_.width * element_size(a_.raw_keys.type));
    return std::memcmp(row_address(a_.raw_keys, x.key, 0), row_address(a_.raw_keys, best.index, 0), bytes) == 0;
  }

  template <class F>
  void drop_if(F condition) {
    count_ = static_cast<int>(std::remove_if(keys_, keys_ + count_, condition) - keys_);
  }

  const Search& a_;
  Query* queries_;
  int64_t first_;
  RawRows<V> raw_rows_;
  WaitingKey keys_[kWaiting];
  int count_ = 0;
};

}  // namespace
}  // namespace ndm
