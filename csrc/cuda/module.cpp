// Python binding of the CUDA kernels: addresses as integers and a stream. Knows nothing of torch;
// ndm_fast/ops/cuda.py checks devices, dtypes, shapes and strides before it hands out an address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "search.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, type, stride), type as in ndm_cuda::Type.
using RowsTuple = std::tuple<uintptr_t, int, int64_t>;

ndm_cuda::Type type_of(const RowsTuple& rows) {
  const int type = std::get<1>(rows);
  if (type < 0 || type > 2) throw std::invalid_argument("unknown element type");
  return static_cast<ndm_cuda::Type>(type);
}

void check(const char* message) {
  if (message) throw std::runtime_error(std::string("CUDA kernel of ndm_fast: ") + message);
}

ndm_cuda::Sweep make_sweep(const RowsTuple& keys, int64_t key_count, uintptr_t origin, uintptr_t scales, uintptr_t errors,
                           uintptr_t packed, int64_t query_count, int64_t query_slots, uintptr_t minima, int subspaces,
                           int width, int padded, bool cosine) {
  const int tile = ndm_cuda::tile_keys(padded);
  if (tile == 0 || width < 1 || width > padded) throw std::invalid_argument("no kernel for this width");
  if (key_count < 1 || query_count < 1 || query_slots % 64 || query_slots < query_count || subspaces < 1 || subspaces > 65535)
    throw std::invalid_argument("sizes must be positive, query slots a multiple of 64");
  ndm_cuda::Sweep a{};
  a.keys = at<const void>(std::get<0>(keys));
  a.key_type = type_of(keys);
  a.key_stride = std::get<2>(keys);
  a.key_count = key_count;
  const uintptr_t pair_bytes = a.key_type == ndm_cuda::Type::f32 ? 8 : 4;
  a.paired = std::get<0>(keys) % pair_bytes == 0 && a.key_stride % 2 == 0 && width % 2 == 0;
  a.origin = at<const float>(origin);
  a.scales = at<const float>(scales);
  a.errors = at<const float>(errors);
  a.packed = at<const void>(packed);
  a.query_count = query_count;
  a.query_slots = query_slots;
  a.minima = at<float>(minima);
  a.subspaces = subspaces;
  a.width = width;
  a.padded = padded;
  a.cosine = cosine;
  return a;
}

void resolve(const ndm_cuda::Sweep& sweep, uintptr_t queries, uintptr_t exact_queries,
             int64_t query_stride, uintptr_t sizes, uintptr_t half_norms, const RowsTuple& raw_queries,
             const RowsTuple& raw_keys, uintptr_t rotation, int64_t rotation_stride, int64_t depth, int64_t first_key,
             float rounding, float copy_rounding, float absolute, uintptr_t best, uintptr_t index, uintptr_t stream) {
  ndm_cuda::Resolve a{};
  a.sweep = sweep;
  a.queries = at<const double>(queries);
  a.exact_queries = at<const double>(exact_queries);
  a.query_stride = query_stride;
  a.sizes = at<const float>(sizes);
  a.half_norms = at<const float>(half_norms);
  a.raw_queries = at<const void>(std::get<0>(raw_queries));
  a.raw_query_type = type_of(raw_queries);
  a.raw_query_stride = std::get<2>(raw_queries);
  a.raw_keys = at<const void>(std::get<0>(raw_keys));
  a.raw_key_type = type_of(raw_keys);
  a.raw_key_stride = std::get<2>(raw_keys);
  a.rotation = at<const float>(rotation);
  a.rotation_stride = rotation_stride;
  a.depth = depth;
  a.first_key = first_key;
  a.rounding = rounding;
  a.copy_rounding = copy_rounding;
  a.absolute = absolute;
  a.best = at<double>(best);
  a.index = at<int64_t>(index);
  if (a.raw_keys && !(a.raw_queries && a.rotation)) throw std::invalid_argument("raw keys need raw queries and a rotation");
  check(ndm_cuda::resolve(a, at<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of ndm_fast; use ndm_fast.ops instead.";
  py::class_<ndm_cuda::Sweep>(m, "Sweep", py::module_local()).def(py::init(&make_sweep));
  m.def("tile_keys", &ndm_cuda::tile_keys);
  m.def("sweep", [](const ndm_cuda::Sweep& a, uintptr_t stream) { check(ndm_cuda::sweep(a, at<void>(stream))); });
  m.def("resolve", &resolve);
}
