// glu: pieces of the gate's and the value's rows meet in the cache.
#include "backend/cpu/kernel_table.h"
#include "backend/cpu/parallel.h"
#include "backend/cpu/steps.h"
#include "graph/ops/glu.h"

namespace comfytp::backend::cpu {
namespace {

class GluKernel final : public Kernel {
 public:
  explicit GluKernel(const Site& site)
      : dtype_(site.in[0].type.dtype),
        size_(site.shape(0).back()),
        rows_(size_ ? numel(site.shape(0)) / size_ : 0),
        biases_(graph::glu_biases(site.attrs(), 2)),
        activation_(step_function(site.attrs().text("activation"), dtype_)) {}
  void run(std::span<const void* const> in, std::span<void* const> out, void*) override {
    const auto pieces = (size_ + kChunk - 1) / kChunk, element = static_cast<std::int64_t>(size_of(dtype_));
    const auto bias = step_function("add", dtype_), product = step_function("mul", DType::f32);
    const auto part = [&](const void* of, std::int64_t at) { return static_cast<const char*>(of) + at * element; };
    parallel(rows_ * pieces, row_grain(std::min(size_, kChunk)), [&](std::int64_t begin, std::int64_t end, int) {
      float value[kChunk], gate[kChunk];
      for (std::int64_t i = begin; i < end; ++i) {
        const auto from = i % pieces * kChunk, count = std::min(kChunk, size_ - from), at = i / pieces * size_ + from;
        load_row(part(in[0], at), dtype_, value, count);
        load_row(part(in[1], at), dtype_, gate, count);
        if (biases_.value) bias(value, part(in[biases_.value], from), 1, count);
        if (biases_.gate) bias(gate, part(in[biases_.gate], from), 1, count);
        activation_(gate, nullptr, 0, count);
        product(value, gate, 1, count);
        store_row(value, dtype_, static_cast<char*>(out[0]) + at * element, count);
      }
    });
  }

 private:
  DType dtype_;
  std::int64_t size_, rows_;
  graph::GluBiases biases_;
  StepFunction activation_;
};

const bool registered = register_kernel("glu", {[](const Site& site) -> std::unique_ptr<Kernel> {
                                          expect_real(site, site.in[0].type.dtype);
                                          return std::make_unique<GluKernel>(site);
                                        }});

}  // namespace
}  // namespace comfytp::backend::cpu
