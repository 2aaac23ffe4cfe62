// Chains of elementwise steps (graph/ops/steps.h) on rows that lie in the cache as floats.
#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/copy_plan.h"
#include "graph/ops/steps.h"

namespace comfytp::backend::cpu {

/// How many elements a kernel takes at a time where its rows are longer.
inline constexpr std::int64_t kChunk = 1024;

/// f32 and bf16 only.
void load_row(const void* x, DType dtype, float* row, std::int64_t count);
void store_row(const float* row, DType dtype, void* y, std::int64_t count);

/// y[i] becomes the step of y[i] and operand[i * stride].
using StepFunction = void (*)(float* y, const void* operand, std::int64_t stride, std::int64_t count);
/// `dtype` is the operand's.
StepFunction step_function(std::string_view step, DType dtype);

/// A chain on a value that is dense in its order, cut into rows: along its innermost dimension alone, or as long as all
/// operands allow.
class StepChain {
 public:
  enum class Rows { innermost, longest };
  /// `operands` of the steps; `channel` is the dimension of biases.
  StepChain(std::string_view steps, const Operand& value, std::span<const Operand> operands, std::size_t channel, Rows rows);
  std::int64_t rows() const { return rows_; }
  std::int64_t row_size() const { return inner_.size; }
  /// Elements [begin, begin + count) of a row; operands[0] is the first step's that takes one.
  void apply(std::int64_t row, std::int64_t begin, std::int64_t count, const void* const* operands, float* y) const;

 private:
  static constexpr int kMostOperands = 2 * static_cast<int>(graph::kMostSteps);
  using Loops = Loop<1 + kMostOperands>;  // the value's, then the operands'
  struct Step {
    StepFunction function;     // null: rope
    int operand;               // -1: none; of rope the cosines', before the sines'
    bool halved = false;       // of rope: neighbours have one angle
    DType dtype = DType::f32;  // of rope's operands
  };
  static void turn(const Step& step, const char* cosines, const char* sines, std::int64_t begin, std::int64_t count, float* y);

  std::vector<Step> steps_;
  std::vector<int> element_;  // bytes of the operands' elements
  std::vector<Loops> outer_;
  Loops inner_;
  std::int64_t rows_ = 1;
};

}  // namespace comfytp::backend::cpu
