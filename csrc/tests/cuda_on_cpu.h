// What the kernels of csrc/cuda use of CUDA, on a CPU, so that they can be tested without a GPU. Takes the place of CUDA's
// headers and of instructions.cuh in a build without nvcc.
//
// Every thread of a block is a fiber. Which warp goes first is drawn for each block: it runs until it can go on no more, the
// worst case for a barrier that is missing. An asynchronous copy is done when it is asked for or when it is waited for, by
// a coin. Shared memory starts as NaN and ends with a guard. Lanes that meet at different instructions, barriers that not
// all threads reach, and rows of a matrix on one bank of shared memory are errors. Nothing here says how fast a kernel is.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define CUDART_INF_F (std::numeric_limits<float>::infinity())

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, gridDim;

using std::fmax, std::sqrt;

using __half = _Float16;
struct __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct float2 {
  float x, y;
};
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

namespace cuda_on_cpu {

constexpr unsigned kLanes = 32;
constexpr int kStackBytes = 1 << 18, kGuardBytes = 256;
constexpr unsigned char kPoison = 0xFF;  // NaN in every format

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  enum { ready, at_meeting, at_barrier, done } state = ready;
  unsigned met = 0;                      // instructions at which this lane has met the others of its warp
  std::vector<std::vector<Copy>> copies;  // groups under way, oldest first; the last is not committed yet
};

struct Warp {
  struct Meeting {
    std::string instruction;
    unsigned arrived = 0;
    std::array<std::array<unsigned char, 64>, kLanes> values;
  };
  // A lane may come to the next meeting before others have read what was left at this one, but not to the one after.
  std::array<Meeting, 2> meetings;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> order;  // of the warps
  std::vector<unsigned char> shared;
  std::function<void()> kernel;
  ucontext_t scheduler;
  unsigned running = 0;
  std::string error;
};

inline Block* block = nullptr;  // that runs
inline std::mt19937 chance;

inline Fiber& fiber() { return block->fibers[block->running]; }
inline void pause() { swapcontext(&fiber().context, &block->scheduler); }

[[noreturn]] inline void fail(const std::string& what) {
  block->error = what;
  while (true) pause();
}

// What all lanes of the warp bring to an instruction, once they are all there.
template <class T>
std::array<T, kLanes> meet(const std::string& instruction, const T& mine) {
  static_assert(sizeof(T) <= 64 && std::is_trivially_copyable_v<T>);
  const unsigned first = block->running / kLanes * kLanes, lane = block->running % kLanes;
  Warp::Meeting& meeting = block->warps[first / kLanes].meetings[fiber().met++ % 2];
  if (meeting.arrived == 0) meeting.instruction = instruction;
  if (meeting.instruction != instruction) fail("lanes of a warp are at " + meeting.instruction + " and " + instruction);
  std::memcpy(meeting.values[lane].data(), &mine, sizeof(T));
  if (++meeting.arrived == kLanes) {
    meeting.arrived = 0;
    for (unsigned other = first; other < first + kLanes; ++other) block->fibers[other].state = Fiber::ready;
  } else {
    fiber().state = Fiber::at_meeting;
    pause();
  }
  std::array<T, kLanes> all;
  for (unsigned other = 0; other < kLanes; ++other) std::memcpy(&all[other], meeting.values[other].data(), sizeof(T));
  return all;
}

inline void begin_thread() {
  block->kernel();
  fiber().state = Fiber::done;
  pause();
}

inline Fiber* next_ready() {
  for (unsigned warp : block->order)
    for (unsigned thread = warp * kLanes; thread < (warp + 1) * kLanes; ++thread)
      if (block->fibers[thread].state == Fiber::ready) return &block->fibers[thread];
  return nullptr;
}

inline bool all_are(decltype(Fiber::state) state) {
  return std::all_of(block->fibers.begin(), block->fibers.end(), [=](const Fiber& f) { return f.state == state; });
}

inline void run_to_the_end() {
  while (!all_are(Fiber::done)) {
    Fiber* const next = next_ready();
    if (next) {
      block->running = unsigned(next - block->fibers.data());
      threadIdx = dim3(block->running);
      swapcontext(&block->scheduler, &next->context);
      if (!block->error.empty()) throw std::runtime_error(block->error);
    } else if (all_are(Fiber::at_barrier)) {
      for (Fiber& each : block->fibers) each.state = Fiber::ready;
      std::shuffle(block->order.begin(), block->order.end(), chance);
    } else {
      throw std::runtime_error("threads wait for others that do not come");
    }
  }
}

inline void run_block(unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads == 0 || threads % kLanes) throw std::runtime_error("a block is not made of whole warps");
  Block now;
  now.fibers.resize(threads);
  now.warps.resize(threads / kLanes);
  now.order.resize(threads / kLanes);
  std::iota(now.order.begin(), now.order.end(), 0u);
  std::shuffle(now.order.begin(), now.order.end(), chance);
  now.shared.assign(shared_bytes + kGuardBytes, kPoison);
  now.kernel = kernel;
  block = &now;
  for (Fiber& each : now.fibers) {
    getcontext(&each.context);
    each.context.uc_stack.ss_sp = each.stack.data();
    each.context.uc_stack.ss_size = each.stack.size();
    each.context.uc_link = nullptr;
    makecontext(&each.context, begin_thread, 0);
  }
  run_to_the_end();
  for (const Fiber& each : now.fibers)
    for (const auto& group : each.copies)
      if (!group.empty()) throw std::runtime_error("a thread has ended before its copies");
  const auto guard = now.shared.begin() + ptrdiff_t(shared_bytes);
  if (std::any_of(guard, now.shared.end(), [](unsigned char byte) { return byte != kPoison; }))
    throw std::runtime_error("a write past the end of shared memory");
}

