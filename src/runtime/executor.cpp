#include "runtime/executor.h"

#include <algorithm>
#include <chrono>

#include "base/error.h"
#include "runtime/collectives.h"

namespace comfytp::runtime {

void* Executor::at(const Place& place) const {
  switch (place.memory) {
    case Place::Memory::arena: return static_cast<char*>(memories_.arena) + place.offset;
    case Place::Memory::prologue: return static_cast<char*>(memories_.prologue) + place.offset;
    case Place::Memory::weight: return place.weight->data;
    case Place::Memory::none: break;
  }
  return nullptr;
}

void Executor::bind(const Memories& memories) {
  collective_seconds_ = 0;
  if (bound_ && memories == memories_) return;
  memories_ = memories;
  prologue_ = resolve(program_.prologue);
  step_ = resolve(program_.step);
  bound_ = true;
  recorded_ = false;
}

void Executor::record(backend::Device& device) {
  record(device, program_.prologue, prologue_);
  record(device, program_.step, step_);
  recorded_ = true;
}

// A wait between queues costs the device a gap. So neighbours aside leave the queue at one point, and a launch waits for the last of what it
// waits for. The side queue is joined at the end for the sake of those that nobody reads here.
void Executor::run(backend::Device& device, const std::vector<Launch>& launches, const Bound& bound, const Segment& segment) {
  const auto awaited = [&](const Launch& launch) {  // what a launch waits for here, and one
    std::size_t end = segment.first;
    for (auto made : launch.after) end = std::max(end, made + 1);
    return end;
  };
  std::map<std::size_t, std::size_t> tickets;  // of what is awaited, once it is there
  for (std::size_t i = segment.first; i < segment.last; ++i)
    if (const auto end = awaited(launches[i]); end > segment.first) tickets[end - 1];
  std::size_t given = segment.first, joined = segment.first;  // behind the last that went aside, and the last that was waited for
  for (std::size_t i = segment.first; i < segment.last; ++i) {
    const auto& launch = launches[i];
    if (const auto end = awaited(launch); end > joined) device.join(tickets.at(end - 1)), joined = end;
    if (launch.aside && (i == segment.first || !launches[i - 1].aside)) device.fork();
    run(launch, bound.addresses[i]);
    if (!launch.aside) continue;
    given = i + 1;
    if (const auto ticket = tickets.find(i); ticket != tickets.end()) ticket->second = device.mark();
  }
  if (given > joined) device.join(device.mark());
}

void Executor::record(backend::Device& device, const std::vector<Launch>& launches, Bound& bound) const {
  for (auto& segment : bound.segments)
    if (!segment.on_host && !segment.recording)
      segment.recording = device.record([&] { run(device, launches, bound, segment); });
}

// The host takes its time to hand over each launch of a recording, and the device begins when it has all: so the first recording is a
// short one, with which the device is busy while it is given the rest. It does not end among launches aside, nor before their readers.
Executor::Bound Executor::resolve(const std::vector<Launch>& launches) const {
  constexpr std::size_t kFirst = 64;
  std::vector<std::size_t> awaited(launches.size() + 1, launches.size());  // the first launch that one from here on waits for
  for (std::size_t i = launches.size(); i-- > 0;) {
    awaited[i] = awaited[i + 1];
    for (auto made : launches[i].after) awaited[i] = std::min(awaited[i], made);
  }
  Bound bound;
  for (std::size_t i = 0; i < launches.size(); ++i) {
    const auto& launch = launches[i];
    Addresses addresses;
    for (const auto& place : launch.in) addresses.in.push_back(at(place));
    for (const auto& place : launch.out) addresses.out.push_back(at(place));
    addresses.workspace = at(launch.workspace);
    bound.addresses.push_back(std::move(addresses));
    const bool on_host = launch.collective && !launch.collective->communicator->queues();
    const bool full = bound.segments.size() == 1 && i >= kFirst && awaited[i] >= i && !(launch.aside && launches[i - 1].aside);
    if (bound.segments.empty() || full || on_host || bound.segments.back().on_host) bound.segments.push_back({i, i, on_host, nullptr});
    bound.segments.back().last = i + 1;
  }
  return bound;
}

void Executor::run_prologue(backend::Device& device, const std::map<std::string, TensorView>& inputs, const comm::Abort& abort) {
  read_inputs(device, inputs, true);
  run(device, program_.prologue, prologue_, abort);
}

void Executor::run_step(backend::Device& device, const std::map<std::string, TensorView>& inputs, const comm::Abort& abort) {
  read_inputs(device, inputs, false);
  run(device, program_.step, step_, abort);
}

void Executor::read_inputs(backend::Device& device, const std::map<std::string, TensorView>& inputs, bool prompt) {
  for (const auto& binding : program_.inputs)
    if (binding.prompt == prompt && binding.place.memory != Place::Memory::none && numel(binding.type.shape) > 0)
      device.read(part_of(inputs.at(binding.name), binding.box), at(binding.place), binding.type, binding.order);
}

void Executor::check_collectives() const {
  for (const auto* launches : {&program_.prologue, &program_.step})
    for (const auto& launch : *launches)
      if (launch.collective) launch.collective->communicator->check();
}

void Executor::write_outputs(backend::Device& device, const std::map<std::string, TensorView>& outputs) {
  for (const auto& binding : program_.outputs)
    if (numel(binding.type.shape) > 0)
      device.write(at(binding.place), binding.type, binding.order, part_of(outputs.at(binding.name), binding.box));
}

void Executor::run(backend::Device& device, const std::vector<Launch>& launches, Bound& bound, const comm::Abort& abort) {
  for (auto& segment : bound.segments) {
    abort.check();
    if (segment.on_host) {
      const auto start = std::chrono::steady_clock::now();
      device.synchronize();
      run(launches[segment.first], bound.addresses[segment.first]);
      collective_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      continue;
    }
    if (segment.recording) {
      segment.recording->replay();
      continue;
    }
    for (std::size_t i = segment.first; i < segment.last; ++i) {
      abort.check();
      run(launches[i], bound.addresses[i]);
    }
  }
}

void Executor::repeat_step(backend::Device& device, const comm::Abort& abort) {
  run(device, program_.step, step_, abort);
  device.synchronize();
  check_collectives();
}

std::map<std::string, comm::Communicator::Spent> Executor::spent() const {
  std::map<const comm::Communicator*, bool> aside;  // each once
  for (const auto& launch : program_.step)
    if (launch.collective) aside[launch.collective->communicator] = launch.aside;
  std::map<std::string, comm::Communicator::Spent> all;
  for (const auto& [communicator, beside] : aside)
    for (const auto& [kind, spent] : communicator->spent()) {
      auto& sum = all[beside ? "fetch_weight" : kind];
      sum.calls += spent.calls;
      sum.waiting_seconds += spent.waiting_seconds;
      sum.moving_seconds += spent.moving_seconds;
    }
  return all;
}

std::vector<double> Executor::time_launches(backend::Device& device, const comm::Abort& abort) {
  std::vector<double> seconds;
  for (std::size_t i = 0; i < program_.step.size(); ++i) {
    abort.check();
    const auto& launch = program_.step[i];
    const auto once = [&] { run(launch, step_.addresses[i]); };
    if (!launch.collective) {
      seconds.push_back(device.time(once));
      continue;
    }
    device.synchronize();
    const auto start = std::chrono::steady_clock::now();
    if (launch.aside) device.fork();
    once();
    if (launch.aside) device.join(device.mark());
    device.synchronize();
    launch.collective->communicator->check();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return seconds;
}

void Executor::run(const Launch& launch, const Addresses& at) {
  if (launch.collective) return run_collective(*launch.collective, at.in[0], at.out[0]);
  try {
    launch.kernel->run(at.in, at.out, at.workspace);
  } catch (const std::exception&) {
    rethrow_from(launch.label);
  }
}

}  // namespace comfytp::runtime
