// comfytp run: one call of the denoiser, from a file to a file.
#include <fmt/format.h>

#include <filesystem>

#include "base/error.h"
#include "base/mapped_file.h"
#include "commands.h"
#include "host_tensor.h"
#include "interrupt.h"
#include "options.h"
#include "progress.h"
#include "weights/safetensors.h"

namespace comfytp::cli {
namespace {

struct Options {
  ModelOptions model;
  std::string inputs, output;
};

// diffusers names the residuals of a ControlNet after the arguments that take them.
std::string input_name(const std::string& key) {
  constexpr std::string_view kDown = "down_block_additional_residuals.";
  if (key.starts_with(kDown)) return "control." + key.substr(kDown.size());
  return key == "mid_block_additional_residual" ? "control.middle" : key;
}

std::map<std::string, HostTensor> read_inputs(const std::string& path) {
  const auto source = weights::open_safetensors(path_from_utf8(path));
  std::map<std::string, HostTensor> inputs;
  for (const auto& [key, info] : source->tensors()) {
    const auto name = input_name(key);
    require(!inputs.contains(name), "[run] expected '{}' once in {} but it stands under two names", name, path);
    HostTensor stored(info.dtype, info.shape);
    source->read(key, whole_box(info.shape), stored.view().data);
    if (name == "timesteps" && !is_float(info.dtype)) {  // often whole numbers
      HostTensor real(DType::f32, info.shape);
      copy(stored.view(), real.view());
      stored = std::move(real);
    }
    inputs.emplace(name, std::move(stored));
  }
  return inputs;
}

// What is read must outlive the call.
void keep_apart(const std::string& output, const std::string& read) {
  std::error_code none;
  require(!std::filesystem::equivalent(path_from_utf8(output), path_from_utf8(read), none),
          "[run] expected an --output that is not read from but got {}", output);
}

int run(const Options& options) {
  keep_apart(options.output, options.inputs);
  keep_apart(options.output, options.model.checkpoint);
  const auto plan = options.model.plan();
  auto tensors = read_inputs(options.inputs);
  Progress progress("loading weights");
  const auto denoiser = options.model.open(plan, options.model.compute_choice(), [&](auto done, auto total) { progress(done, total); });

  std::map<std::string, TensorView> inputs;
  for (auto& [name, tensor] : tensors) inputs[name] = tensor.view();
  // One timestep stands for all rows.
  if (const auto t = inputs.find("timesteps"), x = inputs.find("x"); t != inputs.end() && x != inputs.end() && !x->second.shape.empty())
    if (t->second.numel() == 1 && t->second.shape.size() <= 1) t->second.shape = {x->second.shape[0]}, t->second.strides = {0};
  const auto call = denoiser->call_of(inputs);
  const auto dtype = inputs.at("x").dtype;
  require(size_of(dtype) > 1, "[run] expected x of f64, f32, f16 or bf16, which output will have too, but got {}", name_of(dtype));
  HostTensor output(dtype, {call.batch, denoiser->checkpoint().unet.out_channels, call.height, call.width});
  {
    const Interruptible guard(denoiser->engine());
    denoiser->run(inputs, output.view());
  }
  check_interrupt();
  weights::Writer writer(path_from_utf8(options.output), {{"output", {output.dtype(), output.shape()}}});
  writer.append(output.bytes().data(), output.bytes().size());
  writer.finish();
  return 0;
}

}  // namespace

void add_run(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  auto* command = app.add_subcommand("run", "Calls the denoiser once, from a file to a file");
  options->model.add_to(*command, true);
  command
      ->add_option(
          "--inputs", options->inputs,
          "x [N,C,H,W], timesteps [N] or [1], context [N,L,D], for SDXL y [N,A]; of a ControlNet control.0, control.1, … and control.middle")
      ->required()
      ->type_name("IN.safetensors");
  command->add_option("--output", options->output, "Gets output [N,C,H,W] in the dtype of x")->required()->type_name("OUT.safetensors");
  command->callback([options, &chosen] { chosen = [options] { return run(*options); }; });
}

}  // namespace comfytp::cli
