// comfytp synth: a checkpoint with seeded weights, for demos and tests.
#include <algorithm>
#include <cmath>
#include <thread>

#include "base/error.h"
#include "base/mapped_file.h"
#include "commands.h"
#include "interrupt.h"
#include "models/unet.h"
#include "progress.h"
#include "random.h"
#include "weights/safetensors.h"

namespace comfytp::cli {
namespace {

struct Options {
  std::string output, family, dtype = "f16";
  std::optional<std::int64_t> width;
  std::uint64_t seed = 1;
};

constexpr std::size_t kChunk = std::size_t{1} << 22;  // elements that are drawn at a time

// The distribution of a tensor's elements: matrices and kernels vary as much as torch's initialisation of them, norms are near 1.
struct Spread {
  float mean = 0, scale = 0;
};
Spread spread_of(const std::string& key, const Shape& shape) {
  if (shape.size() > 1) return {0, 1 / std::sqrt(3 * static_cast<float>(numel(shape) / shape[0]))};
  return key.ends_with(".weight") ? Spread{1, 0.1f} : Spread{0, 0.05f};
}

// Elements [first, first + count) of a tensor, in its dtype, drawn by all cores.
void draw(const NormalStream& stream, Spread spread, DType dtype, std::uint64_t first, std::size_t count, std::vector<std::byte>& out) {
  out.resize(count * static_cast<std::size_t>(size_of(dtype)));
  const auto part = [&](std::size_t lo, std::size_t hi) {
    std::vector<float> values(hi - lo);
    stream.fill(values, first + lo, spread.mean, spread.scale);
    convert(values.data(), DType::f32, out.data() + lo * static_cast<std::size_t>(size_of(dtype)), dtype,
            static_cast<std::int64_t>(hi - lo));
  };
  const std::size_t threads = count < 1 << 16 ? 1 : std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::jthread> workers;
  for (std::size_t t = 1; t < threads; ++t) workers.emplace_back(part, count * t / threads, count * (t + 1) / threads);
  part(0, count / threads);
}

int synth(const Options& options) {
  const auto dtype = dtype_from_name(options.dtype);
  require(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, "[synth] expected a dtype f32, f16 or bf16 but got '{}'",
          options.dtype);
  std::vector<std::pair<std::string, weights::TensorInfo>> tensors;
  std::int64_t total = 0, done = 0;
  for (const auto& [key, info] : models::unet_tensors(options.family, dtype, options.width)) {
    tensors.push_back({"model.diffusion_model." + key, info});
    total += info.bytes();
  }

  Progress progress("writing " + options.output);
  weights::Writer writer(path_from_utf8(options.output), tensors,
                         {{"comfytp.synth", fmt::format("{} seed {}", options.family, options.seed)}});
  std::vector<std::byte> chunk;
  for (const auto& [key, info] : tensors) {
    const NormalStream stream(options.seed, key);
    const auto spread = spread_of(key, info.shape);
    const auto count = static_cast<std::size_t>(numel(info.shape));
    for (std::size_t first = 0; first < count; first += kChunk) {
      check_interrupt();
      draw(stream, spread, dtype, first, std::min(kChunk, count - first), chunk);
      writer.append(chunk.data(), chunk.size());
      progress(done += static_cast<std::int64_t>(chunk.size()), total);
    }
  }
  writer.finish();
  return 0;
}

}  // namespace

void add_synth(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  auto* command = app.add_subcommand("synth", "Writes a checkpoint with seeded weights: a tool for demos and tests, it makes no pictures");
  command->add_option("output", options->output, "The file to write")->required()->type_name("OUT.safetensors");
  command->add_option("--family", options->family, "sd1, sd2, sdxl or sdxl-refiner")->required();
  command->add_option("--dtype", options->dtype, "f32, f16 or bf16")->capture_default_str();
  command->add_option("--width", options->width, "Channels of the first level, a multiple of 32 (default: the family's own)");
  command->add_option("--seed", options->seed, "Of the weights")->capture_default_str();
  command->callback([options, &chosen] { chosen = [options] { return synth(*options); }; });
}

}  // namespace comfytp::cli
