// A checkpoint's denoiser over several devices: what the command line and Python call.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "models/model.h"
#include "runtime/engine.h"

namespace comfytp::pipeline {

/// What "f32", "f16", "bf16" or "fp8" asks for; fp8 is bf16 with products in fp8 of what is stored in it. Throws Error.
struct Compute {
  DType dtype = DType::f32;
  bool fp8_products = false;
};
Compute compute_from_name(const std::string& name);

struct DenoiserOptions {
  runtime::EngineOptions engine;
  models::HeadOptions heads;
  Compute compute;
};

class Denoiser {
 public:
  /// Recognises the model and opens the devices. Throws Error.
  Denoiser(std::shared_ptr<const weights::Source> checkpoint, DenoiserOptions options);

  const models::Checkpoint& checkpoint() const { return checkpoint_; }
  runtime::Engine& engine() { return engine_; }

  /// The program of a call of these sizes; built once, and kept while it is among the engine's last `programs`.
  std::shared_ptr<runtime::Compiled> compile(const models::UNetCall& call);

  /// Checks names, shapes and dtypes of the inputs of a call against the model and returns its sizes. Throws Error that names the
  /// input, what was expected and what was got.
  models::UNetCall call_of(const std::map<std::string, TensorView>& inputs) const;

  /// Inputs: x [N,C,H,W], timesteps [N], context [N,L,D], y [N,A] where the model has one, and either none or all of the control
  /// residuals "control.0" …, "control.middle" (models/unet.h); any floating dtypes. `output`: [N,out_channels,H,W]. Throws as
  /// Engine::run.
  void run(const std::map<std::string, TensorView>& inputs, const TensorView& output);

 private:
  DenoiserOptions options_;
  models::Checkpoint checkpoint_;
  runtime::Engine engine_;
  std::mutex mutex_;
  std::list<std::pair<models::UNetCall, std::shared_ptr<runtime::Compiled>>> programs_;  // most recently used first
};

}  // namespace comfytp::pipeline
