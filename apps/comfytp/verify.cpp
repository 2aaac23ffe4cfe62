// comfytp verify: the split model against the whole one.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
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
  int steps = 1;
  std::uint64_t seed = 1;
  std::optional<double> tolerance;
  bool json = false;
};

struct Outcome {
  Sampled sampled;
  double step_seconds = 0;
  std::vector<std::int64_t> weight_bytes;
};

// The weights are gone when it returns, so that the two sides need not fit in memory together.
Outcome sample_on(const planner::Plan& plan, pipeline::Compute compute, const Options& options, const Sampled* along, const std::string& what,
                  bool notes = false) {
  Progress loading(what + ": loading weights");
  const auto denoiser = options.model.open(plan, compute, [&](auto done, auto total) { loading(done, total); });
  const auto call = options.call.call(denoiser->checkpoint().unet);
  const Interruptible guard(denoiser->engine());
  const auto compiled = denoiser->compile(call);
  if (notes) print_notes(denoiser->engine(), *compiled);
  denoiser->engine().load(*compiled);
  Progress sampling(what + ": sampling");
  auto sampled = sample(*denoiser, call, options.steps, options.seed, along, [&](int done) { sampling(done, options.steps); });
  const double seconds = median(sampled.step_seconds);
  return {std::move(sampled), seconds, denoiser->engine().stats().allocated_weight_bytes};
}

// What one device gives is compared with; where that is no number, the fault is not the split's.
void expect_finite(const Outcome& whole, DType compute) {
  const auto& outputs = whole.sampled.outputs;
  const auto wrong = std::count_if(outputs.begin(), outputs.end(), [](float v) { return !std::isfinite(v); });
  require(wrong == 0, "[verify] expected finite numbers from one device but {} of {} are infinite or NaN: its weights hold such numbers, or values go beyond what {} holds",
          wrong, outputs.size(), name_of(compute));
}

// Rounding in bf16 is far larger than the errors looked for, and differs between any two orders of summation. So there both sides are
// held against f32, call by call on the same inputs: the split may be as far off as one device is, and a little more. One call's two
// errors differ by chance by more than that where the image is small, so several are taken together.
constexpr double kErrorsRatio = 1.1;
constexpr int kLeastSteps = 4;

int verify(const Options& asked) {
  Options options = asked;
  const auto plan = options.model.plan();
  planner::Plan one;
  one.devices = {plan.devices.front()};
  one.devices.front().limit_bytes = 0;

  const auto compute = options.model.compute_choice();
  const bool by_ratio = compute.dtype != DType::f32 && !options.tolerance;
  if (by_ratio) options.steps = std::max(options.steps, kLeastSteps);
  std::optional<Sampled> exact;
  if (compute.dtype != DType::f32) exact = sample_on(one, {DType::f32}, options, nullptr, "one device in f32").sampled;
  const auto* along = exact ? &*exact : nullptr;
  const auto whole = sample_on(one, compute, options, along, "one device");
  expect_finite(whole, compute.dtype);
  const auto split = sample_on(plan, compute, options, along, fmt::format("{} devices", plan.devices.size()), true);
  const auto d = difference(split.sampled.outputs, whole.sampled.outputs);
  // Of the split and of one device against f32.
  const double split_error = exact ? difference(split.sampled.outputs, exact->outputs).relative : 0;
  const double whole_error = exact ? difference(whole.sampled.outputs, exact->outputs).relative : 0;
  const double tolerance = options.tolerance.value_or(1e-5);
  const bool passed = by_ratio ? split_error <= kErrorsRatio * whole_error : d.relative <= tolerance;  // false where it is no number

  if (options.json) {
    ordered_json report = {{"passed", passed},
                                 {"max_abs_error", d.max_abs},
                                 {"relative_error", d.relative},
                                 {"psnr_db", d.psnr_db},
                                 {"weight_bytes_per_device", split.weight_bytes},
                                 {"weight_bytes_total", whole.weight_bytes.at(0)},
                                 {"steps", options.steps},
                                 {"step_seconds", split.step_seconds},
                                 {"one_device_step_seconds", whole.step_seconds}};
    if (by_ratio)
      report["tolerated_ratio"] = kErrorsRatio;
    else
      report["tolerance"] = tolerance;
    if (exact) report["error_against_f32"] = split_error, report["one_device_error_against_f32"] = whole_error;
    fmt::print("{}\n", report.dump(2));
  } else {
    const auto total = whole.weight_bytes.at(0);
    std::vector<std::vector<std::string>> rows = {{"", "weights", "share"}, {"one device", bytes_text(total), ""}};
    for (std::size_t i = 0; i < plan.devices.size(); ++i)
      rows.push_back({plan.devices[i].name(), bytes_text(split.weight_bytes.at(i)),
                      percent_text(static_cast<double>(split.weight_bytes[i]), static_cast<double>(total))});
    print_table(rows);
    const auto verdict = passed ? "within" : "beyond";
    fmt::print("\nlargest error   {:.3g}\nrelative error  {:.3g}{}\nPSNR            {:.1f} dB\n", d.max_abs, d.relative,
               by_ratio ? "" : fmt::format(" ({} {:.3g})", verdict, tolerance), d.psnr_db);
    if (exact)
      fmt::print("against f32     {:.3g} split, {:.3g} on one device{}\n", split_error, whole_error,
                 by_ratio ? fmt::format(" ({} {} times that)", verdict, kErrorsRatio) : "");
    fmt::print("time of a step  {} split, {} on one device ({})\n", seconds_text(split.step_seconds), seconds_text(whole.step_seconds),
               options.steps == 1 ? "of the first call alone: bench is what times" : fmt::format("median of {}", options.steps));
  }
  return passed ? 0 : 1;
}

}  // namespace

void add_verify(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  auto* command =
      app.add_subcommand("verify", "Compares the split model with the whole on the first device, whatever its limit, from seeded noise; exit status 1 beyond tolerance");
  options->model.add_to(*command, true);
  options->call.add_to(*command);
  command->add_option("--steps", options->steps, "Denoising steps; an even batch is guided (f16 and bf16 without a tolerance: at least 4)")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000));
  command->add_option("--seed", options->seed, "Of the noise and the text")->capture_default_str();
  command->add_option("--tolerance", options->tolerance, "Of the relative error of the outputs of all steps (default 1e-5; f16 and bf16: 1.1 times one device's error against f32)")
      ->check([](const std::string& text) {
        double value = -1;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        const bool fits = error == std::errc() && end == text.data() + text.size() && value >= 0;
        return fits ? std::string() : fmt::format("expected a number from 0 on but got '{}'", text);
      });
  command->add_flag("--json", options->json, "Print JSON");
  command->callback([options, &chosen] { chosen = [options] { return verify(*options); }; });
}

}  // namespace comfytp::cli
