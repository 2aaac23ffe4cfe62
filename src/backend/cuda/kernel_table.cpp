#include "backend/cuda/kernel_table.h"

#include <map>
#include <string>

#include "base/error.h"

namespace comfytp::backend::cuda {
namespace {

std::map<std::string, KernelEntry, std::less<>>& table() {
  static std::map<std::string, KernelEntry, std::less<>> entries;
  return entries;
}

}  // namespace

bool register_kernel(std::string_view op, KernelEntry entry) { return table().emplace(op, std::move(entry)).second; }

const KernelEntry* find_kernel(std::string_view op) {
  const auto it = table().find(op);
  return it == table().end() ? nullptr : &it->second;
}

const KernelEntry* find_kernel(const graph::Node& node) {
  const auto product = node.attrs.text_or("product", "");
  return find_kernel(product.empty() ? std::string(node.op->name()) : fmt::format("{} in {}", node.op->name(), product));
}

DType narrow_dtype(const Site& site) {
  for (const auto operands : {site.in, site.out})
    for (const auto& operand : operands)
      if (operand.type.dtype != DType::f32) return operand.type.dtype;
  return DType::f32;
}

void expect_real(const Site& site, DType dtype) {
  require(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, "[{}] expected f32, f16 or bf16 on {} but got {}", site.op(),
          site.context.name, name_of(dtype));
}

}  // namespace comfytp::backend::cuda
