// comfytp._core.Engine: one graph on the devices.
#include "engine.h"

#include <nanobind/stl/vector.h>

#include <algorithm>

#include "arrays.h"
#include "base/error.h"
#include "interruptible.h"
#include "module.h"

namespace comfytp::python {
namespace {

class Engine {
 public:
  Engine(const graph::Graph& graph, nb::handle weights, const std::string& devices, const std::string& mesh, const std::string& placement,
         const std::string& communicator, double timeout, const std::string& compute) {
    auto options = options_of(devices, mesh, placement, communicator, timeout, compute);
    auto source = weights_of(weights);
    const nb::gil_scoped_release release;
    graph::verify(graph);
    engine_ = std::make_unique<runtime::Engine>(std::move(options), std::move(source));
    compiled_ = engine_->compile(graph);
  }
  Engine(const Engine&) = delete;
  // Workers are joined here, and the weights that they read may need the GIL to die.
  ~Engine() {
    const nb::gil_scoped_release release;
    compiled_.reset();
    engine_.reset();
  }

  void load() {
    run_interruptible(turn_, [&] { engine_->load(*compiled_); }, [&] { engine_->cancel(); });
  }
  void unload() {
    const nb::gil_scoped_release release;
    engine_->unload();
  }
  bool run(const nb::dict& inputs, const nb::dict& outputs, const Stream& stream, Contents contents) {
    Arrays arrays;
    const auto in = arrays.read_all(inputs, "input"), out = arrays.write_all(outputs, "output");
    const auto options = call_options(stream, std::move(contents));
    return run_call(*engine_, *compiled_, out, options, turn_, [&] { engine_->run(*compiled_, in, out, options); },
                    [&](const auto& work) { run_interruptible(turn_, work, [&] { engine_->cancel(); }); });
  }
  void check() {
    const nb::gil_scoped_release release;
    engine_->check();
  }
  bool synchronize() {
    run_interruptible(turn_, [&] { engine_->synchronize(); }, [&] { engine_->cancel(); });
    return engine_->take_not_finite();
  }
  void cancel() { engine_->cancel(); }
  nb::dict report() const { return report_of(*engine_, *compiled_); }
  nb::dict stats() const { return stats_of(*engine_); }

