#include "runtime/residency.h"

#include <algorithm>
#include <atomic>

#include "base/error.h"

namespace comfytp::runtime {

Residency::Residency(std::shared_ptr<Team> team, std::shared_ptr<const weights::Source> source, int programs)
    : team_(std::move(team)), limit_(static_cast<std::size_t>(programs)) {
  for (std::size_t d = 0; d < team_->size(); ++d) devices_.emplace_back(source);
}

Residency::~Residency() { unload(); }

std::shared_ptr<Compiled> Residency::find(const std::string& text) {
  const auto it = std::find_if(programs_.begin(), programs_.end(), [&](const auto& c) { return c->text == text; });
  if (it == programs_.end()) return nullptr;
  programs_.splice(programs_.begin(), programs_, it);
  return programs_.front();
}

void Residency::use(const std::shared_ptr<Compiled>& compiled) {
  programs_.remove(compiled);
  programs_.push_front(compiled);
  while (programs_.size() > limit_) {
    const auto oldest = programs_.back();
    programs_.pop_back();
    team_->run([&](std::size_t d, backend::Device& device) { release_prompts(d, device, *oldest); });
    oldest->prompts.clear();
    oldest->resident_since = 0;
  }
}

std::int64_t Residency::load(Compiled& compiled, const std::function<void(std::int64_t, std::int64_t)>& progress) {
  if (loaded(compiled)) return 0;
  std::int64_t total = 0;
  for (const auto& program : compiled.programs)
    for (const auto* buffer : program.weights) total += buffer->data ? 0 : buffer->bytes();
  std::atomic<std::int64_t> done{0};
  std::vector<std::vector<backend::WeightBuffer*>> fresh(devices_.size());
  std::function<void()> report;
  if (progress && total > 0) report = [&] { progress(done, total); };
  try {
    const auto loaded = [&](std::int64_t bytes) {
      done += bytes;
      team_->abort()->check();
    };
    team_->run([&](std::size_t d, backend::Device& device) { load_on(d, device, compiled, loaded, fresh[d]); }, report);
    if (report) report();
  } catch (...) {
    const auto failure = std::current_exception();
    team_->run([&](std::size_t d, backend::Device& device) {
      devices_[d].weights.release(device, fresh[d]);
      release_prompts(d, device, compiled);
      release_arena(d, device);
    });
    compiled.prompts.clear();
    ++epoch_;  // the others' arena is gone as well
    std::rethrow_exception(failure);
  }
  compiled.resident_since = epoch_;
  return total;
}

void Residency::load_on(std::size_t d, backend::Device& device, Compiled& compiled, const std::function<void(std::int64_t)>& loaded,
                        std::vector<backend::WeightBuffer*>& fresh) {
  DeviceMemory& memory = devices_[d];
  const Program& program = compiled.programs[d];
  if (memory.arena_bytes < program.arena_bytes) {
    release_arena(d, device);
    memory.arena = device.allocate(program.arena_bytes);
    memory.arena_bytes = program.arena_bytes;
    ++memory.moves;
  }
  if (const auto bytes = compiled.prompt_bytes(d); bytes > 0 && !compiled.prompt_memory[d]) {
    compiled.prompt_memory[d] = device.allocate(bytes);
    memory.prompt_bytes += bytes;
    ++memory.moves;
  }
  memory.weights.load(device, program.weights, loaded, fresh);
}

void Residency::release_arena(std::size_t d, backend::Device& device) {
  DeviceMemory& memory = devices_[d];
  if (memory.arena) device.release(memory.arena, memory.arena_bytes);
  memory.arena = nullptr;
  memory.arena_bytes = 0;
}

void Residency::release_prompts(std::size_t d, backend::Device& device, Compiled& compiled) {
  if (!compiled.prompt_memory[d]) return;
  device.release(compiled.prompt_memory[d], compiled.prompt_bytes(d));
  compiled.prompt_memory[d] = nullptr;
  devices_[d].prompt_bytes -= compiled.prompt_bytes(d);
}

void Residency::unload() {
  team_->run([&](std::size_t d, backend::Device& device) {
    for (const auto& compiled : programs_) release_prompts(d, device, *compiled);
    release_arena(d, device);
    devices_[d].weights.unload(device);
  });
  forget_prompts();
  ++epoch_;
}

void Residency::forget_prompts() {
  for (const auto& compiled : programs_) compiled->prompts.clear();
}

std::int64_t Residency::update(const std::set<std::string>& keys) {
  std::vector<std::vector<backend::WeightBuffer*>> stale;
  for (auto& device : devices_) stale.push_back(device.weights.loaded(keys));
  std::atomic<std::int64_t> done{0};
  forget_prompts();
  try {
    team_->run([&](std::size_t d, backend::Device& device) {
      devices_[d].weights.reload(device, stale[d], [&](std::int64_t bytes) {
        done += bytes;
        team_->abort()->check();
      });
    });
  } catch (...) {
    const auto failure = std::current_exception();
    team_->run([&](std::size_t d, backend::Device& device) { devices_[d].weights.release(device, stale[d]); });
    ++epoch_;
    std::rethrow_exception(failure);
  }
  return done;
}

std::uint64_t Residency::generation() const {
  std::uint64_t sum = 0;
  for (const auto& d : devices_) sum += d.moves + d.weights.generation();
  return sum;
}

std::vector<std::int64_t> Residency::weight_bytes() const {
  std::vector<std::int64_t> bytes;
  for (const auto& d : devices_) bytes.push_back(d.weights.bytes());
  return bytes;
}

std::vector<std::int64_t> Residency::activation_bytes() const {
  std::vector<std::int64_t> bytes;
  for (const auto& d : devices_) bytes.push_back(d.arena_bytes + d.prompt_bytes);
  return bytes;
}

}  // namespace comfytp::runtime
