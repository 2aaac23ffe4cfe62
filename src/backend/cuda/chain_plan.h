// From a chain's text and operands to a Chain.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/chain.h"

namespace comfytp::backend::cuda {

/// Of a step's name (graph/ops/steps.h).
StepKind step_kind(const std::string& step);

/// Adds the steps of `list` to a chain on a value that lies as `x` does; operands[0] is the first step's that takes one. `bias` is
/// along dimension `channel`. Its dimensions are merged where every operand allows it, but the innermost stays as it is where
/// `rows` is set. Throws Error when more than kChainDims are left.
Chain plan_chain(std::string_view list, const Operand& x, std::span<const Operand> operands, std::size_t channel, bool rows);

/// Operands [first, first + as many as the chain takes) of a launch.
ChainOperands chain_operands(const Chain& chain, std::span<const void* const> in, std::size_t first);

}  // namespace comfytp::backend::cuda
