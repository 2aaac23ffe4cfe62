// What the engine keeps of a graph: the program of every device, and the prompts' results.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "runtime/engine.h"
#include "runtime/executor.h"
#include "runtime/program.h"
#include "runtime/prompt_cache.h"
#include "runtime/team.h"

namespace comfytp::runtime {

class Compiled : public std::enable_shared_from_this<Compiled> {
 public:
  Compiled(std::shared_ptr<Team> devices, sharding::Mesh arrangement, std::string graph_text, int prompt_slots)
      : team(std::move(devices)), mesh(std::move(arrangement)), text(std::move(graph_text)), programs(team->size()), executors(team->size()), prompts(prompt_slots), prompt_memory(team->size()) {}
  /// Kernels belong to their device's thread.
  ~Compiled() {
    for (std::size_t d = 0; d < programs.size(); ++d) {
      team->discard(d, std::make_shared<std::vector<std::unique_ptr<Executor>>>(std::move(executors[d])));
      team->discard(d, std::make_shared<Program>(std::move(programs[d])));
    }
  }
  Compiled(const Compiled&) = delete;
  Compiled& operator=(const Compiled&) = delete;

  std::int64_t prompt_bytes(std::size_t device) const { return programs[device].prologue_bytes * prompts.size(); }

  const std::shared_ptr<Team> team;  ///< lives as long as its programs
  const sharding::Mesh mesh;
  const std::string text;            ///< of the graph; behind the mesh where that is not the plan's
  std::map<std::string, graph::Type> inputs, outputs;  ///< of the whole graph
  std::vector<std::string> prompt_inputs;
  sharding::Partition partition;
  std::vector<std::string> notes;
  std::optional<Fp8Products> fp8;    ///< where they were asked for
  std::vector<Program> programs;     ///< by device
  std::vector<std::vector<std::unique_ptr<Executor>>> executors;  ///< by device and prompt slot; they refer to `programs`
  PromptCache prompts;
  std::vector<void*> prompt_memory;  ///< by device: a part of prologue_bytes for every slot; null while not allocated
  int last_slot = -1;                ///< of the last call's prompt; -1: none yet
  std::uint64_t resident_since = 0;  ///< the engine's epoch in which all was loaded; 0: not loaded
};

}  // namespace comfytp::runtime
