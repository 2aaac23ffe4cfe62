#include "pipeline/denoiser.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "base/error.h"

namespace comfytp::pipeline {
namespace {

using models::UNetCall;
using Tensors = std::map<std::string, TensorView>;

bool same(const UNetCall& a, const UNetCall& b) {
  const auto sizes = [](const UNetCall& c) { return std::tuple(c.batch, c.height, c.width, c.tokens, c.control); };
  return sizes(a) == sizes(b);
}

const TensorView& input(const Tensors& inputs, const std::string& name, std::size_t rank, const std::string& dims) {
  const auto it = inputs.find(name);
  require(it != inputs.end(), "[denoiser] expected an input '{}' {} but got none", name, dims);
  require(it->second.shape.size() == rank, "[denoiser] expected input '{}' {} but got shape {}", name, dims, to_string(it->second.shape));
  return it->second;
}

runtime::EngineOptions engine_options(const DenoiserOptions& options) {
  auto engine = options.engine;
  engine.fp8_products = options.compute.fp8_products;
  return engine;
}

}  // namespace

Compute compute_from_name(const std::string& name) {
  require(name == "f32" || name == "f16" || name == "bf16" || name == "fp8", "[compute] expected f32, f16, bf16 or fp8 but got '{}'", name);
  if (name == "fp8") return {DType::bf16, true};
  return {dtype_from_name(name), false};
}

Denoiser::Denoiser(std::shared_ptr<const weights::Source> checkpoint, DenoiserOptions options)
    : options_(std::move(options)),
      checkpoint_(models::recognise(std::move(checkpoint), options_.heads)),
      engine_(engine_options(options_), checkpoint_.denoiser) {}

std::shared_ptr<runtime::Compiled> Denoiser::compile(const UNetCall& call) {
  std::lock_guard lock(mutex_);
  const auto known = std::find_if(programs_.begin(), programs_.end(), [&](const auto& p) { return same(p.first, call); });
  if (known != programs_.end()) {
    programs_.splice(programs_.begin(), programs_, known);
  } else {
    programs_.emplace_front(call, engine_.compile(models::build_unet(checkpoint_.unet, call, options_.compute.dtype)));
    if (programs_.size() > static_cast<std::size_t>(std::max(1, options_.engine.programs))) programs_.pop_back();
  }
  return programs_.front().second;
}

UNetCall Denoiser::call_of(const Tensors& inputs) const {
  const auto& unet = checkpoint_.unet;
  UNetCall call;
  const auto& x = input(inputs, "x", 4, "[N,C,H,W]").shape;
  const auto& context = input(inputs, "context", 3, "[N,L,D]").shape;
  call.batch = x[0], call.height = x[2], call.width = x[3], call.tokens = context[1];
  call.control = std::any_of(inputs.begin(), inputs.end(), [](const auto& i) { return i.first.starts_with("control."); });

  std::map<std::string, Shape> expected = {
      {"x", {call.batch, unet.in_channels, call.height, call.width}}, {"timesteps", {call.batch}}, {"context", {call.batch, call.tokens, unet.context_dim}}};
  if (unet.label_dim) expected["y"] = {call.batch, *unet.label_dim};
  if (call.control)
    for (auto& [name, shape] : models::control_inputs(unet, call)) expected[name] = shape;

  std::vector<std::string> names;
  for (const auto& [name, shape] : expected) names.push_back(name);
  for (const auto& [name, view] : inputs)
    require(expected.count(name) > 0, "[denoiser] expected the inputs {} for this {} model but got '{}'", fmt::join(names, ", "), unet.family, name);
  for (const auto& [name, shape] : expected) {
    const auto it = inputs.find(name);
    require(it != inputs.end(), "[denoiser] expected an input '{}' of shape {} for this {} model but got none", name, to_string(shape), unet.family);
    require(it->second.shape == shape, "[denoiser] expected input '{}' of shape {} for this {} model but got {}", name, to_string(shape), unet.family,
            to_string(it->second.shape));
    require(is_float(it->second.dtype), "[denoiser] expected input '{}' in a floating dtype but got {}", name, name_of(it->second.dtype));
  }
  require(call.batch >= 1 && call.height >= 1 && call.width >= 1 && call.tokens >= 1,
          "[denoiser] expected no empty inputs but got 'x' of shape {} and 'context' of shape {}", to_string(x), to_string(context));
  return call;
}

void Denoiser::run(const Tensors& inputs, const TensorView& output) {
  const auto compiled = compile(call_of(inputs));
  engine_.run(*compiled, inputs, {{"output", output}});
}

}  // namespace comfytp::pipeline
