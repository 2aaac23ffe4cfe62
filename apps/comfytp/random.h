// Seeded numbers that are the same on every machine and in whatever order they are drawn.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace comfytp::cli {

/// A stream of nearly normal numbers (sum of four uniform ones: mean 0, variance 1, none beyond 3.5). A number depends on
/// the seed, the stream's name and its place alone.
class NormalStream {
 public:
  NormalStream(std::uint64_t seed, std::string_view name);
  /// Writes mean + scale * numbers first, first + 1, ….
  void fill(std::span<float> out, std::uint64_t first, float mean, float scale) const;

 private:
  std::uint64_t key_;
};

}  // namespace comfytp::cli
