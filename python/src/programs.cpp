// comfytp._core.Programs: several graphs over one set of weights.
#include <nanobind/stl/set.h>
#include <nanobind/stl/string.h>

#include <atomic>
#include <mutex>

#include "arrays.h"
#include "base/error.h"
#include "engine.h"
#include "interruptible.h"
#include "module.h"

namespace comfytp::python {
namespace {

using Tensors = std::map<std::string, weights::TensorInfo, std::less<>>;

// Weights that a Python object reads when they are asked for: tensors() and read(key, starts, stops).
class Asked final : public weights::Source {
 public:
  explicit Asked(nb::object reader) : reader_(new nb::object(std::move(reader)), [](nb::object* object) {
    const nb::gil_scoped_acquire gil;
    delete object;
  }) {
    for (auto [key, value] : nb::cast<nb::dict>(reader_->attr("tensors")())) {
      const auto entry = nb::cast<nb::tuple>(value);
      Shape shape;
      for (nb::handle size : entry[1]) shape.push_back(nb::cast<std::int64_t>(size));
      tensors_[nb::cast<std::string>(key)] = {dtype_from_name(nb::cast<std::string>(entry[0])), shape};
    }
  }
  std::string name() const override { return "the module"; }
  const Tensors& tensors() const override { return tensors_; }
  void read(std::string_view key, const Box& box, void* out) const override {
    const auto& stored = info(key);
    const nb::gil_scoped_acquire gil;
    Shape starts, stops;
    for (auto i : box) starts.push_back(i.lo), stops.push_back(i.hi);
    try {
      Arrays arrays;
      const auto part = arrays.read(reader_->attr("read")(std::string(key), to_tuple(starts), to_tuple(stops)), weights::in_quotes(key));
      require(part.dtype == stored.dtype && part.shape == shape_of(box), "[weights] expected {} of {} as {}{} but got {}{}", to_string(starts),
              weights::in_quotes(key), name_of(stored.dtype), to_string(shape_of(box)), name_of(part.dtype), to_string(part.shape));
      copy(part, TensorView::dense(out, stored.dtype, part.shape));
    } catch (const nb::python_error& error) {
      const auto type = nb::cast<std::string>(error.type().attr("__name__")), text = nb::cast<std::string>(nb::str(error.value()));
      const auto message = fmt::format("[weights] {} cannot be read: {}: {}", weights::in_quotes(key), type, text);
      if (type == "MemoryError" || type == "OutOfMemoryError") throw OutOfMemory(message);
      throw Error(message);
    }
  }

 private:
  std::shared_ptr<nb::object> reader_;
  Tensors tensors_;
};

// A set of weights to which more are added while no call runs.
class Growing final : public weights::Source {
 public:
  explicit Growing(std::shared_ptr<const weights::Source> first) { add(std::move(first)); }
  void add(std::shared_ptr<const weights::Source> source) {
    for (const auto& [key, info] : source->tensors()) {
      tensors_[key] = info;
      from_[key] = source.get();
    }
    sources_.push_back(std::move(source));
  }
  std::string name() const override { return sources_[0]->name(); }
  const Tensors& tensors() const override { return tensors_; }
  void read(std::string_view key, const Box& box, void* out) const override {
    info(key);
    from_.find(key)->second->read(key, box, out);
  }

 private:
  std::vector<std::shared_ptr<const weights::Source>> sources_;
  Tensors tensors_;
  std::map<std::string, const weights::Source*, std::less<>> from_;
};

struct Handle {
  std::shared_ptr<runtime::Compiled> compiled;
};

class Programs {
 public:
  Programs(nb::handle weights, const std::string& devices, const std::string& mesh, const std::string& placement, double timeout,
           const std::string& communicator, const std::string& compute) {
    auto options = options_of(devices, mesh, placement, communicator, timeout, compute);
    options.progress = [progress = progress_](std::int64_t done, std::int64_t total) {
      progress->done = done;
      progress->total = done < total ? total : 0;
    };
    const bool asked = nb::hasattr(weights, "tensors") && nb::hasattr(weights, "read");
    weights_ = std::make_shared<Growing>(asked ? std::make_shared<Asked>(nb::borrow(weights)) : weights_of(weights));
    const nb::gil_scoped_release release;
    engine_ = std::make_unique<runtime::Engine>(std::move(options), weights_);
  }
  Programs(const Programs&) = delete;
  ~Programs() {
    const nb::gil_scoped_release release;
    engine_.reset();
    weights_.reset();
  }

