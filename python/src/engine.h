// What the engine's and the denoiser's bindings share.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "runtime/engine.h"

namespace comfytp::python {

/// devices "cpu:0,cpu:1"; mesh "tensor=2" or "" for the planner's choice; placement "resident" or "gathered"; timeout in
/// seconds. Throws Error naming the argument.
runtime::EngineOptions options_of(const std::string& devices, const std::string& mesh, const std::string& placement, double timeout);

// As Python's dicts and lists, which json can write.
nanobind::dict report_of(const runtime::Engine& engine, const runtime::Compiled& compiled);
nanobind::dict stats_of(const runtime::Engine& engine);

}  // namespace comfytp::python
