#include "runtime/assembly.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "runtime/memory_plan.h"

namespace comfytp::runtime {

int Assembly::add_block(std::int64_t bytes) {
  blocks_.push_back({bytes, -1, -1, false});
  merged_into_.push_back(static_cast<int>(merged_into_.size()));
  offsets_.push_back(0);
  return merged_into_.back();
}

bool Assembly::lay_within(int part, int whole, std::int64_t offset) {
  if (root(part) != part || root(whole) == part) return false;
  merged_into_[static_cast<std::size_t>(part)] = whole;
  offsets_[static_cast<std::size_t>(part)] = offset;
  return true;
}

void Assembly::add(Phase phase, PendingLaunch launch) { (phase == Phase::step ? step_ : prologue_).push_back(std::move(launch)); }
void Assembly::add_input(Binding binding, Home home) { inputs_.emplace_back(std::move(binding), home); }
void Assembly::add_output(Binding binding, Home home) { outputs_.emplace_back(std::move(binding), home); }

int Assembly::root(int block) {
  while (merged_into_[static_cast<std::size_t>(block)] != block) block = merged_into_[static_cast<std::size_t>(block)];
  return block;
}

std::int64_t Assembly::offset_of(const Home& home) const {
  auto offset = home.offset;
  for (int block = home.block; merged_into_[static_cast<std::size_t>(block)] != block; block = merged_into_[static_cast<std::size_t>(block)])
    offset += offsets_[static_cast<std::size_t>(block)];
  return offset;
}

bool Assembly::lies_behind(const Home& home, const Home& other, std::int64_t bytes) {
  return root(home.block) == root(other.block) && offset_of(home) == offset_of(other) + bytes;
}

// Fetches that run aside are made a chunk of the weights ahead: when the first weight of a chunk is read, the next chunk begins to come. A
// fetch needs a stored weight alone, and the life of what it fills begins with it, so any earlier place is right; as whole weights and
// collectives are counted, it is the same one on all devices.
void Assembly::hoist(std::vector<PendingLaunch>& launches) {
  constexpr std::int64_t kChunks = 64, kMostBytes = std::int64_t{64} << 20;
  std::int64_t total = 0;
  for (const auto& launch : launches)
    if (launch.aside) total += launch.whole_bytes;
  const auto chunk = std::min(total / kChunks, kMostBytes);
  std::vector<std::size_t> key(launches.size()), order(launches.size());
  std::vector<std::size_t> chunk_of(launches.size());
  std::size_t previous = 0, current = 0, chunks = 0;  // where the reading of a chunk begins
  std::int64_t bytes = 0;
  for (std::size_t i = 0; i < launches.size(); ++i) {
    key[i] = order[i] = i;
    if (!launches[i].aside) continue;
    if (bytes >= chunk) previous = current, current = i, bytes = 0, ++chunks;
    bytes += launches[i].whole_bytes;
    key[i] = previous;
    chunk_of[i] = chunks;
  }
  // Of those at one place the fetch comes first: what stood there may be a fetch that has gone ahead itself.
  std::stable_sort(order.begin(), order.end(), [&](std::size_t x, std::size_t y) {
    return std::tuple(key[x], !launches[x].aside) < std::tuple(key[y], !launches[y].aside);
  });
  std::vector<PendingLaunch> hoisted;
  std::vector<std::size_t> hoisted_chunks;
  for (auto i : order) hoisted.push_back(std::move(launches[i])), hoisted_chunks.push_back(chunk_of[i]);
  launches = std::move(hoisted);
  await(launches, hoisted_chunks);
}

// Whoever reads first what is made aside waits for it. The first reader of a chunk of weights waits for all of it, since every wait between
// the queues costs the device a gap; the first chunk, 0, is waited for weight by weight, with nothing to hide behind.
void Assembly::await(std::vector<PendingLaunch>& launches, const std::vector<std::size_t>& chunks) {
  std::map<int, std::vector<std::size_t>> pending;  // by the memory that they fill, which may have other names
  std::set<std::size_t> awaited;
  for (std::size_t i = 0; i < launches.size(); ++i) {
    auto& after = launches[i].after;
    for (const auto& home : launches[i].in)
      if (const auto found = home.block < 0 ? pending.end() : pending.find(root(home.block)); found != pending.end()) {
        for (auto made : found->second)
          if (awaited.insert(made).second) after.push_back(made);
        pending.erase(found);
      }
    if (!launches[i].aside || launches[i].out[0].block < 0) continue;
    auto last = i;  // of its chunk
    while (chunks[i] > 0 && last + 1 < launches.size() && launches[last + 1].aside && chunks[last + 1] == chunks[i]) ++last;
    pending[root(launches[i].out[0].block)].push_back(last);
  }
}

void Assembly::finish(Program& program) {
  hoist(prologue_);
  hoist(step_);
  measure();
  each_launch([&](PendingLaunch& launch, int time) { reuse(launch, time); });
  place_blocks(program);
  for (auto* bindings : {&inputs_, &outputs_})
    for (auto& [binding, home] : *bindings) {
      binding.place = place(home);
      (bindings == &inputs_ ? program.inputs : program.outputs).push_back(std::move(binding));
    }
  each_launch([&](PendingLaunch& pending, int time) {
    Launch launch{std::move(pending.kernel), std::move(pending.collective), {}, {}, workspaces_[static_cast<std::size_t>(time)],
                  pending.aside, std::move(pending.after), std::move(pending.label), std::move(pending.work)};
    for (const auto& home : pending.in) launch.in.push_back(place(home));
    for (const auto& home : pending.out) launch.out.push_back(place(home));
    (time < step_begins() ? program.prologue : program.step).push_back(std::move(launch));
  });
}

void Assembly::use(const Home& home, int time) {
  if (home.block < 0) return;
  Block& b = block(home);
  b.first = b.first < 0 ? time : std::min(b.first, time);
  b.last = std::max(b.last, time);
}

void Assembly::measure() {
  for (const auto& [binding, home] : inputs_) use(home, binding.prompt ? 0 : step_begins());
  each_launch([&](PendingLaunch& launch, int time) {
    for (const auto& home : launch.in) use(home, time);
    for (const auto& home : launch.out) use(home, time);
  });
  hold(prologue_, 1);
  hold(step_, step_begins() + 1);
  for (const auto& [binding, home] : outputs_) use(home, end());
  for (auto& b : blocks_) b.kept = b.first < step_begins() && b.last > step_begins();
}

// A launch aside may read and write at any time until it has been waited for, at the latest behind its phase.
void Assembly::hold(const std::vector<PendingLaunch>& launches, int begin) {
  std::vector<std::size_t> running;
  const auto until = [&](std::size_t last, int time) {
    std::erase_if(running, [&](std::size_t i) {
      if (i > last) return false;
      for (const auto* homes : {&launches[i].in, &launches[i].out})
        for (const auto& home : *homes) use(home, time);
      return true;
    });
  };
  for (std::size_t i = 0; i < launches.size(); ++i) {
    const auto time = begin + static_cast<int>(i);
    if (const auto& after = launches[i].after; !after.empty()) until(*std::max_element(after.begin(), after.end()), time);
    if (launches[i].aside) running.push_back(i);
  }
  if (!launches.empty()) until(launches.size(), begin + static_cast<int>(launches.size()) - 1);
}

// Output 0 takes over the memory of an input that nobody needs afterwards. What is kept of a prompt is never overwritten.
void Assembly::reuse(PendingLaunch& launch, int time) {
  for (std::size_t i : launch.may_overwrite) {
    const int from = launch.in[i].block < 0 ? -1 : root(launch.in[i].block), to = root(launch.out[0].block);
    if (from < 0 || from == to || offset_of(launch.in[i]) != 0 || offset_of(launch.out[0]) != 0) continue;
    Block &in = blocks_[static_cast<std::size_t>(from)], &out = blocks_[static_cast<std::size_t>(to)];
    const auto readers = std::count_if(launch.in.begin(), launch.in.end(), [&](const Home& h) { return h.block >= 0 && root(h.block) == from; });
    if (in.last != time || in.kept || out.first != time || in.bytes != out.bytes || readers != 1) continue;
    in.last = out.last;
    in.kept = out.kept;
    merged_into_[static_cast<std::size_t>(to)] = from;
    return;
  }
}

void Assembly::place_blocks(Program& program) {
  places_.resize(blocks_.size());
  workspaces_.resize(static_cast<std::size_t>(end()) + 1);
  std::vector<Buffer> buffers;
  std::vector<Place*> homes;
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    const Block& b = blocks_[i];
    if (root(static_cast<int>(i)) != static_cast<int>(i) || b.first < 0) continue;
    if (b.kept) {
      places_[i] = {Place::Memory::prologue, program.prologue_bytes, nullptr};
      program.prologue_bytes += aligned(b.bytes);
      continue;
    }
    places_[i].memory = Place::Memory::arena;
    buffers.push_back({b.bytes, b.first, b.last, 0});
    homes.push_back(&places_[i]);
  }
  each_launch([&](PendingLaunch& launch, int time) {
    const auto bytes = launch.kernel ? launch.kernel->workspace_bytes() : 0;
    if (bytes == 0) return;
    auto& workspace = workspaces_[static_cast<std::size_t>(time)];
    workspace.memory = Place::Memory::arena;
    buffers.push_back({bytes, time, time, 0});
    homes.push_back(&workspace);
  });
  program.arena_bytes = assign_offsets(buffers);
  for (std::size_t i = 0; i < homes.size(); ++i) homes[i]->offset = buffers[i].offset;
}

Place Assembly::place(const Home& home) {
  if (home.block < 0) return {Place::Memory::weight, 0, home.weight};
  Place place = places_[static_cast<std::size_t>(root(home.block))];
  place.offset += offset_of(home);
  return place;
}

}  // namespace comfytp::runtime
