#include "base/dtype.h"

#include <array>
#include <cstring>
#include <string>

#include "base/error.h"
#include "base/simd.h"

namespace comfytp {
namespace {

constexpr std::array<std::string_view, 15> kNames = {"f64", "f32", "f16", "bf16", "f8_e4m3", "f8_e5m2", "i64", "i32",
                                                     "i16", "i8",  "u8",  "bool", "u64",     "u32",     "u16"};

// Every fp8 value as a float, made once.
template <int kExponentBits, bool kHasInfinity>
std::array<float, 256> fp8_table() {
  constexpr int mantissa_bits = 7 - kExponentBits;
  constexpr int bias = (1 << (kExponentBits - 1)) - 1;
  std::array<float, 256> table{};
  for (int v = 0; v < 256; ++v) {
    const int exponent = (v >> mantissa_bits) & ((1 << kExponentBits) - 1);
    const int mantissa = v & ((1 << mantissa_bits) - 1);
    const int top = (1 << kExponentBits) - 1;
    float f;
    if (kHasInfinity && exponent == top) {
      f = mantissa ? NAN : INFINITY;
    } else if (!kHasInfinity && (v & 0x7f) == 0x7f) {
      f = NAN;
    } else if (exponent == 0) {
      f = std::ldexp(static_cast<float>(mantissa), 1 - bias - mantissa_bits);
    } else {
      f = std::ldexp(static_cast<float>(mantissa + (1 << mantissa_bits)), exponent - bias - mantissa_bits);
    }
    table[v] = (v & 0x80) ? -f : f;
  }
  return table;
}

const std::array<float, 256> kE4M3 = fp8_table<4, false>();
const std::array<float, 256> kE5M2 = fp8_table<5, true>();

// Branch-free f16 -> f32: the exponent is moved by a multiplication, which also makes subnormals right.
CTP_INLINE float half_to_float(std::uint16_t v) {
  const std::uint32_t sign = std::uint32_t{v & 0x8000u} << 16;
  const std::uint32_t body = std::uint32_t{v & 0x7fffu} << 13;
  const float scaled = std::bit_cast<float>(body) * std::bit_cast<float>(0x77800000u);  // * 2^112
  const std::uint32_t special = (v & 0x7c00u) == 0x7c00u ? 0x7f800000u | body : std::bit_cast<std::uint32_t>(scaled);
  return std::bit_cast<float>(special | sign);
}

// Round to nearest even through the float adder: adding a power of two drops just the bits f16 lacks.
CTP_INLINE std::uint16_t float_to_half(float f) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(f);
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  const std::uint32_t magnitude = u & 0x7fffffffu;
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  std::uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x47800000u ? 0x7c00u : h;
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  return static_cast<std::uint16_t>(h | sign);
}

CTP_CLONES void f16_to_f32(const std::uint16_t* in, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = half_to_float(in[i]);
}
CTP_CLONES void f32_to_f16(const float* in, std::uint16_t* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = float_to_half(in[i]);
}
// In bulk, arithmetic beats the table: it is vectorised. The exponent is moved as half_to_float does it.
CTP_CLONES void f8_e4m3_to_f32(const std::uint8_t* in, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t body = in[i] & 0x7fu;
    const float scaled = std::bit_cast<float>(body << 20) * std::bit_cast<float>(0x7b800000u);  // * 2^120
    const std::uint32_t bits = body == 0x7fu ? 0x7fc00000u : std::bit_cast<std::uint32_t>(scaled);
    out[i] = std::bit_cast<float>(bits | std::uint32_t{in[i] & 0x80u} << 24);
  }
}
// E5M2 is the upper half of an f16.
CTP_CLONES void f8_e5m2_to_f32(const std::uint8_t* in, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = half_to_float(static_cast<std::uint16_t>(in[i] << 8));
}
CTP_CLONES void bf16_to_f32(const std::uint16_t* in, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(in[i]);
}
CTP_CLONES void f32_to_bf16(const float* in, std::uint16_t* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = float_to_bf16(in[i]);
}

template <typename T>
T load(const void* data, std::int64_t i) {
  T v;
  std::memcpy(&v, static_cast<const char*>(data) + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return v;
}

template <typename T>
void store(void* data, std::int64_t i, T v) {
  std::memcpy(static_cast<char*>(data) + i * static_cast<std::int64_t>(sizeof(T)), &v, sizeof(T));
}

}  // namespace

std::string_view name_of(DType t) { return kNames[static_cast<std::size_t>(t)]; }

