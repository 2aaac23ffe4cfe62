#include "backend/cpu/kernel_table.h"

#include <map>
#include <string>

#include "base/error.h"

namespace comfytp::backend::cpu {
namespace {

std::map<std::string, KernelEntry, std::less<>>& table() {
  static std::map<std::string, KernelEntry, std::less<>> entries;
  return entries;
}

}  // namespace

bool register_kernel(std::string_view op, KernelEntry entry) { return table().emplace(op, entry).second; }

const KernelEntry* find_kernel(std::string_view op) {
  const auto it = table().find(op);
  return it == table().end() ? nullptr : &it->second;
}

void expect_real(const Site& site, DType dtype) {
  require(dtype == DType::f32 || dtype == DType::bf16, "[{}] expected f32 or bf16 on the CPU but got {}", site.node.op->name(),
          name_of(dtype));
}

}  // namespace comfytp::backend::cpu
