// The subcommands, one file each. Every one adds itself to the command line and says what is to run if it is chosen.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace comfytp::cli {

/// What the command line chose; returns the exit status.
using Command = std::function<int()>;

void add_inspect(CLI::App& app, Command& chosen);
void add_plan(CLI::App& app, Command& chosen);
void add_run(CLI::App& app, Command& chosen);
void add_verify(CLI::App& app, Command& chosen);
void add_bench(CLI::App& app, Command& chosen);
void add_collectives(CLI::App& app, Command& chosen);
void add_synth(CLI::App& app, Command& chosen);

}  // namespace comfytp::cli
