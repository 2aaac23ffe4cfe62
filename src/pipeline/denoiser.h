// A checkpoint's denoiser over several devices: what the command line and Python call.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>

#include "models/model.h"
#include "runtime/engine.h"

namespace comfytp::pipeline {

struct DenoiserOptions {
  runtime::EngineOptions engine;
  models::HeadOptions heads;
  DType compute = DType::f32;
};

class Denoiser {
 public:
  /// Recognises the model and opens the devices. Throws Error.
  Denoiser(std::shared_ptr<const weights::Source> checkpoint, DenoiserOptions options);

  const models::Checkpoint& checkpoint() const { return checkpoint_; }
  runtime::Engine& engine() { return engine_; }

  /// The program of a call of these sizes; built once.
  std::shared_ptr<runtime::Compiled> compile(const models::UNetCall& call);

  /// Checks names, shapes and dtypes of the inputs of a call against the model and returns its sizes. Throws Error that names the
  /// input, what was expected and what was got.
  models::UNetCall call_of(const std::map<std::string, TensorView>& inputs) const;

  /// x, timesteps, context, y and control residuals in; `output` has x's sizes with the model's output channels.
  void run(const std::map<std::string, TensorView>& inputs, const TensorView& output);

 private:
  DenoiserOptions options_;
  models::Checkpoint checkpoint_;
  runtime::Engine engine_;
};

}  // namespace comfytp::pipeline
