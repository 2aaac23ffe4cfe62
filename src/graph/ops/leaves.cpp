// input, weight, constant: where values come from.
#include <algorithm>

#include "base/error.h"
#include "graph/graph.h"

namespace comfytp::graph {
namespace {

// Attributes: name, dtype, shape; varies = "call" or "prompt" (what depends on prompt inputs alone runs once per prompt).
class Input final : public Op {
 public:
  std::string_view name() const override { return "input"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 0, 0);
    const auto varies = a.text_or("varies", "call");
    require(varies == "call" || varies == "prompt", "[input] expected varies to be call or prompt but got '{}'", varies);
    require(!a.text("name").empty(), "[input] expected a name but got ''");
    return {{dtype_from_name(a.text("dtype")), a.ints("shape")}};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    rule.outputs = {free_dims(rule, op.out[0].shape)};
    return rule;
  }
  Attrs localize(const OpContext& op, std::span<const Interval> ranges, std::span<const Type>) const override {
    Attrs local = op.attrs;
    Ints shape, offset;
    for (auto r : ranges) shape.push_back(r.size()), offset.push_back(r.lo);
    local.set("shape", shape);
    local.set("offset", offset);
    return local;
  }
  void reference(const OpContext&, std::span<const RefTensor>, std::span<RefTensor>) const override {
    fail("[input] has no value of its own");
  }
};

// Attributes: key; dtype in which the ops see it; full, the whole tensor's shape (the checkpoint's but for dimensions of
// size 1); offset and shape, the part of it that this value is.
class Weight final : public Op {
 public:
  std::string_view name() const override { return "weight"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 0, 0);
    const auto &full = a.ints("full"), &offset = a.ints("offset"), &shape = a.ints("shape");
    expect_shape(name(), full);
    bool fits = full.size() == offset.size() && full.size() == shape.size();
    for (std::size_t d = 0; fits && d < full.size(); ++d)
      fits = offset[d] >= 0 && shape[d] >= 0 && shape[d] <= full[d] && offset[d] <= full[d] - shape[d];
    require(fits, "[weight] expected a part of {} of shape {} but got offset {} and shape {}", a.text("key"),
            comfytp::to_string(full), comfytp::to_string(offset), comfytp::to_string(shape));
    return {{dtype_from_name(a.text("dtype")), shape}};
  }
  Rule rule(const OpContext& op) const override {
    Rule rule;
    rule.outputs = {free_dims(rule, op.out[0].shape)};
    return rule;
  }
  Attrs localize(const OpContext& op, std::span<const Interval> ranges, std::span<const Type>) const override {
    Attrs local = op.attrs;
    Ints shape, offset = op.attrs.ints("offset");
    for (std::size_t d = 0; d < ranges.size(); ++d) {
      shape.push_back(ranges[d].size());
      offset[d] += ranges[d].lo;
    }
    local.set("shape", shape);
    local.set("offset", offset);
    return local;
  }
  void reference(const OpContext&, std::span<const RefTensor>, std::span<RefTensor>) const override {
    fail("[weight] has no value of its own");
  }
};

// Attributes: shape, dtype, values (row-major; a single one fills the shape). For small tables; larger ones are weights.
class Constant final : public Op {
 public:
  std::string_view name() const override { return "constant"; }
  std::vector<Type> infer(const Attrs& a, std::span<const Type> in) const override {
    expect_inputs(name(), in, 0, 0);
    const auto& shape = a.ints("shape");
    expect_shape(name(), shape);
    const auto count = static_cast<std::int64_t>(a.reals("values").size());
    require(count == numel(shape) || count == 1, "[constant] expected {} values or 1 but got {}", numel(shape), count);
    return {{dtype_from_name(a.text("dtype")), shape}};
  }
  void reference(const OpContext& op, std::span<const RefTensor>, std::span<RefTensor> out) const override {
    const auto& values = op.attrs.reals("values");
    if (values.size() == 1)
      std::fill(out[0].data.begin(), out[0].data.end(), values[0]);
    else
      out[0].data = values;
  }
};

COMFYTP_OP(Input)
COMFYTP_OP(Weight)
COMFYTP_OP(Constant)

}  // namespace
}  // namespace comfytp::graph
