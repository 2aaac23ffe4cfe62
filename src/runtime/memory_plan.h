// Where buffers with known lifetimes lie in one piece of memory.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/alignment.h"

namespace comfytp::runtime {

using backend::aligned;
using backend::kAlignment;

/// In use from time `first` to time `last`, both included.
struct Buffer {
  std::int64_t bytes = 0;
  int first = 0, last = 0;
  std::int64_t offset = 0;
};

/// Sets the offsets so that no two buffers in use at the same time overlap; returns the bytes needed. The largest buffers are
/// placed first, each into the tightest gap that is free over its lifetime (greedy by size: Pisarchyk & Lee 2020).
std::int64_t assign_offsets(std::vector<Buffer>& buffers);

}  // namespace comfytp::runtime
