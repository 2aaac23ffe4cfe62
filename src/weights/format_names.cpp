#include "weights/format_names.h"

#include <utility>

namespace comfytp::weights {
namespace {

constexpr std::pair<DType, std::string_view> kNames[] = {
    {DType::f64, "F64"},         {DType::f32, "F32"}, {DType::f16, "F16"}, {DType::bf16, "BF16"}, {DType::f8_e4m3, "F8_E4M3"},
    {DType::f8_e5m2, "F8_E5M2"}, {DType::i64, "I64"}, {DType::i32, "I32"}, {DType::i16, "I16"},   {DType::i8, "I8"},
    {DType::u64, "U64"},         {DType::u32, "U32"}, {DType::u16, "U16"}, {DType::u8, "U8"},     {DType::boolean, "BOOL"}};

}  // namespace

std::string_view format_name(DType dtype) {
  for (const auto& [type, name] : kNames)
    if (type == dtype) return name;
  return {};
}

std::optional<DType> dtype_of_format(std::string_view name) {
  for (const auto& [type, known] : kNames)
    if (known == name) return type;
  return {};
}

std::string format_names() {
  std::string names;
  for (const auto& [type, name] : kNames) names.append(names.empty() ? "" : ", ").append(name);
  return names;
}

}  // namespace comfytp::weights
