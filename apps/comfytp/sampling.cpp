#include "sampling.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "interrupt.h"
#include "random.h"

namespace comfytp::cli {
namespace {

constexpr int kTrainSteps = 1000;
constexpr float kGuidance = 7.5f;

// Noise of every training step relative to the image (Stable Diffusion's "scaled linear" betas).
std::vector<double> noise_levels() {
  const double first = std::sqrt(0.00085), last = std::sqrt(0.012);
  std::vector<double> levels;
  double alphas = 1;
  for (int t = 0; t < kTrainSteps; ++t) {
    const double root = first + (last - first) * t / (kTrainSteps - 1);
    alphas *= 1 - root * root;
    levels.push_back(std::sqrt((1 - alphas) / alphas));
  }
  return levels;
}

std::vector<float> normal(std::int64_t count, std::uint64_t seed, std::string_view name) {
  std::vector<float> values(static_cast<std::size_t>(count));
  NormalStream(seed, name).fill(values, 0, 0, 1);
  return values;
}

}  // namespace

SeededCall::SeededCall(const models::UNet& unet, const models::UNetCall& call, std::uint64_t seed)
    : x(normal(call.batch * unet.in_channels * call.height * call.width, seed, "x")),
      timesteps(static_cast<std::size_t>(call.batch), kTrainSteps / 2),
      context(normal(call.batch * call.tokens * unet.context_dim, seed, "context")),
      y(normal(call.batch * unet.label_dim.value_or(0), seed, "y")),
      output(static_cast<std::size_t>(call.batch * unet.out_channels * call.height * call.width)),
      unet_(unet),
      call_(call) {}

std::map<std::string, TensorView> SeededCall::inputs() {
  std::map<std::string, TensorView> inputs;
  inputs["x"] = TensorView::dense(x.data(), DType::f32, {call_.batch, unet_.in_channels, call_.height, call_.width});
  inputs["timesteps"] = TensorView::dense(timesteps.data(), DType::f32, {call_.batch});
  inputs["context"] = TensorView::dense(context.data(), DType::f32, {call_.batch, call_.tokens, unet_.context_dim});
  if (unet_.label_dim) inputs["y"] = TensorView::dense(y.data(), DType::f32, {call_.batch, *unet_.label_dim});
  return inputs;
}

TensorView SeededCall::output_view() {
  return TensorView::dense(output.data(), DType::f32, {call_.batch, unet_.out_channels, call_.height, call_.width});
}

Sampled sample(pipeline::Denoiser& denoiser, const models::UNetCall& call, int steps, std::uint64_t seed, const Sampled* along,
               const std::function<void(int done)>& progress) {
  const auto& unet = denoiser.checkpoint().unet;
  SeededCall rows(unet, call, seed);
  const bool guided = call.batch % 2 == 0;
  const std::int64_t images = guided ? call.batch / 2 : call.batch;
  // Channels beyond the latent's (inpainting's mask and image) stay as they were drawn.
  const std::int64_t pixels = call.height * call.width, channels = std::min(unet.in_channels, unet.out_channels);
  const auto levels = noise_levels();
  const auto step_of = [&](int i) { return kTrainSteps - 1 - i * kTrainSteps / steps; };
  const auto level_of = [&](int i) { return i < steps ? levels[static_cast<std::size_t>(step_of(i))] : 0.0; };

  Sampled sampled;
  auto latent = normal(images * channels * pixels, seed, "latent");
  for (float& v : latent) v *= static_cast<float>(level_of(0));
  for (int i = 0; i < steps; ++i) {
    check_interrupt();
    const double level = level_of(i);
    const auto scale = static_cast<float>(1 / std::sqrt(level * level + 1));
    for (std::int64_t row = 0; row < call.batch; ++row)
      for (std::int64_t k = 0; k < channels * pixels; ++k)
        rows.x[static_cast<std::size_t>(row * unet.in_channels * pixels + k)] =
            latent[static_cast<std::size_t>(row % images * channels * pixels + k)] * scale;
    if (along) rows.x = along->x.at(static_cast<std::size_t>(i));
    sampled.x.push_back(rows.x);
    std::fill(rows.timesteps.begin(), rows.timesteps.end(), static_cast<float>(step_of(i)));

    if (i == 0) denoiser.run(rows.inputs(), rows.output_view());
    const auto begin = std::chrono::steady_clock::now();
    denoiser.run(rows.inputs(), rows.output_view());
    sampled.step_seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    sampled.outputs.insert(sampled.outputs.end(), rows.output.begin(), rows.output.end());

    const auto change = static_cast<float>(level_of(i + 1) - level);
    const auto noise = [&](std::int64_t row, std::int64_t k) {
      return rows.output[static_cast<std::size_t>(row * unet.out_channels * pixels + k)];
    };
    for (std::int64_t image = 0; image < images; ++image)
      for (std::int64_t k = 0; k < channels * pixels; ++k) {
        float epsilon = noise(image, k);
        if (guided) epsilon += kGuidance * (noise(image + images, k) - epsilon);
        latent[static_cast<std::size_t>(image * channels * pixels + k)] += change * epsilon;
      }
    progress(i + 1);
  }
  return sampled;
}

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
  d.psnr_db = deviation == 0 ? kEqualDb : std::min(20 * std::log10((high - low) / deviation), kEqualDb);  // no number of no number
  return d;
}

}  // namespace comfytp::cli
