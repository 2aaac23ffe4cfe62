// comfytp plan: what each device would hold and do, before anything is loaded.
#include <fmt/format.h>

#include <charconv>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "graph/rewrites.h"
#include "graph/text.h"
#include "options.h"
#include "sharding/strategy.h"
#include "table.h"

namespace comfytp::cli {
namespace {

using nlohmann::ordered_json;

struct Options {
  ModelOptions model;
  CallOptions call;
  bool json = false, dump = false;
};

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
                     const std::vector<runtime::DeviceReport>& devices, const std::vector<std::string>& notes) {
  ordered_json report = ordered_json::array();
  for (const auto& d : devices) {
    ordered_json collectives = ordered_json::object();
    for (const auto& [kind, c] : d.collectives) collectives[kind] = {{"count", c.count}, {"bytes", c.bytes}};
    report.push_back({{"name", d.name},
                      {"weight_bytes", d.weight_bytes},
                      {"weight_share", static_cast<double>(d.weight_bytes) / static_cast<double>(whole.weight_bytes)},
                      {"flops", d.flops},
                      {"flops_share", d.flops / whole.flops},
                      {"activation_bytes", d.activation_bytes},
                      {"collectives", collectives}});
  }
  auto root = ordered_json::parse(planner::to_json(plan));
  root["call"] = {{"width", call.width * 8},
                  {"height", call.height * 8},
                  {"batch", call.batch},
                  {"tokens", call.tokens},
                  {"compute", std::string(name_of(options.model.compute_dtype()))}};
  root["report"] = {{"weight_bytes_total", whole.weight_bytes}, {"flops_total", whole.flops}, {"devices", report}, {"notes", notes}};
  return root;
}

void print(const planner::Plan& plan, const models::UNetCall& call, const Whole& whole, const std::vector<runtime::DeviceReport>& devices,
           const std::vector<std::string>& notes) {
  const auto mesh = plan.mesh.to_string();
  fmt::print("mesh {}, weights {}, {}x{} pixels, batch {}, {} tokens\n", mesh.empty() ? "of one device" : mesh,
             plan.placement == sharding::Placement::gathered ? "gathered" : "resident", call.width * 8, call.height * 8, call.batch,
             call.tokens);
  fmt::print("the model: weights {}, a step {:.1f} GFLOP\n\n", bytes_text(whole.weight_bytes), whole.flops / 1e9);
  std::vector<std::vector<std::string>> rows = {
      {"device", "weights", "share", "arithmetic", "share", "activations", "collectives", "bytes"}};
  for (const auto& d : devices) {
    runtime::DeviceReport::Collective sum;
    for (const auto& [kind, c] : d.collectives) sum.count += c.count, sum.bytes += c.bytes;
    rows.push_back({d.name, bytes_text(d.weight_bytes),
                    percent_text(static_cast<double>(d.weight_bytes), static_cast<double>(whole.weight_bytes)),
                    fmt::format("{:.1f} GFLOP", d.flops / 1e9), percent_text(d.flops, whole.flops), bytes_text(d.activation_bytes),
                    count_text(sum.count), bytes_text(sum.bytes)});
  }
  print_table(rows);
  if (plan.devices.size() > 1) {
    fmt::print("\n");
    rows = {{"collectives of a step", "kind", "count", "bytes"}};
    for (const auto& d : devices)
      for (const auto& [kind, c] : d.collectives) rows.push_back({d.name, kind, count_text(c.count), bytes_text(c.bytes)});
    print_table(rows);
  }
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

void dump(const graph::Graph& whole, const sharding::Partition& partition, const std::vector<runtime::DeviceReport>& devices) {
  fmt::print("\n# what is cut along which axis\n");
  for (const auto& group : sharding::decide(whole, partition.mesh).groups) fmt::print("# {}\n", group);
  fmt::print("\n# the graph before partitioning, with the sharding of each value\n");
  print_sharded(whole, partition);
  for (std::size_t d = 0; d < partition.devices.size(); ++d)
    fmt::print("\n# the graph of {} after partitioning\n{}", devices[d].name, graph::to_text(partition.devices[d]));
}

int plan(const Options& options) {
  const auto plan = options.model.plan();
  const auto denoiser = options.model.open(plan);
  const auto& unet = denoiser->checkpoint().unet;
  const auto call = options.call.call(unet);
  const auto compiled = denoiser->compile(call);
  const auto devices = denoiser->engine().report(*compiled);
  auto notes = denoiser->engine().notes(*compiled);
  for (std::size_t d = 0; d < devices.size(); ++d)
    if (const auto limit = plan.devices[d].limit_bytes, needed = devices[d].weight_bytes + devices[d].activation_bytes;
        limit && needed > limit)
      notes.push_back(fmt::format("{} needs {}, more than its limit of {}", devices[d].name, bytes_text(needed), bytes_text(limit)));

  const auto whole_graph = graph::normalise(models::build_unet(unet, call, options.model.compute_dtype()));
  const auto whole = whole_of(whole_graph, unet);
  if (options.json) {
    fmt::print("{}\n", to_json(plan, options, call, whole, devices, notes).dump(2));
  } else {
    print(plan, call, whole, devices, notes);
    if (options.dump) dump(whole_graph, denoiser->engine().partition(*compiled), devices);
  }
  return 0;
}

}  // namespace

void add_plan(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  auto* command = app.add_subcommand("plan", "Shows what each device would hold, compute and send; nothing is loaded");
  options->model.add_to(*command, true);
  options->call.add_to(*command);
  auto* json = command->add_flag("--json", options->json, "Print JSON, which run, verify and bench take as --plan FILE");
  command
      ->add_flag("--dump", options->dump,
                 "Print the graph before and after partitioning, each value's sharding and each collective's reason")
      ->excludes(json);
  command->callback([options, &chosen] { chosen = [options] { return plan(*options); }; });
}

}  // namespace comfytp::cli
