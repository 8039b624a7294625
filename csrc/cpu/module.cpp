// Python binding: addresses as integers, sizes, thread count. Knows nothing of torch; ndm_fast/ops/cpu/search.py checks
// devices, dtypes, shapes and strides before it hands out an address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "driver.h"
#include "parallel.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, type, stride), type as in ndm::Type.
using RowsTuple = std::tuple<uintptr_t, int, int64_t>;

ndm::Rows rows(const RowsTuple& from) {
  const auto [address, type, stride] = from;
  if (type < 0 || type > 2) throw std::invalid_argument("unknown element type");
  return {at<const void>(address), static_cast<ndm::Type>(type), stride};
}

const ndm::Kernels& kernels_named(const std::string& name) {
  std::string why;
  const ndm::Kernels* kernels = ndm::choose_kernels(name, &why);
  if (!kernels) throw std::invalid_argument("instruction set " + name + ": " + why);
  return *kernels;
}

void check_sizes(int64_t queries, int64_t keys, const std::vector<int64_t>& offsets, int threads) {
  if (queries < 0 || keys < 1 || offsets.size() < 2 || offsets[0] != 0 || threads < 1)
    throw std::invalid_argument("sizes must be positive");
  for (size_t s = 1; s < offsets.size(); ++s)
    if (offsets[s] <= offsets[s - 1]) throw std::invalid_argument("offsets must increase");
}

void nearest_neighbors(const std::string& isa, int threads, int64_t queries, int64_t keys,
                       const std::vector<int64_t>& offsets, bool cosine, bool bf16, bool shadows,
                       const RowsTuple& rotated_keys, const RowsTuple& swept_keys,
                       uintptr_t center, uintptr_t rotated_queries, uintptr_t exact_queries,
                       const RowsTuple& raw_queries, const RowsTuple& raw_keys, uintptr_t rotation,
                       uintptr_t query_error, uintptr_t key_error, uintptr_t distance, uintptr_t index) {
  check_sizes(queries, keys, offsets, threads);
  const ndm::Kernels& kernels = kernels_named(isa);
  ndm::Search a;
  a.queries = queries;
  a.keys = keys;
  a.width = offsets.back();
  a.subspaces = static_cast<int64_t>(offsets.size()) - 1;
  a.offsets = offsets.data();
  a.cosine = cosine;
  a.bf16 = bf16;
  a.shadows = shadows;
  a.rotated_keys = rows(rotated_keys);
  a.swept_keys = rows(swept_keys);
  a.center = at<const float>(center);
  a.rotated_queries = at<const float>(rotated_queries);
  a.exact_queries = at<const double>(exact_queries);
  a.raw_queries = rows(raw_queries);
  a.raw_keys = rows(raw_keys);
  a.rotation = at<const float>(rotation);
  a.query_error = at<const float>(query_error);
  a.key_error = at<const float>(key_error);
  a.distance = at<float>(distance);
  a.index = at<int64_t>(index);
  if (!exact_queries && !(rotation && query_error && key_error))
    throw std::invalid_argument("raw form needs rotation and error bounds");
  if (a.swept_keys.data && !(exact_queries && rotated_queries && query_error && key_error && !center))
    throw std::invalid_argument("turned form needs queries in both axes and error bounds, and no center");
  py::gil_scoped_release unlocked;
  if (queries) ndm::nearest_neighbors(a, kernels, threads);
}

ndm::Ksg ksg_arguments(int64_t queries, int64_t keys, const std::vector<int64_t>& offsets, uintptr_t inverse_variance,
                       uintptr_t rotated_queries, uintptr_t rotated_keys, int64_t pairs, uintptr_t pair) {
  ndm::Ksg a;
  a.queries = queries;
  a.keys = keys;
  a.width = offsets.back();
  a.subspaces = static_cast<int64_t>(offsets.size()) - 1;
  a.pairs = pairs;
  a.offsets = offsets.data();
  a.inverse_variance = at<const float>(inverse_variance);
  a.rotated_queries = at<const float>(rotated_queries);
  a.rotated_keys = at<const float>(rotated_keys);
  a.pair = at<const int64_t>(pair);
  for (int64_t i = 0; i < 2 * pairs; ++i)
    if (a.pair[i] < 0 || a.pair[i] >= a.subspaces) throw std::invalid_argument("pair out of range");
  return a;
}

void ksg_radius(const std::string& isa, int threads, int64_t queries, int64_t keys,
                const std::vector<int64_t>& offsets, uintptr_t inverse_variance, uintptr_t rotated_queries,
                uintptr_t rotated_keys, int64_t pairs, uintptr_t pair, uintptr_t radius) {
  check_sizes(queries, keys, offsets, threads);
  const ndm::Kernels& kernels = kernels_named(isa);
  ndm::Ksg a = ksg_arguments(queries, keys, offsets, inverse_variance, rotated_queries, rotated_keys, pairs, pair);
  py::gil_scoped_release unlocked;
  if (queries && pairs) ndm::ksg_radius(a, kernels, threads, at<float>(radius));
}

void ksg_counts(const std::string& isa, int threads, int64_t queries, int64_t keys,
                const std::vector<int64_t>& offsets, uintptr_t inverse_variance, uintptr_t rotated_queries,
                uintptr_t rotated_keys, int64_t pairs, uintptr_t pair, uintptr_t radius, uintptr_t counts) {
  check_sizes(queries, keys, offsets, threads);
  const ndm::Kernels& kernels = kernels_named(isa);
  ndm::Ksg a = ksg_arguments(queries, keys, offsets, inverse_variance, rotated_queries, rotated_keys, pairs, pair);
  py::gil_scoped_release unlocked;
  if (queries && pairs) ndm::ksg_counts(a, kernels, threads, at<const float>(radius), at<int64_t>(counts));
}

