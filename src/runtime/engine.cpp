#include "runtime/engine.h"

#include <fmt/ranges.h>

#include <chrono>
#include <mutex>

#include "base/error.h"
#include "graph/text.h"
#include "runtime/collectives.h"
#include "runtime/engine_state.h"
#include "runtime/profiling.h"

namespace comfytp::runtime {

using Tensors = std::map<std::string, TensorView>;
using Types = std::map<std::string, graph::Type>;

namespace {

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
    const bool fp8 = is_fp8(view.dtype);
    require(is_float(type.dtype) == is_float(view.dtype) && !(fp8 && what == "output"), "[run] expected {} '{}' in {} but got {}", what, name,
            is_float(type.dtype) ? "a floating dtype" : "an integer dtype", name_of(view.dtype));
    require(view.data || view.numel() == 0, "[run] expected memory for {} '{}' but got none", what, name);
  }
}

std::string text_of(const std::exception_ptr& failure) {
  try {
    std::rethrow_exception(failure);
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace

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

void Engine::State::collect() {
  if (!queue.failed() && !team->abort()->raised()) return;
  try {
    queue.settle();
    for (const auto& [key, group] : groups)
      for (const auto& end : group) end->check();
    queue.check();
  } catch (...) {
    if (!failure) failure = std::current_exception();
    residency.forget_prompts();  // what its prologue left
  }
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
  } catch (const std::exception& error) {
    collect();
    if (failure && text_of(failure) == error.what()) failure = nullptr;  // a device that has noticed later, or an earlier call that it ended
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
  state_->report_failure();  // loading waits for what is queued
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
  compiled.prompts.clear();
  return profile_steps(*state_->team, compiled);
}

void Engine::cancel() {
  std::lock_guard lock(state_->running_mutex);
  const bool queued = state_->queue.pending();
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
      if (!launch.collective) {
        report.launches.push_back({launch.work.flops, launch.work.bytes});
        continue;
      }
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
const std::optional<Fp8Products>& Engine::fp8_products(const Compiled& compiled) const { return compiled.fp8; }

EngineStats Engine::stats() const {
  std::lock_guard lock(state_->stats_mutex);
  return state_->stats;
}

const EngineOptions& Engine::options() const { return state_->options; }

}  // namespace comfytp::runtime
