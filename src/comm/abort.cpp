#include "comm/abort.h"

#include <algorithm>

#include "base/error.h"
#include "comm/host_group.h"

namespace comfytp::comm {

void Abort::raise(Kind kind, const std::string& reason) {
  {
    std::lock_guard lock(mutex_);
    if (raised()) return;
    kind_ = kind;
    reason_ = reason;
    raised_.store(true, std::memory_order_release);
  }
  for (const auto& group : groups()) group->wake();
}

void Abort::reset() {
  for (const auto& group : groups()) group->reset();
  std::lock_guard lock(mutex_);
  raised_.store(false, std::memory_order_release);
}

void Abort::check() const {
  if (!raised()) return;
  std::lock_guard lock(mutex_);
  switch (kind_) {
    case Kind::cancelled: throw Cancelled(reason_);
    case Kind::timeout: throw Timeout(reason_);
    case Kind::device: throw DeviceFailure(reason_);
    case Kind::out_of_memory: throw OutOfMemory(reason_);
    case Kind::error: throw Error(reason_);
  }
}

void Abort::subscribe(std::weak_ptr<HostGroup> group) {
  std::lock_guard lock(mutex_);
  std::erase_if(groups_, [](const auto& g) { return g.expired(); });
  groups_.push_back(std::move(group));
}

std::vector<std::shared_ptr<HostGroup>> Abort::groups() const {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<HostGroup>> alive;
  for (const auto& group : groups_)
    if (auto g = group.lock()) alive.push_back(std::move(g));
  return alive;
}

}  // namespace comfytp::comm
