// Chains of elementwise steps (src/graph/ops/steps.h) as device code takes them. Known to host and device code.
#pragma once

#include <cstdint>

namespace comfytp::backend::cuda {

constexpr int kChainDims = 4;
constexpr int kChainSteps = 8;
constexpr int kChainOperands = 10;

enum class StepKind : std::uint8_t { add, mul, add_one_mul, silu, gelu, gelu_tanh, sigmoid, tanh, relu, rope };

struct ChainStep {
  StepKind kind = StepKind::add;
  std::int8_t operand = -1;                  ///< number of its operand, or -1; of rope the cosines', before the sines'
  bool wide = false;                         ///< the operand is f32, whatever the value is
  bool halved = false;                       ///< of rope: neighbours have one angle
  bool varies = false;                       ///< the operand is another one along an outer dimension
  std::int64_t stride[kChainDims] = {};      ///< of the operand, in elements; 0 where it is broadcast
};

/// What kernels are compiled for one by one, since every case that is told apart while they run costs instructions.
enum class ChainKind {
  plain,  ///< operands are of the narrower dtype, and along the innermost dimension they are as long as the value
  wide,   ///< or of f32
  any,
};

/// The value has up to kChainDims dimensions, the outermost first and dense in that order.
struct Chain {
  int dims = 0;
  std::int64_t size[kChainDims] = {};
  int count = 0;
  ChainStep steps[kChainSteps];
  /// The innermost dimension and all strides allow packs of so many elements.
  bool packs_of(int n) const {
    bool fits = size[dims - 1] % n == 0;
    for (int s = 0; fits && s < count; ++s) {
      if (steps[s].operand < 0) continue;
      fits = steps[s].stride[dims - 1] <= 1;
      for (int d = 0; fits && d < dims - 1; ++d) fits = steps[s].stride[d] % n == 0;
    }
    return fits;
  }
  ChainKind kind() const {
    auto kind = ChainKind::plain;
    for (int s = 0; s < count; ++s) {
      if (steps[s].operand < 0) continue;
      if (steps[s].kind == StepKind::rope || steps[s].stride[dims - 1] != 1) return ChainKind::any;
      if (steps[s].wide) kind = ChainKind::wide;
    }
    return kind;
  }
  /// A step takes elements two by two.
  bool pairs() const {
    for (int s = 0; s < count; ++s)
      if (steps[s].kind == StepKind::rope) return true;
    return false;
  }
};

struct ChainOperands {
  const void* at[kChainOperands] = {};
  bool aligned() const {
    for (const void* p : at)
      if (reinterpret_cast<std::uintptr_t>(p) % 16) return false;
    return true;
  }
};

}  // namespace comfytp::backend::cuda
