// A linear that asks for its product in fp8, or several of one x: by cuBLASLt, where the weight is stored in fp8 and the GPU and the sizes allow
// it. Otherwise the weight is decoded and all goes as in any other linear.
#include "backend/alignment.h"
#include "backend/cuda/copy.h"
#include "backend/cuda/copy_plan.h"
#include "backend/cuda/kernels/contraction.h"
#include "backend/cuda/kernels/fp8.h"
#include "backend/cuda/kernels/linear.h"
#include "backend/cuda/matmul.h"
#include "backend/cuda/status.h"
#include "base/error.h"
#include "graph/ops/epilogue.h"
#include "graph/ops/linears.h"

namespace comfytp::backend::cuda {
namespace {

std::unique_ptr<Kernel> make_decoding(const Site& site) {
  const auto& plain = *find_kernel("linear");
  const DType dtype = site.in[0].type.dtype;
  if (site.dtype(1) == dtype) return plain.make(site);
  std::vector<Operand> in(site.in.begin(), site.in.end());
  in[1] = {{dtype, site.shape(1)}, graph::row_major(2)};
  std::shared_ptr<Kernel> linear = plain.make({site.node, in, site.out, site.context});
  const auto copy = plan_copy(site.shape(1), site.dtype(1), site.strides(1), dtype, row_major_strides(site.shape(1)));
  const auto bytes = aligned(in[1].type.bytes());
  return make_kernel(
      [=, stream = site.context.stream](auto operands, auto out, void* workspace) {
        check(launch_copy(copy, operands[1], workspace, stream), "decoding a weight");
        std::vector<const void*> decoded(operands.begin(), operands.end());
        decoded[1] = workspace;
        linear->run(decoded, out, static_cast<char*>(workspace) + bytes);
      },
      bytes + linear->workspace_bytes());
}

// The product with an x that is rounded already; null where the sizes, the weight or the GPU do not allow it.
class Fp8Product {
 public:
  static std::shared_ptr<const Fp8Product> of(const Site& site) {
    const DType dtype = site.in[0].type.dtype, stored = site.dtype(1);
    const auto& y = site.out[0].type.shape;
    MatmulSizes sizes;
    sizes.dtype = dtype;
    sizes.outputs = site.shape(1)[0];
    sizes.inner = site.shape(1)[1];
    sizes.rows = sizes.outputs ? numel(y) / sizes.outputs : 0;
    sizes.fp8_weight = stored;
    const bool as_stored = site.strides(1) == row_major_strides(site.shape(1));
    if (!site.context.multiplies_in_fp8() || !is_fp8(stored) || !as_stored || dtype == DType::f32 || sizes.rows <= kFewRows || sizes.inner == 0 ||
        sizes.inner % 16 || sizes.outputs % 16)
      return nullptr;
    const auto steps = graph::epilogue_of(site.attrs());
    sizes.bias = !steps.empty() && steps[0] == "bias";
    auto matmul = matmul_if_any(site.context, sizes);
    if (!matmul) return nullptr;
    return std::make_shared<Fp8Product>(std::move(matmul), Epilogue(site, y.size() - 1, sizes.bias ? 1 : 0), sizes.bias);
  }
  Fp8Product(std::shared_ptr<Matmul> matmul, Epilogue epilogue, bool bias) : matmul_(std::move(matmul)), epilogue_(std::move(epilogue)), bias_(bias) {}

  std::int64_t workspace_bytes() const { return matmul_->workspace_bytes(); }
  /// in: as the linear's, but for x.
  void run(const void* x, const float* scale, std::span<const void* const> in, void* y, void* workspace) const {
    matmul_->run(x, in[1], bias_ ? in[2] : nullptr, y, workspace, scale);
    epilogue_.run(in, y);
  }

 private:
  std::shared_ptr<Matmul> matmul_;
  Epilogue epilogue_;
  bool bias_;
};

// x rounded, in a workspace.
class Rounding {
 public:
  explicit Rounding(const Site& site)
      : dtype_(site.in[0].type.dtype), count_(numel(site.shape(0))), scale_(aligned(count_)), stream_(site.context.stream) {}
  std::int64_t bytes() const { return scale_ + aligned(2 * sizeof(float)); }
  const float* scale(const void* workspace) const { return reinterpret_cast<const float*>(static_cast<const char*>(workspace) + scale_); }
  void run(const void* x, void* workspace) const {
    check(launch_to_fp8(dtype_, x, count_, workspace, const_cast<float*>(scale(workspace)), stream_), "rounding to fp8");
  }

 private:
  DType dtype_;
  std::int64_t count_, scale_;
  cudaStream_t stream_;
};

std::unique_ptr<Kernel> make(const Site& site) {
  expect_real(site, site.in[0].type.dtype);
  const auto product = Fp8Product::of(site);
  if (!product) return make_decoding(site);
  const Rounding rounding(site);
  return make_kernel(
      [=](auto in, auto out, void* workspace) {
        rounding.run(in[0], workspace);
        product->run(workspace, rounding.scale(workspace), in, out[0], static_cast<char*>(workspace) + rounding.bytes());
      },
      rounding.bytes() + product->workspace_bytes());
}

// x is rounded once for all that multiply in fp8; the others decode their weights.
std::unique_ptr<Kernel> make_several(const Site& site) {
  expect_real(site, site.in[0].type.dtype);
  struct One {
    graph::LinearOfSeveral linear;
    std::shared_ptr<const Fp8Product> product;
    std::shared_ptr<Kernel> decoding;
  };
  const Rounding rounding(site);
  std::vector<One> all;
  std::int64_t workspace_bytes = 0;
  bool any = false;
  for (auto& linear : graph::linears_of(site.attrs())) {
    const graph::Node node{&graph::find_op("linear"), linear.attrs, {}, {}, site.node.name};
    const auto in = linear.operands(site.in);
    const Site own{node, in, site.out.subspan(all.size(), 1), site.context};
    auto& one = all.emplace_back(One{std::move(linear), Fp8Product::of(own), nullptr});
    if (!one.product) one.decoding = make_decoding(own);
    any = any || one.product;
    workspace_bytes = std::max(workspace_bytes, one.product ? one.product->workspace_bytes() : one.decoding->workspace_bytes());
  }
  const auto before = any ? rounding.bytes() : 0;
  return make_kernel(
      [=, all = std::move(all)](auto in, auto out, void* workspace) {
        if (any) rounding.run(in[0], workspace);
        void* rest = static_cast<char*>(workspace) + before;
        for (std::size_t k = 0; k < all.size(); ++k) {
          const auto operands = all[k].linear.operands(in);
          if (all[k].product)
            all[k].product->run(workspace, rounding.scale(workspace), operands, out[k], rest);
          else
            all[k].decoding->run(operands, out.subspan(k, 1), rest);
        }
      },
      before + workspace_bytes);
}

bool is_weight_of_several(const graph::Node& node, std::size_t i) { return i >= 1 && i <= node.attrs.ints("biased").size(); }

const bool registered = register_kernel("linear in fp8", {make, {1}});
const bool registered_several = register_kernel("linears in fp8", {make_several, {}, is_weight_of_several});

}  // namespace
}  // namespace comfytp::backend::cuda
