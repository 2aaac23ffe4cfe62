// From a graph to the programs of an engine's devices.
#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>

#include "backend/backend.h"
#include "base/error.h"
#include "graph/rewrites.h"
#include "runtime/engine_state.h"
#include "runtime/executor.h"
#include "runtime/lowering.h"
#include "sharding/strategy.h"

namespace comfytp::runtime {

using Types = std::map<std::string, graph::Type>;

namespace {

std::shared_ptr<Team> open_team(const EngineOptions& options) {
  planner::check(options.plan);
  const auto& specs = options.plan.devices;
  const auto count = static_cast<int>(specs.size());
  std::vector<std::unique_ptr<backend::Device>> devices;
  require(!options.only_rank || *options.only_rank < specs.size(), "[engine] expected a rank below {} but got {}", count,
          options.only_rank.value_or(0));
  for (int i = 0; i < count; ++i) {
    if (options.only_rank && static_cast<int>(*options.only_rank) != i) continue;
    const auto& spec = specs[static_cast<std::size_t>(i)];
    devices.push_back(options.open ? options.open(spec, i, count) : backend::open_device(spec, i, count));
  }
  return std::make_shared<Team>(std::move(devices));
}

// Leaves what this device hands over, with the part of the whole that it is.
void set_outputs(Program& program, const sharding::Partition& partition, std::size_t device) {
  std::erase_if(program.outputs, [&](const Binding& b) { return !partition.outputs.at(b.name)[device].writes; });
  for (auto& binding : program.outputs) binding.box = partition.outputs.at(binding.name)[device].box;
}

}  // namespace

Engine::State::State(EngineOptions o, std::shared_ptr<const weights::Source> s)
    : options(std::move(o)), team(open_team(options)), source(std::move(s)), residency(team, source, std::max(1, options.programs)), queue(team) {
  stats.collective_seconds.resize(team->size());
  ranks.resize(team->size());
  side_ranks.resize(team->size());
  multiplies_in_fp8.resize(team->size());
  team->run([&](std::size_t d, backend::Device& device) {
    ranks[d] = {device.spec().name(), device.spec().index, device.queue()};
    side_ranks[d] = {device.spec().name(), device.spec().index, device.side_queue()};
    multiplies_in_fp8[d] = device.multiplies_in_fp8();
  });
  measure();
}

void Engine::State::measure() {
  const auto weights = residency.weight_bytes(), activations = residency.activation_bytes();
  std::lock_guard lock(stats_mutex);
  stats.allocated_weight_bytes = weights;
  stats.allocated_activation_bytes = activations;
}

// Products in fp8 where there are such weights and a device that can; otherwise a note says what is in the way.
graph::Graph Engine::State::with_fp8_products(const graph::Graph& graph, Fp8Products& products) const {
  auto asking = graph::multiply_in_fp8(graph, [&](const std::string& key) {
    const auto found = source->tensors().find(key);
    return found != source->tensors().end() && is_fp8(found->second.dtype);
  });
  std::int64_t stored = 0, narrow = 0;
  for (const auto& node : asking.nodes()) {
    if (node.attrs.text_or("product", "") != "fp8") continue;
    ++stored;
    if (asking.type(node.inputs[0]).dtype != DType::f32) ++narrow;
  }
  bool able = false;
  std::vector<std::string> without;
  for (std::size_t d = 0; d < team->size(); ++d) {
    const auto name = options.plan.devices[rank_of(d)].name();
    able = able || multiplies_in_fp8[d];
    // What stands in for a device that is not here says nothing of that one.
    if (!multiplies_in_fp8[d] && ranks[d].name == name) without.push_back(name);
  }
  std::sort(without.begin(), without.end());
  without.erase(std::unique(without.begin(), without.end()), without.end());
  if (stored == 0)
    products.note = "fp8: nothing is multiplied in it, for no linear's weight is stored in it";
  else if (!able && !without.empty())
    products.note = fmt::format("fp8: nothing is multiplied in it, for {} cannot (GPUs can from sm_89 on)", fmt::join(without, ", "));
  else if (narrow == 0)
    products.note = "fp8: nothing is multiplied in it, for the model computes in f32 and not in f16 or bf16";
  else if (!without.empty())
    products.note = fmt::format("fp8: some weights are decoded, for {} cannot (GPUs can from sm_89 on)", fmt::join(without, ", "));
  if (able) products.linears = narrow;
  return products.linears > 0 ? asking : graph;
}

std::shared_ptr<Compiled> Engine::State::build(const graph::Graph& graph, const sharding::Mesh& mesh, const std::string& text) {
  Types inputs, outputs;
  std::vector<std::string> prompt_inputs;
  for (const auto* node : graph.all("input")) {
    const auto& name = node->attrs.text("name");
    inputs[name] = graph.type(node->outputs[0]);
    if (node->attrs.text_or("varies", "call") == "prompt") prompt_inputs.push_back(name);
  }
  for (const auto& output : graph.outputs()) outputs[output.name] = graph.type(output.value);

  auto normalised = graph::normalise(graph);
  std::optional<Fp8Products> fp8;
  if (options.fp8_products) normalised = with_fp8_products(normalised, fp8.emplace());
  auto decision = sharding::decide(normalised, mesh, planner::least_work(options.plan.devices));
  const int slots = prompt_inputs.empty() ? 1 : std::max(1, options.prompts);
  auto compiled = std::make_shared<Compiled>(team, mesh, text, slots);
  compiled->inputs = std::move(inputs);
  compiled->outputs = std::move(outputs);
  compiled->prompt_inputs = std::move(prompt_inputs);
  compiled->partition = sharding::partition(normalised, mesh, decision.assignment, options.plan.placement);
  compiled->notes = std::move(decision.notes);
  compiled->notes.insert(compiled->notes.end(), compiled->partition.notes.begin(), compiled->partition.notes.end());
  if (fp8 && !fp8->note.empty()) compiled->notes.push_back(fp8->note);
  compiled->fp8 = std::move(fp8);
  team->run([&](std::size_t d, backend::Device& device) {
    compiled->programs[d] = lower(compiled->partition.devices[rank_of(d)], device, residency.weights(d));
    set_outputs(compiled->programs[d], compiled->partition, rank_of(d));
  });
  for (auto& program : compiled->programs) connect(program);
  for (std::size_t d = 0; d < team->size(); ++d)
    for (int slot = 0; slot < slots; ++slot) compiled->executors[d].push_back(std::make_unique<Executor>(compiled->programs[d]));
  std::lock_guard lock(stats_mutex);
  ++stats.programs_built;
  return compiled;
}

// Gives every collective this device's end of its group.
void Engine::State::connect(Program& program) {
  for (auto* launches : {&program.prologue, &program.step})
    for (auto& launch : *launches) {
      if (!launch.collective) continue;
      const auto& attrs = launch.collective->node->attrs;
      const auto& devices = attrs.ints("group");
      auto& group = groups[{devices, launch.aside}];
      if (group.empty() && options.only_rank) group = comm::idle_group(static_cast<int>(devices.size()));
      if (group.empty()) {
        std::vector<comm::DeviceRank> members;
        for (auto d : devices) members.push_back((launch.aside ? side_ranks : ranks).at(static_cast<std::size_t>(d)));
        group = comm::device_group(members, team->abort(), std::chrono::duration<double>(options.timeout_seconds), options.route);
        for (const auto& end : group)
          if (const auto* fault = end->fault()) queue.watch(fault);
      }
      launch.collective->communicator = group.at(static_cast<std::size_t>(attrs.integer("rank"))).get();
    }
}

std::shared_ptr<Compiled> Engine::State::compile(const graph::Graph& graph, const sharding::Mesh& mesh, const std::string& text) {
  Call call(*this);
  auto compiled = residency.find(text);
  if (!compiled) {
    settle();
    compiled = build(graph, mesh, text);
    residency.use(compiled);
    measure();
  }
  return compiled;
}

}  // namespace comfytp::runtime
