#include "graph/builder.h"

namespace comfytp::graph {

ValueId Builder::input(const std::string& name, Shape shape, DType dtype, const std::string& varies) {
  return graph.add("input", {}, {{"name", name}, {"shape", Ints(shape)}, {"dtype", std::string(name_of(dtype))}, {"varies", varies}}, name);
}

ValueId Builder::weight(const std::string& key, Shape shape) {
  return graph.add("weight", {},
                   {{"key", key}, {"dtype", std::string(name_of(compute))}, {"full", Ints(shape)}, {"offset", Ints(shape.size(), 0)},
                    {"shape", Ints(shape)}},
                   key);
}

ValueId Builder::constant(Shape shape, Doubles values, DType dtype) {
  return graph.add("constant", {}, {{"shape", Ints(shape)}, {"values", std::move(values)}, {"dtype", std::string(name_of(dtype))}});
}

ValueId Builder::linear(ValueId x, ValueId w, ValueId bias, const std::string& name) {
  const ValueId y = linear(x, w, name);
  return bias < 0 ? y : add(y, bias);
}

ValueId Builder::conv2d(ValueId x, ValueId k, ValueId bias, std::int64_t stride, std::int64_t padding, const std::string& name) {
  const ValueId y = graph.add("conv2d", {x, k}, {{"stride", Ints{stride, stride}}, {"padding", Ints(4, padding)}}, name);
  return bias < 0 ? y : add(y, bias);
}

ValueId Builder::attention(ValueId q, ValueId k, ValueId v, double scale, const std::string& name) {
  return graph.add("attention", {q, k, v}, {{"scale", scale}}, name);
}

ValueId Builder::group_norm(ValueId x, ValueId weight, ValueId bias, std::int64_t groups, double epsilon, const std::string& name) {
  return graph.add("group_norm", {x, weight, bias}, {{"groups", groups}, {"epsilon", epsilon}}, name);
}

ValueId Builder::layer_norm(ValueId x, ValueId weight, ValueId bias, double epsilon, const std::string& name) {
  return graph.add("layer_norm", {x, weight, bias}, {{"epsilon", epsilon}}, name);
}

ValueId Builder::cast(ValueId x, DType dtype) {
  if (graph.type(x).dtype == dtype) return x;
  return graph.add("cast", {x}, {{"dtype", std::string(name_of(dtype))}});
}

ValueId Builder::split_dim(ValueId x, std::int64_t dim, Ints sizes) {
  return graph.add("split_dim", {x}, {{"dim", dim}, {"sizes", std::move(sizes)}});
}

ValueId Builder::merge_dims(ValueId x, std::int64_t dim, std::int64_t count) {
  return graph.add("merge_dims", {x}, {{"dim", dim}, {"count", count}});
}

ValueId Builder::slice(ValueId x, std::int64_t dim, std::int64_t start, std::int64_t stop) {
  return graph.add("slice", {x}, {{"dim", dim}, {"start", start}, {"stop", stop}});
}

ValueId Builder::upsample_nearest(ValueId x, std::int64_t height, std::int64_t width) {
  const auto& s = shape(x);
  return graph.add("upsample_nearest", {x},
                   {{"from", Ints{s[2], s[3]}}, {"to", Ints{height, width}}, {"size", Ints{height, width}}, {"from_offset", Ints{0, 0}},
                    {"to_offset", Ints{0, 0}}});
}

}  // namespace comfytp::graph
