#include "runtime/executor.h"

#include <array>
#include <chrono>

#include "base/error.h"
#include "runtime/collectives.h"

namespace comfytp::runtime {
namespace {

constexpr std::size_t kMostOperands = 72;  // more than any op takes

}  // namespace

Executor::Executor(Program& program, Memories memories, const comm::Abort& abort)
    : program_(program), memories_(memories), abort_(abort) {
  for (auto& slot : program_.slots) slot.weight->data = at(slot.place);
}

void* Executor::at(const Place& place) const {
  switch (place.memory) {
    case Place::Memory::arena: return static_cast<char*>(memories_.arena) + place.offset;
    case Place::Memory::prologue: return static_cast<char*>(memories_.prologue) + place.offset;
    case Place::Memory::weight: return place.weight->data;
    case Place::Memory::none: break;
  }
  return nullptr;
}

void Executor::run_prologue(backend::Device& device, const std::map<std::string, TensorView>& inputs) {
  read_inputs(device, inputs, true);
  run(program_.prologue);
}

void Executor::run_step(backend::Device& device, const std::map<std::string, TensorView>& inputs) {
  read_inputs(device, inputs, false);
  run(program_.step);
}

void Executor::read_inputs(backend::Device& device, const std::map<std::string, TensorView>& inputs, bool prompt) {
  for (const auto& binding : program_.inputs)
    if (binding.prompt == prompt && binding.place.memory != Place::Memory::none && numel(binding.type.shape) > 0)
      device.read_from_host(part_of(inputs.at(binding.name), binding.box), at(binding.place), binding.type, binding.order);
}

void Executor::write_outputs(backend::Device& device, const std::map<std::string, TensorView>& outputs) {
  for (const auto& binding : program_.outputs)
    if (numel(binding.type.shape) > 0)
      device.write_to_host(at(binding.place), binding.type, binding.order, part_of(outputs.at(binding.name), binding.box));
}

void Executor::run(std::vector<Launch>& launches) {
  std::array<const void*, kMostOperands> in;
  std::array<void*, kMostOperands> out;
  for (auto& launch : launches) {
    abort_.check();
    require(launch.in.size() <= kMostOperands && launch.out.size() <= kMostOperands, "{}: expected at most {} operands", launch.label, kMostOperands);
    for (std::size_t i = 0; i < launch.in.size(); ++i) in[i] = at(launch.in[i]);
    for (std::size_t i = 0; i < launch.out.size(); ++i) out[i] = at(launch.out[i]);
    if (launch.collective) {
      const auto start = std::chrono::steady_clock::now();
      run_collective(*launch.collective, in[0], out[0]);
      collective_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      continue;
    }
    try {
      launch.kernel->run({in.data(), launch.in.size()}, {out.data(), launch.out.size()}, at(launch.workspace));
    } catch (const std::exception& e) {
      fail("{}: {}", launch.label, e.what());
    }
  }
}

}  // namespace comfytp::runtime
