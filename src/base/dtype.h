// Element types, and the conversions that the host needs for them.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <string_view>

namespace comfytp {

enum class DType : std::uint8_t { f64, f32, f16, bf16, f8_e4m3, f8_e5m2, i64, i32, i16, i8, u8, boolean, u64, u32, u16 };

/// Bytes of one element.
constexpr int size_of(DType t) {
  switch (t) {
    case DType::f64:
    case DType::i64:
    case DType::u64: return 8;
    case DType::f32:
    case DType::i32:
    case DType::u32: return 4;
    case DType::f16:
    case DType::bf16:
    case DType::i16:
    case DType::u16: return 2;
    default: return 1;
  }
}

constexpr bool is_fp8(DType t) { return t == DType::f8_e4m3 || t == DType::f8_e5m2; }
constexpr bool is_float(DType t) { return t <= DType::f8_e5m2; }

/// The short name used in graphs, plans and messages: "f32", "bf16", "f8_e4m3", …
std::string_view name_of(DType t);

/// The inverse of name_of; also takes the long names "float32", "float16", "bfloat16". Throws Error.
DType dtype_from_name(std::string_view name);

// Scalar conversions, branch-free where it matters so that loops over them are vectorised.

inline float bf16_to_float(std::uint16_t v) { return std::bit_cast<float>(std::uint32_t{v} << 16); }

/// Round to nearest even; NaN stays NaN.
inline std::uint16_t float_to_bf16(float f) {
  const auto u = std::bit_cast<std::uint32_t>(f);
  const auto rounded = static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  const auto quiet = static_cast<std::uint16_t>((u >> 16) | 0x40u);
  return (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}

float f16_to_float(std::uint16_t v);
std::uint16_t float_to_f16(float f);
/// OCP 8-bit E4M3 ("fn": no infinities, 0x7f is NaN), as torch.float8_e4m3fn and safetensors' F8_E4M3.
float f8_e4m3_to_float(std::uint8_t v);
/// OCP 8-bit E5M2, as torch.float8_e5m2 and safetensors' F8_E5M2.
float f8_e5m2_to_float(std::uint8_t v);

/// Reads element `i` of an array of `t` as a double (integers up to 2^53 are exact).
double load_element(const void* data, DType t, std::int64_t i);
/// Writes `v` to element `i`, rounded to nearest even. fp8 cannot be written. Throws Error for it.
void store_element(void* data, DType t, std::int64_t i, double v);

/// Converts `count` elements that lie one behind the other. Writing fp8 from another type throws Error.
void convert(const void* source, DType from, void* target, DType to, std::int64_t count);

}  // namespace comfytp
