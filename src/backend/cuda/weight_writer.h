#pragma once

#include <memory>

#include "backend/backend.h"
#include "backend/cuda/context.h"

namespace comfytp::backend::cuda {

/// Several threads read into page-locked memory while the copy engine takes what was read before.
std::unique_ptr<WeightWriter> make_weight_writer(Context& context);

}  // namespace comfytp::backend::cuda
