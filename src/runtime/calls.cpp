#include "runtime/calls.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <deque>

#include "backend/alignment.h"
#include "base/error.h"

namespace comfytp::runtime {
namespace {

using Tensors = Calls::Tensors;

std::uint32_t load(const std::uint32_t& word) { return std::atomic_ref(const_cast<std::uint32_t&>(word)).load(std::memory_order_acquire); }
void store(std::uint32_t& word, std::uint32_t value) { std::atomic_ref(word).store(value, std::memory_order_release); }

// What one device's thread tells the others' in the middle of a job: a moment of its queue that they may wait for.
class Gate {
 public:
  void open(void* moment) {
    moment_ = moment;
    open_.store(true, std::memory_order_release);
  }
  void* wait(const comm::Abort& abort) const {
    while (!open_.load(std::memory_order_acquire)) {
      abort.check();
      std::this_thread::yield();
    }
    return moment_;
  }

 private:
  void* moment_ = nullptr;
  std::atomic<bool> open_ = false;
};

bool on_host(const Tensors& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const auto& entry) { return entry.second.host; });
}

bool on_device(const Tensors& tensors) {
  return std::none_of(tensors.begin(), tensors.end(), [](const auto& entry) { return entry.second.host; });
}

// A copy to or from dense memory, on `device`.
void move(backend::Device& device, const TensorView& from, const TensorView& to) {
  const auto order = graph::row_major(from.shape.size());
  if (from.numel() == 0) return;
  if (to.strides == row_major_strides(to.shape))
    device.read(from, to.data, {to.dtype, to.shape}, order);
  else
    device.write(from.data, {from.dtype, from.shape}, order, to);
}

}  // namespace

struct Calls::Call {
  Compiled& compiled;
  const Tensors &inputs, &outputs;
  const CallOptions& options;
  std::optional<std::size_t> home;  // the device on which the caller's tensors lie
  bool several = false;             // devices
  bool queued = false;              // all results are written in the order of the caller's stream
  bool results_there = false;       // some are, or all
  PromptCache::Found prompt;
  Tensors theirs_in, theirs_out;    // in the relay: what the others read, and what all write where another writes
  Gate fed;
  std::deque<Gate> done;            // by device

  Executor& executor(std::size_t d) const { return *compiled.executors[d][static_cast<std::size_t>(prompt.slot)]; }
  void* stream() const { return options.stream.value_or(nullptr); }
};

Calls::Calls(std::shared_ptr<Team> team) : team_(std::move(team)), ordinals_(team_->size()) {
  team_->run([&](std::size_t d, backend::Device& device) { ordinals_[d] = device.spec().index; });
  if (!team_->queues()) return;
  team_->run_on(0, [&](std::size_t, backend::Device& device) {
    state_ = new (device.call_queue()->allocate_shared(sizeof(backend::CallState))) backend::CallState;
  });
}

Calls::~Calls() {
  if (!state_) return;
  try {
    settle();
  } catch (const std::exception&) {  // its call has failed, or nobody asked
  }
  team_->run_on(0, [&](std::size_t, backend::Device& device) {
    device.call_queue()->release_shared(state_);
    if (relay_) device.call_queue()->release_shared(relay_);
  });
}

void Calls::settle() {
  if (state_) team_->run([](std::size_t, backend::Device& device) { device.synchronize(); });
}

bool Calls::pending() const { return state_ && load(state_->done) != number_; }
bool Calls::failed() const {
  const auto set = [](const std::uint32_t* word) { return load(*word) != 0; };
  return state_ && (set(&state_->cancelled) || set(&state_->failed) || std::any_of(faults_.begin(), faults_.end(), set));
}
void Calls::check() const {
  if (!state_ || load(state_->failed) == 0) return;
  if (load(state_->cancelled) != 0) throw Cancelled("cancelled by the caller");
  fail("[run] a call that was queued has failed");
}
void Calls::cancel() {
  if (state_) store(state_->cancelled, 1);
}
void Calls::clear() {
  if (!state_) return;
  store(state_->cancelled, 0);
  store(state_->failed, 0);
  store(state_->done, number_);  // of a call that did not come to its end
}