// A sum as matrix units form it (Fasi et al. 2021): exact products, every addend cut off at the last place of the largest.
inline float sum_like_matrix_unit(float start, const float* left, const float* right, int count) {
  std::vector<double> addends{start};
  for (int i = 0; i < count; ++i) addends.push_back(double(left[i]) * double(right[i]));
  const double rounded = std::accumulate(addends.begin(), addends.end(), 0.0);
  double largest = 0, sum = 0;
  for (double each : addends) largest = std::max(largest, std::fabs(each));
  if (!std::isfinite(rounded) || largest == 0) return float(rounded);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
  for (double each : addends) sum += std::trunc(each / unit) * unit;
  const double last = sum == 0 ? unit : std::ldexp(1.0, std::max(std::ilogb(sum) - 23, -149));
  return float(std::trunc(sum / last) * last);
}

inline unsigned char* at_shared(const void* address, const char* instruction) {
  auto* const byte = static_cast<unsigned char*>(const_cast<void*>(address));
  const auto offset = byte - block->shared.data();
  if (offset < 0 || size_t(offset) + 16 > block->shared.size() - kGuardBytes || offset % 16)
    fail(std::string(instruction) + " is outside of shared memory, or not at a multiple of 16 bytes");
  return byte;
}

}  // namespace cuda_on_cpu

// Of CUDA's own functions.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  if (mask != ~0u) cuda_on_cpu::fail("a shuffle of some lanes only");
  return cuda_on_cpu::meet("shfl.xor", value)[threadIdx.x % 32 ^ unsigned(lanes)];
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  if (mask != ~0u) cuda_on_cpu::fail("a shuffle of some lanes only");
  return cuda_on_cpu::meet("shfl", value)[unsigned(lane) % 32];
}
inline void __syncwarp() { cuda_on_cpu::meet("syncwarp", 0); }
inline void __syncthreads() {
  cuda_on_cpu::fiber().state = cuda_on_cpu::Fiber::at_barrier;
  cuda_on_cpu::pause();
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= 163 * 1024 ? cudaSuccess : cudaErrorInvalidValue;  // of sm_80, the least of those we build for
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* launch, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const dim3 grid = gridDim = launch->gridDim;
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z != 1 || launch->blockDim.x > 1024) return cudaErrorInvalidValue;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      cuda_on_cpu::run_block(launch->blockDim.x, launch->dynamicSmemBytes, [&] { kernel(arguments...); });
    }
  return cudaSuccess;
}

namespace ndm_cuda {

// The instructions of instructions.cuh; layouts of fragments as in the PTX ISA, mma.m16n8k16 and ldmatrix.

inline unsigned char* shared_memory() { return cuda_on_cpu::block->shared.data(); }

inline void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&start)[4]) {
  struct Operands {
    __half a[8], b[4];
  } mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  const auto all = cuda_on_cpu::meet("mma", mine);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float left[16], right[16];
    for (unsigned k = 0; k < 16; ++k) {
      left[k] = float(all[row % 8 * 4 + k % 8 / 2].a[k / 8 * 4 + row / 8 * 2 + k % 2]);
      right[k] = float(all[column * 4 + k % 8 / 2].b[k / 8 * 2 + k % 2]);
    }
    // Two turns of eight products, as sm_80 does it.
    sum[i] = cuda_on_cpu::sum_like_matrix_unit(start[i], left, right, 8);
    sum[i] = cuda_on_cpu::sum_like_matrix_unit(sum[i], left + 8, right + 8, 8);
  }
}

inline void load_matrix(uint32_t (&a)[4], const __half* row) {
  const auto rows = cuda_on_cpu::meet("ldmatrix", cuda_on_cpu::at_shared(row, "ldmatrix"));
  const unsigned lane = threadIdx.x % 32;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    for (unsigned each = 0; each < 8; ++each) banks |= 1u << (rows[matrix * 8 + each] - shared_memory()) / 16 % 8;
    if (banks != 0xFF) cuda_on_cpu::fail("rows of a matrix share a bank of shared memory");
    std::memcpy(&a[matrix], rows[matrix * 8 + lane / 4] + lane % 4 * 4, 4);
  }
}

inline void copy_16_bytes(__half* to, const __half* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) cuda_on_cpu::fail("cp.async from an address that is no multiple of 16 bytes");
  auto& groups = cuda_on_cpu::fiber().copies;
  if (groups.empty()) groups.emplace_back();
  if (cuda_on_cpu::chance() % 2)
    std::memcpy(cuda_on_cpu::at_shared(to, "cp.async"), from, 16);
  else
    groups.back().push_back({cuda_on_cpu::at_shared(to, "cp.async"), from});
}

inline void commit_copies() { cuda_on_cpu::fiber().copies.emplace_back(); }

template <int kGroups>
void wait_for_copies() {
  auto& groups = cuda_on_cpu::fiber().copies;
  while (groups.size() > kGroups + 1) {
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

}  // namespace ndm_cuda
