// comfytp collectives: what exchanges between devices take, and whether they are right.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"
#include "collective_case.h"
#include "commands.h"
#include "interrupt.h"
#include "options.h"
#include "progress.h"
#include "statistics.h"
#include "table.h"

namespace comfytp::cli {
namespace {

using nlohmann::ordered_json;

struct Options {
  std::string devices, communicators, dtypes = "f16,bf16,f32", ops = "all_reduce,all_gather,reduce_scatter,halo_exchange";
  std::optional<std::string> sizes;
  double timeout_seconds = 60;
  bool json = false;
};

// Odd ones too, and the 5.2 MB that SDXL's blocks sum at 1024x1024, batch 2. Those of CPUs take seconds each.
constexpr const char* kSizes = "1KB,4KB,16KB,64KB,100003,256KB,1MB,1234567,5242880,16MB,64MB";
constexpr const char* kHostSizes = "1KB,64KB,100003,1MB,5242880";

struct Measured {
  std::string communicator;
  CollectiveCase what;
  double seconds = 0, most_seconds = 0;  // of a call: the median and the most of some graphs
  bool right = false;
};

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  for (std::size_t at = 0; at <= list.size();) {
    const auto end = std::min(list.find(',', at), list.size());
    parts.push_back(list.substr(at, end - at));
    at = end + 1;
  }
  return parts;
}

// "64KB", "1MB" (powers of 1024), or bytes.
std::int64_t size_from(const std::string& text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const std::string_view unit(end, static_cast<std::size_t>(text.data() + text.size() - end));
  const double factor = unit.empty() || unit == "B" ? 1 : unit == "KB" ? 1024 : unit == "MB" ? 1024 * 1024 : 0;
  require(error == std::errc() && factor > 0 && value * factor >= 4 && value * factor <= (1 << 30),
          "[collectives] expected a size of 4 B to 1024 MB as in 64KB but got '{}'", text);
  return static_cast<std::int64_t>(value * factor);
}

// The ranks of one communicator, each on its thread, and the memory for one case.
class Ranks {
 public:
  Ranks(runtime::Team& team, comm::Route route, double timeout_seconds) : team_(team), buffers_(team.size()) {
    std::vector<comm::DeviceRank> ranks(team.size());
    team.run([&](std::size_t r, backend::Device& device) { ranks[r] = {device.spec().name(), device.spec().index, device.queue()}; });
    ends_ = comm::device_group(ranks, team.abort(), std::chrono::duration<double>(timeout_seconds), route);
  }
  ~Ranks() {
    try {
      team_.run([&](std::size_t r, backend::Device& device) { buffers_[r].release(device); });
    } catch (const std::exception&) {  // the device failed, which was said
    }
  }
  Ranks(const Ranks&) = delete;

  Measured measure(const std::string& communicator, const CollectiveCase& c) {
    Measured m{communicator, c, 0, 0, true};
    CaseTensors tensors(c);
    const int repeats = static_cast<int>(std::clamp<std::int64_t>((std::int64_t{64} << 20) / c.bytes, 4, 200));
    team_.run([&](std::size_t r, backend::Device& device) { buffers_[r].put(device, tensors.in[r].view(), tensors.out[r].view()); });
    const auto once = [&](std::size_t r) { c.call(*ends_[r], buffers_[r].in, buffers_[r].out); };
    std::vector<std::unique_ptr<backend::Recording>> recordings(team_.size());
    // All record before any runs: recording may allocate, which waits for kernels that wait for another device.
    team_.run([&](std::size_t r, backend::Device& device) {
      recordings[r] = device.record([&] {
        for (int i = 0; i < repeats; ++i) once(r);
      });
      device.synchronize();
    });
    std::vector<double> rounds;
    for (int round = 0; round < 12; ++round) {  // the first only warms up
      std::vector<double> seconds(team_.size());
      team_.run([&](std::size_t r, backend::Device& device) {
        const auto begin = std::chrono::steady_clock::now();
        if (recordings[r])
          recordings[r]->replay();
        else
          for (int i = 0; i < repeats; ++i) once(r);
        device.synchronize();
        seconds[r] = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / repeats;
        ends_[r]->check();
      });
      if (round > 0) rounds.push_back(*std::max_element(seconds.begin(), seconds.end()));
      check_interrupt();
    }
    m.seconds = median(rounds);
    m.most_seconds = *std::max_element(rounds.begin(), rounds.end());
    team_.run([&](std::size_t r, backend::Device& device) {
      recordings[r].reset();
      buffers_[r].get(device, tensors.out[r].view());
    });
    m.right = tensors.right();
    return m;
  }

