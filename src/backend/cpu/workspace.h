// Parts of a kernel's workspace.
#pragma once

#include <cstdint>

namespace comfytp::backend::cpu {

class Workspace {
 public:
  /// Offset of `bytes` more, 64-byte aligned.
  std::int64_t take(std::int64_t bytes) {
    const auto offset = bytes_;
    bytes_ += (bytes + 63) / 64 * 64;
    return offset;
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  std::int64_t bytes_ = 0;
};

template <typename T = char>
T* at(void* workspace, std::int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
}

}  // namespace comfytp::backend::cpu
