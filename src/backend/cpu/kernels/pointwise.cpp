// pointwise: pieces of rows go through all steps while they are in the cache.
#include "backend/cpu/kernel_table.h"
#include "backend/cpu/parallel.h"
#include "backend/cpu/steps.h"

namespace comfytp::backend::cpu {
namespace {

class PointwiseKernel final : public Kernel {
 public:
  explicit PointwiseKernel(const Site& site)
      : from_(site.in[0].type.dtype),
        to_(site.out[0].type.dtype),
        chain_(site.attrs().text("steps"), site.in[0], site.in.subspan(1), static_cast<std::size_t>(site.attrs().integer_or("channel", 0)),
               graph::takes_pairs(site.attrs().text("steps")) ? StepChain::Rows::innermost : StepChain::Rows::longest) {}
  void run(std::span<const void* const> in, std::span<void* const> out, void*) override {
    const auto size = chain_.row_size(), pieces = (size + kChunk - 1) / kChunk;
    parallel(chain_.rows() * pieces, row_grain(std::min(size, kChunk)), [&](std::int64_t begin, std::int64_t end, int) {
      float piece[kChunk];
      for (std::int64_t i = begin; i < end; ++i) {
        const auto row = i / pieces, from = i % pieces * kChunk, count = std::min(kChunk, size - from), at = row * size + from;
        load_row(static_cast<const char*>(in[0]) + at * size_of(from_), from_, piece, count);
        chain_.apply(row, from, count, in.data() + 1, piece);
        store_row(piece, to_, static_cast<char*>(out[0]) + at * size_of(to_), count);
      }
    });
  }

 private:
  DType from_, to_;
  StepChain chain_;
};

const bool registered = register_kernel("pointwise", {[](const Site& site) -> std::unique_ptr<Kernel> {
                                          expect_real(site, site.in[0].type.dtype);
                                          return std::make_unique<PointwiseKernel>(site);
                                        }});

}  // namespace
}  // namespace comfytp::backend::cpu