 private:
  runtime::Team& team_;
  std::vector<std::unique_ptr<comm::Communicator>> ends_;
  std::vector<DeviceBuffers> buffers_;  // by rank
};

// What `plan --link` takes: seconds = latency + bytes / rate, with the least relative error over the all_reduces.
std::optional<planner::Link> link_of(const std::vector<Measured>& all, const std::string& communicator) {
  double n = 0, b = 0, bb = 0, t = 0, bt = 0;
  for (const auto& m : all) {
    if (m.communicator != communicator || m.what.op != "all_reduce") continue;
    const double bytes = static_cast<double>(m.what.traffic_bytes()), weight = 1 / (m.seconds * m.seconds);
    n += weight, b += weight * bytes, bb += weight * bytes * bytes, t += weight * m.seconds, bt += weight * bytes * m.seconds;
  }
  const double determinant = n * bb - b * b;
  if (!(determinant > 1e-9 * n * bb)) return std::nullopt;
  const double latency = (bb * t - b * bt) / determinant, seconds_a_byte = (n * bt - b * t) / determinant;
  if (seconds_a_byte <= 0) return std::nullopt;
  return planner::Link{1 / seconds_a_byte, std::max(latency, 1e-7)};
}

void print(const std::vector<Measured>& all, const std::vector<std::string>& communicators) {
  std::vector<std::vector<std::string>> rows = {{"collective", "dtype", "bytes"}};
  for (const auto& name : communicators) rows[0].insert(rows[0].end(), {fmt::format("{} us", name), "GB/s"});
  const auto cases = all.size() / communicators.size();
  for (std::size_t i = 0; i < cases; ++i) {
    const auto& what = all[i].what;
    rows.push_back({what.op, std::string(name_of(what.dtype)), count_text(what.bytes)});
    for (std::size_t k = 0; k < communicators.size(); ++k) {
      const auto& m = all[k * cases + i];
      rows.back().push_back(fmt::format("{:.1f}{}", m.seconds * 1e6, m.right ? "" : " WRONG"));
      rows.back().push_back(fmt::format("{:.1f}", static_cast<double>(what.traffic_bytes()) / m.seconds / 1e9));
    }
  }
  print_table(rows);
  for (const auto& name : communicators)
    if (const auto link = link_of(all, name)) fmt::print("{}: all_reduce is as over --link {}\n", name, link->to_string());
}

ordered_json to_json(const std::vector<Measured>& all, const std::vector<std::string>& communicators,
                     const std::vector<backend::DeviceSpec>& devices) {
  ordered_json root = {{"devices", ordered_json::array()}, {"links", ordered_json::object()}, {"results", ordered_json::array()}};
  for (const auto& d : devices) root["devices"].push_back(d.name());
  for (const auto& name : communicators)
    if (const auto link = link_of(all, name))
      root["links"][name] = {{"bytes_per_second", link->bytes_per_second}, {"latency_seconds", link->latency_seconds}, {"option", link->to_string()}};
  for (const auto& m : all)
    root["results"].push_back({{"communicator", m.communicator},
                               {"op", m.what.op},
                               {"dtype", std::string(name_of(m.what.dtype))},
                               {"bytes", m.what.bytes},
                               {"traffic_bytes", m.what.traffic_bytes()},
                               {"seconds", m.seconds},
                               {"most_seconds", m.most_seconds},
                               {"right", m.right}});
  return root;
}

int collectives(const Options& options) {
  const auto specs = backend::parse_devices(without_spaces(options.devices));
  const bool on_host = specs[0].kind == "cpu";
  const auto communicators = split(without_spaces(!options.communicators.empty() ? options.communicators : on_host ? "best" : "peer,staged"));
  std::vector<CollectiveCase> cases;
  for (const auto& op : split(without_spaces(options.ops)))
    for (const auto& dtype : split(without_spaces(options.dtypes)))
      for (const auto& size : split(without_spaces(options.sizes.value_or(on_host ? kHostSizes : kSizes))))
        cases.push_back(CollectiveCase(op, dtype_from_name(dtype), size_from(size), static_cast<int>(specs.size())));

  std::vector<std::unique_ptr<backend::Device>> devices;
  for (std::size_t i = 0; i < specs.size(); ++i)
    devices.push_back(backend::open_device(specs[i], static_cast<int>(i), static_cast<int>(specs.size())));
  runtime::Team team(std::move(devices));
  Progress running("running");
  std::vector<Measured> all;
  for (const auto& name : communicators) {
    Ranks ranks(team, comm::route_from_name(name), options.timeout_seconds);
    for (const auto& c : cases) {
      all.push_back(ranks.measure(name, c));
      running(static_cast<std::int64_t>(all.size()), static_cast<std::int64_t>(cases.size() * communicators.size()));
    }
  }
  if (options.json)
    fmt::print("{}\n", to_json(all, communicators, specs).dump(1));
  else
    print(all, communicators);
  const auto wrong = std::find_if(all.begin(), all.end(), [](const Measured& m) { return !m.right; });
  require(wrong == all.end(), "[collectives] expected {} of {} bytes of {} over '{}' to be what the host computes but it is not", wrong->what.op,
          wrong->what.bytes, name_of(wrong->what.dtype), wrong->communicator);
  return 0;
}

}  // namespace

void add_collectives(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  auto* command = app.add_subcommand("collectives", "Times exchanges between devices by size, and checks them against the host's sums");
  command->add_option("--devices", options->devices, "The devices, as in cuda:0,cuda:1; one may stand for several ranks")->required();
  command->add_option("--communicator", options->communicators, "peer, staged or best, or several of them (default peer,staged between GPUs)");
  command->add_option("--ops", options->ops, "Which collectives")->capture_default_str();
  command->add_option("--dtype", options->dtypes, "Of which elements: f16, bf16, f32")->capture_default_str();
  command->add_option("--sizes", options->sizes, fmt::format("Bytes of the whole tensor; of halo_exchange: that a rank gets from a neighbour (default {}; of CPUs {})",
                                                             kSizes, kHostSizes));
  command->add_option("--timeout", options->timeout_seconds, "Seconds that a device waits for another")->capture_default_str();
  command->add_flag("--json", options->json, "Print JSON");
  command->callback([options, &chosen] { chosen = [options] { return collectives(*options); }; });
}

}  // namespace comfytp::cli
