// What the exact pass of nearest_neighbors knows of one query in one subspace.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "types.h"

namespace ndm {
namespace {

inline double sum(Double4 x) { return (x[0] + x[2]) + (x[1] + x[3]); }

// 2 - 2 cos: the squared distance of the unit vectors. A zero vector has cosine 0.
inline double chord(double dot, double norm_q, double norm_k) {
  const double scale = norm_q * norm_k;
  const double cosine = scale == 0 ? 0 : dot / scale;
  return cosine > 1 ? 0 : 2 - 2 * cosine;
}

struct Best {
  double squared = std::numeric_limits<double>::infinity();
  int64_t index = -1;
};

// Lowest index wins among values that differ by rounding only.
inline void improve(Best& best, double squared, int64_t index) {
  // Factors, not differences: those of two infinities are NaN.
  if (best.index < 0 || squared < best.squared * (1 - 1e-14) ||
      (squared <= best.squared * (1 + 1e-14) && index < best.index) ||
      (squared != squared && best.squared == best.squared))
    best = {squared, index};
}

struct Query {
  const double* row;      // [p] rotated, fp64
  double norm;            // of that row
  double sweep_norm2;     // |q|^2 as the scores mean it: squared distance = 2 score + this
  double sweep_error;     // e_q between the packed query and the true one
  double error;           // e_q between `row` and the true one: 0 in rotated form
  double upper;           // U
  Best best;
};

}  // namespace
}  // namespace ndm
