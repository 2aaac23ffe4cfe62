// What the compiler must know of an op, all in one place: its shape rule, sharding rule, layouts, cost and reference.
// One class per op, in graph/ops/; one kernel file per backend.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "base/shape.h"
#include "graph/attrs.h"

namespace comfytp::graph {

class Graph;
using ValueId = std::int32_t;

/// The static type of a value.
struct Type {
  DType dtype = DType::f32;
  Shape shape;
  bool operator==(const Type&) const = default;
  std::int64_t bytes() const { return numel(shape) * size_of(dtype); }
};
std::string to_string(const Type& type);

/// One use of an op: what a rule, a cost or a kernel is asked about.
struct OpContext {
  const Attrs& attrs;
  std::vector<Type> in;
  std::vector<Type> out;
};

/// A tensor of the references: dense, row-major, in double precision.
struct RefTensor {
  Shape shape;
  std::vector<double> data;
  RefTensor() = default;
  explicit RefTensor(Shape s, double fill = 0) : shape(std::move(s)), data(static_cast<std::size_t>(numel(shape)), fill) {}
};

// ---- sharding rule -------------------------------------------------------------------------------------------------

/// How an index of the op may be cut over devices (the words of Shardy; an einsum's letters are such factors).
enum class FactorKind {
  free,        ///< every part computes its own part of the output
  contracted,  ///< summed over: every part gives a partial sum
  statistics,  ///< reduced in moments first: parts exchange count, mean and squares, then go on alone
  whole,       ///< cannot be cut
};

struct Factor {
  std::string name;
  std::int64_t size = 1;
  FactorKind kind = FactorKind::free;
};

/// One dimension of an operand: the factors it is made of, major to minor (none: a dimension of size 1 that is
/// broadcast). Only the major factor of a dimension can be cut, since a part must be one interval.
struct DimRule {
  std::vector<int> factors;
  /// Set where the operand needs another interval than the factor's own (a halo): output interval -> operand's interval.
  std::function<Interval(Interval)> window;
  /// Set where the operand's index is the factor's plus this, as far as the operand goes: what a slice and a concat read. A window too.
  std::optional<std::int64_t> shift;
  DimRule() = default;
  DimRule(int factor) : factors{factor} {}
  DimRule(std::vector<int> f) : factors(std::move(f)) {}
  DimRule(int factor, std::function<Interval(Interval)> w) : factors{factor}, window(std::move(w)) {}
  /// Of an operand of that size.
  static DimRule shifted(int factor, std::int64_t shift, std::int64_t size);
};

struct Rule {
  std::vector<Factor> factors;
  std::vector<std::vector<DimRule>> inputs;
  std::vector<std::vector<DimRule>> outputs;
  /// Applied to partial sums it gives partial sums (add, transpose, …).
  bool linear = false;

  int add(std::string name, std::int64_t size, FactorKind kind = FactorKind::free) {
    factors.push_back({std::move(name), size, kind});
    return static_cast<int>(factors.size()) - 1;
  }
};

// ---- layout --------------------------------------------------------------------------------------------------------

/// The logical dimensions of a value, outermost in memory first. A value is always dense in its order.
using Order = std::vector<int>;
Order row_major(std::size_t rank);
/// Batch, then the spatial dimensions, then channels: NHWC and its kin, for logical [N, C, …].
Order channels_last(std::size_t rank);
/// Strides in elements, per logical dimension.
Shape strides_of(const Shape& shape, const Order& order);
/// The orders place the elements alike (they may differ in dimensions of size 1).
bool same_memory(const Shape& shape, const Order& a, const Order& b);

struct Layout {
  std::vector<Order> in;   ///< what the op wants; the lowering copies where a value lies otherwise
  std::vector<Order> out;
  bool view = false;       ///< output 0 is input 0's memory, seen otherwise: nothing runs
};

// ---- the op --------------------------------------------------------------------------------------------------------

class Op {
 public:
  virtual ~Op() = default;
  virtual std::string_view name() const = 0;

  /// Output types. Throws Error "[op] expected … but got …".
  virtual std::vector<Type> infer(const Attrs& attrs, std::span<const Type> in) const = 0;

  /// Its factors. The default cuts nothing.
  virtual Rule rule(const OpContext& op) const;
  /// The attributes of one part, `ranges[f]` being the part of factor f and `inputs` what it gets (nothing for weights and inputs of the graph).
  virtual Attrs localize(const OpContext& op, std::span<const Interval> ranges, std::span<const Type> inputs) const;
  /// For an op whose statistics factor is cut: appends to `g` the op that takes this part's moments from the local
  /// inputs, with a leading dimension of 1 along which the parts are gathered. The op then takes them as a further input.
  virtual ValueId emit_moments(Graph& g, const Attrs& local, std::span<const ValueId> inputs) const;

  /// Wanted and given layouts, knowing how the inputs lie. Default: all row-major.
  virtual Layout layout(const OpContext& op, std::span<const Order> produced) const;
  /// The output may overwrite input `i` (same size and layout) where that dies here.
  virtual bool in_place(const OpContext& op, std::size_t i) const;

  /// Floating-point operations; a multiply-add counts as two.
  virtual double flops(const OpContext& op) const;

  /// Slow and plain: the oracle of every test and rewrite. The outputs come allocated and zeroed.
  virtual void reference(const OpContext& op, std::span<const RefTensor> in, std::span<RefTensor> out) const = 0;

  /// Needs all devices of its group at once; the reference then works on one input per rank.
  virtual bool collective() const { return false; }
  virtual void collective_reference(std::span<const OpContext> ranks, std::span<const RefTensor> in, std::span<RefTensor> out) const;
};

/// The op of that name. Throws Error when there is none.
const Op& find_op(std::string_view name);
std::vector<const Op*> all_ops();

namespace detail {
bool register_op(std::unique_ptr<Op> op);
}
#define COMFYTP_OP(Class) [[maybe_unused]] static const bool registered_##Class = ::comfytp::graph::detail::register_op(std::make_unique<Class>());

// Helpers that most ops need.
void expect_inputs(std::string_view op, std::span<const Type> in, std::size_t least, std::size_t most);
/// No negative size, and few enough elements that no later arithmetic overflows (2^48).
void expect_shape(std::string_view op, const Shape& shape);
void expect_rank(std::string_view op, std::string_view operand, const Type& type, std::size_t rank);
/// One free factor for each dimension of `shape`, used by every operand of that shape.
std::vector<DimRule> free_dims(Rule& rule, const Shape& shape, std::string_view prefix = "d");

}  // namespace comfytp::graph
