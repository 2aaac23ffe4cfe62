// A few denoising steps from seeded noise, for comparing and timing.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "pipeline/denoiser.h"

namespace comfytp::cli {

/// The inputs of a call, drawn from a seed: the same for every device plan, size and thread count.
class SeededCall {
 public:
  SeededCall(const models::UNet& unet, const models::UNetCall& call, std::uint64_t seed);

  /// The latent [N,C,H,W] that the model is given, and the timestep of all rows.
  std::vector<float> x, timesteps, context, y, output;
  std::map<std::string, TensorView> inputs();
  TensorView output_view();

 private:
  const models::UNet unet_;
  const models::UNetCall call_;
};

struct Sampled {
  std::vector<float> outputs;        ///< of the denoiser in all steps
  std::vector<std::vector<float>> x;  ///< the input of each step
  std::vector<double> step_seconds;  ///< of each call
};

/// Euler's method (Karras et al. 2022, algorithm 1 without noise) over the noise schedule of Stable Diffusion, from the
/// highest noise to none: a step begins where the one before it ended, so an error in one is carried into all that follow.
/// With an even batch its halves are the two branches of classifier-free guidance. `along`: every step is given that trajectory's input
/// instead, so that errors are those of single calls. The first call is made once more before, so that no step's time has preparations.
Sampled sample(pipeline::Denoiser& denoiser, const models::UNetCall& call, int steps, std::uint64_t seed, const Sampled* along,
               const std::function<void(int done)>& progress);

/// Between two results.
struct Difference {
  double max_abs = 0;
  double relative = 0;  ///< |a - b| / |b| in the Euclidean norm
  double psnr_db = 0;   ///< against the range of b
};
constexpr double kEqualDb = 300;  ///< what stands for infinity, which JSON lacks
Difference difference(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace comfytp::cli
