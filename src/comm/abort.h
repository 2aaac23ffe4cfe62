// What ends a call early, on all devices at once.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace comfytp::comm {

class HostGroup;

/// What stops every rank of a call: the first failure, or the caller's wish. Shared by all groups of an engine.
class Abort {
 public:
  enum class Kind { error, device, out_of_memory, timeout, cancelled };

  /// Keeps the first reason; wakes all waiters.
  void raise(Kind kind, const std::string& reason);
  /// Between calls, when no rank is inside a group: forgets the reason and who had come where.
  void reset();
  bool raised() const { return raised_.load(std::memory_order_acquire); }
  /// Throws the error of that kind with the reason if raised.
  void check() const;
  /// The group is woken when the abort is raised.
  void subscribe(std::weak_ptr<HostGroup> group);

 private:
  std::vector<std::shared_ptr<HostGroup>> groups() const;

  std::atomic<bool> raised_{false};
  mutable std::mutex mutex_;
  Kind kind_ = Kind::error;
  std::string reason_;
  std::vector<std::weak_ptr<HostGroup>> groups_;
};

}  // namespace comfytp::comm
