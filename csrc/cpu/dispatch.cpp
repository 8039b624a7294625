// Which instruction set to use.
#include <string>

#include "driver.h"

namespace ndm {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_amd() { return __builtin_cpu_is("amd"); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512bf16() { return false; }
bool has_amd() { return false; }
#endif

const Kernels* check(const Kernels* kernels, bool cpu_has, const std::string& name, std::string* why) {
  if (!kernels) *why = "this build holds no " + name + " code";
  else if (!cpu_has) *why = "this CPU has no " + name;
  return kernels && cpu_has ? kernels : nullptr;
}

}  // namespace

bool is_amd() { return has_amd(); }

const Kernels* choose_kernels(const std::string& name, std::string* why) {
  std::string ignored;
  if (!why) why = &ignored;
  if (name == "avx512bf16") return check(avx512bf16_kernels(), has_avx512bf16(), name, why);
  if (name == "avx512") return check(avx512_kernels(), has_avx512(), name, why);
  if (name == "avx2") return check(avx2_kernels(), has_avx2(), name, why);
  if (name == "portable") return portable_kernels();
  if (!name.empty()) {
    *why = "unknown name, take avx512bf16, avx512, avx2 or portable";
    return nullptr;
  }
  for (const char* faster : {"avx512bf16", "avx512", "avx2"})
    if (const Kernels* kernels = choose_kernels(faster, why)) return kernels;
  return portable_kernels();
}

}  // namespace ndm
