// What a linear or a convolution does with its result before it is written: a comma-separated list, in order, of
// bias [o], mul and add (operands of the output's shape, taken from the inputs behind x and w), silu, gelu and gelu_tanh.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "graph/ops/steps.h"

namespace comfytp::graph {

std::vector<std::string> epilogue_of(const Attrs& attrs);
/// An activation that can be a step of an epilogue.
bool activates_epilogue(std::string_view step);
/// Checks the operands behind the first `skip` inputs.
void check_epilogue(std::string_view op, const Attrs& attrs, std::span<const Type> in, std::size_t skip, const Type& out, std::size_t channel_dim);
/// Appends the operands' rules; with an epilogue the contracted factors cannot be cut (it would be applied to parts).
void epilogue_rule(Rule& rule, const OpContext& op, std::size_t channel_dim);
void epilogue_reference(const OpContext& op, std::span<const RefTensor> in, std::size_t skip, std::size_t channel_dim, RefTensor& out);
double epilogue_flops(const OpContext& op);

}  // namespace comfytp::graph
