#include "random.h"

namespace comfytp::cli {
namespace {

// The output function of SplitMix64 (Steele, Lea, Flood 2014), used as a counter-based generator.
std::uint64_t mix(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15u;

}  // namespace

NormalStream::NormalStream(std::uint64_t seed, std::string_view name) : key_(mix(seed + kGolden)) {
  for (unsigned char c : name) key_ = mix(key_ ^ (c + kGolden));
}

void NormalStream::fill(std::span<float> out, std::uint64_t first, float mean, float scale) const {
  constexpr float kMean = 2 * 65535.0f;
  constexpr float kDeviation = 37837.2275f;  // sqrt(4 * (65536^2 - 1) / 12)
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::uint64_t bits = mix(key_ + (first + i) * kGolden);
    const auto sum = static_cast<std::uint32_t>((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48));
    out[i] = mean + scale * ((static_cast<float>(sum) - kMean) / kDeviation);
  }
}

}  // namespace comfytp::cli
