// Runs a function on n threads, on the thread pool that torch already has.
#pragma once

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

}  // namespace ndm
