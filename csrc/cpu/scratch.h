// Scratch memory of a call, and the arithmetic of its sizes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ndm {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory on a 64-byte boundary, so that vectors do not straddle cache lines; large blocks in huge pages,
// because minima are read with strides of many small ones.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    const size_t boundary = bytes >= kHugePage ? kHugePage : 64;
    memory_.reset(new char[bytes + boundary]);
    auto address = (reinterpret_cast<uintptr_t>(memory_.get()) + boundary - 1) / boundary * boundary;
    start_ = reinterpret_cast<T*>(address);
#if defined(__linux__)
    if (bytes >= kHugePage) madvise(start_, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  }
  T* get() { return start_; }

 private:
  static constexpr size_t kHugePage = 2 << 20;
  std::unique_ptr<char[]> memory_;
  T* start_;
};

inline int64_t widest(const int64_t* offsets, int64_t subspaces) {
  int64_t p = 0;
  for (int64_t s = 0; s < subspaces; ++s) p = std::max(p, offsets[s + 1] - offsets[s]);
  return p;
}

}  // namespace ndm
