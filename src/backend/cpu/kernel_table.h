// The kernels of the CPU backend by the names of their ops. A kernel's file registers it; nothing else knows them all.
#pragma once

#include <memory>
#include <span>
#include <string_view>

#include "backend/backend.h"

namespace comfytp::backend::cpu {

/// What a kernel is made from.
struct Site {
  const graph::Node& node;
  std::span<const Operand> in, out;
  int threads = 1;

  const graph::Attrs& attrs() const { return node.attrs; }
  const Shape& shape(std::size_t i) const { return in[i].type.shape; }
};

struct KernelEntry {
  std::unique_ptr<Kernel> (*make)(const Site& site) = nullptr;
  /// The input that the kernel reads as the weight lies in memory (stored dtype, format, and it may choose the format);
  /// -1: none. All other weights reach it decoded.
  int weight_input = -1;
};

bool register_kernel(std::string_view op, KernelEntry entry);
/// Null where there is none.
const KernelEntry* find_kernel(std::string_view op);

/// Throws Error unless `dtype` is one that the CPU kernels compute in.
void expect_real(const Site& site, DType dtype);

}  // namespace comfytp::backend::cpu
