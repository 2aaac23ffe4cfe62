// Brings some output channels of a weight from how they are stored into the layout and dtype that a primitive reads.
#pragma once

#include "backend/cpu/contraction.h"
#include "backend/cpu/workspace.h"

namespace comfytp::backend::cpu {

/// How a weight lies in memory.
struct WeightSource {
  DType stored;
  const MemoryDesc* packed = nullptr;  ///< in the weight's own dimensions; row-major where null

  /// Output channels that lie together: a part can only begin at a multiple.
  std::int64_t block() const;
};

class WeightDecoder {
 public:
  /// For parts of `channels` output channels, to `target` in the primitive's dimensions; takes its memory from `work`.
  /// Each of `callers` threads may decode at once, and each call may use `threads`.
  WeightDecoder(const Contraction& contraction, const ContractionSizes& sizes, const WeightSource& source, DType dtype,
                std::int64_t channels, const MemoryDesc& target, int callers, int threads, Workspace& work);
  /// Makes what is costly; before the first run.
  void make();
  /// Decodes channels [begin, begin + channels) and returns them, somewhere in `work`.
  void* run(const void* weight, std::int64_t begin, void* work, int caller);

 private:
  void convert_slice(const char* from, char* to) const;

  WeightSource source_;
  DType dtype_;
  std::int64_t channels_, threads_;
  std::int64_t step_;             ///< stored elements from one output channel to the next (in steps of whole blocks)
  std::int64_t slices_ = 1;       ///< a part is decoded a slice of its input channels at a time, so that a slice stays in the cache
  std::int64_t run_ = 0;          ///< elements of one output channel in a slice
  std::int64_t target_step_ = 0;  ///< elements of the target from slice to slice
  std::int64_t slice_ = -1, target_, scratchpad_;
  dnnl::reorder::primitive_desc desc_;
  dnnl::reorder primitive_;
  std::vector<Arguments> args_;  ///< by caller
};

}  // namespace comfytp::backend::cpu
