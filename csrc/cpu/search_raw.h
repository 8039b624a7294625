// Distances measured from the raw rows: those, or their difference, times the subspace's columns of R.
//
// In fp32, V::lanes / 2 pairs at once, with sums of 32 terms that are added up in fp64: the error is at most
// 2 sqrt(32) 2^-24 |q - k| (like that of the fp32 rotation, in probability). In fp64, four pairs at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "rows.h"
#include "search_query.h"
#include "search_sweep.h"

namespace ndm {
namespace {

constexpr int64_t kChunk = 32;  // terms summed in fp32
constexpr double kDistanceError = 8e-6;  // relative; 1e-5 is promised

// One lane, for the columns that fill no vector.
struct Scalar {
  static constexpr int lanes = 1;
  float v;
  static Scalar load(const float* p) { return {*p}; }
  static Scalar set1(float x) { return {x}; }
  void store(float* p) const { *p = v; }
  static Scalar fma(Scalar a, Scalar b, Scalar c) { return {a.v * b.v + c.v}; }
};

struct RawPair {
  int64_t query, key;
};

template <class V>
struct RawRows {
  static constexpr int kAtOnce = V::lanes / 2;  // pairs of an fp32 measurement: 2 vectors of sums each

  const Search& a;
  int64_t column, p;
  double* rows;      // scratch: [4 d]
  double* products;  // scratch: [8 p]
  float* row;        // scratch: [d]

  // Euclidean, at most kAtOnce pairs: squared distances, and whether each is as exact as promised.
  void measure_in_fp32(const RawPair* pairs, int size, double* squared, bool* exact) {
    auto differences = reinterpret_cast<float*>(rows);  // [kAtOnce][d]
    double squared_norm[kAtOnce];
    for (int b = 0; b < kAtOnce; ++b) {
      const RawPair& pair = pairs[b < size ? b : 0];
      float* difference = differences + b * a.width;
      read_row(a.raw_queries, pair.query, 0, a.width, difference);
      read_row(a.raw_keys, pair.key, 0, a.width, row);
      for (int64_t i = 0; i < a.width; ++i) difference[i] -= row[i];
      squared_norm[b] = sum_of_squares(difference, a.width);
    }
    std::fill(products, products + kAtOnce * p, 0.0);
    int64_t c = 0;
    for (; c + 2 * V::lanes <= p; c += 2 * V::lanes) add_products<V, 2>(differences, c);
    for (; c + V::lanes <= p; c += V::lanes) add_products<V, 1>(differences, c);
    for (; c + 8 <= p; c += 8) add_products<Vec8, 1>(differences, c);
    for (; c < p; ++c) add_products<Scalar, 1>(differences, c);
    for (int b = 0; b < size; ++b) {
      squared[b] = 0;
      for (int64_t j = 0; j < p; ++j) squared[b] += products[b * p + j] * products[b * p + j];
      const double error = 2 * kUnit * std::sqrt(static_cast<double>(kChunk) * squared_norm[b]);
      // Not so where there is NaN or overflow.
      exact[b] = error <= kDistanceError * std::sqrt(squared[b]) && error <= std::numeric_limits<float>::max();
    }
  }

  // Squared distances of at most 4 pairs, or 2 - 2 cos of at most 2.
  void measure_in_fp64(const RawPair* pairs, int size, double* squared) {
    for (int64_t j = 0; j < 4 * a.width; ++j) rows[j] = 0;
    for (int b = 0; b < size; ++b) {
      if (a.cosine) {
        load_row(a.raw_queries, pairs[b].query, 2 * b, 1, false);
        load_row(a.raw_keys, pairs[b].key, 2 * b + 1, 1, false);
      } else {
        load_row(a.raw_queries, pairs[b].query, b, 1, false);
        load_row(a.raw_keys, pairs[b].key, b, -1, true);
      }
    }
    project();
    for (int b = 0; b < size; ++b) {
      double first_sum = 0, dot = 0, second_sum = 0;
      for (int64_t j = 0; j < p; ++j) {
        const double x = products[4 * j + (a.cosine ? 2 * b : b)], y = a.cosine ? products[4 * j + 2 * b + 1] : 0;
        first_sum += x * x;
        dot += x * y;
        second_sum += y * y;
      }
      squared[b] = a.cosine ? chord(dot, std::sqrt(first_sum), std::sqrt(second_sum)) : first_sum;
    }
  }

 private:
  static double sum_of_squares(const float* x, int64_t count) {
    Double4 sums = {0, 0, 0, 0};
    double rest = 0;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) sums += to_double(x + i) * to_double(x + i);
    for (; i < count; ++i) rest += static_cast<double>(x[i]) * x[i];
    return sum(sums) + rest;
  }

  // products[b][c ..] += differences[b][.] . R[., column + c ..], for a few vectors of columns.
  template <class W, int Vectors>
  void add_products(const float* differences, int64_t c) {
    const float* basis = a.rotation + column + c;
    for (int64_t begin = 0; begin < a.width; begin += kChunk) {
      const int64_t end = begin + kChunk < a.width ? begin + kChunk : a.width;
      W sums[kAtOnce][Vectors];
      for (auto& of_row : sums)
        for (W& sum : of_row) sum = W::set1(0);
      for (int64_t i = begin; i < end; ++i) {
        W r[Vectors];
        for (int v = 0; v < Vectors; ++v) r[v] = W::load(basis + i * a.width + v * W::lanes);
        for (int b = 0; b < kAtOnce; ++b) {
          const W x = W::set1(differences[b * a.width + i]);
          for (int v = 0; v < Vectors; ++v) sums[b][v] = W::fma(x, r[v], sums[b][v]);
        }
      }
      for (int b = 0; b < kAtOnce; ++b)
        for (int v = 0; v < Vectors; ++v) {
          alignas(64) float parts[W::lanes];
          sums[b][v].store(parts);
          for (int l = 0; l < W::lanes; ++l) products[b * p + c + v * W::lanes + l] += parts[l];
        }
    }
  }

  // `rows` holds 4 of them interleaved, [d][4].
  void load_row(const Rows& from, int64_t index, int slot, double factor, bool add) {
    read_row(from, index, 0, a.width, row);
    double* out = rows + slot;
    for (int64_t j = 0; j < a.width; ++j) out[4 * j] = (add ? out[4 * j] : 0.0) + factor * row[j];
  }

  // Those rows times the subspace's columns of R -> [p][4].
  void project() {
    int64_t c = 0;
    for (; c + 8 <= p; c += 8) project_columns<8>(c);
    for (; c < p; ++c) project_columns<1>(c);
  }

  template <int Columns>
  void project_columns(int64_t c) {
    const int64_t d = a.width;
    const float* basis = a.rotation + column + c;
    Double4 sums[Columns];
    for (int j = 0; j < Columns; ++j) sums[j] = Double4{0, 0, 0, 0};
    for (int64_t i = 0; i < d; ++i) {
      Double4 x;
      std::memcpy(&x, rows + 4 * i, 32);
      for (int j = 0; j < Columns; ++j) {
        const double r = basis[i * d + j];
        sums[j] += x * Double4{r, r, r, r};
      }
    }
    std::memcpy(products + 4 * c, sums, sizeof sums);
  }
};

}  // namespace
}  // namespace ndm
