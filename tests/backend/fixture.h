// Runs a graph on a device as the runtime does, in small, and holds it against the ops' references.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>

#include "backend/backend.h"
#include "graph/builder.h"
#include "graph/evaluate.h"

namespace comfytp::test {

/// The devices that every test of a kernel runs on, each with a dtype that it computes in. Of cpu:0 and cuda:0 those that are here.
std::vector<std::pair<std::string, DType>> devices_here();

std::unique_ptr<backend::Device> open(const std::string& name);

/// How the graph's leaves lie in memory.
struct Placement {
  DType stored = DType::f32;  ///< weights
  bool packable = true;
  bool reversed = false;  ///< inputs: innermost dimension outermost, instead of row-major
};

/// Runs `graph` and expects its outputs, all of them twice with the same bits, in place where the op allows it, within
/// `tolerance` (norm-wise, relative) of the references; and that kernels write nothing behind their memory.
void expect_reference(backend::Device& device, const graph::Graph& graph, const Placement& placement, double tolerance);

/// Values that `dtype` can hold, the same for the same name.
graph::RefTensor values_of(const std::string& name, const Shape& shape, DType dtype);

}  // namespace comfytp::test
