// Which of the last prompts' results are kept, and where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "backend/call_queue.h"
#include "base/tensor_view.h"

namespace comfytp::runtime {

/// A prompt's input as it is recognised.
struct PromptInput {
  TensorView view;
  std::uint64_t content = 0;               ///< the caller's number: equal ones promise equal contents; 0: it has none
  std::optional<backend::Digest> digest;   ///< where the view is on a device
};

/// Recognises prompts by the content of their inputs, never by pointers: type, shape and every byte, which of what lies on a device
/// its digest stands for. The least recently used slot gives way to a new prompt.
class PromptCache {
 public:
  explicit PromptCache(int slots) : slots_(static_cast<std::size_t>(slots)) {}

  struct Found {
    int slot = 0;
    bool known = false;  ///< its results are there
  };
  /// The slot of these inputs as far as it can be told without digests: each has the caller's number that it had, or lies in host memory
  /// as it did.
  std::optional<int> find_without_digests(const std::vector<PromptInput>& inputs);
  /// The slot of these inputs. An unknown prompt's slot counts as empty until confirm().
  Found find(const std::vector<PromptInput>& inputs);
  void confirm(int slot) { slots_[static_cast<std::size_t>(slot)].valid = true; }
  void clear();
  int size() const { return static_cast<int>(slots_.size()); }

 private:
  struct Slot {
    std::vector<DType> dtypes;
    std::vector<std::vector<std::byte>> content;  // by input; empty where there is a digest
    std::vector<std::optional<backend::Digest>> digests;
    std::vector<std::uint64_t> numbers;
    bool valid = false;
    std::uint64_t used = 0;
  };
  void use(Slot& slot, const std::vector<PromptInput>& inputs);

  std::vector<Slot> slots_;
  std::uint64_t now_ = 0;
};

}  // namespace comfytp::runtime
