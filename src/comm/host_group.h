// Where the ranks of a group meet when they are threads of one process.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/tensor_view.h"
#include "comm/abort.h"

namespace comfytp::comm {

/// What a rank calls.
struct Request {
  std::string op;
  TensorView in, out;
  int dim = -1;
  std::vector<std::int64_t> bounds, need_lo, need_hi;
};

class HostGroup {
 public:
  HostGroup(std::vector<std::string> names, std::shared_ptr<Abort> abort, std::chrono::duration<double> timeout);
  virtual ~HostGroup() = default;

  int size() const { return static_cast<int>(names_.size()); }
  /// Tells the others what this rank calls and waits for what they call. What is returned stays until this rank's next meet().
  const std::vector<Request>& meet(int rank, Request request);
  /// Waits until all ranks have come here.
  void wait(int rank);
  /// Of the abort: wakes all ranks; makes the group as new.
  virtual void wake();
  virtual void reset();
  const std::string& name(int rank) const { return names_[static_cast<std::size_t>(rank)]; }

 private:
  const std::vector<std::string> names_;
  const std::shared_ptr<Abort> abort_;
  const std::chrono::duration<double> timeout_;
  std::vector<Request> requests_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<bool> arrived_;
  int count_ = 0;
  std::uint64_t generation_ = 0;
};

/// Throws Error unless the ranks' requests fit together.
void check_requests(const HostGroup& group, const std::vector<Request>& requests);

}  // namespace comfytp::comm
