// Words: elements of any kind as 1 … 16 bytes at a time, for what moves them and does not look at them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace comfytp::backend::cuda {

/// Bytes of the widest word that divides every number whose bits are in `bits`: sizes and offsets in bytes, addresses.
inline int widest_word(std::uint64_t bits) {
  bits |= 16;
  return static_cast<int>(bits & (~bits + 1));
}
inline std::uint64_t address(const void* p) { return reinterpret_cast<std::uintptr_t>(p); }

template <typename T>
struct WordTag { using type = T; };

/// Calls `body(WordTag<W>)` with the word of so many bytes.
template <typename Body>
void with_word(int bytes, const Body& body) {
  switch (bytes) {
    case 16: return body(WordTag<uint4>());
    case 8: return body(WordTag<uint2>());
    case 4: return body(WordTag<std::uint32_t>());
    case 2: return body(WordTag<std::uint16_t>());
    default: return body(WordTag<std::uint8_t>());
  }
}

}  // namespace comfytp::backend::cuda