bool Calls::take_not_finite() {
  const bool on_gpu = state_ && std::atomic_ref(state_->not_finite).exchange(0) != 0;
  return not_finite_.exchange(false) || on_gpu;
}

std::optional<std::size_t> Calls::home_of(const Tensors& inputs, const Tensors& outputs) const {
  const std::pair<const std::string, TensorView>* first = nullptr;
  for (const auto* tensors : {&inputs, &outputs})
    for (const auto& entry : *tensors) {
      if (entry.second.host) continue;
      if (!first) first = &entry;
      require(entry.second.ordinal == first->second.ordinal,
              "[run] expected all tensors that are on a GPU on the same but got '{}' on {} and '{}' on {}", first->first, first->second.ordinal,
              entry.first, entry.second.ordinal);
    }
  if (!first) return std::nullopt;
  require(state_, "[run] expected '{}' in host memory, as the engine does not run on GPUs, but got it on GPU {}", first->first,
          first->second.ordinal);
  const auto found = std::find(ordinals_.begin(), ordinals_.end(), first->second.ordinal);
  require(found != ordinals_.end(), "[run] expected '{}' in host memory or on one of the engine's GPUs ({}) but got it on GPU {}", first->first,
          fmt::join(ordinals_, ", "), first->second.ordinal);
  return static_cast<std::size_t>(found - ordinals_.begin());
}

// Numbers of the caller's settle it without a look. What lies on a device and has none that is known is compared there, the one wait of a
// queued call.
PromptCache::Found Calls::find_prompt(const Call& call) {
  std::vector<PromptInput> inputs;
  std::vector<TensorView> there;
  for (const auto& name : call.compiled.prompt_inputs) {
    const auto number = call.options.contents.find(name);
    inputs.push_back({call.inputs.at(name), number == call.options.contents.end() ? 0 : number->second, std::nullopt});
    if (!inputs.back().view.host) there.push_back(inputs.back().view);
  }
  if (const auto slot = call.compiled.prompts.find_without_digests(inputs)) return {*slot, true};
  if (!there.empty()) {
    std::vector<backend::Digest> digests;
    team_->run_on(*call.home, [&](std::size_t, backend::Device& device) {
      device.call_queue()->follow(call.stream());
      digests = device.call_queue()->digest(there);
    });
    auto next = digests.begin();
    for (auto& input : inputs)
      if (!input.view.host) input.digest = *next++;
  }
  return call.compiled.prompts.find(inputs);
}

// Gives the other devices' tensors their places in memory that all reach.
void Calls::lay_relay(Call& call) {
  std::int64_t bytes = 0;
  std::vector<std::pair<TensorView*, std::int64_t>> places;
  const auto lay = [&](const Tensors& from, Tensors& to) {
    to = from;
    for (auto& [name, view] : to) {
      if (view.host) continue;
      view.strides = row_major_strides(view.shape);
      places.emplace_back(&view, bytes);
      bytes += backend::aligned(view.bytes());
    }
  };
  lay(call.inputs, call.theirs_in);
  if (call.results_there) lay(call.outputs, call.theirs_out);
  if (bytes > relay_bytes_) {
    settle();
    team_->run_on(*call.home, [&](std::size_t, backend::Device& device) {
      if (relay_) device.call_queue()->release_shared(relay_);
      relay_ = nullptr;
      relay_bytes_ = 0;
      relay_ = static_cast<char*>(device.call_queue()->allocate_shared(bytes));
      relay_bytes_ = bytes;
    });
  }
  for (const auto& [view, offset] : places) view->data = relay_ + offset;
}

