// Kernels of every instruction set that this CPU runs, against naive double loops over odd shapes.
// Built with address and undefined-behaviour sanitizers by csrc/tests/sanitize.sh; exact-sized heap blocks make
// any read or write past an end of an input or a result an error; scratch of all threads is one block. Exit status 0: all passed.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/driver.h"

namespace {

int failures = 0;

void check(bool good, const std::string& what) {
  if (good) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

std::mt19937 generator(7);

std::vector<float> random_rows(int64_t rows, int64_t width, bool outliers) {
  std::normal_distribution<float> normal;
  std::vector<float> data(static_cast<size_t>(rows * width));
  for (float& x : data) x = normal(generator);
  if (outliers)
    for (int64_t i = 0; i < rows; i += 7)
      for (int64_t j = 0; j < width; ++j) data[static_cast<size_t>(i * width + j)] *= j == 0 ? 3e5f : 300.0f;
  if (rows > 4) std::copy_n(data.begin(), width, data.begin() + 3 * width);  // a copy of row 0
  return data;
}

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The rows in bf16; where `round`, those given are rounded too.
std::vector<uint16_t> in_bfloat16(std::vector<float>& rows, bool round) {
  std::vector<uint16_t> half;
  for (float& x : rows) {
    half.push_back(to_bfloat16(x));
    if (round) x = from_bfloat16(half.back());
  }
  return half;
}

struct Shape {
  int64_t queries, keys;
  std::vector<int64_t> widths;
};

std::vector<int64_t> offsets_of(const Shape& shape) {
  std::vector<int64_t> offsets{0};
  for (int64_t w : shape.widths) offsets.push_back(offsets.back() + w);
  return offsets;
}

// Distance of a query to a key in columns [from, to).
double distance(const double* q, const double* k, int64_t from, int64_t to, bool cosine) {
  double squared = 0, dot = 0, qq = 0, kk = 0;
  for (int64_t j = from; j < to; ++j) {
    squared += (q[j] - k[j]) * (q[j] - k[j]);
    dot += q[j] * k[j];
    qq += q[j] * q[j];
    kk += k[j] * k[j];
  }
  if (!cosine) return std::sqrt(squared);
  const double scale = std::sqrt(qq) * std::sqrt(kk);
  return 1 - (scale > 0 ? dot / scale : 0);
}

// The columns of each subspace the other way round: a turn without rounding.
void turn_row(const float* row, const std::vector<int64_t>& offsets, float* out) {
  for (size_t s = 0; s + 1 < offsets.size(); ++s) std::reverse_copy(row + offsets[s], row + offsets[s + 1], out + offsets[s]);
}

void check_search(const ndm::Kernels& kernels, const Shape& shape, bool cosine, bool raw, bool half, bool bf16,
                  bool shadows, bool turned) {
  const std::vector<int64_t> offsets = offsets_of(shape);
  const int64_t d = offsets.back();
  std::vector<float> queries = random_rows(shape.queries, d, true), keys = random_rows(shape.keys, d, true);
  const std::vector<uint16_t> half_keys = in_bfloat16(keys, half);
  const std::vector<double> exact(queries.begin(), queries.end()), exact_keys(keys.begin(), keys.end());
  std::vector<float> identity(static_cast<size_t>(d * d)), center(static_cast<size_t>(d), 0.5f);
  for (int64_t j = 0; j < d; ++j) identity[static_cast<size_t>(j * d + j)] = 1;
  const std::vector<float> query_error(queries.size(), 1e-3f), key_error(keys.size(), 1e-3f);
  std::vector<float> found(shape.widths.size() * static_cast<size_t>(shape.queries));
  std::vector<int64_t> index(found.size());

  ndm::Search a;
  a.queries = shape.queries;
  a.keys = shape.keys;
  a.width = d;
  a.subspaces = static_cast<int64_t>(shape.widths.size());
  a.offsets = offsets.data();
  a.cosine = cosine;
  a.bf16 = bf16;
  a.shadows = shadows;
  a.rotated_keys = {keys.data(), ndm::Type::float32, d};
  const ndm::Rows given = half ? ndm::Rows{half_keys.data(), ndm::Type::bfloat16, d} : a.rotated_keys;
  if (raw) {
    a.rotated_queries = queries.data();
    a.raw_queries = {queries.data(), ndm::Type::float32, d};
    a.raw_keys = given;
    a.rotation = identity.data();
    a.query_error = query_error.data();
    a.key_error = key_error.data();
  } else {
    a.rotated_keys = given;
    a.exact_queries = exact.data();
    if (!cosine && !turned) a.center = center.data();
  }
  std::vector<float> turned_queries(queries.size()), turned_keys(keys.size());
  std::vector<float> turned_query_error(queries.size()), turned_key_error(keys.size());
  if (turned) {  // every subspace's columns the other way round, in rows of their own
    for (int64_t i = 0; i < shape.queries; ++i) turn_row(&queries[static_cast<size_t>(i * d)], offsets, &turned_queries[static_cast<size_t>(i * d)]);
    for (int64_t i = 0; i < shape.keys; ++i) turn_row(&keys[static_cast<size_t>(i * d)], offsets, &turned_keys[static_cast<size_t>(i * d)]);
    a.swept_keys = {turned_keys.data(), ndm::Type::float32, d};
    a.rotated_queries = turned_queries.data();
    a.query_error = turned_query_error.data();
    a.key_error = turned_key_error.data();
  }
  a.distance = found.data();
  a.index = index.data();
  ndm::nearest_neighbors(a, kernels, 2);

  const std::string name = std::string(kernels.name) + " search Q" + std::to_string(shape.queries) + " K" +
                           std::to_string(shape.keys) + " d" + std::to_string(d) + (cosine ? " cosine" : "") +
                           (raw ? " raw" : "") + (half ? " bf16 keys" : "") + (bf16 ? " bf16 sweep" : "") +
                           (shadows ? " shadows" : "") + (turned ? " turned" : "");
  const double allowed = bf16 ? 1e-2 : 1e-6;
  bool good = true;
  for (size_t s = 0; s < shape.widths.size(); ++s)
    for (int64_t q = 0; q < shape.queries; ++q) {
      const size_t at = s * static_cast<size_t>(shape.queries) + static_cast<size_t>(q);
      double least = std::numeric_limits<double>::infinity();
      for (int64_t k = 0; k < shape.keys; ++k)
        least = std::min(least, distance(&exact[static_cast<size_t>(q * d)], &exact_keys[static_cast<size_t>(k * d)],
                                         offsets[s], offsets[s + 1], cosine));
      good = good && index[at] >= 0 && index[at] < shape.keys;
      good = good && (bf16 || shape.keys <= 4 || index[at] != 3);  // a copy of row 0, which wins
      good = good && found[at] >= least * (1 - 1e-6) - 1e-13 && found[at] <= least * (1 + allowed) + 1e-13;
    }
  check(good, name);
}

void check_ksg(const ndm::Kernels& kernels, const Shape& shape) {
  const std::vector<int64_t> offsets = offsets_of(shape);
  const int64_t d = offsets.back(), subspaces = static_cast<int64_t>(shape.widths.size());
  const std::vector<float> queries = random_rows(shape.queries, d, false), keys = random_rows(shape.keys, d, false);
  const std::vector<float> inverse_variance(shape.widths.size(), 0.49f);
  std::vector<int64_t> pairs;
  for (int64_t x = 0; x < subspaces; ++x)
    for (int64_t y = x; y < subspaces; ++y) pairs.insert(pairs.end(), {x, y});
  ndm::Ksg a;
  a.queries = shape.queries;
  a.keys = shape.keys;
  a.width = d;
  a.subspaces = subspaces;
  a.pairs = static_cast<int64_t>(pairs.size()) / 2;
  a.offsets = offsets.data();
  a.inverse_variance = inverse_variance.data();
  a.rotated_queries = queries.data();
  a.rotated_keys = keys.data();
  a.pair = pairs.data();
  std::vector<float> radius(static_cast<size_t>(a.pairs * a.queries));
  std::vector<int64_t> counts(2 * radius.size());
  ndm::ksg_radius(a, kernels, 2, radius.data());
  ndm::ksg_counts(a, kernels, 2, radius.data(), counts.data());
  std::vector<float> same_radius(radius.size());
  std::vector<int64_t> same_counts(counts.size());
  ndm::ksg_radius_and_counts(a, kernels, 3, same_radius.data(), same_counts.data());
  check(same_radius == radius && same_counts == counts, std::string(kernels.name) + " ksg in one pass");
  const std::vector<double> exact(queries.begin(), queries.end()), exact_keys(keys.begin(), keys.end());
  bool good = true;
  for (int64_t p = 0; p < a.pairs; ++p)
    for (int64_t q = 0; q < a.queries; ++q) {
      const double r = radius[static_cast<size_t>(p * a.queries + q)];
      double least = std::numeric_limits<double>::infinity();
      int64_t low[2] = {0, 0}, high[2] = {0, 0};
      for (int64_t k = 0; k < a.keys; ++k) {
        double sides[2];
        for (int side = 0; side < 2; ++side) {
          const int64_t s = pairs[static_cast<size_t>(2 * p + side)];
          sides[side] = 0.7 * distance(&exact[static_cast<size_t>(q * d)], &exact_keys[static_cast<size_t>(k * d)],
                                       offsets[static_cast<size_t>(s)], offsets[static_cast<size_t>(s) + 1], false);
          low[side] += sides[side] < r * (1 - 1e-5);
          high[side] += sides[side] < r * (1 + 1e-5);
        }
        least = std::min(least, std::max(sides[0], sides[1]));
      }
      good = good && std::abs(r - least) <= 1e-5 * least;
      for (int side = 0; side < 2; ++side) {
        const int64_t count = counts[static_cast<size_t>((2 * p + side) * a.queries + q)];
        good = good && count >= low[side] && count <= high[side];
      }
    }
  check(good, std::string(kernels.name) + " ksg Q" + std::to_string(shape.queries) + " K" + std::to_string(shape.keys));
}

void check_step(const ndm::Kernels& kernels, const Shape& shape, bool half) {
  const std::vector<int64_t> offsets = offsets_of(shape);
  const int64_t d = offsets.back();
  std::vector<float> queries = random_rows(shape.queries, d, false), keys = random_rows(shape.keys, d, false);
  const std::vector<uint16_t> half_keys = in_bfloat16(keys, half);
  std::vector<float> rotation(static_cast<size_t>(d * d)), found(rotation.size()), mean(shape.widths.size());
  for (int64_t j = 0; j < d; ++j) rotation[static_cast<size_t>(j * d + j)] = 1;
  std::vector<int64_t> index;
  std::vector<uint8_t> counted;
  for (size_t i = 0; i < shape.widths.size() * static_cast<size_t>(shape.queries); ++i) {
    index.push_back(static_cast<int64_t>(generator() % static_cast<uint64_t>(shape.keys)));
    counted.push_back(generator() % 4 != 0);
  }
  ndm::Gradient a;
  a.queries = shape.queries;
  a.width = d;
  a.subspaces = static_cast<int64_t>(shape.widths.size());
  a.offsets = offsets.data();
  a.raw_queries = {queries.data(), ndm::Type::float32, d};
  a.raw_keys = half ? ndm::Rows{half_keys.data(), ndm::Type::bfloat16, d}
                    : ndm::Rows{keys.data(), ndm::Type::float32, d};
  a.index = index.data();
  a.index_stride = a.counted_stride = shape.queries;
  a.counted = counted.data();
  a.rotation = rotation.data();
  a.mean = mean.data();
  a.gradient = found.data();
  ndm::mean_distance_gradient(a, kernels, 2);
  std::vector<double> expected(found.size());
  bool good = true;
  for (size_t s = 0; s < shape.widths.size(); ++s) {
    double total = 0;
    for (int64_t q = 0; q < shape.queries; ++q) {
      const size_t at = s * static_cast<size_t>(shape.queries) + static_cast<size_t>(q);
      if (!counted[at]) continue;
      const float* key = &keys[static_cast<size_t>(index[at] * d)];
      const float* query = &queries[static_cast<size_t>(q * d)];
      double norm = 0;
      for (int64_t j = offsets[s]; j < offsets[s + 1]; ++j) norm += std::pow(double(query[j]) - key[j], 2);
      norm = std::sqrt(norm);
      total += norm;
      for (int64_t i = 0; i < d; ++i)
        for (int64_t j = offsets[s]; norm > 0 && j < offsets[s + 1]; ++j)
          expected[static_cast<size_t>(i * d + j)] += (double(query[i]) - key[i]) * (double(query[j]) - key[j]) /
                                                     (norm * double(shape.queries) * double(a.subspaces));
    }
    good = good && std::abs(mean[s] - total / double(shape.queries)) <= 1e-5 * total / double(shape.queries);
  }
  for (size_t i = 0; i < found.size(); ++i) good = good && std::abs(found[i] - expected[i]) <= 1e-4;
  check(good, std::string(kernels.name) + " gradient Q" + std::to_string(shape.queries) + " d" + std::to_string(d));

  std::vector<float> first(found.size()), second(found.size()), update(found.size());
  std::vector<uint16_t> half_update(found.size());
  ndm::LieUpdate u;
  u.width = d;
  u.product = found.data();
  u.first = first.data();
  u.second = second.data();
  u.fast = 0.9;
  u.slow = 0.999;
  u.scale = 1e-3f;
  u.guard = 1e-8f;
  u.update = half ? nullptr : update.data();
  u.half_update = half ? half_update.data() : nullptr;
  ndm::lie_update(u, kernels, 2);
  good = true;
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) {
      const size_t at = static_cast<size_t>(i * d + j), mirrored = static_cast<size_t>(j * d + i);
      const double tangent = double(found[at]) - found[mirrored];
      const double expected_update = -1e-3 * 0.1 * tangent / (std::sqrt(0.001 * tangent * tangent) + 1e-8);
      const double got = half ? from_bfloat16(half_update[at]) : update[at];
      good = good && std::abs(got - expected_update) <= (half ? 1e-2 : 1e-4) * std::abs(expected_update) + 1e-9;
    }
  check(good, std::string(kernels.name) + " update d" + std::to_string(d));
}

// Any answer will do, as long as nothing is read or written out of bounds.
void check_not_finite(const ndm::Kernels& kernels) {
  const std::vector<int64_t> offsets{0, 5};
  std::vector<float> keys = random_rows(100, 5, false);
  keys[33] = std::numeric_limits<float>::quiet_NaN();
  keys[404] = std::numeric_limits<float>::infinity();
  std::vector<double> queries(45, std::numeric_limits<double>::quiet_NaN());
  std::vector<float> found(9);
  std::vector<int64_t> index(9, -1);
  ndm::Search a;
  a.queries = 9;
  a.keys = 100;
  a.width = 5;
  a.subspaces = 1;
  a.offsets = offsets.data();
  a.rotated_keys = {keys.data(), ndm::Type::float32, 5};
  a.exact_queries = queries.data();
  a.distance = found.data();
  a.index = index.data();
  ndm::nearest_neighbors(a, kernels, 2);
  for (int q = 0; q < 9; ++q) check(std::isnan(found[q]) && index[q] >= 0 && index[q] < 100, "NaN stays NaN");
}

// Half-precision rows about an origin, or a transposed left, on a base: strides and blocks cut off anywhere.
void check_product(const ndm::Kernels& kernels, int64_t rows, int64_t depth, int64_t columns, bool transposed, bool half) {
  std::vector<float> left = random_rows(transposed ? depth : rows, transposed ? rows : depth, false);
  const std::vector<uint16_t> halved = in_bfloat16(left, half);
  const std::vector<float> right = random_rows(depth, columns, false), base = random_rows(rows, columns, false),
                           origin = random_rows(1, depth, false);
  std::vector<float> out(static_cast<size_t>(rows * columns)), norms(static_cast<size_t>(rows));
  ndm::Product a;
  a.rows = rows;
  a.depth = depth;
  a.columns = columns;
  a.transposed = transposed;
  a.left = {left.data(), ndm::Type::float32, transposed ? rows : depth};
  if (half) a.left = {halved.data(), ndm::Type::bfloat16, depth};
  if (!transposed) {
    a.origin = origin.data();
    a.norms = norms.data();
  }
  a.scale = -0.5f;
  a.right = right.data();
  a.right_stride = a.base_stride = a.out_stride = columns;
  a.base = base.data();
  a.factor = 1.5f;
  a.out = out.data();
  ndm::product(a, kernels, 3);
  bool good = true;
  for (int64_t i = 0; i < rows; ++i) {
    double squared = 0;
    for (int64_t j = 0; j < columns; ++j) {
      double expected = 1.5 * base[static_cast<size_t>(i * columns + j)], size = std::abs(expected);
      squared = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const double shift = transposed ? 0.0 : static_cast<double>(origin[static_cast<size_t>(k)]);
        const double x = left[static_cast<size_t>(transposed ? k * rows + i : i * depth + k)] - shift;
        squared += x * x;
        const double term = -0.5 * x * right[static_cast<size_t>(k * columns + j)];
        expected += term;
        size += std::abs(term);
      }
      good = good && std::abs(out[static_cast<size_t>(i * columns + j)] - expected) <= 1e-5 * size;
    }
    if (!transposed) good = good && std::abs(norms[static_cast<size_t>(i)] - std::sqrt(squared)) <= 1e-5 * std::sqrt(squared);
  }
  check(good, std::string(kernels.name) + " product " + std::to_string(rows) + "x" + std::to_string(depth) + "x" +
                  std::to_string(columns) + (transposed ? " transposed" : half ? " half" : ""));
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 1, {1}},           {1, 7, {3, 1}},       {5, 31, {9, 8}},        {7, 64, {33}},
                          {13, 65, {1, 5, 31}},  {6, 127, {2}},        {25, 129, {40, 3}},     {3, 257, {7, 130, 2}},
                          {9, 1000, {16, 8, 1}}, {2, 40000, {3, 2}}};
  for (const char* isa : {"avx512bf16", "avx512", "avx2", "portable"}) {
    std::string why;
    const ndm::Kernels* kernels = ndm::choose_kernels(isa, &why);
    if (!kernels) {
      std::printf("skipped %s: %s\n", isa, why.c_str());
      continue;
    }
    for (const Shape& shape : shapes) {
      for (int form = 0; form < 24; ++form)
        for (const bool turned : {false, true})
          if (!(turned && form & 2)) check_search(*kernels, shape, form & 1, form & 2, form & 4, form & 8, form & 16, turned);
      if (shape.keys <= 1000) check_ksg(*kernels, shape);
      for (const bool half : {false, true}) check_step(*kernels, shape, half);
    }
    for (const auto& [rows, depth, columns] : {std::array<int64_t, 3>{1, 1, 1}, {25, 193, 33}, {12, 400, 64}, {31, 5, 70}})
      for (const auto& [transposed, half] : {std::pair{false, false}, {false, true}, {true, false}})
        check_product(*kernels, rows, depth, columns, transposed, half);
    check_not_finite(*kernels);
    std::printf("ran %s\n", isa);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
