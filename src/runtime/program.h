// What one device runs: a flat list of launches with fixed arena offsets.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "graph/graph.h"

namespace comfytp::runtime {

/// A place in one of a device's memories.
struct Place {
  enum class Memory { none, arena, prologue, weight } memory = Memory::none;
  std::int64_t offset = 0;                    ///< bytes into the arena or the prologue's memory
  backend::WeightBuffer* weight = nullptr;    ///< Memory::weight
};

struct Launch {
  std::unique_ptr<backend::Kernel> kernel;    ///< null for a collective
  std::vector<Place> in, out;
  Place workspace;
  std::string label;                          ///< "conv2d 'input_blocks.1.0.in_layers.2'" for errors and profiles
  // Of a collective:
  const graph::Node* node = nullptr;
  std::vector<graph::Type> types;             ///< input, output
  std::vector<graph::Order> orders;
};

/// A named input or output and where it lies.
struct Binding {
  std::string name;
  graph::Type type;
  graph::Order order;
  Box box;                                    ///< the part of the whole tensor
  Shape full;
  Place place;
  bool prompt = false;                        ///< inputs: varies with the prompt only
};

struct Program {
  graph::Graph graph;                         ///< after fusion; launches point into it
  std::vector<Launch> prologue, step;
  std::vector<Binding> inputs, outputs;
  std::int64_t arena_bytes = 0;               ///< activations, workspaces and gathered weights
  std::int64_t prologue_bytes = 0;            ///< what is kept of a prompt
};

}  // namespace comfytp::runtime