DType dtype_from_name(std::string_view name) {
  for (std::size_t i = 0; i < kNames.size(); ++i)
    if (kNames[i] == name) return static_cast<DType>(i);
  if (name == "float64") return DType::f64;
  if (name == "float32") return DType::f32;
  if (name == "float16") return DType::f16;
  if (name == "bfloat16") return DType::bf16;
  fail("[dtype] expected one of f64, f32, f16, bf16, f8_e4m3, f8_e5m2, i64, i32, i16, i8, u8, bool, u64, u32, u16 but got '{}'", name);
}

float f16_to_float(std::uint16_t v) { return half_to_float(v); }
std::uint16_t float_to_f16(float f) { return float_to_half(f); }
float f8_e4m3_to_float(std::uint8_t v) { return kE4M3[v]; }
float f8_e5m2_to_float(std::uint8_t v) { return kE5M2[v]; }

double load_element(const void* data, DType t, std::int64_t i) {
  switch (t) {
    case DType::f64: return load<double>(data, i);
    case DType::f32: return load<float>(data, i);
    case DType::f16: return half_to_float(load<std::uint16_t>(data, i));
    case DType::bf16: return bf16_to_float(load<std::uint16_t>(data, i));
    case DType::f8_e4m3: return kE4M3[load<std::uint8_t>(data, i)];
    case DType::f8_e5m2: return kE5M2[load<std::uint8_t>(data, i)];
    case DType::i64: return static_cast<double>(load<std::int64_t>(data, i));
    case DType::u64: return static_cast<double>(load<std::uint64_t>(data, i));
    case DType::i32: return load<std::int32_t>(data, i);
    case DType::u32: return load<std::uint32_t>(data, i);
    case DType::i16: return load<std::int16_t>(data, i);
    case DType::u16: return load<std::uint16_t>(data, i);
    case DType::i8: return load<std::int8_t>(data, i);
    case DType::u8:
    case DType::boolean: return load<std::uint8_t>(data, i);
  }
  return 0;
}

void store_element(void* data, DType t, std::int64_t i, double v) {
  switch (t) {
    case DType::f64: return store(data, i, v);
    case DType::f32: return store(data, i, static_cast<float>(v));
    case DType::f16: return store(data, i, float_to_half(static_cast<float>(v)));
    case DType::bf16: return store(data, i, float_to_bf16(static_cast<float>(v)));
    case DType::f8_e4m3:
    case DType::f8_e5m2: break;
    case DType::i64: return store(data, i, static_cast<std::int64_t>(v));
    case DType::u64: return store(data, i, static_cast<std::uint64_t>(v));
    case DType::i32: return store(data, i, static_cast<std::int32_t>(v));
    case DType::u32: return store(data, i, static_cast<std::uint32_t>(v));
    case DType::i16: return store(data, i, static_cast<std::int16_t>(v));
    case DType::u16: return store(data, i, static_cast<std::uint16_t>(v));
    case DType::i8: return store(data, i, static_cast<std::int8_t>(v));
    case DType::u8: return store(data, i, static_cast<std::uint8_t>(v));
    case DType::boolean: return store(data, i, static_cast<std::uint8_t>(v != 0));
  }
  fail("[convert] cannot write {} elements", name_of(t));
}

void convert(const void* source, DType from, void* target, DType to, std::int64_t count) {
  if (from == to) {
    std::memcpy(target, source, static_cast<std::size_t>(count) * size_of(from));
    return;
  }
  if (to == DType::f32) {
    auto* out = static_cast<float*>(target);
    switch (from) {
      case DType::f16: return f16_to_f32(static_cast<const std::uint16_t*>(source), out, count);
      case DType::bf16: return bf16_to_f32(static_cast<const std::uint16_t*>(source), out, count);
      case DType::f8_e4m3: return f8_e4m3_to_f32(static_cast<const std::uint8_t*>(source), out, count);
      case DType::f8_e5m2: return f8_e5m2_to_f32(static_cast<const std::uint8_t*>(source), out, count);
      default: break;
    }
  }
  if (from == DType::f32 && to == DType::f16)
    return f32_to_f16(static_cast<const float*>(source), static_cast<std::uint16_t*>(target), count);
  if (from == DType::f32 && to == DType::bf16)
    return f32_to_bf16(static_cast<const float*>(source), static_cast<std::uint16_t*>(target), count);
  if (is_float(from) && from != DType::f64 && (to == DType::f16 || to == DType::bf16)) {
    // Through fp32, a block at a time, so that both halves run vectorised.
    constexpr std::int64_t kBlock = 1024;
    float block[kBlock];
    for (std::int64_t i = 0; i < count; i += kBlock) {
      const std::int64_t n = std::min(kBlock, count - i);
      convert(static_cast<const char*>(source) + i * size_of(from), from, block, DType::f32, n);
      convert(block, DType::f32, static_cast<char*>(target) + i * size_of(to), to, n);
    }
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) store_element(target, to, i, load_element(source, from, i));
}

}  // namespace comfytp
