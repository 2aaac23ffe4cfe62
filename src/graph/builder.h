// Short forms for writing a graph by hand: what models/ and the tests use.
#pragma once

#include <string>

#include "graph/graph.h"

namespace comfytp::graph {

class Builder {
 public:
  /// `compute` is the dtype in which the ops see weights and activations.
  Builder(Graph& graph, DType compute) : graph(graph), compute(compute) {}

  ValueId input(const std::string& name, Shape shape, DType dtype, const std::string& varies = "call");
  /// The whole tensor `key`; `shape` may add or drop dimensions of size 1.
  ValueId weight(const std::string& key, Shape shape);
  ValueId constant(Shape shape, Doubles values, DType dtype);

  ValueId linear(ValueId x, ValueId w, const std::string& name = {}) { return graph.add("linear", {x, w}, {}, name); }
  /// x w^T + bias; `bias` may be -1. The bias is an add of its own: fuse() joins what ends up on one device.
  ValueId linear(ValueId x, ValueId w, ValueId bias, const std::string& name);
  /// `bias` is [o,1,1] or -1; the padding is the same on all sides.
  ValueId conv2d(ValueId x, ValueId k, ValueId bias, std::int64_t stride, std::int64_t padding, const std::string& name = {});
  ValueId attention(ValueId q, ValueId k, ValueId v, double scale, const std::string& name = {});
  ValueId group_norm(ValueId x, ValueId weight, ValueId bias, std::int64_t groups, double epsilon, const std::string& name = {});
  ValueId layer_norm(ValueId x, ValueId weight, ValueId bias, double epsilon, const std::string& name = {});
  ValueId unary(const std::string& op, ValueId x) { return graph.add(op, {x}); }
  ValueId add(ValueId a, ValueId b) { return graph.add("add", {a, b}); }
  ValueId mul(ValueId a, ValueId b) { return graph.add("mul", {a, b}); }
  ValueId cast(ValueId x, DType dtype);
  ValueId transpose(ValueId x, Ints order) { return graph.add("transpose", {x}, {{"order", std::move(order)}}); }
  ValueId split_dim(ValueId x, std::int64_t dim, Ints sizes);
  ValueId merge_dims(ValueId x, std::int64_t dim, std::int64_t count);
  ValueId slice(ValueId x, std::int64_t dim, std::int64_t start, std::int64_t stop);
  ValueId concat(std::vector<ValueId> parts, std::int64_t dim) { return graph.add("concat", std::move(parts), {{"dim", dim}}); }
  /// Enlarges the last two dimensions of [n,c,h,w] to `height` and `width`.
  ValueId upsample_nearest(ValueId x, std::int64_t height, std::int64_t width);

  const Shape& shape(ValueId x) const { return graph.type(x).shape; }

  Graph& graph;
  DType compute;
};

}  // namespace comfytp::graph
