// matmul of two activations, row-major, as a batched oneDNN matmul.
#include <cstring>

#include "backend/cpu/kernel_table.h"
#include "backend/cpu/onednn.h"

namespace comfytp::backend::cpu {
namespace {

class MatmulKernel final : public Kernel {
 public:
  explicit MatmulKernel(const Site& site) : bytes_(site.out[0].type.bytes()), inner_(site.shape(0).back()) {
    const auto dtype = site.in[0].type.dtype;
    if (bytes_ == 0 || inner_ == 0) return;
    const auto& y = site.out[0].type.shape;
    const auto batch = numel(Shape(y.begin(), y.end() - 2)), m = y[y.size() - 2], n = y.back();
    dnnl::primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    desc_ = dnnl::matmul::primitive_desc(engine(), dense({batch, m, inner_}, dtype), dense({batch, inner_, n}, dtype),
                                         dense({batch, m, n}, dtype), attr);
    args_ = {{DNNL_ARG_SRC, unplaced(desc_.src_desc())},
             {DNNL_ARG_WEIGHTS, unplaced(desc_.weights_desc())},
             {DNNL_ARG_DST, unplaced(desc_.dst_desc())},
             {DNNL_ARG_SCRATCHPAD, unplaced(desc_.scratchpad_desc())}};
  }
  std::int64_t workspace_bytes() const override { return desc_ ? bytes_of(desc_.scratchpad_desc()) : 0; }
  void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override {
    if (!desc_) {
      if (bytes_) std::memset(out[0], 0, static_cast<std::size_t>(bytes_));
      return;
    }
    if (!primitive_) primitive_ = dnnl::matmul(desc_);
    place(args_, DNNL_ARG_SRC, in[0]);
    place(args_, DNNL_ARG_WEIGHTS, in[1]);
    place(args_, DNNL_ARG_DST, out[0]);
    place(args_, DNNL_ARG_SCRATCHPAD, workspace);
    primitive_.execute(stream(), args_);
  }

 private:
  std::int64_t bytes_, inner_;
  dnnl::matmul::primitive_desc desc_;
  dnnl::matmul primitive_;
  Arguments args_;
};

const bool registered = register_kernel("matmul", {[](const Site& site) -> std::unique_ptr<Kernel> {
                                          expect_real(site, site.in[0].type.dtype);
                                          return std::make_unique<MatmulKernel>(site);
                                        }});

}  // namespace
}  // namespace comfytp::backend::cpu
