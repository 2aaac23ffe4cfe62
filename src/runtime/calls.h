// Runs calls of programs that are loaded.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "backend/call_queue.h"
#include "runtime/compiled.h"
#include "runtime/engine.h"
#include "runtime/residency.h"

namespace comfytp::runtime {

/// Tensors on a GPU ("the caller's") are read and written in the order of the caller's stream; where the engine has several GPUs, the
/// others reach them through page-locked memory, which every GPU can, and the GPUs wait for each other without the host.
class Calls {
 public:
  using Tensors = std::map<std::string, TensorView>;

  explicit Calls(std::shared_ptr<Team> team);
  ~Calls();
  Calls(const Calls&) = delete;
  Calls& operator=(const Calls&) = delete;

  /// Whether the prologue ran. Throws what the call meets until it is queued, or has run; settle() and clear() must follow then.
  bool run(Compiled& compiled, const Residency& residency, const Tensors& inputs, const Tensors& outputs, const CallOptions& options);
  /// Words that a collective's failure is seen by (Communicator::fault).
  void watch(const std::uint32_t* fault) { faults_.push_back(fault); }
  /// Waits until what was queued has run.
  void settle();
  /// From any thread. pending: a queued call has not ended. failed: one has failed or may do so soon.
  bool pending() const;
  bool failed() const;
  /// Behind settle(): throws Cancelled or Error where a queued call has failed. A cancel that came when all had ended is none.
  void check() const;
  /// What was queued has failed from now on. From any thread.
  void cancel();
  /// Forgets failures, behind settle().
  void clear();
  /// Whether a result of a GPU held what is not finite since this was last asked.
  bool take_not_finite();

 private:
  struct Call;
  std::optional<std::size_t> home_of(const Tensors& inputs, const Tensors& outputs) const;
  PromptCache::Found find_prompt(const Call& call);
  void lay_relay(Call& call);
  void begin(Call& call, std::size_t d, backend::Device& device);
  void end(Call& call, std::size_t d, backend::Device& device);
  void close(const Call& call, backend::Device& device, bool relayed);
  void look_at(const Tensors& outputs);

  const std::shared_ptr<Team> team_;
  std::vector<int> ordinals_;                   // by device
  std::vector<const std::uint32_t*> faults_;
  backend::CallState* state_ = nullptr;         // null where calls cannot be queued
  std::atomic<std::uint32_t> number_ = 0;       // of the last call that was queued
  std::atomic<bool> not_finite_ = false;        // of results in the host's memory
  char* relay_ = nullptr;
  std::int64_t relay_bytes_ = 0;
};

}  // namespace comfytp::runtime
