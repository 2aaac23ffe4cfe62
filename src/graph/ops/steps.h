// Chains of elementwise steps, as pointwise and fused_norm apply them: computed in fp32, rounded once at their end. A
// comma-separated list, in order:
//   bias               + operand [c], along the chain's channel dimension
//   add, mul           + or * operand of the value's rank, each dimension the value's or 1
//   add_one_mul        * (1 + operand), likewise: the modulation of DiT (Peebles & Xie 2022)
//   silu, gelu, gelu_tanh, sigmoid, tanh, relu
// The operands stand in the order of the steps that take one and have the value's dtype.
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
bool is_activation(std::string_view step);
/// How many of the steps take one.
std::size_t operand_count(std::string_view list);

/// Throws Error unless in[first], … are the operands of a chain on `x`. Returns the first input behind them.
std::size_t check_steps(std::string_view op, std::string_view list, std::span<const Type> in, std::size_t first, const Type& x,
                        std::size_t channel);
/// Applies the chain to `y`; operands[0] is the first step's that takes one.
void steps_reference(std::string_view list, std::span<const RefTensor> operands, std::size_t channel, RefTensor& y);
/// For one element.
double steps_flops(std::string_view list);

}  // namespace comfytp::graph