 private:
  Turn turn_;
  std::unique_ptr<runtime::Engine> engine_;
  std::shared_ptr<runtime::Compiled> compiled_;
};

}  // namespace

runtime::EngineOptions options_of(const std::string& devices, const std::string& mesh, const std::string& placement, const std::string& communicator,
                                  double timeout, const std::string& compute) {
  require(compute.empty() || compute == "fp8", "[python] expected compute 'fp8' or None but got '{}'", compute);
  runtime::EngineOptions options;
  options.fp8_products = !compute.empty();
  auto& plan = options.plan;
  plan.devices = backend::parse_devices(devices);
  plan.mesh = mesh.empty() ? planner::default_mesh(plan.devices) : sharding::Mesh::parse(mesh);
  require(placement == "resident" || placement == "gathered", "[python] expected placement 'resident' or 'gathered' but got '{}'", placement);
  plan.placement = placement == "resident" ? sharding::Placement::resident : sharding::Placement::gathered;
  planner::check(plan);
  require(timeout > 0, "[python] expected a timeout above 0 seconds but got {}", timeout);
  options.timeout_seconds = timeout;
  options.route = comm::route_from_name(communicator);
  return options;
}

runtime::CallOptions call_options(const Stream& stream, Contents contents) {
  runtime::CallOptions options;
  if (stream) options.stream = reinterpret_cast<void*>(*stream);
  options.contents = std::move(contents);
  return options;
}

bool run_call(runtime::Engine& engine, const runtime::Compiled& compiled, const Views& outputs, const runtime::CallOptions& options, Turn& turn,
              const std::function<void()>& work, const std::function<void(const std::function<void()>&)>& interruptible) {
  const bool queued = options.stream && std::none_of(outputs.begin(), outputs.end(), [](const auto& output) { return output.second.host; });
  bool loaded = false;
  if (queued) {
    const nb::gil_scoped_release release;
    loaded = engine.loaded(compiled);
    if (loaded) {
      const std::lock_guard mine(turn);
      work();
    }
  }
  if (!loaded) interruptible(work);
  return engine.take_not_finite();
}

nb::dict report_of(const runtime::Engine& engine, const runtime::Compiled& compiled) {
  nb::list devices;
  for (const auto& device : engine.report(compiled)) {
    nb::dict collectives;
    for (const auto& [kind, of_kind] : device.collectives) {
      nb::dict entry;
      entry["count"] = of_kind.count;
      entry["bytes"] = of_kind.bytes;
      collectives[kind.c_str()] = entry;
    }
    nb::dict entry;
    entry["name"] = device.name;
    entry["weight_bytes"] = device.weight_bytes;
    entry["activation_bytes"] = device.activation_bytes;
    entry["flops"] = device.flops;
    entry["collectives"] = collectives;
    devices.append(entry);
  }
  nb::dict report;
  report["mesh"] = engine.mesh(compiled).to_string();
  report["devices"] = devices;
  report["notes"] = engine.notes(compiled);
  if (const auto& products = engine.fp8_products(compiled)) {
    nb::dict fp8;
    fp8["linears"] = products->linears;
    fp8["note"] = products->note;
    report["fp8"] = fp8;
  }
  return report;
}

nb::dict stats_of(const runtime::Engine& engine) {
  const auto stats = engine.stats();
  nb::dict all;
  all["calls"] = stats.calls;
  all["prologues"] = stats.prologues;
  all["programs_built"] = stats.programs_built;
  all["uploaded_bytes"] = stats.uploaded_bytes;
  all["load_seconds"] = stats.load_seconds;
  all["collective_seconds"] = stats.collective_seconds;
  all["allocated_weight_bytes"] = stats.allocated_weight_bytes;
  all["allocated_activation_bytes"] = stats.allocated_activation_bytes;
  return all;
}

void bind_engine(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<Engine>(m, "Engine")
      .def(nb::init<const graph::Graph&, nb::handle, const std::string&, const std::string&, const std::string&, const std::string&, double,
                    const std::string&>(),
           "graph"_a, "weights"_a, "devices"_a, "mesh"_a, "placement"_a, "communicator"_a, "timeout"_a, "compute"_a)
      .def("load", &Engine::load)
      .def("unload", &Engine::unload)
      .def("run", &Engine::run, "inputs"_a, "outputs"_a, "stream"_a = nb::none(), "contents"_a = Contents())
      .def("check", &Engine::check)
      .def("synchronize", &Engine::synchronize)
      .def("cancel", &Engine::cancel)
      .def("report", &Engine::report)
      .def("stats", &Engine::stats);
  m.def(
      "check_devices",
      [](const std::string& devices) {
        const auto specs = backend::parse_devices(devices);
        for (std::size_t i = 0; i < specs.size(); ++i) backend::open_device(specs[i], static_cast<int>(i), static_cast<int>(specs.size()));
      },
      "devices"_a, "Raises Error, naming the devices that exist, when one of the list does not.");
  m.def(
      "empty", [](const Shape& shape, const std::string& dtype) { return empty(shape, dtype_from_name(dtype)); }, "shape"_a, "dtype"_a,
      "An uninitialised array in host memory that speaks DLPack.");
  m.def(
      "dtype_of", [](nb::handle array) { return std::string(name_of(Arrays().read(array, "an array").dtype)); }, "array"_a,
      "The engine's name of an array's dtype.");
  m.def(
      "shape_of", [](nb::handle array) { return to_tuple(Arrays().read(array, "an array").shape); }, "array"_a, "An array's sizes.");
}

}  // namespace comfytp::python
