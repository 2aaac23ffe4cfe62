// comfytp._core.Denoiser: a checkpoint's denoiser on the devices.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "arrays.h"
#include "base/error.h"
#include "engine.h"
#include "interruptible.h"
#include "module.h"
#include "pipeline/denoiser.h"

namespace comfytp::python {
namespace {

// What stands for one timestep a sample: a number or a single value is repeated, whole numbers become f32.
class Timesteps {
 public:
  Timesteps(nb::handle value, std::int64_t batch, Arrays& arrays) {
    if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())) {
      values_ = {nb::cast<float>(nb::float_(nb::borrow(value)))};
      view = {values_.data(), DType::f32, {batch}, {0}};
      return;
    }
    view = arrays.read(value, "input 'timesteps'");
    if (!is_float(view.dtype)) {
      values_.resize(static_cast<std::size_t>(view.numel()));
      const auto dense = TensorView::dense(values_.data(), DType::f32, view.shape);
      copy(view, dense);
      view = dense;
    }
    if (view.shape.empty() || view.shape == Shape{1}) view.shape = {batch}, view.strides = {0};
  }
  TensorView view;

 private:
  std::vector<float> values_;
};

class Denoiser {
 public:
  Denoiser(nb::handle weights, const std::string& devices, const std::string& mesh, const std::string& placement, const std::string& compute,
           const std::string& communicator, std::optional<std::int64_t> heads, std::optional<std::int64_t> head_dim, double timeout) {
    pipeline::DenoiserOptions options;
    options.engine = options_of(devices, mesh, placement, communicator, timeout, "");
    options.heads = {heads, head_dim};
    options.compute = pipeline::compute_from_name(compute);
    auto source = weights_of(weights);
    const nb::gil_scoped_release release;
    denoiser_ = std::make_unique<pipeline::Denoiser>(std::move(source), std::move(options));
  }
  Denoiser(const Denoiser&) = delete;
  // Workers are joined here, and the weights that they read may need the GIL to die.
  ~Denoiser() {
    const nb::gil_scoped_release release;
    denoiser_.reset();
  }

  bool run(const nb::dict& inputs, nb::handle output, const Stream& stream, Contents contents) {
    Arrays arrays;
    nb::dict rest;
    for (auto [name, array] : inputs)
      if (!name.equal(nb::str("timesteps"))) rest[name] = array;
    auto in = arrays.read_all(rest, "input");
    require(in.count("x") && !in["x"].shape.empty(), "[python] expected input 'x' of shape [N,C,H,W]");
    const Timesteps timesteps(inputs["timesteps"], in["x"].shape[0], arrays);
    in["timesteps"] = timesteps.view;
    const auto out = arrays.write(output, "output 'output'");
    const auto options = call_options(stream, std::move(contents));
    const auto program = compile_of(in);
    auto& engine = denoiser_->engine();
    const Views outputs = {{"output", out}};
    return run_call(engine, *program, outputs, options, turn_, [&] { engine.run(*program, in, outputs, options); },
                    [&](const auto& work) { run_interruptible(turn_, work, [&] { cancel(); }); });
  }
  void check() {
    const nb::gil_scoped_release release;
    denoiser_->engine().check();
  }
  bool synchronize() {
    run_interruptible(turn_, [&] { denoiser_->engine().synchronize(); }, [&] { cancel(); });
    return denoiser_->engine().take_not_finite();
  }
  void load(const models::UNetCall& call) {
    run_interruptible(
        turn_,
        [&] {
          auto compiled = denoiser_->compile(call);
          denoiser_->engine().load(*compiled);
        },
        [&] { cancel(); });
  }
  void unload() {
    const nb::gil_scoped_release release;
    denoiser_->engine().unload();
  }
  void cancel() { denoiser_->engine().cancel(); }
  nb::dict report(const models::UNetCall& call) {
    const auto compiled = compile(call);
    return report_of(denoiser_->engine(), *compiled);
  }
  nb::dict stats() { return stats_of(denoiser_->engine()); }

  nb::dict info() const {
    const auto& checkpoint = denoiser_->checkpoint();
    const auto& unet = checkpoint.unet;
    nb::dict info;
    info["family"] = unet.family;
    info["layout"] = checkpoint.layout;
    info["in_channels"] = unet.in_channels;
    info["out_channels"] = unet.out_channels;
    info["model_channels"] = unet.model_channels;
    info["context_dim"] = unet.context_dim;
    info["label_dim"] = unet.label_dim ? nb::object(nb::int_(*unet.label_dim)) : nb::none();
    info["levels"] = unet.levels;
    return info;
  }

 private:
  std::shared_ptr<runtime::Compiled> compile_of(const Views& inputs) { return compile(denoiser_->call_of(inputs)); }
  std::shared_ptr<runtime::Compiled> compile(const models::UNetCall& call) {
    const nb::gil_scoped_release release;
    return denoiser_->compile(call);
  }
  Turn turn_;
  std::unique_ptr<pipeline::Denoiser> denoiser_;
};

}  // namespace

void bind_denoiser(nb::module_& m) {
  using namespace nb::literals;
  using Size = std::optional<std::int64_t>;
  nb::class_<Denoiser>(m, "Denoiser")
      .def(nb::init<nb::handle, const std::string&, const std::string&, const std::string&, const std::string&, const std::string&, Size, Size,
                    double>(),
           "weights"_a, "devices"_a, "mesh"_a, "placement"_a, "compute"_a, "communicator"_a, "heads"_a.none(), "head_dim"_a.none(), "timeout"_a)
      .def("run", &Denoiser::run, "inputs"_a, "output"_a, "stream"_a = nb::none(), "contents"_a = Contents())
      .def("check", &Denoiser::check)
      .def("synchronize", &Denoiser::synchronize)
      .def(
          "load",
          [](Denoiser& d, std::int64_t batch, std::int64_t height, std::int64_t width, std::int64_t tokens, bool control) {
            d.load({batch, height, width, tokens, control});
          },
          "batch"_a, "height"_a, "width"_a, "tokens"_a, "control"_a)
      .def(
          "report",
          [](Denoiser& d, std::int64_t batch, std::int64_t height, std::int64_t width, std::int64_t tokens, bool control) {
            return d.report({batch, height, width, tokens, control});
          },
          "batch"_a, "height"_a, "width"_a, "tokens"_a, "control"_a)
      .def("unload", &Denoiser::unload)
      .def("cancel", &Denoiser::cancel)
      .def("stats", &Denoiser::stats)
      .def_prop_ro("info", &Denoiser::info);
}

}  // namespace comfytp::python