bool Calls::run(Compiled& compiled, const Residency& residency, const Tensors& inputs, const Tensors& outputs, const CallOptions& options) {
  const bool several = team_->size() > 1;
  Call call{compiled, inputs, outputs, options, home_of(inputs, outputs), several, false, false, {}, {}, {}, {}, std::deque<Gate>(team_->size())};
  call.queued = call.home && on_device(outputs);
  call.results_there = !on_host(outputs);
  call.prompt = find_prompt(call);
  if (call.home && several) lay_relay(call);
  bool recorded = true;
  const auto generation = residency.generation();
  for (std::size_t d = 0; d < team_->size(); ++d) {
    char* kept = static_cast<char*>(compiled.prompt_memory[d]);
    if (kept) kept += call.prompt.slot * compiled.programs[d].prologue_bytes;
    call.executor(d).bind({residency.arena(d), kept, generation});
    recorded = recorded && call.executor(d).recorded();
  }
  if (!recorded) team_->run([&](std::size_t d, backend::Device& device) { call.executor(d).record(device); });
  if (call.queued) ++number_;
  const bool waits = !call.queued || !options.stream;
  const auto& abort = *team_->abort();
  team_->run([&](std::size_t d, backend::Device& device) {
    const auto& given = call.home && d != *call.home ? call.theirs_in : inputs;
    if (call.home) begin(call, d, device);
    if (!call.prompt.known) call.executor(d).run_prologue(device, given, abort);
    call.executor(d).run_step(device, given, abort);
    if (call.queued) end(call, d, device);
    if (!call.queued && !several) call.executor(d).write_outputs(device, outputs);
    if (!waits) return;
    device.synchronize();
    call.executor(d).check_collectives();
  });
  compiled.prompts.confirm(call.prompt.slot);
  compiled.last_slot = call.prompt.slot;
  // Of several devices only when all have succeeded, so that a failed call writes nothing in the host's memory.
  if (!call.queued && several)
    team_->run([&](std::size_t d, backend::Device& device) {
      call.executor(d).write_outputs(device, call.results_there ? call.theirs_out : outputs);
      device.synchronize();
    });
  if (!call.queued && call.results_there) {
    ++number_;
    team_->run_on(*call.home, [&](std::size_t, backend::Device& device) {
      close(call, device, several);
      device.synchronize();
    });
  }
  if (state_) look_at(outputs);
  return !call.prompt.known;
}

// The device at home hands on what lies there.
void Calls::begin(Call& call, std::size_t d, backend::Device& device) {
  auto& queue = *device.call_queue();
  if (d != *call.home) return queue.await(call.fed.wait(*team_->abort()));
  queue.follow(call.stream());
  if (!call.several) return;
  const auto& prompts = call.compiled.prompt_inputs;
  for (const auto& [name, view] : call.inputs) {
    const bool kept = call.prompt.known && std::find(prompts.begin(), prompts.end(), name) != prompts.end();
    if (!view.host && !kept) move(device, view, call.theirs_in.at(name));
  }
  call.fed.open(queue.moment());
}

// The device at home waits for the others, also so that the next call may write to the relay, and hands on what they wrote there. The
// caller's stream waits for that: so nothing that it does later comes too early, and memory that the caller frees on it may be given away
// at once, for whoever gets it uses it behind this call. An allocator that orders by streams, as torch's, needs to know no more.
void Calls::end(Call& call, std::size_t d, backend::Device& device) {
  auto& queue = *device.call_queue();
  const auto& programs = call.compiled.programs;
  bool others_write = false;
  for (std::size_t other = 0; other < team_->size(); ++other) others_write |= other != *call.home && !programs[other].outputs.empty();
  call.executor(d).write_outputs(device, others_write ? call.theirs_out : call.outputs);
  if (d != *call.home) return call.done[d].open(queue.moment());
  for (std::size_t other = 0; other < team_->size(); ++other)
    if (other != d) queue.await(call.done[other].wait(*team_->abort()));
  close(call, device, others_write);
  queue.lead(call.stream());
}

// The device at home fetches what lies in the relay, and ends the call.
void Calls::close(const Call& call, backend::Device& device, bool relayed) {
  std::vector<TensorView> outputs;
  for (const auto& [name, view] : call.outputs) {
    if (view.host || view.numel() == 0) continue;
    if (relayed) move(device, call.theirs_out.at(name), view);
    outputs.push_back(view);
  }
  device.call_queue()->end(state_, number_, faults_, outputs);
}

void Calls::look_at(const Tensors& outputs) {
  std::vector<float> values;
  for (const auto& [name, view] : outputs) {
    if (!view.host || !is_float(view.dtype)) continue;
    values.resize(static_cast<std::size_t>(view.numel()));
    copy(view, TensorView::dense(values.data(), DType::f32, view.shape));
    if (!std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); })) not_finite_ = true;
  }
}

}  // namespace comfytp::runtime