  void add_weights(nb::handle mapping) {
    auto source = weights_of(mapping);
    const nb::gil_scoped_release release;
    const std::lock_guard lock(calls_);
    weights_->add(std::move(source));
  }
  Handle compile(const graph::Graph& graph, const std::string& mesh) {
    const nb::gil_scoped_release release;
    const std::lock_guard lock(calls_);
    graph::verify(graph);
    return {mesh.empty() ? engine_->compile(graph) : engine_->compile(graph, sharding::Mesh::parse(mesh))};
  }
  void load(Handle& handle) {
    interruptible([&] { engine_->load(*handle.compiled); });
  }
  bool run(Handle& handle, const nb::dict& inputs, const nb::dict& outputs, const nb::object& watch, const Stream& stream, Contents contents) {
    Arrays arrays;
    const auto in = arrays.read_all(inputs, "input"), out = arrays.write_all(outputs, "output");
    const auto options = call_options(stream, std::move(contents));
    return run_call(*engine_, *handle.compiled, out, options, calls_, [&] { engine_->run(*handle.compiled, in, out, options); },
                    [&](const auto& work) { interruptible(work, watch); });
  }
  void check() {
    const nb::gil_scoped_release release;
    engine_->check();
  }
  bool synchronize(const nb::object& watch) {
    interruptible([&] { engine_->synchronize(); }, watch);
    return engine_->take_not_finite();
  }
  nb::tuple loading() const { return nb::make_tuple(progress_->done.load(), progress_->total.load()); }
  void unload() {
    const nb::gil_scoped_release release;
    const std::lock_guard lock(calls_);
    engine_->unload();
  }
  void update(const std::set<std::string>& keys, const nb::object& watch) {
    interruptible([&] { engine_->update(keys); }, watch);
  }
  void cancel() { engine_->cancel(); }
  nb::dict report(const Handle& handle) const { return report_of(*engine_, *handle.compiled); }
  nb::list profile(Handle& handle) {
    std::vector<runtime::StepProfile> profiles;
    {
      const nb::gil_scoped_release release;
      const std::lock_guard lock(calls_);
      profiles = engine_->profile(*handle.compiled);
    }
    nb::list devices;
    for (const auto& profile : profiles) {
      nb::list launches;
      for (const auto& launch : profile.launches) {
        nb::dict entry;
        entry["label"] = launch.label;
        entry["op"] = launch.op;
        entry["shapes"] = launch.shapes;
        entry["seconds"] = launch.seconds;
        entry["flops"] = launch.flops;
        entry["bytes"] = launch.bytes;
        launches.append(entry);
      }
      nb::dict device;
      device["seconds"] = profile.seconds;
      device["launches"] = launches;
      devices.append(device);
    }
    return devices;
  }
  nb::dict stats() const { return stats_of(*engine_); }

 private:
  struct Progress {
    std::atomic<std::int64_t> done = 0, total = 0;  // bytes of the load under way; total is 0 when there is none
  };

  void interruptible(const std::function<void()>& work, const nb::object& watch = nb::none()) {
    const auto begin = [&] {
      progress_->total = 0;
      work();
    };
    run_interruptible(calls_, begin, [&] { engine_->cancel(); }, watch.is_none() ? std::function<void()>() : [&] { watch(); });
  }

  const std::shared_ptr<Progress> progress_ = std::make_shared<Progress>();
  Turn calls_;  // adding weights, compiling and running exclude each other
  std::shared_ptr<Growing> weights_;
  std::unique_ptr<runtime::Engine> engine_;
};

}  // namespace

void bind_programs(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<Handle>(m, "Compiled", "A graph that Programs prepared for its devices.");
  nb::class_<Programs>(m, "Programs",
                       "Several graphs over one set of weights on the devices: what stands behind a module that is captured once a shape.\n\n"
                       "weights: as Engine's; or an object with tensors() -> {key: (dtype, shape)} and read(key, starts, stops) -> array, which is\n"
                       "asked for one part of one key at a time, from any thread.")
      .def(nb::init<nb::handle, const std::string&, const std::string&, const std::string&, double, const std::string&, const std::string&>(), "weights"_a,
           "devices"_a, "mesh"_a, "placement"_a, "timeout"_a, "communicator"_a = "best", "compute"_a = "")
      .def("add_weights", &Programs::add_weights, "mapping"_a, "Further weights, for graphs to come.")
      .def("compile", &Programs::compile, "graph"_a, "mesh"_a = "",
           "Partitions and lowers a graph, over another mesh than the one given at first where one is named. Raises Error naming the op or the\n"
           "key.")
      .def("load", &Programs::load, "compiled"_a, "Loads what the graph needs and is not loaded.")
      .def("unload", &Programs::unload, "Frees the weights and activations of all devices.")
      .def("update", &Programs::update, "keys"_a, "watch"_a = nb::none(),
           "Reads the loaded parts of these weights again, whose values have changed.")
      .def("run", &Programs::run, "compiled"_a, "inputs"_a, "outputs"_a, "watch"_a = nb::none(),
           "stream"_a = nb::none(), "contents"_a = Contents(),
           "One call: reads the inputs where they lie and writes to the outputs. watch() is called some twenty times a second on the\n"
           "calling thread while it runs; what it raises ends the call. With the handle of a stream of the GPU on which all outputs lie, the\n"
           "call is queued in its order and not waited for. contents: for inputs, numbers that are given for equal contents only.\n"
           "True: a result of a call that has ended held infinities or NaNs.")
      .def("check", &Programs::check, "Raises what queued calls that have ended met.")
      .def("synchronize", &Programs::synchronize, "watch"_a = nb::none(), "Waits for queued calls and raises what they met. Returns as run().")
      .def("loading", &Programs::loading, "(bytes done, bytes in all) of the load under way; (…, 0) when there is none.")
      .def("cancel", &Programs::cancel)
      .def("report", &Programs::report, "compiled"_a)
      .def("profile", &Programs::profile, "compiled"_a,
           "Times the step of the graph's last call: by device its seconds, and every launch of it timed alone.")
      .def("stats", &Programs::stats);
}

}  // namespace comfytp::python
