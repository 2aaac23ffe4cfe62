// Runs a graph whole and in parts through the ops' references, and compares.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <random>
#include <string>

#include "graph/evaluate.h"
#include "graph/rewrites.h"
#include "sharding/partition.h"

namespace comfytp::test {

using graph::Graph;
using graph::RefTensor;

inline RefTensor random_tensor(const Shape& shape, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  RefTensor t(shape);
  for (auto& v : t.data) v = normal(random) + (std::abs(normal(random)) < 0.1 ? 0.0 : 0.25);
  return t;
}

// The inputs and weights of a whole graph, by name: the devices' graphs are given the same and take their parts.
inline graph::Leaves leaves_of(const Graph& whole) {
  std::map<std::string, RefTensor> tensors;
  for (const auto* node : whole.all("input")) {
    const auto& name = node->attrs.text("name");
    auto& t = tensors[name] = random_tensor(node->attrs.ints("shape"), std::hash<std::string>()(name));
    const DType dtype = dtype_from_name(node->attrs.text("dtype"));
    for (auto& v : t.data) {
      if (dtype == DType::boolean) v = v > -0.3;
      if (dtype == DType::i64) v = std::clamp(std::floor(v), -2.0, 1.0);
    }
  }
  for (const auto* node : whole.all("weight")) {
    const auto& key = node->attrs.text("key");
    tensors[key] = random_tensor(node->attrs.ints("full"), std::hash<std::string>()(key));
  }
  return [tensors](const graph::Node& node) { return tensors.at(node.attrs.text(graph::is(node, "input") ? "name" : "key")); };
}

// Relative; NaN in both (the logarithm of a negative number) counts as equal.
inline double difference(const RefTensor& a, const RefTensor& b) {
  if (a.data.size() != b.data.size()) return INFINITY;
  double diff = 0, norm = 0;
  for (std::size_t i = 0; i < a.data.size(); ++i) {
    if (std::isnan(a.data[i]) && std::isnan(b.data[i])) continue;
    diff += std::pow(a.data[i] - b.data[i], 2);
    norm += std::pow(b.data[i], 2);
  }
  return std::sqrt(diff / std::max(norm, 1e-300));
}

// The largest difference to the whole, over all outputs, from the parts that the devices hand over; each device's graph fused or not.
inline double error_of(const Graph& graph, const sharding::Mesh& mesh, const sharding::Assignment& assignment,
                       sharding::Placement placement = sharding::Placement::resident, std::optional<graph::Fusion> fusion = {}) {
  const auto leaves = leaves_of(graph);
  const auto whole = graph::evaluate(graph, leaves);
  auto parts = sharding::partition(graph, mesh, assignment, placement);
  for (auto& device : parts.devices)
    if (fusion) device = graph::fuse(device, *fusion);
  const auto results = graph::evaluate(parts.devices, leaves);
  double worst = 0;
  for (const auto& [name, value] : whole) {
    RefTensor joined(value.shape, NAN);
    for (std::size_t d = 0; d < results.size(); ++d) {
      const auto& out = parts.outputs.at(name)[d];
      const auto part = results[d].at(name);
      EXPECT_EQ(part.shape, shape_of(out.box));
      if (!out.writes) continue;
      const auto strides = row_major_strides(value.shape), inner = row_major_strides(part.shape);
      for (std::size_t i = 0; i < part.data.size(); ++i) {
        std::int64_t at = 0;
        for (std::size_t k = 0; k < part.shape.size(); ++k)
          at += (static_cast<std::int64_t>(i) / inner[k] % part.shape[k] + out.box[k].lo) * strides[k];
        joined.data[static_cast<std::size_t>(at)] = part.data[i];
      }
    }
    const double e = difference(joined, value);
    worst = std::isnan(e) ? INFINITY : std::max(worst, e);
  }
  return worst;
}

}  // namespace comfytp::test
