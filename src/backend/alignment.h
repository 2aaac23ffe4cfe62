// Where in memory a tensor may begin.
#pragma once

#include <cstdint>

namespace comfytp::backend {

constexpr std::int64_t kAlignment = 256;  ///< bytes: what cuBLASLt counts on; more than a cache line
/// What is laid behind so many bytes begins here.
constexpr std::int64_t aligned(std::int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace comfytp::backend
