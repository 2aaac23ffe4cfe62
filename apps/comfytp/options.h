// The options that several subcommands share.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "pipeline/denoiser.h"
#include "planner/link.h"
#include "planner/plan.h"
#include "planner/profile.h"

namespace comfytp::cli {

using OpenDevice = decltype(runtime::EngineOptions::open);

/// Which model on which devices.
struct ModelOptions {
  std::string checkpoint;
  std::optional<std::string> devices, mesh, weights, plan_file, compute;
  std::string communicator = "best";
  models::HeadOptions heads;

  /// `accepts_plan`: --plan FILE may stand instead of devices, mesh and weights.
  void add_to(CLI::App& command, bool accepts_plan);
  /// What the options or the plan's file say, checked. Throws Error. `ranks`: a single device may stand for so many of them.
  planner::Plan plan(std::size_t ranks = 1) const;
  /// The option's, else the plan's file's, else f32. fp8 is bf16 with products in fp8.
  std::string compute_name() const;
  pipeline::Compute compute_choice() const { return pipeline::compute_from_name(compute_name()); }
  /// Maps the checkpoint, recognises it, opens the devices of `plan`.
  std::unique_ptr<pipeline::Denoiser> open(const planner::Plan& plan, pipeline::Compute compute, std::function<void(std::int64_t, std::int64_t)> progress = {},
                                           OpenDevice open_device = {}, std::optional<std::size_t> only_rank = {}) const;
};

/// Says on stderr what of the plan is not as asked: what could not be cut, uneven parts.
void print_notes(const runtime::Engine& engine, const runtime::Compiled& compiled);
/// What one rank of a step exchanges.
planner::Exchanged exchanged_by(const runtime::DeviceReport& device);
/// The rates of a GPU that is here, where its card is a well-known one.
std::optional<planner::DeviceProfile> card_of(const backend::DeviceSpec& spec);
/// --link, a text that planner::link_from takes.
CLI::Option* add_link(CLI::App& command, std::optional<std::string>& link);

/// The bytes of a file as text. Throws Error naming it.
std::string read_text(const std::string& path);

/// The sizes of a call.
struct CallOptions {
  std::optional<std::string> size;
  std::int64_t batch = 2;
  std::int64_t tokens = 77;

  void add_to(CLI::App& command);
  /// Throws Error naming what is wrong with the size.
  models::UNetCall call(const models::UNet& unet) const;
};

/// Says in one plain sentence what a count has to be.
CLI::Validator at_least_one();

void add_heads(CLI::App& command, models::HeadOptions& heads);
/// --communicator, a name that comm::route_from_name takes.
void add_communicator(CLI::App& command, std::string& communicator);
/// A list that may have spaces behind its commas.
std::string without_spaces(std::string list);

}  // namespace comfytp::cli
