// What linear and the convolutions share: the steps of an epilogue behind the heavy op.
#pragma once

#include <optional>

#include "backend/cuda/chain_plan.h"
#include "backend/cuda/kernel_table.h"

namespace comfytp::backend::cuda {

/// The steps that are left for a pass over the result, in place. `done` steps at the front are the heavy op's own.
class Epilogue {
 public:
  /// The operands stand behind x and w; `channel` is the output's dimension that a bias is along.
  Epilogue(const Site& site, std::size_t channel, std::size_t done = 0);
  bool empty() const { return chain_.count == 0; }
  void run(std::span<const void* const> in, void* out) const;
  const Chain& chain() const { return chain_; }
  std::size_t first() const { return first_; }

 private:
  Chain chain_;
  std::size_t first_ = 2;  ///< the first operand that it takes
  DType dtype_;
  cudaStream_t stream_;
};

}  // namespace comfytp::backend::cuda
