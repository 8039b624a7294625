// Why not link OpenMP: a second libgomp next to torch's would spin on the same cores (measured in
// docs/lab-notes.md), and a wheel would have to carry one. Instead the entry point of the runtime that torch
// has loaded is looked up by name: the same workers that ran torch's last product take ours, still warm.
// GOMP_parallel is part of GCC's stable ABI since 4.9, and LLVM's libomp exports it too.
#include "parallel.h"

#include <atomic>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace ndm {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_gomp() {
#if defined(__linux__)
  if (void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel")) return reinterpret_cast<GompParallel>(symbol);
  // Only if someone has loaded it: never bring in a runtime of our own.
  if (void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD))
    return reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
#endif
  return nullptr;
}

GompParallel gomp() {
  static const GompParallel found = find_gomp();
  return found;
}

struct Team {
  void (*body)(void*, int);
  void* context;
  int wanted;
  std::atomic<int> next;
};

// The runtime may give fewer threads than asked for, so members take numbers until none is left.
void member(void* data) {
  Team& team = *static_cast<Team*>(data);
  for (int thread; (thread = team.next.fetch_add(1)) < team.wanted;) team.body(team.context, thread);
}

}  // namespace

const char* parallel_runtime() { return gomp() ? "gomp" : "threads"; }

void parallel(int threads, void (*body)(void*, int), void* context) {
  if (threads <= 1) return body(context, 0);
  Team team{body, context, threads, {0}};
  if (gomp()) return gomp()(member, &team, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(member, &team);
  member(&team);
  for (std::thread& other : others) other.join();
}

}  // namespace ndm
