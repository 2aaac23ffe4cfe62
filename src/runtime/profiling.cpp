#include "runtime/profiling.h"

#include <algorithm>
#include <chrono>

#include "runtime/compiled.h"
#include "runtime/executor.h"

namespace comfytp::runtime {
namespace {

using Spent = std::map<std::string, comm::Communicator::Spent>;

Spent in_one(Spent after, const Spent& before, int runs) {
  for (auto& [kind, spent] : after) {
    const auto found = before.find(kind);
    const auto was = found == before.end() ? comm::Communicator::Spent{} : found->second;
    spent = {(spent.calls - was.calls) / runs, (spent.waiting_seconds - was.waiting_seconds) / runs,
             (spent.moving_seconds - was.moving_seconds) / runs};
  }
  return after;
}

}  // namespace

std::vector<StepProfile> profile_steps(Team& team, Compiled& compiled) {
  std::vector<StepProfile> profiles(compiled.programs.size());
  const auto executor = [&](std::size_t d) -> Executor& { return *compiled.executors[d][static_cast<std::size_t>(compiled.last_slot)]; };
  int runs = 1;  // as many on one device as on another
  for (const bool warm : {true, false}) {
    team.run([&](std::size_t d, backend::Device& device) {
      auto& profile = profiles[d];
      const auto before = executor(d).spent();
      const double host_before = executor(d).collective_seconds();
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < runs; ++i) executor(d).repeat_step(device, *team.abort());
      profile.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / runs;
      profile.host_exchange_seconds = (executor(d).collective_seconds() - host_before) / runs;
      profile.exchanges = in_one(executor(d).spent(), before, runs);
    });
    if (warm) runs = std::clamp(static_cast<int>(0.3 / std::max(profiles[0].seconds, 1e-6)), 1, 20);
  }
  team.run([&](std::size_t d, backend::Device& device) {
    const auto seconds = executor(d).time_launches(device, *team.abort());
    for (std::size_t i = 0; i < seconds.size(); ++i) {
      const Launch& launch = compiled.programs[d].step[i];
      profiles[d].launches.push_back({launch.label, launch.work.op, launch.work.shapes, seconds[i], launch.work.flops, launch.work.bytes});
    }
  });
  return profiles;
}

}  // namespace comfytp::runtime
