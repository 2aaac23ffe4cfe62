// What the engine's and the denoiser's bindings share.
#pragma once

#include <nanobind/nanobind.h>

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>

#include "arrays.h"
#include "interruptible.h"
#include "runtime/engine.h"

namespace comfytp::python {

/// devices "cpu:0,cpu:1"; mesh "tensor=2" or "" for the planner's choice; placement "resident" or "gathered"; communicator as
/// comm::route_from_name takes it; timeout in seconds; compute "fp8" for products in it, or "". Throws Error naming the argument.
runtime::EngineOptions options_of(const std::string& devices, const std::string& mesh, const std::string& placement,
                                  const std::string& communicator, double timeout, const std::string& compute);

/// A call's order as Python gives it: the handle of the current stream (None: none), and numbers for contents by input.
using Stream = std::optional<std::uintptr_t>;
using Contents = std::map<std::string, std::uint64_t>;
runtime::CallOptions call_options(const Stream& stream, Contents contents);

/// Runs `work`, which runs a call with these outputs, in its turn. One that is queued is not worth a thread of its own that listens for
/// Ctrl-C, as `interruptible` does. Returns Engine::take_not_finite().
bool run_call(runtime::Engine& engine, const runtime::Compiled& compiled, const Views& outputs, const runtime::CallOptions& options, Turn& turn,
              const std::function<void()>& work, const std::function<void(const std::function<void()>&)>& interruptible);

// As Python's dicts and lists, which json can write.
nanobind::dict report_of(const runtime::Engine& engine, const runtime::Compiled& compiled);
nanobind::dict stats_of(const runtime::Engine& engine);

}  // namespace comfytp::python
