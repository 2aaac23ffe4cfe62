#include "runtime/prompt_cache.h"

#include <algorithm>
#include <cstring>

namespace comfytp::runtime {
namespace {

// A tensor's elements in row-major order: where they are if they lie so, else copied.
class Content {
 public:
  explicit Content(const TensorView& view) : bytes_(static_cast<std::size_t>(view.bytes())), data_(view.data) {
    bool dense = true;
    const auto strides = row_major_strides(view.shape);
    for (std::size_t d = 0; d < strides.size(); ++d) dense = dense && (view.shape[d] == 1 || view.strides[d] == strides[d]);
    if (dense) return;
    copy_.resize(bytes_);
    copy(view, TensorView::dense(copy_.data(), view.dtype, view.shape));
    data_ = copy_.data();
  }
  bool equals(const std::vector<std::byte>& other) const {
    return bytes_ == other.size() && (bytes_ == 0 || std::memcmp(data_, other.data(), bytes_) == 0);
  }
  void store(std::vector<std::byte>& target) const {
    const auto* first = static_cast<const std::byte*>(data_);
    target.assign(first, first + bytes_);
  }

 private:
  std::size_t bytes_;
  const void* data_;
  std::vector<std::byte> copy_;
};

}  // namespace

PromptCache::Found PromptCache::find(const std::vector<TensorView>& inputs) {
  std::vector<Content> contents(inputs.begin(), inputs.end());
  std::vector<DType> dtypes;
  for (const auto& view : inputs) dtypes.push_back(view.dtype);
  ++now_;
  for (std::size_t s = 0; s < slots_.size(); ++s) {
    Slot& slot = slots_[s];
    bool same = slot.valid && slot.dtypes == dtypes;
    for (std::size_t i = 0; same && i < contents.size(); ++i) same = contents[i].equals(slot.content[i]);
    if (!same) continue;
    slot.used = now_;
    return {static_cast<int>(s), true};
  }
  const auto oldest = std::min_element(slots_.begin(), slots_.end(), [](const Slot& a, const Slot& b) {
    return std::pair(a.valid, a.used) < std::pair(b.valid, b.used);
  });
  oldest->valid = false;
  oldest->used = now_;
  oldest->dtypes = std::move(dtypes);
  oldest->content.resize(contents.size());
  for (std::size_t i = 0; i < contents.size(); ++i) contents[i].store(oldest->content[i]);
  return {static_cast<int>(oldest - slots_.begin()), false};
}

void PromptCache::clear() {
  for (auto& slot : slots_) slot = {};
}

}  // namespace comfytp::runtime
