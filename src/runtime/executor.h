// Runs one device's program. What takes a device is called on that device's worker.
#pragma once

#include <map>
#include <string>

#include "comm/abort.h"
#include "runtime/program.h"

namespace comfytp::runtime {

/// The memories that a program's places are in, for one call.
struct Memories {
  void* arena = nullptr;
  void* prologue = nullptr;  ///< of the call's prompt
};

class Executor {
 public:
  Executor(Program& program, Memories memories, const comm::Abort& abort);

  /// Reads the prompt inputs and runs the prologue. Throws Error with the launch's label, or what the abort says.
  void run_prologue(backend::Device& device, const std::map<std::string, TensorView>& inputs);
  /// Reads the other inputs and runs the step.
  void run_step(backend::Device& device, const std::map<std::string, TensorView>& inputs);
  /// Writes this device's parts of the outputs.
  void write_outputs(backend::Device& device, const std::map<std::string, TensorView>& outputs);
  /// Spent in collectives, waiting for peers included.
  double collective_seconds() const { return collective_seconds_; }

 private:
  void read_inputs(backend::Device& device, const std::map<std::string, TensorView>& inputs, bool prompt);
  void run(std::vector<Launch>& launches);
  void* at(const Place& place) const;

  Program& program_;
  Memories memories_;
  const comm::Abort& abort_;
  double collective_seconds_ = 0;
};

}  // namespace comfytp::runtime
