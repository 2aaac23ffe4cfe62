// Which of the last prompts' results are kept, and where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/tensor_view.h"

namespace comfytp::runtime {

/// Recognises prompts by the content of their inputs (type, shape and every byte), never by pointers. The least recently used slot
/// gives way to a new prompt.
class PromptCache {
 public:
  explicit PromptCache(int slots) : slots_(static_cast<std::size_t>(slots)) {}

  struct Found {
    int slot = 0;
    bool known = false;  ///< its results are there
  };
  /// The slot of these inputs. An unknown prompt's slot counts as empty until confirm().
  Found find(const std::vector<TensorView>& inputs);
  void confirm(int slot) { slots_[static_cast<std::size_t>(slot)].valid = true; }
  void clear();
  int size() const { return static_cast<int>(slots_.size()); }

 private:
  struct Slot {
    std::vector<DType> dtypes;
    std::vector<std::vector<std::byte>> content;
    bool valid = false;
    std::uint64_t used = 0;
  };
  std::vector<Slot> slots_;
  std::uint64_t now_ = 0;
};

}  // namespace comfytp::runtime
