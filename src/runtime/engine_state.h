// What an engine is made of. For the engine's own files.
#pragma once

#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "comm/device_group.h"
#include "runtime/calls.h"
#include "runtime/engine.h"
#include "runtime/residency.h"

namespace comfytp::runtime {

struct Engine::State {
  State(EngineOptions o, std::shared_ptr<const weights::Source> s);

  // One public call at a time; cancel() reaches it from outside.
  class Call {
   public:
    explicit Call(State& state) : state_(state), lock_(state.calls) {
      for (;;) {  // a cancel may come in between, of what was queued
        state_.collect();
        std::lock_guard running(state_.running_mutex);
        if (state_.queue.failed() || state_.team->abort()->raised()) continue;
        state_.running = true;
        return;
      }
    }
    ~Call() {
      std::lock_guard running(state_.running_mutex);
      state_.running = false;
    }

   private:
    State& state_;
    std::lock_guard<std::mutex> lock_;
  };

  /// Behind a failure or a cancel: waits for the devices, which give up what they still have, keeps what a queued call has met, and makes
  /// the devices ready for others. settle() waits for all that are queued in any case.
  void collect();
  void settle();
  /// Throws what was kept.
  void report_failure();
  /// Of the plan's, what this device of the team is.
  std::size_t rank_of(std::size_t device) const { return options.only_rank.value_or(device); }
  void measure();

  std::shared_ptr<Compiled> compile(const graph::Graph& graph, const sharding::Mesh& mesh, const std::string& text);
  std::shared_ptr<Compiled> build(const graph::Graph& graph, const sharding::Mesh& mesh, const std::string& text);
  graph::Graph with_fp8_products(const graph::Graph& graph, Fp8Products& products) const;
  void connect(Program& program);
  void load(Compiled& compiled);
  void run(Compiled& compiled, const Calls::Tensors& inputs, const Calls::Tensors& outputs, const CallOptions& options);

  const EngineOptions options;
  const std::shared_ptr<Team> team;
  const std::shared_ptr<const weights::Source> source;
  Residency residency;
  std::vector<comm::DeviceRank> ranks;       // by device
  std::vector<comm::DeviceRank> side_ranks;  // the same with their side queues
  std::vector<char> multiplies_in_fp8;       // by device
  // By the devices' numbers, and whether they run on the side queues.
  std::map<std::pair<std::vector<std::int64_t>, bool>, std::vector<std::unique_ptr<comm::Communicator>>> groups;

  Calls queue;
  std::exception_ptr failure;  // of a queued call, to be told

  std::mutex calls, running_mutex;
  bool running = false;
  mutable std::mutex stats_mutex;
  EngineStats stats;
};

}  // namespace comfytp::runtime
