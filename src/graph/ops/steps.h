// Chains of elementwise steps, as pointwise and fused_norm apply them: computed in fp32, rounded once at their end. A
// comma-separated list, in order:
//   bias               + operand [c], along the chain's channel dimension
//   add, mul           + or * operand of the value's rank, each dimension the value's or 1
//   add_one_mul        * (1 + operand), likewise: the modulation of DiT (Peebles & Xie 2022)
//   silu, gelu, gelu_tanh, sigmoid, tanh, relu
//   rope               two operands of one type, cos and sin, like the value but for the last dimension, which is the value's or half of
//                      it: neighbours x0, x1 along it become x0 cos - x1 sin and x1 cos + x0 sin (Su et al. 2021), each with its own angle or both with one
// The operands stand in the order of the steps that take them. They, the value and the result may be f32 beside one other dtype.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "graph/op.h"

namespace comfytp::graph {

inline constexpr std::size_t kMostSteps = 8;  ///< of a chain

std::vector<std::string> steps_of(std::string_view list);
bool takes_operand(std::string_view step);
/// How many a step takes.
std::size_t operands_of(std::string_view step);
bool is_activation(std::string_view step);
/// How many all steps take.
std::size_t operand_count(std::string_view list);

/// What an op's attribute says of a result's dtype, or else its value's.
DType dtype_or(const Attrs& attrs, std::string_view attribute, DType value);
/// Throws Error unless the types are of one dtype, or of f32 and one narrower.
void check_dtypes(std::string_view op, std::span<const Type> types);
/// Throws Error unless in[first], … are the operands of a chain on `x`, whatever their dtypes. Returns the first input behind them.
std::size_t check_steps(std::string_view op, std::string_view list, std::span<const Type> in, std::size_t first, const Type& x,
                        std::size_t channel);
/// The orders that a chain on a value in order `x` wants of its operands, op.in[first] and on: of the full shape like the value, of rope
/// row-major, else as they are. Returns the first input behind them.
std::size_t lay_operands(std::string_view list, const OpContext& op, std::size_t first, const Order& x, Layout& layout);
/// The chain has a step that takes neighbours along the last dimension, which then lies innermost.
bool takes_pairs(std::string_view list);
/// Applies the chain to `y`; operands[0] is the first step's that takes one.
void steps_reference(std::string_view list, std::span<const RefTensor> operands, std::size_t channel, RefTensor& y);
/// For one element.
double steps_flops(std::string_view list);

}  // namespace comfytp::graph
