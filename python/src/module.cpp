// comfytp._core: what the package's Python files translate to the engine.
#include "module.h"

#include <nanobind/nanobind.h>

#include "base/error.h"

NB_MODULE(_core, m) {
  namespace nb = nanobind;
  m.doc() = "The engine's core. Use the package comfytp.";

  // The newest translator is asked first, so the special ones come last.
  const nb::object error = nb::exception<comfytp::Error>(m, "Error", PyExc_RuntimeError);
  const nb::object cancelled = nb::exception<comfytp::Cancelled>(m, "Cancelled", error);
  const nb::object timeout = nb::exception<comfytp::Timeout>(m, "Timeout", error);
  const nb::object device = nb::exception<comfytp::DeviceFailure>(m, "DeviceFailure", error);
  const nb::object memory = nb::exception<comfytp::OutOfMemory>(m, "OutOfMemory", device);
  error.attr("__doc__") = "A failure that can be acted on; its text says what was expected, what was got, and where.";
  cancelled.attr("__doc__") = "The call was ended by cancel().";
  timeout.attr("__doc__") = "A device waited for another longer than the time-out allows.";
  device.attr("__doc__") = "A device could not do what was asked of it: its driver reports a fault.";
  memory.attr("__doc__") = "A device, or the host, has too little memory.";
  for (const auto& type : {error, cancelled, timeout, device, memory}) type.attr("__module__") = "comfytp";

  comfytp::python::bind_graph(m);
  comfytp::python::bind_engine(m);
  comfytp::python::bind_programs(m);
  comfytp::python::bind_denoiser(m);
}
