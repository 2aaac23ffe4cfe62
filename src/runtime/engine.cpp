#include "runtime/engine.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <mutex>

#include "base/error.h"
#include "comm/device_group.h"
#include "graph/rewrites.h"
#include "graph/text.h"
#include "runtime/calls.h"
#include "runtime/collectives.h"
#include "runtime/compiled.h"
#include "runtime/executor.h"
#include "runtime/lowering.h"
#include "runtime/residency.h"
#include "sharding/strategy.h"

namespace comfytp::runtime {

using Tensors = std::map<std::string, TensorView>;
using Types = std::map<std::string, graph::Type>;

namespace {

std::shared_ptr<Team> open_team(const EngineOptions& options) {
  planner::check(options.plan);
  const auto& specs = options.plan.devices;
  const auto count = static_cast<int>(specs.size());
  std::vector<std::unique_ptr<backend::Device>> devices;
  for (int i = 0; i < count; ++i) {
    const auto& spec = specs[static_cast<std::size_t>(i)];
    devices.push_back(options.open ? options.open(spec, i, count) : backend::open_device(spec, i, count));
  }
  return std::make_shared<Team>(std::move(devices));
}

// `what` is "input" or "output".
void check_tensors(const std::string& what, const Types& expected, const Tensors& given) {
  std::vector<std::string> names;
  for (const auto& [name, type] : expected) names.push_back(name);
  for (const auto& [name, view] : given)
    require(expected.count(name) > 0, "[run] expected the {}s {} but got '{}'", what, fmt::join(names, ", "), name);
  for (const auto& [name, type] : expected) {
    const auto it = given.find(name);
    require(it != given.end(), "[run] expected the {}s {} but got no '{}'", what, fmt::join(names, ", "), name);
    const TensorView& view = it->second;
    require(view.shape == type.shape && view.strides.size() == view.shape.size(), "[run] expected {} '{}' of shape {} but got {}", what, name,
            to_string(type.shape), to_string(view.shape));
    const bool fp8 = view.dtype == DType::f8_e4m3 || view.dtype == DType::f8_e5m2;
    require(is_float(type.dtype) == is_float(view.dtype) && !(fp8 && what == "output"), "[run] expected {} '{}' in {} but got {}", what, name,
            is_float(type.dtype) ? "a floating dtype" : "an integer dtype", name_of(view.dtype));
    require(view.data || view.numel() == 0, "[run] expected memory for {} '{}' but got none", what, name);
  }
}

// Leaves what this device hands over, with the part of the whole that it is.
void set_outputs(Program& program, const sharding::Partition& partition, std::size_t device) {
  std::erase_if(program.outputs, [&](const Binding& b) { return !partition.outputs.at(b.name)[device].writes; });
  for (auto& binding : program.outputs) binding.box = partition.outputs.at(binding.name)[device].box;
}

}  // namespace

struct Engine::State {
  State(EngineOptions o, std::shared_ptr<const weights::Source> source)
      : options(std::move(o)), team(open_team(options)), residency(team, std::move(source), std::max(1, options.programs)), queue(team) {
    stats.collective_seconds.resize(team->size());
    ranks.resize(team->size());
    side_ranks.resize(team->size());
    team->run([&](std::size_t d, backend::Device& device) {
      ranks[d] = {device.spec().name(), device.spec().index, device.queue()};
      side_ranks[d] = {device.spec().name(), device.spec().index, device.side_queue()};
    });
    measure();
  }

  // One public call at a time; cancel() reaches it from outside.
  class Call {
   public:
    explicit Call(State& state) : state_(state), lock_(state.calls) {
      state_.collect();
      std::lock_guard running(state_.running_mutex);
      state_.team->abort()->reset();
      state_.running = true;
    }
    ~Call() {
      std::lock_guard running(state_.running_mutex);
      state_.running = false;
    }

   private:
    State& state_;
    std::lock_guard<std::mutex> lock_;
  };

  void collect();
  void settle();
  void report_failure();
  void measure() {
    const auto weights = residency.weight_bytes(), activations = residency.activation_bytes();
    std::lock_guard lock(stats_mutex);
    stats.allocated_weight_bytes = weights;
    stats.allocated_activation_bytes = activations;
  }

  std::shared_ptr<Compiled> compile(const graph::Graph& graph, const sharding::Mesh& mesh, const std::string& text);
  std::shared_ptr<Compiled> build(const graph::Graph& graph, const sharding::Mesh& mesh, const std::string& text);
  void connect(Program& program);
  void load(Compiled& compiled);
  void run(Compiled& compiled, const Tensors& inputs, const Tensors& outputs, const CallOptions& options);

