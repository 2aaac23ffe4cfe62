// comfytp.Graph: what an importer writes a model into.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "arrays.h"
#include "base/error.h"
#include "graph/builder.h"
#include "graph/evaluate.h"
#include "graph/text.h"
#include "module.h"

namespace comfytp::python {
namespace {

using graph::Graph;
using graph::ValueId;

std::int64_t integer_of(nb::handle value, const std::string& name) {
  std::int64_t result = 0;
  if (!nb::try_cast(nb::object(nb::module_::import_("operator").attr("index")(value)), result))
    fail("[python] expected attribute '{}' within 64 bits but got {}", name, nb::cast<std::string>(nb::str(value)));
  return result;
}

bool is_integer(nb::handle value) { return PyIndex_Check(value.ptr()) != 0; }
bool is_real(nb::handle value) { return PyFloat_Check(value.ptr()) != 0; }

graph::Attr attr_of(const std::string& name, nb::handle value) {
  if (nb::isinstance<nb::str>(value)) return nb::cast<std::string>(value);
  if (is_integer(value)) return integer_of(value, name);
  if (is_real(value)) return nb::cast<double>(value);
  require(PySequence_Check(value.ptr()) != 0, "[python] expected attribute '{}' as int, float, str or a list of numbers but got a {}", name,
          nb::cast<std::string>(nb::str(value.type().attr("__name__"))));
  graph::Ints ints;
  graph::Doubles reals;
  for (nb::handle item : nb::cast<nb::sequence>(value)) {
    require(is_integer(item) || is_real(item), "[python] expected numbers in attribute '{}' but got {}", name,
            nb::cast<std::string>(nb::repr(item)));
    reals.push_back(nb::cast<double>(nb::module_::import_("builtins").attr("float")(item)));
    if (is_integer(item)) ints.push_back(integer_of(item, name));
  }
  if (ints.size() == reals.size()) return ints;
  return reals;
}

graph::Attrs attrs_of(const nb::dict& items) {
  graph::Attrs attrs;
  for (auto [key, value] : items) {
    const auto name = nb::cast<std::string>(key);
    attrs.set(name, attr_of(name, value));
  }
  return attrs;
}

graph::Builder builder(Graph& g, const std::string& dtype) { return {g, dtype_from_name(dtype)}; }

const graph::Type& type_of(const Graph& g, ValueId id) {
  require(id >= 0 && static_cast<std::size_t>(id) < g.value_count(), "[graph] expected a value below {} but got {}", g.value_count(), id);
  return g.type(id);
}

ValueId constant(Graph& g, nb::handle values, const std::string& dtype) {
  Arrays arrays;
  const auto view = arrays.read(values, "a constant's values");
  graph::Doubles numbers(static_cast<std::size_t>(view.numel()));
  copy(view, TensorView::dense(numbers.data(), DType::f64, view.shape));
  return builder(g, "f32").constant(view.shape, std::move(numbers), dtype.empty() ? view.dtype : dtype_from_name(dtype));
}

// Through the ops' references, in double precision.
nb::dict evaluate(const Graph& g, const nb::dict& inputs, const nb::dict& weights) {
  Arrays arrays;
  const auto given = arrays.read_all(inputs, "input"), stored = arrays.read_all(weights, "weight");
  graph::Results results;
  {
    const nb::gil_scoped_release release;
    graph::verify(g);
    results = graph::evaluate(g, [&](const graph::Node& node) {
      const bool is_input = graph::is(node, "input");
      const auto& name = node.attrs.text(is_input ? "name" : "key");
      const auto& all = is_input ? given : stored;
      const auto found = all.find(name);
      require(found != all.end(), "[evaluate] expected {} '{}' but there is none", node.op->name(), name);
      const auto& whole = node.attrs.ints(is_input ? "shape" : "full");
      require(found->second.numel() == numel(whole), "[evaluate] expected '{}' of shape {} but got {}", name, to_string(whole),
              to_string(found->second.shape));
      graph::RefTensor value(whole);
      copy(found->second, TensorView::dense(value.data.data(), DType::f64, found->second.shape));
      return value;
    });
  }
  nb::dict all;
  for (const auto& [name, value] : results) {
    auto array = empty(value.shape, DType::f64);
    std::copy(value.data.begin(), value.data.end(), static_cast<double*>(array.data()));
    all[name.c_str()] = array;
  }
  return all;
}

// name -> (dtype, shape)
nb::dict signature_of_inputs(const Graph& g) {
  nb::dict all;
  for (const auto* node : g.all("input")) {
    const auto& type = g.type(node->outputs[0]);
    all[node->attrs.text("name").c_str()] = nb::make_tuple(std::string(name_of(type.dtype)), to_tuple(type.shape));
  }
  return all;
}

nb::dict signature_of_outputs(const Graph& g) {
  nb::dict all;
  for (const auto& output : g.outputs()) {
    const auto& type = g.type(output.value);
    all[output.name.c_str()] = nb::make_tuple(std::string(name_of(type.dtype)), to_tuple(type.shape));
  }
  return all;
}

}  // namespace

void bind_graph(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<Graph>(m, "Graph",
                    "A model's computation: values with static types in single assignment, and the ops that make them.\n\n"
                    "Values are named by the ints that the methods return. Every method checks types at once and raises Error naming\n"
                    "the op. dtypes are written f32, bf16, f16, f64, i64, ….")
      .def(nb::init<>())
      .def_static("parse", [](const std::string& text) { return graph::parse(text); }, "text"_a,
                  "Reads the text form, one line a node, as str(graph) prints it. Raises Error naming the line.")
      .def("__str__", [](const Graph& g) { return graph::to_text(g); })
      .def("__len__", [](const Graph& g) { return g.nodes().size(); }, "Number of nodes.")
      .def(
          "add",
          [](Graph& g, const std::string& op, std::vector<ValueId> inputs, const nb::dict& attrs, std::string name) {
            return g.add(op, std::move(inputs), attrs_of(attrs), std::move(name));
          },
          "op"_a, "inputs"_a = std::vector<ValueId>(), "attrs"_a = nb::dict(), "name"_a = "",
          "Appends a node of an op with one output and returns that value.\n\n"
          "attrs: ints, floats, strs, and lists of ints or of floats, as the op states them. A float attribute must be a float:\n"
          "1.0, not 1. name: where the node stands in the model, for messages and profiles.")
      .def(
          "add_node",
          [](Graph& g, const std::string& op, std::vector<ValueId> inputs, const nb::dict& attrs, std::string name) {
            return g.add_node(graph::find_op(op), std::move(inputs), attrs_of(attrs), std::move(name));
          },
          "op"_a, "inputs"_a = std::vector<ValueId>(), "attrs"_a = nb::dict(), "name"_a = "",
          "As add(), for any number of outputs: returns the list of values.")
      .def(
          "input",
          [](Graph& g, const std::string& name, Shape shape, const std::string& dtype, const std::string& varies) {
            return builder(g, dtype).input(name, std::move(shape), dtype_from_name(dtype), varies);
          },
          "name"_a, "shape"_a, "dtype"_a = "f32", "varies"_a = "call",
          "A named input. varies: \"call\", or \"prompt\" for what stays the same over many calls; what depends on such inputs\n"
          "alone runs again only when their content changes.")
      .def(
          "weight",
          [](Graph& g, const std::string& key, Shape shape, const std::string& dtype) {
            return builder(g, dtype).weight(key, std::move(shape));
          },
          "key"_a, "shape"_a, "dtype"_a = "f32",
          "The tensor `key` of the weights, seen by the ops in `dtype` whatever it is stored in. Its shape may differ from the\n"
          "stored one in dimensions of size 1.")
      .def("constant", &constant, "values"_a, "dtype"_a = "",
           "A small table of numbers, from an array that speaks DLPack; large ones are better weights. dtype \"\": the array's.")
      .def(
          "output",
          [](Graph& g, std::string name, ValueId value) {
            type_of(g, value);
            g.add_output(std::move(name), value);
          },
          "name"_a, "value"_a, "Makes a value an output of the graph.")
      .def("shape", [](const Graph& g, ValueId value) { return to_tuple(type_of(g, value).shape); }, "value"_a)
      .def("dtype", [](const Graph& g, ValueId value) { return std::string(name_of(type_of(g, value).dtype)); }, "value"_a)
      .def("evaluate", &evaluate, "inputs"_a, "weights"_a = nb::dict(),
           "Runs the graph through the ops' slow, plain references, in double precision: what every backend is held against.\n\n"
           "inputs, weights: names to arrays. Returns output names to f64 arrays that speak DLPack.")
      .def("verify", [](const Graph& g) { graph::verify(g); }, "Raises Error naming the node if something does not hold.")
      .def_prop_ro("inputs", &signature_of_inputs, "Inputs: name -> (dtype, shape).")
      .def_prop_ro("outputs", &signature_of_outputs, "Outputs: name -> (dtype, shape).");
  m.def(
      "ops",
      [] {
        std::vector<std::string> names;
        for (const auto* op : graph::all_ops()) names.emplace_back(op->name());
        return names;
      },
      "The names of all ops that a graph can have.");
}

}  // namespace comfytp::python
