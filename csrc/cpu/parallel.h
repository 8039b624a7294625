// Runs a function on n threads, on the thread pool that torch already has.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace ndm {

// Calls body(context, thread) for thread = 0 .. threads - 1, at once, and returns when all are done.
// The body must not throw.
void parallel(int threads, void (*body)(void*, int), void* context);

// "gomp" where torch's OpenMP runtime was found, else "threads".
const char* parallel_runtime();

template <class F>
void parallel(int threads, F&& body) {
  using Body = typename std::remove_reference<F>::type;
  parallel(
      threads, [](void* context, int thread) { (*static_cast<Body*>(context))(thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Calls work(item, thread) for item = 0 .. items - 1, each as soon as a thread is free: another core may be busy
// with something else.
template <class F>
void share(int threads, int64_t items, F&& work) {
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int thread) {
    for (int64_t item; (item = next.fetch_add(1)) < items;) work(item, thread);
  });
}

}  // namespace ndm