  const EngineOptions options;
  const std::shared_ptr<Team> team;
  Residency residency;
  std::vector<comm::DeviceRank> ranks;  // by device
  std::vector<comm::DeviceRank> side_ranks;  // the same with their side queues
  // By the devices' numbers, and whether they run on the side queues.
  std::map<std::pair<std::vector<std::int64_t>, bool>, std::vector<std::unique_ptr<comm::Communicator>>> groups;

  Calls queue;
  std::exception_ptr failure;  // of a queued call, to be told

  std::mutex calls, running_mutex;
  bool running = false;
  mutable std::mutex stats_mutex;
  EngineStats stats;
};

std::shared_ptr<Compiled> Engine::State::build(const graph::Graph& graph, const sharding::Mesh& mesh, const std::string& text) {
  Types inputs, outputs;
  std::vector<std::string> prompt_inputs;
  for (const auto* node : graph.all("input")) {
    const auto& name = node->attrs.text("name");
    inputs[name] = graph.type(node->outputs[0]);
    if (node->attrs.text_or("varies", "call") == "prompt") prompt_inputs.push_back(name);
  }
  for (const auto& output : graph.outputs()) outputs[output.name] = graph.type(output.value);

  const auto normalised = graph::normalise(graph);
  auto decision = sharding::decide(normalised, mesh);
  const int slots = prompt_inputs.empty() ? 1 : std::max(1, options.prompts);
  auto compiled = std::make_shared<Compiled>(team, mesh, text, slots);
  compiled->inputs = std::move(inputs);
  compiled->outputs = std::move(outputs);
  compiled->prompt_inputs = std::move(prompt_inputs);
  compiled->partition = sharding::partition(normalised, mesh, decision.assignment, options.plan.placement);
  compiled->notes = std::move(decision.notes);
  compiled->notes.insert(compiled->notes.end(), compiled->partition.notes.begin(), compiled->partition.notes.end());
  team->run([&](std::size_t d, backend::Device& device) {
    compiled->programs[d] = lower(compiled->partition.devices[d], device, residency.weights(d));
    set_outputs(compiled->programs[d], compiled->partition, d);
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
      if (group.empty()) {
        std::vector<comm::DeviceRank> members;
        for (auto d : devices) members.push_back((launch.aside ? side_ranks : ranks).at(static_cast<std::size_t>(d)));
        group = comm::device_group(members, team->abort(), std::chrono::duration<double>(options.timeout_seconds));
        for (const auto& end : group)
          if (const auto* fault = end->fault()) queue.watch(fault);
      }
      launch.collective->communicator = group.at(static_cast<std::size_t>(attrs.integer("rank"))).get();
    }
}

void Engine::State::load(Compiled& compiled) {
  if (residency.loaded(compiled)) return;
  settle();
  const auto start = std::chrono::steady_clock::now();
  std::int64_t bytes = 0;
  try {
    bytes = residency.load(compiled, options.progress);
  } catch (...) {
    measure();
    throw;
  }
  measure();
  if (bytes == 0) return;
  std::lock_guard lock(stats_mutex);
  stats.uploaded_bytes += bytes;
  stats.load_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Keeps what a queued call has met, and makes the devices ready for others.
void Engine::State::collect() {
  if (!queue.failed()) return;
  try {
    queue.settle();
    for (const auto& [key, group] : groups)
      for (const auto& end : group) end->check();
    if (queue.cancelled()) throw Cancelled("cancelled by the caller");
    fail("[run] a call that was queued has failed");
  } catch (...) {
    failure = std::current_exception();
  }
  residency.forget_prompts();  // what its prologue left
  team->abort()->reset();
  queue.clear();
}

void Engine::State::settle() {
  queue.settle();
  collect();
}

void Engine::State::report_failure() {
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

void Engine::State::run(Compiled& compiled, const Tensors& inputs, const Tensors& outputs, const CallOptions& call) {
  bool prologue = false;
  try {
    prologue = queue.run(compiled, residency, inputs, outputs, call);
  } catch (...) {
    collect();
    failure = nullptr;  // the same
    throw;
  }
  std::lock_guard lock(stats_mutex);
  ++stats.calls;
  stats.prologues += prologue;
  for (std::size_t d = 0; d < team->size(); ++d)
    stats.collective_seconds[d] = compiled.executors[d][static_cast<std::size_t>(compiled.last_slot)]->collective_seconds();
}

Engine::Engine(EngineOptions options, std::shared_ptr<const weights::Source> weights)
    : state_(std::make_unique<State>(std::move(options), std::move(weights))) {}
Engine::~Engine() = default;

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

std::shared_ptr<Compiled> Engine::compile(const graph::Graph& graph) {
  return state_->compile(graph, state_->options.plan.mesh, graph::to_text(graph));
}

std::shared_ptr<Compiled> Engine::compile(const graph::Graph& graph, const sharding::Mesh& mesh) {
  auto plan = state_->options.plan;
  plan.mesh = mesh;
  planner::check(plan);
  const auto name = mesh.to_string();
  if (name == state_->options.plan.mesh.to_string()) return compile(graph);
  return state_->compile(graph, mesh, name + "\n" + graph::to_text(graph));
}

void Engine::load(Compiled& compiled) {
  State::Call call(*state_);
  require(compiled.team == state_->team, "[engine] expected a program of this engine but got another's");
  state_->residency.use(compiled.shared_from_this());
  state_->load(compiled);
}

void Engine::unload() {
  State::Call call(*state_);
  state_->settle();
  state_->residency.unload();
  state_->measure();
}

void Engine::update(const std::set<std::string>& keys) {
  State::Call call(*state_);
  state_->settle();
  std::int64_t bytes = 0;
  try {
    bytes = state_->residency.update(keys);
  } catch (...) {
    state_->measure();
    throw;
  }
  std::lock_guard lock(state_->stats_mutex);
  state_->stats.uploaded_bytes += bytes;
}

void Engine::run(Compiled& compiled, const Tensors& inputs, const Tensors& outputs, const CallOptions& options) {
  check_tensors("input", compiled.inputs, inputs);
  check_tensors("output", compiled.outputs, outputs);
  State::Call call(*state_);
  state_->report_failure();
  require(compiled.team == state_->team, "[engine] expected a program of this engine but got another's");
  state_->residency.use(compiled.shared_from_this());
  state_->load(compiled);
  state_->run(compiled, inputs, outputs, options);
}

bool Engine::loaded(const Compiled& compiled) const {
  std::lock_guard lock(state_->calls);
  return state_->residency.loaded(compiled);
}

void Engine::check() {
  State::Call call(*state_);
  state_->report_failure();
}

void Engine::synchronize() {
  State::Call call(*state_);
  state_->settle();
  state_->report_failure();
}

bool Engine::take_not_finite() { return state_->queue.take_not_finite(); }

std::vector<StepProfile> Engine::profile(Compiled& compiled) {
  State::Call call(*state_);
  require(compiled.team == state_->team, "[engine] expected a program of this engine but got another's");
  require(compiled.resident_since > 0 && compiled.last_slot >= 0, "[engine] expected a call before its profile but there was none");
  state_->settle();
  std::vector<StepProfile> profiles(compiled.programs.size());
  compiled.prompts.clear();
  state_->team->run([&](std::size_t d, backend::Device& device) {
    auto& executor = *compiled.executors[d][static_cast<std::size_t>(compiled.last_slot)];
    profiles[d].seconds = executor.time_step(device);
    const auto seconds = executor.time_launches(device, *state_->team->abort());
    for (std::size_t i = 0; i < seconds.size(); ++i) {
      const Launch& launch = compiled.programs[d].step[i];
      profiles[d].launches.push_back({launch.label, launch.work.op, launch.work.shapes, seconds[i], launch.work.flops, launch.work.bytes});
    }
  });
  return profiles;
}

void Engine::cancel() {
  std::lock_guard lock(state_->running_mutex);
  const bool queued = !state_->running && state_->queue.pending();
  if (queued) state_->queue.cancel();
  if (queued || state_->running) state_->team->abort()->raise(comm::Abort::Kind::cancelled, "cancelled by the caller");
}

std::vector<DeviceReport> Engine::report(const Compiled& compiled) const {
  std::vector<DeviceReport> reports;
  for (std::size_t d = 0; d < compiled.programs.size(); ++d) {
    const Program& program = compiled.programs[d];
    DeviceReport report;
    report.name = state_->team->name(d);
    for (const auto* buffer : program.weights) report.weight_bytes += buffer->bytes();
    report.activation_bytes = program.arena_bytes + compiled.prompt_bytes(d);
    report.flops = program.step_flops;
    for (const auto& launch : program.step) {
      if (!launch.collective) continue;
      auto& kind = report.collectives[std::string(launch.collective->node->op->name())];
      ++kind.count;
      kind.bytes += traffic_bytes(*launch.collective);
    }
    reports.push_back(std::move(report));
  }
  return reports;
}

const sharding::Partition& Engine::partition(const Compiled& compiled) const { return compiled.partition; }
const sharding::Mesh& Engine::mesh(const Compiled& compiled) const { return compiled.mesh; }
std::vector<std::string> Engine::notes(const Compiled& compiled) const { return compiled.notes; }

EngineStats Engine::stats() const {
  std::lock_guard lock(state_->stats_mutex);
  return state_->stats;
}

const EngineOptions& Engine::options() const { return state_->options; }

}  // namespace comfytp::runtime
