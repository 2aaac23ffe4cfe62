// What one device runs: a flat list of launches with fixed offsets into its memories.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "comm/communicator.h"
#include "graph/graph.h"

namespace comfytp::runtime {

/// A place in one of a device's memories.
struct Place {
  enum class Memory { none, arena, prologue, weight } memory = Memory::none;
  std::int64_t offset = 0;                  ///< bytes into the arena or into what is kept of one prompt
  backend::WeightBuffer* weight = nullptr;  ///< Memory::weight
};

/// What a collective is called with. The views carry no data: the places of the launch give it.
struct CollectiveCall {
  const graph::Node* node = nullptr;            ///< in Program::graph
  TensorView in, out;                           ///< with the strides of the orders in which the values lie here
  comm::Communicator* communicator = nullptr;   ///< this device's end of the node's group; set by the engine
};

/// What a launch is and does, for profiles.
struct Work {
  std::string op;
  std::string shapes;      ///< of inputs and outputs
  double flops = 0;
  std::int64_t bytes = 0;  ///< of inputs and outputs, each once
};

struct Launch {
  std::unique_ptr<backend::Kernel> kernel;  ///< null for a collective
  std::optional<CollectiveCall> collective;
  std::vector<Place> in, out;
  Place workspace;
  bool aside = false;                       ///< a fetch that runs beside what stands around it, on the device's side queue
  std::vector<std::size_t> after;           ///< launches aside, by their place in the same list, that must be done before this one, with all
                                            ///< that went aside before them
  std::string label;                        ///< "conv2d 'input_blocks.1.0.in_layers.2'" for errors and profiles
  Work work;
};

/// A named input or output and where it lies.
struct Binding {
  std::string name;
  graph::Type type;     ///< of this device's part
  graph::Order order;
  Box box;              ///< the part of the whole tensor
  Place place;
  bool prompt = false;  ///< inputs: varies with the prompt only, and is read when the prologue runs
};

struct Program {
  graph::Graph graph;                            ///< after fusion; collectives point into it
  std::vector<Launch> prologue, step;
  std::vector<Binding> inputs, outputs;          ///< outputs: only those that this device hands over
  std::vector<backend::WeightBuffer*> weights;   ///< all that it reads, each once; they belong to the device's WeightStore
  std::vector<std::unique_ptr<backend::WeightBuffer>> fetched;  ///< descriptions of weights that pass through planned memory
  std::int64_t arena_bytes = 0;                  ///< activations, workspaces and gathered weights
  std::int64_t prologue_bytes = 0;               ///< what is kept of one prompt
  double step_flops = 0;
};

}  // namespace comfytp::runtime
