// The kernels of the CUDA backend by the names of their ops. A kernel's file registers it; nothing else knows them all.
//
// An op has two files in kernels/: x.cpp decides and checks, in the host's C++; x.cu holds the device code behind launch functions
// that know pointers and sizes alone, for nvcc cannot read all that the rest includes.
#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/context.h"

namespace comfytp::backend::cuda {

/// What a kernel is made from.
struct Site {
  const graph::Node& node;
  std::span<const Operand> in, out;
  Context& context;

  const graph::Attrs& attrs() const { return node.attrs; }
  std::string_view op() const { return node.op->name(); }
  const Shape& shape(std::size_t i) const { return in[i].type.shape; }
  /// Of input i as it lies in memory: a weight's stored one.
  DType dtype(std::size_t i) const { return in[i].weight ? in[i].weight->stored : in[i].type.dtype; }
  Shape strides(std::size_t i) const { return graph::strides_of(in[i].type.shape, in[i].order); }
};

struct KernelEntry {
  std::unique_ptr<Kernel> (*make)(const Site& site) = nullptr;
  /// Inputs that the kernel reads in whatever dtype and format a weight lies in memory; the lowering casts all others.
  std::vector<std::size_t> decodes;
  bool (*also_decodes)(const graph::Node& node, std::size_t i) = nullptr;  ///< where that hangs on the node
};

bool register_kernel(std::string_view op, KernelEntry entry);
/// Null where there is none.
const KernelEntry* find_kernel(std::string_view op);
/// Of a node: linears that ask for products in fp8 have kernels of their own, "linear in fp8" and "linears in fp8".
const KernelEntry* find_kernel(const graph::Node& node);

/// A kernel that is one function of its operands.
template <typename Run>
class FunctionKernel final : public Kernel {
 public:
  FunctionKernel(Run run, std::int64_t workspace) : run_(std::move(run)), workspace_(workspace) {}
  std::int64_t workspace_bytes() const override { return workspace_; }
  void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override { run_(in, out, workspace); }

 private:
  Run run_;
  std::int64_t workspace_;
};
template <typename Run>
std::unique_ptr<Kernel> make_kernel(Run run, std::int64_t workspace = 0) {
  return std::make_unique<FunctionKernel<Run>>(std::move(run), workspace);
}

/// The one dtype beside f32 among a site's operands and results; f32 where there is none.
DType narrow_dtype(const Site& site);
/// Throws Error unless `dtype` is one that the CUDA kernels compute in: f32, f16, bf16.
void expect_real(const Site& site, DType dtype);

}  // namespace comfytp::backend::cuda
