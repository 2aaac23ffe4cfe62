// The engine: weights on devices, and programs that run over them.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "comm/device_group.h"
#include "graph/graph.h"
#include "planner/plan.h"
#include "planner/profile.h"
#include "sharding/partition.h"
#include "weights/source.h"

namespace comfytp::runtime {

struct EngineOptions {
  planner::Plan plan;
  comm::Route route = comm::Route::best;  ///< between GPUs
  /// This rank alone is opened and runs, and exchanges nothing: its time is right, its output is not.
  std::optional<std::size_t> only_rank;
  double timeout_seconds = 600;   ///< how long a device waits for a peer
  int prompts = 2;                ///< results of how many prompts are kept, each in its own memory
  int programs = 8;               ///< graphs (shapes) whose programs are kept
  bool fp8_products = false;      ///< linears whose weights are stored in fp8 multiply in it, where a device can
  /// Called on the loading caller's thread with bytes done and bytes in all; what it throws ends the load. May be empty.
  std::function<void(std::int64_t done, std::int64_t total)> progress;
  /// Opens a device: backend::open_device where it is empty.
  std::function<std::unique_ptr<backend::Device>(const backend::DeviceSpec& spec, int position, int count)> open;
};

/// What one device holds and does for one program.
struct DeviceReport {
  std::string name;
  std::int64_t weight_bytes = 0;      ///< stored on it, in the stored dtype
  std::int64_t activation_bytes = 0;  ///< arena, and the kept results of `prompts` prompts
  double flops = 0;                   ///< of a step
  std::vector<planner::Work> launches;  ///< of a step, collectives left out
  struct Collective {
    std::int64_t count = 0;
    std::int64_t bytes = 0;           ///< that the device sends or receives, whichever is more (runtime/collectives.h)
  };
  std::map<std::string, Collective> collectives;  ///< by kind, of a step
};

/// What one launch of a step takes.
struct LaunchTime {
  std::string label, op, shapes;
  double seconds = 0, flops = 0;
  std::int64_t bytes = 0;  ///< read and written, each operand once
};

struct StepProfile {
  double seconds = 0;                ///< of the whole step as it is run
  /// Of the step's seconds, by kind, as the devices count it themselves; weights are fetched beside the rest.
  std::map<std::string, comm::Communicator::Spent> exchanges;
  double host_exchange_seconds = 0;  ///< of the step's seconds, where collectives run on the host
  std::vector<LaunchTime> launches;  ///< each timed alone, collectives but once
};

/// How a call is made.
struct CallOptions {
  /// The caller's stream on the GPU where its tensors lie (null: the default stream), in whose order the call reads and writes them.
  /// Where all outputs lie there, the call is queued and returns before it has run. Without it the call is in the order of the default
  /// stream and waits.
  std::optional<void*> stream;
  /// By input: a number that the caller promises to give for equal contents only. A prompt whose inputs have the numbers of an earlier
  /// one is not looked at. None or 0: not known.
  std::map<std::string, std::uint64_t> contents;
};

/// What `fp8_products` comes to in one program.
struct Fp8Products {
  /// Over weights stored in fp8, where one device at least can multiply in it: all of them but those of few rows or odd sizes, which decode.
  std::int64_t linears = 0;
  std::string note;          ///< why none do, or not on all devices; empty otherwise. One of the program's notes too
};

/// Counters since the engine was made.
struct EngineStats {
  std::int64_t calls = 0, prologues = 0, programs_built = 0;
  std::int64_t uploaded_bytes = 0;                ///< of weights, read into devices
  double load_seconds = 0;
  std::vector<double> collective_seconds;         ///< by device, of the last call
  std::vector<std::int64_t> allocated_weight_bytes, allocated_activation_bytes;  ///< by device, now
};

/// A program of all devices for one graph. Kept by the engine and by whoever holds it.
class Compiled;

class Engine {
 public:
  /// Opens the devices. Nothing is loaded yet. Throws Error naming a device.
  Engine(EngineOptions options, std::shared_ptr<const weights::Source> weights);
  ~Engine();

  /// Partitions and lowers `graph` for the devices; allocates nothing on them. Graphs whose text is equal share one result.
  std::shared_ptr<Compiled> compile(const graph::Graph& graph);
  /// The same over another arrangement of the devices than the plan's. Parts of weights that both need alike are held once.
  std::shared_ptr<Compiled> compile(const graph::Graph& graph, const sharding::Mesh& mesh);
  std::vector<DeviceReport> report(const Compiled& compiled) const;
  const sharding::Partition& partition(const Compiled& compiled) const;
  const sharding::Mesh& mesh(const Compiled& compiled) const;
  std::vector<std::string> notes(const Compiled& compiled) const;
  /// Nothing where `fp8_products` was not asked for.
  const std::optional<Fp8Products>& fp8_products(const Compiled& compiled) const;

  /// Loads what `compiled` needs and is not loaded: every device reads its own parts.
  void load(Compiled& compiled);
  /// Frees the devices' weights and arenas; the next call loads again.
  void unload();
  /// Reads the parts of these weights that are loaded again, for their values in the source have changed (a LoRA's strength); the
  /// others stay. Keys that nothing reads are passed over. When it throws, these weights are unloaded and the next call loads
  /// them.
  void update(const std::set<std::string>& keys);

  /// One call. Inputs and outputs by the graph's names, of the graph's shapes and any floating dtype, on the host or on one of the
  /// engine's GPUs. Loads on first use. Throws Error (shapes, a device's failure with its name and op), Cancelled, Timeout; the engine
  /// stays usable. What a queued call met since is thrown first, and this call does not run.
  void run(Compiled& compiled, const std::map<std::string, TensorView>& inputs, const std::map<std::string, TensorView>& outputs,
           const CallOptions& options = {});
  /// All is loaded that this call needs, so that run() does nothing that takes long but for the call.
  bool loaded(const Compiled& compiled) const;
  /// Throws what queued calls that have ended met; their outputs are NaN.
  void check();
  /// Waits for queued calls, and throws what they met.
  void synchronize();
  /// Whether a GPU's result held infinities or NaNs, as when values went beyond what f16 holds, since this was last asked. Of a queued
  /// call it is known when that has ended.
  bool take_not_finite();
  /// Times the step of the last call of `compiled`, by device; the kept results of prompts are lost. Throws Error when
  /// it was never called.
  std::vector<StepProfile> profile(Compiled& compiled);
  /// From any thread: the running call ends soon with Cancelled; of queued calls that have not ended the results become NaN, and the
  /// next call, check() or synchronize() throws Cancelled. Without any it does nothing.
  void cancel();

  EngineStats stats() const;
  const EngineOptions& options() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace comfytp::runtime
