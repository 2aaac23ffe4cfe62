// comfytp bench: how long a call takes.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <map>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/text.h"
#include "commands.h"
#include "interrupt.h"
#include "options.h"
#include "progress.h"
#include "sampling.h"
#include "statistics.h"
#include "table.h"

namespace comfytp::cli {
namespace {

using nlohmann::ordered_json;

struct Options {
  ModelOptions model;
  CallOptions call;
  int runs = 5, warmup = 1;
  bool json = false, profile = false;
  std::optional<std::string> rank_only, link;
};

// --rank-only R/N.
struct OnlyRank {
  std::size_t rank = 0, ranks = 1;
};

std::optional<OnlyRank> only_rank_from(const std::optional<std::string>& text) {
  if (!text) return std::nullopt;
  OnlyRank only;
  const char *at = text->data(), *end = at + text->size();
  const auto rank = std::from_chars(at, end, only.rank);
  const bool slash = rank.ec == std::errc() && rank.ptr != end && *rank.ptr == '/';
  const auto ranks = slash ? std::from_chars(rank.ptr + 1, end, only.ranks) : rank;
  require(slash && ranks.ec == std::errc() && ranks.ptr == end && only.rank < only.ranks && only.ranks <= 1024,
          "[rank-only] expected a rank and how many there are, as in 0/2, but got '{}'", *text);
  return only;
}

// What the device itself did for how much of the step: it computes when it neither waits nor moves anything.
ordered_json timeline_of(const runtime::StepProfile& profile, bool print) {
  std::vector<std::vector<std::string>> rows = {{"of the step", "count", "ms", "share"}};
  ordered_json json = ordered_json::array();
  double computing = profile.seconds;
  const auto add = [&](const std::string& what, std::int64_t count, double seconds) {
    json.push_back({{"what", what}, {"count", count}, {"seconds", seconds}, {"share", seconds / profile.seconds}});
    rows.push_back({what, count ? count_text(count) : "", fmt::format("{:.3f}", seconds * 1e3), percent_text(seconds, profile.seconds)});
  };
  for (const auto& [kind, spent] : profile.exchanges) {
    const bool beside = kind == "fetch_weight";
    if (!beside) computing -= spent.waiting_seconds + spent.moving_seconds;
    add(kind + (beside ? " waits, beside the rest" : " waits"), spent.calls, spent.waiting_seconds);
    add(kind + (beside ? " moves, beside the rest" : " moves"), spent.calls, spent.moving_seconds);
  }
  if (profile.host_exchange_seconds > 0) add("exchanges on the host", 0, profile.host_exchange_seconds);
  add("computes", 0, std::max(computing - profile.host_exchange_seconds, 0.0));
  if (print) {
    fmt::print("\n");
    print_table(rows);
  }
  return json;
}

// Where the time of a call goes: by kind of op, and the launches that take most.
ordered_json profile_of(const runtime::StepProfile& profile, bool print) {
  const auto& launches = profile.launches;
  struct Kind {
    std::string op;
    int count = 0;
    double seconds = 0, flops = 0, bytes = 0;
  };
  std::map<std::string, Kind> kinds, places;
  double total = 0;
  for (const auto& l : launches) {
    for (auto* group : {&kinds[l.op], &places[l.op + " " + l.shapes]}) {
      group->op = l.op;
      ++group->count;
      group->seconds += l.seconds;
      group->flops += l.flops;
      group->bytes += static_cast<double>(l.bytes);
    }
    total += l.seconds;
  }
  const auto listed = [&](const std::map<std::string, Kind>& groups, const std::string& title, std::size_t most) {
    std::vector<std::pair<std::string, Kind>> list(groups.begin(), groups.end());
    std::sort(list.begin(), list.end(), [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
    std::vector<std::vector<std::string>> rows = {{"count", "ms", "share", "TFLOP/s", "GB/s", title}};
    ordered_json json = ordered_json::array();
    for (const auto& [name, k] : list) {
      json.push_back({{title, name}, {"count", k.count}, {"seconds", k.seconds}, {"flops", k.flops}, {"bytes", k.bytes}});
      if (rows.size() <= most)
        rows.push_back({fmt::format("{}", k.count), fmt::format("{:.3f}", k.seconds * 1e3), fmt::format("{:.1f} %", 100 * k.seconds / total),
                        fmt::format("{:.1f}", k.flops / k.seconds / 1e12), fmt::format("{:.0f}", k.bytes / k.seconds / 1e9), name});
    }
    if (print) {
      fmt::print("\n");
      print_table(rows);
    }
    return json;
  };
  if (print) fmt::print(": a step {:.3f} ms; its {} launches one by one {:.3f} ms\n", profile.seconds * 1e3, launches.size(), total * 1e3);
  ordered_json report = {{"step_seconds", profile.seconds}, {"launch_seconds", total}};
  report["timeline"] = timeline_of(profile, print);
  report["ops"] = listed(kinds, "op", 30);
  report["launches"] = listed(places, "launch", 40);
  return report;
}

// The first seeded call's output where weights in fp8 are decoded at use.
std::vector<float> decoded_output(const Options& options, const planner::Plan& plan, const models::UNetCall& call) {
  const auto denoiser = options.model.open(plan, {DType::bf16});
  const Interruptible guard(denoiser->engine());
  SeededCall rows(denoiser->checkpoint().unet, call, 1);
  denoiser->run(rows.inputs(), rows.output_view());
  return rows.output;
}

int bench(const Options& options) {
  const auto only = only_rank_from(options.rank_only);
  std::optional<planner::Link> link;
  if (options.link) link = planner::link_from(*options.link);
  const auto plan = options.model.plan(only ? only->ranks : 1);
  require(!only || plan.devices.size() == only->ranks, "[rank-only] expected R/N of a mesh of N devices, R counted from 0, but N is {} and '{}' has {}",
          only ? only->ranks : 0, plan.mesh.to_string(), plan.devices.size());
  auto names = planner::rank_names(plan.devices);
  if (only) names = {fmt::format("{}, rank {} of {} alone", plan.devices[only->rank].name(), only->rank, only->ranks)};
  const auto compute = options.model.compute_choice();
  Progress loading("loading weights");
  const auto denoiser = options.model.open(plan, compute, [&](auto done, auto total) { loading(done, total); }, {},
                                           only ? std::optional(only->rank) : std::nullopt);
  const auto& unet = denoiser->checkpoint().unet;
  const auto call = options.call.call(unet);
  auto& engine = denoiser->engine();
  const Interruptible guard(engine);
  const auto compiled = denoiser->compile(call);
  print_notes(engine, *compiled);
  engine.load(*compiled);

  SeededCall rows(unet, call, 1);
  Progress running("running");
  std::vector<double> seconds;
  std::vector<std::vector<double>> collective_seconds(names.size());
  for (int i = -options.warmup; i < options.runs; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    denoiser->run(rows.inputs(), rows.output_view());
    const auto end = std::chrono::steady_clock::now();
    running(i + options.warmup + 1, options.runs + options.warmup);
    check_interrupt();
    if (i < 0) continue;
    seconds.push_back(std::chrono::duration<double>(end - begin).count());
    const auto stats = engine.stats();
    for (std::size_t d = 0; d < names.size(); ++d) collective_seconds[d].push_back(stats.collective_seconds.at(d));
  }

  std::vector<runtime::StepProfile> profiles;
  if (options.profile) profiles = engine.profile(*denoiser->compile(call));
  const auto stats = engine.stats();
  std::optional<double> predicted;
  planner::Exchanged exchanged;
  if (link) {
    exchanged = exchanged_by(engine.report(*denoiser->compile(call)).at(0));
    const auto card = card_of(plan.devices[only ? only->rank : 0]).value_or(planner::DeviceProfile());
    predicted = planner::predicted_seconds(median(seconds) + planner::fetching_seconds(card, exchanged.fetched), exchanged, *link);
  }
  const auto& axes = plan.mesh.axes();
  const bool shares = std::any_of(axes.begin(), axes.end(), [](const auto& axis) { return !axis.shares.empty(); });
  const auto& fp8 = engine.fp8_products(*compiled);
  std::optional<double> fp8_error;
  if (fp8 && fp8->linears == 0)
    fp8_error = 0;
  else if (fp8 && !only) {
    engine.unload();
    fp8_error = difference(rows.output, decoded_output(options, plan, call)).relative;
  }
  const auto [least, most] = std::minmax_element(seconds.begin(), seconds.end());
  ordered_json devices = ordered_json::array();
  // Where GPUs exchange without the host, --profile alone knows what that takes.
  const bool on_host = std::all_of(plan.devices.begin(), plan.devices.end(), [](const auto& device) { return device.kind == "cpu"; });
  std::vector<std::vector<std::string>> rows_text = {{"device", "peak memory", "weights", "activations"}};
  if (on_host) rows_text[0].push_back("in collectives");
  for (std::size_t d = 0; d < names.size(); ++d) {
    // One arena serves all calls and is never given back, so what is allocated now is the peak.
    const auto weights = stats.allocated_weight_bytes.at(d), activations = stats.allocated_activation_bytes.at(d);
    devices.push_back({{"name", names[d]}, {"peak_bytes", weights + activations}, {"weight_bytes", weights}, {"activation_bytes", activations}});
    rows_text.push_back({names[d], bytes_text(weights + activations), bytes_text(weights), bytes_text(activations)});
    if (!on_host) continue;
    const double spent = median(collective_seconds[d]);
    devices.back()["collective_seconds"] = spent;
    rows_text.back().push_back(seconds_text(spent));
  }
  if (options.json) {
    ordered_json report = {
        {"median_seconds", median(seconds)},  {"min_seconds", *least}, {"max_seconds", *most}, {"runs", options.runs},
        {"load_seconds", stats.load_seconds}, {"devices", devices}};
    if (predicted) report["predicted_seconds"] = *predicted;
    if (fp8_error) report["fp8_error"] = *fp8_error;
    for (std::size_t d = 0; d < profiles.size(); ++d) report["profile"][names[d]] = profile_of(profiles[d], false);
    fmt::print("{}\n", report.dump(2));
  } else {
    fmt::print("a call  {} (median of {}), {} to {}\n", seconds_text(median(seconds)), options.runs, seconds_text(*least),
               seconds_text(*most));
    if (only) fmt::print("        of one rank alone, which exchanges nothing\n");
    if (predicted)
      fmt::print("whole   {}, predicted and not measured: with what this rank exchanges over a link of {}{}{}\n", seconds_text(*predicted), link->to_string(),
                 exchanged.fetches ? ", fetches of weights beside what it computes" : "", shares ? "; a rank with a larger share may take longer" : "");
    if (fp8_error && *fp8_error != 0)
      fmt::print("error   {:.3g} of products in fp8, against decoded weights in bf16\n", *fp8_error);
    else if (fp8_error && fp8->linears > 0)
      fmt::print("fp8     nothing is multiplied in it, for the sizes do not allow it\n");
    fmt::print("load    {}\n\n", seconds_text(stats.load_seconds));
    print_table(rows_text);
    for (std::size_t d = 0; d < profiles.size(); ++d) {
      fmt::print("\n{}", names[d]);
      profile_of(profiles[d], true);
    }
  }
  return 0;
}

}  // namespace

void add_bench(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  auto* command = app.add_subcommand("bench", "Times calls of the denoiser: median, least and most, loading, memory, collectives");
  options->model.add_to(*command, true);
  options->call.add_to(*command);
  command->add_option("--runs", options->runs, "Calls that are timed")->capture_default_str()->check(CLI::Range(1, 100000));
  command->add_option("--warmup", options->warmup, "Calls before them")->capture_default_str()->check(CLI::Range(0, 1000));
  command->add_flag("--profile", options->profile, "Print where the time goes: every launch of a step timed alone, by op and by shapes");
  auto* rank = command->add_option("--rank-only", options->rank_only,
                                   "R/N: one rank of N runs alone and exchanges nothing; --devices may name one device for it");
  add_link(*command, options->link)->needs(rank);
  command->add_flag("--json", options->json, "Print JSON");
  command->callback([options, &chosen] { chosen = [options] { return bench(*options); }; });
}

}  // namespace comfytp::cli
