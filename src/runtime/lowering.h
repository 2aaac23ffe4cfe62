// From a device's graph to its program.
#pragma once

#include "runtime/program.h"
#include "runtime/weight_store.h"

namespace comfytp::runtime {

/// Lowers a partitioned graph for `device`: fusion, layouts (copies where a reader wants another order, casts where a kernel
/// does not decode a weight), kernels, and every value's place. Nothing is allocated on the device; the sizes are those that a
/// run will allocate, and the same graph always gives the same program. Output boxes are whole and communicators unset: the
/// engine knows them. Runs on the device's worker. Throws Error naming the op.
Program lower(const graph::Graph& local, backend::Device& device, WeightStore& weights);

}  // namespace comfytp::runtime
