// comfytp verify: the split model against the whole one.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

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
  int steps = 1;
  std::uint64_t seed = 1;
  std::optional<double> tolerance;
  bool json = false;
};

struct Difference {
  double max_abs = 0;
  double relative = 0;  // |a - b| / |b| in the Euclidean norm
  double psnr_db = 0;   // against the range of b
};

constexpr double kEqualDb = 300;  // what stands for infinity, which JSON lacks

Difference difference(const std::vector<float>& a, const std::vector<float>& b) {
  Difference d;
  double squares = 0, reference = 0, low = b.at(0), high = b.at(0);
  for (std::size_t i = 0; i < b.size(); ++i) {
    const double delta = std::abs(static_cast<double>(a[i]) - b[i]);
    if (std::isnan(delta) || delta > d.max_abs) d.max_abs = delta;  // once no number, always none
    squares += delta * delta;
    reference += static_cast<double>(b[i]) * b[i];
    low = std::min<double>(low, b[i]);
    high = std::max<double>(high, b[i]);
  }
  d.relative = squares == 0 ? 0 : std::sqrt(squares / reference);
  const double deviation = std::sqrt(squares / static_cast<double>(b.size()));
  d.psnr_db = deviation == 0 ? kEqualDb : std::min(kEqualDb, 20 * std::log10((high - low) / deviation));
  return d;
}

struct Outcome {
  std::vector<float> outputs;
  double step_seconds = 0;
  std::vector<std::int64_t> weight_bytes;
};

// The weights are gone when it returns, so that the two sides need not fit in memory together.
Outcome sample_on(const planner::Plan& plan, const Options& options, const std::string& what) {
  Progress loading(what + ": loading weights");
  const auto denoiser = options.model.open(plan, [&](auto done, auto total) { loading(done, total); });
  const auto call = options.call.call(denoiser->checkpoint().unet);
  const Interruptible guard(denoiser->engine());
  const auto compiled = denoiser->compile(call);
  denoiser->engine().load(*compiled);
  Progress sampling(what + ": sampling");
  auto sampled = sample(*denoiser, call, options.steps, options.seed, [&](int done) { sampling(done, options.steps); });
  return {std::move(sampled.outputs), median(sampled.step_seconds), denoiser->engine().stats().allocated_weight_bytes};
}

int verify(const Options& options) {
  const auto plan = options.model.plan();
  planner::Plan one;
  one.devices = {plan.devices.front()};
  one.devices.front().limit_bytes = 0;

  const auto whole = sample_on(one, options, "one device");
  const auto split = sample_on(plan, options, fmt::format("{} devices", plan.devices.size()));
  const auto d = difference(split.outputs, whole.outputs);
  const double tolerance = options.tolerance.value_or(options.model.compute_dtype() == DType::bf16 ? 2e-2 : 1e-5);
  const bool passed = d.relative <= tolerance;  // false where it is no number

  if (options.json) {
    const ordered_json report = {{"passed", passed},
                                 {"max_abs_error", d.max_abs},
                                 {"relative_error", d.relative},
                                 {"psnr_db", d.psnr_db},
                                 {"tolerance", tolerance},
                                 {"weight_bytes_per_device", split.weight_bytes},
                                 {"weight_bytes_total", whole.weight_bytes.at(0)},
                                 {"steps", options.steps},
                                 {"step_seconds", split.step_seconds},
                                 {"one_device_step_seconds", whole.step_seconds}};
    fmt::print("{}\n", report.dump(2));
  } else {
    const auto total = whole.weight_bytes.at(0);
    std::vector<std::vector<std::string>> rows = {{"", "weights", "share"}, {"one device", bytes_text(total), ""}};
    for (std::size_t i = 0; i < plan.devices.size(); ++i)
      rows.push_back({plan.devices[i].name(), bytes_text(split.weight_bytes.at(i)),
                      percent_text(static_cast<double>(split.weight_bytes[i]), static_cast<double>(total))});
    print_table(rows);
    fmt::print("\nlargest error   {:.3g}\nrelative error  {:.3g} ({} {:.3g})\nPSNR            {:.1f} dB\n", d.max_abs, d.relative,
               passed ? "within" : "beyond", tolerance, d.psnr_db);
    fmt::print("time of a step  {} split, {} on one device\n", seconds_text(split.step_seconds), seconds_text(whole.step_seconds));
  }
  return passed ? 0 : 1;
}

}  // namespace

void add_verify(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  auto* command =
      app.add_subcommand("verify", "Compares the split model with one device from seeded noise; exit status 1 beyond tolerance");
  options->model.add_to(*command, true);
  options->call.add_to(*command);
  command->add_option("--steps", options->steps, "Denoising steps; an even batch is guided")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000));
  command->add_option("--seed", options->seed, "Of the noise and the text")->capture_default_str();
  command->add_option("--tolerance", options->tolerance, "Of the relative error of the outputs of all steps (default 1e-5, bf16 2e-2)")
      ->check(CLI::NonNegativeNumber);
  command->add_flag("--json", options->json, "Print JSON");
  command->callback([options, &chosen] { chosen = [options] { return verify(*options); }; });
}

}  // namespace comfytp::cli
