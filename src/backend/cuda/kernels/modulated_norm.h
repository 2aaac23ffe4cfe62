// The norms of a transformer's stream: a projection's bias, gate and residual before one, weights and modulation behind it. A case of row_norm.h
// whose steps stand in one order, so that nothing is interpreted: it takes three quarters of the general kernel's time.
#pragma once

#include <cstdint>
#include <optional>

#include "backend/cuda/kernels/row_norm.h"

namespace comfytp::backend::cuda {

/// y = (x + bias) * gate + residual; z = (norm(y) * weight + shift) * (1 + scale) * factor + offset + sum. Any of the operands may be missing.
/// residual and sum are like x, the others vectors along its columns: all rows', or those of each sample.
struct ModulatedNorm {
  std::int64_t rows = 0;
  int columns = 0, rows_of_sample = 0;  ///< 0: no operand differs between samples
  bool centred = true;                  ///< layer_norm; otherwise rms_norm
  float epsilon = 0;
  /// A step's operand: its number among the chain's, and how far apart, in elements, samples have theirs. -1: none.
  struct Vector {
    int operand = -1, stride = 0;
  };
  Vector bias, gate, scale, factor, offset;
  int residual = -1, sum = -1;
};

/// The norm as such; nothing where its steps are others, stand otherwise or are of more than one dtype, or its rows are not of whole packs,
/// or longer than 8192.
std::optional<ModulatedNorm> as_modulated_norm(const RowNorm& norm, DType dtype);

/// All operands begin at multiples of 16 bytes; z may lie where x, residual or sum does, y where x or residual does.
cudaError_t launch_modulated_norm(const ModulatedNorm& norm, const RowNormOperands& operands, DType dtype, cudaStream_t stream);

}  // namespace comfytp::backend::cuda
