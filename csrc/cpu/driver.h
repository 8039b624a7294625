// Runs the kernels of one instruction set over threads; owns all scratch memory.
#pragma once

#include <string>

#include "types.h"

namespace ndm {

// Fills `distance` and `index`. Arguments are already checked.
void nearest_neighbors(Search search, const Kernels& kernels, int threads);

// `radius` [P, Q], not squared.
void ksg_radius(Ksg ksg, const Kernels& kernels, int threads, float* radius);

// `counts` [P, 2, Q]: keys with distance < radius, which is [P, Q].
void ksg_counts(Ksg ksg, const Kernels& kernels, int threads, const float* radius, int64_t* counts);

// Both, with one look at the keys where not too many of them are near.
void ksg_radius_and_counts(Ksg ksg, const Kernels& kernels, int threads, float* radius, int64_t* counts);

// Fills `mean` and `gradient`.
void mean_distance_gradient(const Gradient& gradient, const Kernels& kernels, int threads);

// Moves the moments on and writes the update.
void lie_update(const LieUpdate& update, const Kernels& kernels, int threads);

// Fills `out`, and `norms` where they are wanted.
void product(Product product, const Kernels& kernels, int threads);

// Fastest set that this CPU runs, or null with `why` filled if the named one cannot run.
const Kernels* choose_kernels(const std::string& name, std::string* why);

// Whether the processor is AMD's.
bool is_amd();

}  // namespace ndm
