// Runs one device's program in certain memories. What takes a device is called on that device's worker.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "comm/abort.h"
#include "runtime/program.h"

namespace comfytp::runtime {

/// The memories that a program's places are in.
struct Memories {
  void* arena = nullptr;
  void* prologue = nullptr;       ///< of one prompt
  std::uint64_t generation = 0;   ///< Residency::generation(): addresses of weights hold as long as it is the same
  bool operator==(const Memories&) const = default;
};

class Executor {
 public:
  explicit Executor(Program& program) : program_(program) {}

  /// Must be called before the others in every call; does nothing while the memories are the same.
  void bind(const Memories& memories);
  /// All that a device may record is recorded; otherwise record() must have run on every device before any of them runs: recording may
  /// allocate, which waits for kernels that wait for the other device.
  bool recorded() const { return recorded_; }
  void record(backend::Device& device);
  /// Reads the prompt inputs and runs the prologue. Throws Error with the launch's label, or what the abort says.
  void run_prologue(backend::Device& device, const std::map<std::string, TensorView>& inputs, const comm::Abort& abort);
  /// Reads the other inputs and runs the step.
  void run_step(backend::Device& device, const std::map<std::string, TensorView>& inputs, const comm::Abort& abort);
  /// Throws what collectives have met that the device ran; behind its synchronize().
  void check_collectives() const;
  /// Writes this device's parts of the outputs.
  void write_outputs(backend::Device& device, const std::map<std::string, TensorView>& outputs);
  /// The step once more, on the inputs of the last call; waits for it. Results of the prologue may be lost.
  void repeat_step(backend::Device& device, const comm::Abort& abort);
  /// What the step's collectives have spent since their groups were made, by kind, as far as their communicators count it.
  std::map<std::string, comm::Communicator::Spent> spent() const;
  /// The step's launches one after the other, each timed alone but for collectives, which run once. Results are lost.
  std::vector<double> time_launches(backend::Device& device, const comm::Abort& abort);
  /// Spent in the collectives of the last call and of repeated steps, waiting for peers included, where they run on the host.
  double collective_seconds() const { return collective_seconds_; }

 private:
  /// A collective that runs on the host, or launches that a device may record and replay as one.
  struct Segment {
    std::size_t first = 0, last = 0;  ///< of the launches, `last` excluded
    bool on_host = false;
    std::unique_ptr<backend::Recording> recording;
  };
  struct Addresses {
    std::vector<const void*> in;
    std::vector<void*> out;
    void* workspace = nullptr;
  };
  /// The prologue's launches or the step's, in the memories they are bound to.
  struct Bound {
    std::vector<Addresses> addresses;
    std::vector<Segment> segments;
  };
  Bound resolve(const std::vector<Launch>& launches) const;
  void read_inputs(backend::Device& device, const std::map<std::string, TensorView>& inputs, bool prompt);
  void record(backend::Device& device, const std::vector<Launch>& launches, Bound& bound) const;
  void run(backend::Device& device, const std::vector<Launch>& launches, Bound& bound, const comm::Abort& abort);
  static void run(backend::Device& device, const std::vector<Launch>& launches, const Bound& bound, const Segment& segment);
  static void run(const Launch& launch, const Addresses& at);
  void* at(const Place& place) const;

  Program& program_;
  Memories memories_;
  bool bound_ = false, recorded_ = false;
  Bound prologue_, step_;
  double collective_seconds_ = 0;
};

}  // namespace comfytp::runtime
