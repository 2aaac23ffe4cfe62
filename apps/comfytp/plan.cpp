// comfytp plan: what each device would hold and do, before anything is loaded.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

#include "backend/library.h"
#include "base/error.h"
#include "base/text.h"
#include "commands.h"
#include "graph/rewrites.h"
#include "graph/text.h"
#include "options.h"
#include "planner/profile.h"
#include "sharding/strategy.h"
#include "table.h"

namespace comfytp::cli {
namespace {

using nlohmann::ordered_json;

struct Options {
  ModelOptions model;
  CallOptions call;
  std::optional<std::string> profile, link;
  bool json = false, dump = false;
};

// What is known of one rank's device without running on it.
struct Rank {
  std::string name;                                 // of the rank: the device's may stand for several
  std::optional<planner::DeviceProfile> profile;
  std::string absent;                               // why the device is not to be had; then a CPU's kernels stand in for its
  std::int64_t needed = 0;                          // bytes
  double compute_seconds = 0, link_seconds = 0;     // of a step, by the profile
  double predicted_seconds = 0;                     // of a step, exchanges over --link included; 0: not known
};

// Of the whole: the slowest rank's; 0 where one is not known.
double predicted_seconds(const std::vector<Rank>& ranks) {
  double most = 0;
  for (const auto& rank : ranks) {
    if (rank.predicted_seconds == 0) return 0;
    most = std::max(most, rank.predicted_seconds);
  }
  return most;
}

// The whole model's weights, and the arithmetic of a step of it.
struct Whole {
  std::int64_t weight_bytes = 0;
  double flops = 0;
};

Whole whole_of(const graph::Graph& graph, const models::UNet& unet) {
  Whole whole;
  for (const auto& [key, info] : unet.tensors) whole.weight_bytes += info.bytes();
  const auto varies = graph::varies_per_call(graph);
  for (std::size_t n = 0; n < varies.size(); ++n)
    if (const auto& node = graph.nodes()[n]; varies[n]) whole.flops += node.op->flops(graph.context(node));
  return whole;
}

ordered_json to_json(const planner::Plan& plan, const Options& options, const models::UNetCall& call, const Whole& whole,
                     const std::vector<runtime::DeviceReport>& devices, const std::vector<Rank>& ranks, const std::vector<std::string>& notes) {
  ordered_json report = ordered_json::array();
  for (std::size_t i = 0; i < devices.size(); ++i) {
    const auto& d = devices[i];
    ordered_json collectives = ordered_json::object();
    for (const auto& [kind, c] : d.collectives) collectives[kind] = {{"count", c.count}, {"bytes", c.bytes}};
    report.push_back({{"name", ranks[i].name},
                      {"weight_bytes", d.weight_bytes},
                      {"weight_share", static_cast<double>(d.weight_bytes) / static_cast<double>(whole.weight_bytes)},
                      {"flops", d.flops},
                      {"flops_share", d.flops / whole.flops},
                      {"activation_bytes", d.activation_bytes},
                      {"collectives", collectives}});
    if (const auto& p = ranks[i].profile)
      report.back()["profile"] = {{"model", p->model},
                                  {"assumed", p->assumed},
                                  {"memory_bytes", p->memory_bytes},
                                  {"compute_seconds", ranks[i].compute_seconds},
                                  {"link_seconds", ranks[i].link_seconds}};
    if (ranks[i].predicted_seconds > 0) report.back()["predicted_seconds"] = ranks[i].predicted_seconds;
  }
  auto root = ordered_json::parse(planner::to_json(plan));
  root["call"] = {{"width", call.width * 8},
                  {"height", call.height * 8},
                  {"batch", call.batch},
                  {"tokens", call.tokens},
                  {"compute", options.model.compute_name()}};
  root["report"] = {{"weight_bytes_total", whole.weight_bytes}, {"flops_total", whole.flops}, {"devices", report}, {"notes", notes}};
  if (const double predicted = predicted_seconds(ranks); predicted > 0) root["report"]["predicted_seconds"] = predicted;
  return root;
}

void print(const planner::Plan& plan, const models::UNetCall& call, const Whole& whole, const std::vector<runtime::DeviceReport>& devices,
           const std::vector<Rank>& ranks, const std::vector<std::string>& notes, const std::optional<planner::Link>& link) {
  const auto mesh = plan.mesh.to_string();
  fmt::print("mesh {}, weights {}, {}x{} pixels, batch {}, {} tokens\n", mesh.empty() ? "of one device" : mesh,
             plan.placement == sharding::Placement::gathered ? "gathered" : "resident", call.width * 8, call.height * 8, call.batch,
             call.tokens);
  fmt::print("the model: weights {}, a step {:.1f} GFLOP\n\n", bytes_text(whole.weight_bytes), whole.flops / 1e9);
  std::vector<std::vector<std::string>> rows = {
      {"device", "weights", "share", "arithmetic", "share", "activations", "collectives", "bytes"}};
  for (std::size_t i = 0; i < devices.size(); ++i) {
    const auto& d = devices[i];
    runtime::DeviceReport::Collective sum;
    for (const auto& [kind, c] : d.collectives) sum.count += c.count, sum.bytes += c.bytes;
    rows.push_back({ranks[i].name, bytes_text(d.weight_bytes),
                    percent_text(static_cast<double>(d.weight_bytes), static_cast<double>(whole.weight_bytes)),
                    fmt::format("{:.1f} GFLOP", d.flops / 1e9), percent_text(d.flops, whole.flops), bytes_text(d.activation_bytes),
                    count_text(sum.count), bytes_text(sum.bytes)});
  }
  print_table(rows);
  if (plan.devices.size() > 1) {
    fmt::print("\n");
    rows = {{"collectives of a step", "kind", "count", "bytes"}};
    for (std::size_t i = 0; i < devices.size(); ++i)
      for (const auto& [kind, c] : devices[i].collectives) rows.push_back({ranks[i].name, kind, count_text(c.count), bytes_text(c.bytes)});
    print_table(rows);
  }
  rows = {{"at full rates", "card", "memory", "needed", "a step computes", "and sends"}};
  for (const auto& r : ranks)
    if (r.profile)
      rows.push_back({r.name, r.profile->model + (r.profile->assumed ? " (assumed)" : ""),
                      r.profile->memory_bytes ? bytes_text(r.profile->memory_bytes) : "-", bytes_text(r.needed),
                      r.compute_seconds > 0 ? seconds_text(r.compute_seconds) : "-", seconds_text(r.link_seconds)});
  if (rows.size() > 1) {
    fmt::print("\n");
    print_table(rows);
  }
  if (const double predicted = predicted_seconds(ranks); predicted > 0)
    fmt::print("\npredicted, not measured: {} a step over a link of {}\n", seconds_text(predicted), link->to_string());
  for (const auto& note : notes) fmt::print("note: {}\n", note);
}

// A line of the text form with the sharding of the values that it makes.
void print_sharded(const graph::Graph& graph, const sharding::Partition& partition) {
  std::string text = graph::to_text(graph);
  std::size_t at = 0;
  while (at < text.size()) {
    const auto end = std::min(text.find('\n', at), text.size());
    const std::string_view line(text.data() + at, end - at);
    fmt::print("{}", line);
    std::size_t id = 0;
    if (line.starts_with('%')) {
      std::from_chars(line.data() + 1, line.data() + line.size(), id);
      fmt::print("  # {}", sharding::to_string(partition.values.at(id), partition.mesh));
    }
    fmt::print("\n");
    at = end + 1;
  }
}

void dump(const graph::Graph& whole, const sharding::Mesh& mesh, const sharding::Partition& partition, const std::vector<Rank>& ranks) {
  fmt::print("\n# what is cut along which axis\n");
  for (const auto& group : sharding::decide(whole, mesh).groups) fmt::print("# {}\n", group);
  fmt::print("\n# the graph before partitioning, with the sharding of each value\n");
  print_sharded(whole, partition);
  for (std::size_t d = 0; d < partition.devices.size(); ++d)
    fmt::print("\n# the graph of {} after partitioning\n{}", ranks[d].name, graph::to_text(partition.devices[d]));
}

planner::Profile read_profile(const std::optional<std::string>& path) {
  if (!path) return {};
  try {
    return planner::profile_from_json(read_text(*path));
  } catch (const Error& error) {
    fail("{}: {}", *path, error.what());
  }
}

// The rates are the profile's, else those of the card that is here.
void predict(Rank& rank, const backend::DeviceSpec& spec, const runtime::DeviceReport& device, const planner::Exchanged& exchanged, const planner::Link& link,
             DType compute, std::vector<std::string>& notes) {
  const auto known = rank.profile ? rank.profile : card_of(spec);
  const double alone = known ? planner::expected_seconds(*known, device.launches, compute) : 0;
  if (alone > 0)
    rank.predicted_seconds = planner::predicted_seconds(alone + planner::fetching_seconds(*known, exchanged.fetched), exchanged, link);
  else
    notes.push_back(fmt::format("no time is predicted, for the rates of {} are not known: --profile FILE says them", rank.name));
}

int plan(const Options& options) {
  auto plan = options.model.plan();
  const auto profile = read_profile(options.profile);
  std::optional<planner::Link> link;
  if (options.link) link = planner::link_from(*options.link);
  const auto compute = options.model.compute_choice();
  std::vector<Rank> ranks;
  for (const auto& name : planner::rank_names(plan.devices)) ranks.push_back({name, {}, {}, 0, 0, 0, 0});
  // Nothing runs, so a GPU need not be there. A CPU that stands in for one does not compute in f16; bf16 is as large.
  auto sized = compute;
  std::vector<std::unique_ptr<backend::Device>> opened;
  for (std::size_t d = 0; d < ranks.size(); ++d) {
    const int position = static_cast<int>(d), count = static_cast<int>(ranks.size());
    try {
      opened.push_back(backend::open_device(plan.devices[d], position, count));
    } catch (const Error& error) {
      if (plan.devices[d].kind != "cuda") throw;
      ranks[d].absent = error.what();
      opened.push_back(backend::open_device({"cpu", position, 0}, position, count));
      if (sized.dtype == DType::f16) sized.dtype = DType::bf16;
    }
  }
  const auto denoiser = options.model.open(plan, sized, {}, [&](const auto&, int position, int) { return std::move(opened[static_cast<std::size_t>(position)]); });
  const auto& unet = denoiser->checkpoint().unet;
  const auto call = options.call.call(unet);
  const auto compiled = denoiser->compile(call);
  const auto devices = denoiser->engine().report(*compiled);
  auto notes = denoiser->engine().notes(*compiled);
  for (std::size_t d = 0; d < devices.size(); ++d) {
    auto& rank = ranks[d];
    rank.needed = devices[d].weight_bytes + devices[d].activation_bytes;
    if (profile.devices.contains(plan.devices[d].name()) || !rank.absent.empty()) rank.profile = planner::profile_of(plan.devices[d], profile);
    if (const auto limit = plan.devices[d].limit_bytes; limit && rank.needed > limit)
      notes.push_back(fmt::format("{} needs {}, more than its limit of {}", rank.name, bytes_text(rank.needed), bytes_text(limit)));
    const auto exchanged = exchanged_by(devices[d]);
    if (link) predict(rank, plan.devices[d], devices[d], exchanged, *link, compute.dtype, notes);
    if (!rank.profile) continue;
    rank.compute_seconds = planner::compute_seconds(*rank.profile, devices[d].flops, compute.dtype);
    rank.link_seconds = link.value_or(planner::Link{planner::link_bytes_per_second(profile), 0})
                            .seconds(exchanged.collectives + exchanged.fetches, exchanged.bytes + exchanged.fetched);
    if (!rank.absent.empty())
      notes.push_back(fmt::format("{} is not here ({}): activations are what a cpu would take{}", rank.name, rank.absent,
                                  rank.profile->assumed ? "; its card is assumed, --profile FILE says which it is" : ""));
  }

  std::map<std::string, std::int64_t> together;  // ranks of one device share its memory
  for (std::size_t d = 0; d < ranks.size(); ++d) together[plan.devices[d].name()] += ranks[d].needed;
  for (std::size_t d = 0; d < ranks.size(); ++d) {
    auto& needed = together[plan.devices[d].name()];
    if (const auto& p = ranks[d].profile; p && p->memory_bytes && needed > p->memory_bytes)
      notes.push_back(fmt::format("{} needs {}, more than the {} of its {}", plan.devices[d].name(), bytes_text(needed), bytes_text(p->memory_bytes), p->model));
    needed = 0;  // said once
  }

  const auto whole_graph = graph::normalise(models::build_unet(unet, call, compute.dtype));
  const auto whole = whole_of(whole_graph, unet);
  plan.mesh.cuts = sharding::decide(whole_graph, plan.mesh, planner::least_work(plan.devices)).cuts;
  if (options.json) {
    fmt::print("{}\n", to_json(plan, options, call, whole, devices, ranks, notes).dump(2));
  } else {
    print(plan, call, whole, devices, ranks, notes, link);
    if (options.dump) dump(whole_graph, plan.mesh, denoiser->engine().partition(*compiled), ranks);
  }
  return 0;
}

}  // namespace

void add_plan(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  auto* command = app.add_subcommand("plan", "Shows what each device would hold, compute and send; nothing is loaded");
  options->model.add_to(*command, true);
  options->call.add_to(*command);
  command
      ->add_option("--profile", options->profile,
                   "JSON with the devices' models, memory and rates (src/planner/profile.h): so a plan for devices that are not here says what fits")
      ->type_name("FILE");
  add_link(*command, options->link);
  auto* json = command->add_flag("--json", options->json, "Print JSON, which run, verify and bench take as --plan FILE");
  command
      ->add_flag("--dump", options->dump,
                 "Print the graph before and after partitioning, each value's sharding and each collective's reason")
      ->excludes(json);
  command->callback([options, &chosen] { chosen = [options] { return plan(*options); }; });
}

}  // namespace comfytp::cli
