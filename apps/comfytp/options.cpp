#include "options.h"

#include <nlohmann/json.hpp>

#include <charconv>

#include "backend/library.h"
#include "base/error.h"
#include "base/mapped_file.h"
#include "interrupt.h"
#include "weights/checkpoint.h"

namespace comfytp::cli {
namespace {

constexpr std::int64_t kPixelsPerLatent = 8;  // the VAEs of these families halve an image three times

std::int64_t pixels(std::string_view text, const std::string& size) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  require(error == std::errc() && end == text.data() + text.size() && value > 0 && value % kPixelsPerLatent == 0 && value <= 1 << 16,
          "[size] expected WIDTHxHEIGHT in pixels, each a multiple of {} up to {}, as in 1024x768 but got '{}'", kPixelsPerLatent, 1 << 16,
          size);
  return value;
}

std::string default_size(const std::string& family) {
  if (family == "sd2") return "768x768";
  return family == "sdxl" || family == "sdxl-refiner" ? "1024x1024" : "512x512";
}

}  // namespace

std::string without_spaces(std::string list) {
  std::erase(list, ' ');
  return list;
}

std::string read_text(const std::string& path) {
  const MappedFile file(path_from_utf8(path));
  const auto bytes = file.bytes();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

CLI::Validator at_least_one() {
  return CLI::Validator(
      [](const std::string& text) {
        std::int64_t value = 0;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        const bool fits = error == std::errc() && end == text.data() + text.size() && value >= 1;
        return fits ? std::string() : fmt::format("expected a whole number of at least 1 but got '{}'", text);
      },
      "");
}

void add_heads(CLI::App& command, models::HeadOptions& heads) {
  auto* count = command.add_option("--heads", heads.heads, "Heads of every attention, where the family's rule does not hold");
  command.add_option("--head-dim", heads.head_dim, "Or the width of a head")->excludes(count)->check(at_least_one());
  count->check(at_least_one());
}

CLI::Option* add_link(CLI::App& command, std::optional<std::string>& link) {
  return command.add_option("--link", link,
                            "The link between two devices as rate (MB/s, GB/s) and latency (us, ms), as in 386GB/s,3us: says what a step is predicted to take over it");
}

planner::Exchanged exchanged_by(const runtime::DeviceReport& device) {
  planner::Exchanged all;
  for (const auto& [kind, c] : device.collectives) {
    const bool fetch = kind == "fetch_weight";
    (fetch ? all.fetches : all.collectives) += c.count;
    (fetch ? all.fetched : all.bytes) += c.bytes;
  }
  return all;
}

std::optional<planner::DeviceProfile> card_of(const backend::DeviceSpec& spec) {
  if (spec.kind != "cuda") return {};
  return planner::card(backend::cuda_library().devices().at(static_cast<std::size_t>(spec.index)).model);
}

void add_communicator(CLI::App& command, std::string& communicator) {
  command.add_option("--communicator", communicator,
                     "Between GPUs: peer (they read each other's memory), staged (through memory of the host) or best (peer where it is possible)")
      ->capture_default_str();
}

void ModelOptions::add_to(CLI::App& command, bool accepts_plan) {
  command.add_option("checkpoint", checkpoint, "A .safetensors file, its index, or a diffusers folder")->required()->type_name("CKPT");
  auto* d = command.add_option("--devices", devices, "Devices in the order of the mesh, as in cpu:0,cpu:1@2GiB (default cpu:0)");
  auto* m =
      command.add_option("--mesh", mesh, "Axes and their sizes, as in batch=2,tensor=2; tensor=2:1 gives unequal parts (default tensor=N)");
  auto* w =
      command.add_option("--weights", weights, "resident: a device holds what it computes with (default); gathered: each weight lies on one\n"
                                                "of them, and is fetched ahead of use");
  command.add_option("--compute", compute, "The dtype of activations and arithmetic: f32, f16 (GPUs), bf16, or fp8: bf16, and products with weights stored in fp8 in\n"
                                             "that, where a GPU can (default f32, or what --plan says)");
  add_communicator(command, communicator);
  add_heads(command, heads);
  if (accepts_plan)
    command.add_option("--plan", plan_file, "What `comfytp plan --json` printed, in place of --devices, --mesh and --weights")
        ->type_name("FILE")
        ->excludes(d)
        ->excludes(m)
        ->excludes(w);
}

void print_notes(const runtime::Engine& engine, const runtime::Compiled& compiled) {
  for (const auto& note : engine.notes(compiled)) fmt::print(stderr, "note: {}\n", note);
}

planner::Plan ModelOptions::plan(std::size_t ranks) const {
  if (plan_file) {
    try {
      return planner::from_json(read_text(*plan_file));
    } catch (const Error& error) {
      fail("{}: {}", *plan_file, error.what());
    }
  }
  planner::Plan plan;
  plan.devices = backend::parse_devices(without_spaces(devices.value_or("cpu:0")));
  if (plan.devices.size() == 1) plan.devices.resize(ranks, plan.devices[0]);
  plan.mesh = mesh ? sharding::Mesh::parse(without_spaces(*mesh)) : planner::default_mesh(plan.devices);
  plan.placement = planner::placement_from_name(weights.value_or("resident"));
  planner::check(plan);
  return plan;
}

std::string ModelOptions::compute_name() const {
  std::string name = compute.value_or("f32");
  if (!compute && plan_file) {
    const auto json = nlohmann::json::parse(read_text(*plan_file), nullptr, false);  // plan() says what is wrong with a broken file
    const auto at = nlohmann::json::json_pointer("/call/compute");
    if (json.is_object() && json.contains(at) && json.at(at).is_string()) name = json.at(at).get<std::string>();
  }
  return name;
}

std::unique_ptr<pipeline::Denoiser> ModelOptions::open(const planner::Plan& plan, pipeline::Compute compute,
                                                       std::function<void(std::int64_t, std::int64_t)> progress,
                                                       OpenDevice open_device, std::optional<std::size_t> only_rank) const {
  pipeline::DenoiserOptions options;
  options.engine.plan = plan;
  options.engine.only_rank = only_rank;
  options.engine.route = comm::route_from_name(communicator);
  options.engine.open = std::move(open_device);
  options.engine.progress = [progress = std::move(progress)](std::int64_t done, std::int64_t total) {
    check_interrupt();
    if (progress) progress(done, total);
  };
  options.heads = heads;
  options.compute = compute;
  return std::make_unique<pipeline::Denoiser>(weights::open_checkpoint(path_from_utf8(checkpoint)), std::move(options));
}

void CallOptions::add_to(CLI::App& command) {
  command.add_option("--size", size, "Width x height in pixels, as in 1024x768 (default: the family's own size)");
  command.add_option("--batch", batch, "Rows of a call; classifier-free guidance takes two an image")
      ->capture_default_str()
      ->check(at_least_one());
  command.add_option("--tokens", tokens, "Tokens of the text")->capture_default_str()->check(at_least_one());
}

models::UNetCall CallOptions::call(const models::UNet& unet) const {
  const std::string text = size.value_or(default_size(unet.family));
  const auto cross = text.find('x');
  require(cross != std::string::npos, "[size] expected WIDTHxHEIGHT in pixels as in 1024x768 but got '{}'", text);
  models::UNetCall call;
  call.batch = batch;
  call.width = pixels(std::string_view(text).substr(0, cross), text) / kPixelsPerLatent;
  call.height = pixels(std::string_view(text).substr(cross + 1), text) / kPixelsPerLatent;
  call.tokens = tokens;
  return call;
}

}  // namespace comfytp::cli
