// The sum of several tensors, element by element.
#pragma once

#include <span>

#include "base/tensor_view.h"

namespace comfytp::comm {

/// out = in[0] + in[1] + … in fp32, in this order, rounded once. All of one shape and of one type: f32, f16 or bf16. Strides may
/// be anything. `out` may be one of the operands.
void sum(std::span<const TensorView> in, const TensorView& out);

}  // namespace comfytp::comm
