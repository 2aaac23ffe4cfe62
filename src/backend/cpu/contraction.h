// What linear and conv2d share: a oneDNN primitive with the epilogue in its post-ops, and the ways to feed it weights.
// Weights that lie as the primitive wants them are read in place. Others (another dtype, row-major where a blocked layout is
// needed, packed for another shape) are decoded a chunk of output channels at a time, each thread into its own cache, and
// the primitive runs on that chunk: a decoded weight never goes to memory.
#pragma once

#include <memory>

#include "backend/cpu/kernel_table.h"
#include "backend/cpu/onednn.h"

namespace comfytp::backend::cpu {

/// One contraction as oneDNN sees it, for any number `o` of its output channels.
class Contraction {
 public:
  virtual ~Contraction() = default;
  /// `attr` holds the post-ops; `bias` is empty where there is none.
  virtual dnnl::primitive_desc primitive(std::int64_t o, const MemoryDesc& weights, const MemoryDesc& bias,
                                         const dnnl::primitive_attr& attr) const = 0;
  /// Operands of the epilogue: one value a channel (as bias argument, as post-op), one an element of the result.
  virtual MemoryDesc bias(std::int64_t o) const = 0;
  virtual MemoryDesc channels(std::int64_t o) const = 0;
  virtual MemoryDesc result(std::int64_t o) const = 0;
  /// The primitive's view of weights whose dimensions are the weight's own, and the inverse.
  virtual MemoryDesc as_weights(const MemoryDesc& own) const = 0;
  virtual MemoryDesc as_own(const MemoryDesc& weights) const = 0;
  /// The contracted channels among the primitive's dimensions of the weights.
  virtual std::int64_t input_dim() const = 0;
  /// Layouts worth trying, the best first.
  virtual std::vector<MemoryDesc> candidates(std::int64_t o) const = 0;
  virtual bool reads_plain() const = 0;
  /// Any range of output channels is a contraction of the whole x.
  virtual bool divisible() const { return true; }
};

/// The sizes all contractions have.
struct ContractionSizes {
  std::int64_t rows = 0;  ///< elements of the result for each output channel, which is innermost
  std::int64_t outputs = 0;
  Shape weight;       ///< [o, ..], never empty: where nothing is contracted, one zero is
  Shape source;       ///< of x, the same
  bool zero = false;  ///< nothing is contracted: x and w are that zero
};

std::unique_ptr<Kernel> make_contraction(const Site& site, const ContractionSizes& sizes, std::shared_ptr<const Contraction> contraction);

/// y [rows, o] = x [rows, i] w[o, i]^T.
std::shared_ptr<const Contraction> matmul_contraction(DType dtype, std::int64_t rows, const Shape& weight);

}  // namespace comfytp::backend::cpu
