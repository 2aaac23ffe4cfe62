// The parts of the module, one file each.
#pragma once

#include <nanobind/nanobind.h>

namespace comfytp::python {

void bind_graph(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_programs(nanobind::module_& m);
void bind_denoiser(nanobind::module_& m);

}  // namespace comfytp::python