void ksg_radius_and_counts(const std::string& isa, int threads, int64_t queries, int64_t keys,
                           const std::vector<int64_t>& offsets, uintptr_t inverse_variance, uintptr_t rotated_queries,
                           uintptr_t rotated_keys, int64_t pairs, uintptr_t pair, uintptr_t radius, uintptr_t counts) {
  check_sizes(queries, keys, offsets, threads);
  const ndm::Kernels& kernels = kernels_named(isa);
  ndm::Ksg a = ksg_arguments(queries, keys, offsets, inverse_variance, rotated_queries, rotated_keys, pairs, pair);
  py::gil_scoped_release unlocked;
  if (queries && pairs) ndm::ksg_radius_and_counts(a, kernels, threads, at<float>(radius), at<int64_t>(counts));
}

void mean_distance_gradient(const std::string& isa, int threads, int64_t queries, int64_t keys,
                            const std::vector<int64_t>& offsets, const RowsTuple& raw_queries, const RowsTuple& raw_keys,
                            uintptr_t index, int64_t index_stride, uintptr_t counted, int64_t counted_stride,
                            uintptr_t log_floor, uintptr_t rotation, uintptr_t mean, uintptr_t gradient) {
  check_sizes(queries - 1, keys, offsets, threads);
  const ndm::Kernels& kernels = kernels_named(isa);
  ndm::Gradient a;
  a.queries = queries;
  a.width = offsets.back();
  a.subspaces = static_cast<int64_t>(offsets.size()) - 1;
  a.offsets = offsets.data();
  a.raw_queries = rows(raw_queries);
  a.raw_keys = rows(raw_keys);
  a.index = at<const int64_t>(index);
  a.index_stride = index_stride;
  a.counted = at<const uint8_t>(counted);
  a.counted_stride = counted_stride;
  a.log_floor = at<const float>(log_floor);
  a.rotation = at<const float>(rotation);
  a.mean = at<float>(mean);
  a.gradient = at<float>(gradient);
  for (int64_t s = 0; s < a.subspaces; ++s)
    for (int64_t q = 0; q < queries; ++q)
      if (const int64_t key = a.index[s * index_stride + q]; key < 0 || key >= keys)
        throw std::invalid_argument("index names row " + std::to_string(key) + " of " + std::to_string(keys));
  py::gil_scoped_release unlocked;
  ndm::mean_distance_gradient(a, kernels, threads);
}

void lie_update(const std::string& isa, int threads, int64_t width, uintptr_t product, uintptr_t first,
                uintptr_t second, float scale, float guard, double fast, double slow, uintptr_t update,
                uintptr_t half_update) {
  if (width < 1 || threads < 1) throw std::invalid_argument("sizes must be positive");
  const ndm::Kernels& kernels = kernels_named(isa);
  const ndm::LieUpdate a{width, at<const float>(product), at<float>(first), at<float>(second), fast, slow, scale,
                         guard, at<float>(update),        at<uint16_t>(half_update)};
  py::gil_scoped_release unlocked;
  ndm::lie_update(a, kernels, threads);
}

void product(const std::string& isa, int threads, int64_t count, int64_t depth, int64_t columns, const RowsTuple& left,
             bool transposed, uintptr_t origin, float scale, const RowsTuple& right, const RowsTuple& base, float factor,
             const RowsTuple& out, uintptr_t norms) {
  if (count < 0 || depth < 1 || columns < 1 || threads < 1) throw std::invalid_argument("sizes must be positive");
  ndm::Product a;
  a.rows = count;
  a.depth = depth;
  a.columns = columns;
  a.left = rows(left);
  a.transposed = transposed;
  a.origin = at<const float>(origin);
  a.scale = scale;
  const ndm::Rows fp32[] = {rows(right), rows(base), rows(out)};
  for (const ndm::Rows& each : fp32)
    if (each.type != ndm::Type::float32) throw std::invalid_argument("only left may be in half precision");
  if (transposed && (a.left.type != ndm::Type::float32 || origin || norms))
    throw std::invalid_argument("a transposed left has to be fp32, without origin and norms");
  a.right = static_cast<const float*>(fp32[0].data);
  a.right_stride = fp32[0].stride;
  a.base = static_cast<const float*>(fp32[1].data);
  a.base_stride = fp32[1].stride;
  a.factor = factor;
  a.out = at<float>(std::get<0>(out));
  a.out_stride = fp32[2].stride;
  a.norms = at<float>(norms);
  const ndm::Kernels& kernels = kernels_named(isa);
  py::gil_scoped_release unlocked;
  if (count) ndm::product(a, kernels, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU ops of ndm_fast; use ndm_fast.ops instead.";
  m.def("isa", [](const std::string& name) { return std::string(kernels_named(name).name); });
  m.def("is_amd", &ndm::is_amd);
  m.def("parallel_runtime", [] { return std::string(ndm::parallel_runtime()); });
  m.def("nearest_neighbors", &nearest_neighbors);
  m.def("ksg_radius", &ksg_radius);
  m.def("ksg_counts", &ksg_counts);
  m.def("ksg_radius_and_counts", &ksg_radius_and_counts);
  m.def("mean_distance_gradient", &mean_distance_gradient);
  m.def("lie_update", &lie_update);
  m.def("product", &product);
}
