#include "graph/op.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "base/error.h"

namespace comfytp::graph {

std::string to_string(const Type& type) { return fmt::format("{}{}", name_of(type.dtype), comfytp::to_string(type.shape)); }

Order row_major(std::size_t rank) {
  Order order(rank);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

Order channels_last(std::size_t rank) {
  if (rank < 3) return row_major(rank);
  Order order = {0};
  for (std::size_t d = 2; d < rank; ++d) order.push_back(static_cast<int>(d));
  order.push_back(1);
  return order;
}

Shape strides_of(const Shape& shape, const Order& order) {
  Shape strides(shape.size());
  std::int64_t step = 1;
  for (std::size_t i = order.size(); i-- > 0;) {
    strides[order[i]] = step;
    step *= shape[order[i]];
  }
  return strides;
}

bool same_memory(const Shape& shape, const Order& a, const Order& b) {
  const auto moving = [&](const Order& order) {
    Order kept;
    std::copy_if(order.begin(), order.end(), std::back_inserter(kept), [&](int d) { return shape[d] != 1; });
    return kept;
  };
  return a == b || moving(a) == moving(b);
}

Rule Op::rule(const OpContext& op) const {
  Rule rule;
  for (const auto* side : {&op.in, &op.out})
    for (const auto& type : *side) {
      std::vector<DimRule> dims;
      for (auto size : type.shape) dims.push_back(rule.add("whole", size, FactorKind::whole));
      (side == &op.in ? rule.inputs : rule.outputs).push_back(std::move(dims));
    }
  return rule;
}

Attrs Op::localize(const OpContext& op, std::span<const Interval>, std::span<const Type>) const { return op.attrs; }

DimRule DimRule::shifted(int factor, std::int64_t shift, std::int64_t size) {
  const auto at = [=](std::int64_t index) { return std::clamp<std::int64_t>(index + shift, 0, size); };
  DimRule rule(factor, [=](Interval part) { return Interval{at(part.lo), at(part.hi)}; });
  rule.shift = shift;
  return rule;
}

ValueId Op::emit_moments(Graph&, const Attrs&, std::span<const ValueId>) const { fail("[{}] has no moments", name()); }

Layout Op::layout(const OpContext& op, std::span<const Order>) const {
  Layout layout;
  for (const auto& t : op.in) layout.in.push_back(row_major(t.shape.size()));
  for (const auto& t : op.out) layout.out.push_back(row_major(t.shape.size()));
  return layout;
}

bool Op::in_place(const OpContext&, std::size_t) const { return false; }

double Op::flops(const OpContext&) const { return 0; }

void Op::collective_reference(std::span<const OpContext>, std::span<const RefTensor>, std::span<RefTensor>) const {
  fail("[{}] is no collective", name());
}

namespace {
std::map<std::string, std::unique_ptr<Op>, std::less<>>& registry() {
  static std::map<std::string, std::unique_ptr<Op>, std::less<>> ops;
  return ops;
}
}  // namespace

bool detail::register_op(std::unique_ptr<Op> op) {
  const std::string name(op->name());
  return registry().emplace(name, std::move(op)).second;
}

const Op& find_op(std::string_view name) {
  const auto it = registry().find(name);
  require(it != registry().end(), "[graph] expected a known op but got '{}'", name);
  return *it->second;
}

std::vector<const Op*> all_ops() {
  std::vector<const Op*> ops;
  for (const auto& [name, op] : registry()) ops.push_back(op.get());
  return ops;
}

void expect_inputs(std::string_view op, std::span<const Type> in, std::size_t least, std::size_t most) {
  require(in.size() >= least && in.size() <= most, "[{}] expected {} to {} inputs but got {}", op, least, most, in.size());
}

void expect_shape(std::string_view op, const Shape& shape) {
  std::int64_t room = std::int64_t{1} << 48;
  for (auto size : shape) {
    require(size >= 0 && size <= room, "[{}] expected sizes from 0 and at most 2^48 elements but got {}", op, comfytp::to_string(shape));
    room /= std::max<std::int64_t>(size, 1);
  }
}

void expect_rank(std::string_view op, std::string_view operand, const Type& type, std::size_t rank) {
  require(type.shape.size() == rank, "[{}] expected {} of rank {} but got {}", op, operand, rank, to_string(type));
}

std::vector<DimRule> free_dims(Rule& rule, const Shape& shape, std::string_view prefix) {
  std::vector<DimRule> dims;
  for (std::size_t d = 0; d < shape.size(); ++d) dims.push_back(rule.add(fmt::format("{}{}", prefix, d), shape[d]));
  return dims;
}

}  // namespace comfytp::graph
