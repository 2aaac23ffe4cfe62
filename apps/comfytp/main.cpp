// comfytp: one diffusion model split over several devices, from the command line.
#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <string>

#include "base/environment.h"
#include "base/error.h"
#include "commands.h"
#include "interrupt.h"

namespace {

constexpr int kFailed = 1, kUsage = 2;

// Every error is one line.
int complain(std::string message, int status) {
  for (char& c : message)
    if (c == '\n') c = ' ';
  while (!message.empty() && message.back() == ' ') message.pop_back();
  std::fprintf(stderr, "comfytp: %s\n", message.c_str());
  return status;
}

int run(const comfytp::cli::Command& command) {
  using namespace comfytp;
  try {
    cli::watch_interrupts();
    const int status = command();
    require(std::fflush(stdout) == 0, "cannot write to the standard output");
    return status;
  } catch (const Cancelled&) {
    return complain("interrupted", cli::interrupt_status());
  } catch (const std::bad_alloc&) {
    return complain("out of memory", kFailed);
  } catch (const std::exception& error) {
    return complain(error.what(), kFailed);
  }
}

// Between parallel regions libgomp's threads spin for some milliseconds before they sleep. Where other processes want the cores, that takes
// them from the thread that all wait for. A few microseconds bridge the gaps within a step as well.
void spin_briefly(char** argv) {
  if (!std::getenv("OMP_WAIT_POLICY")) comfytp::restart_with("GOMP_SPINCOUNT", "1000", argv);
}

}  // namespace

int main(int argc, char** argv) {
  using namespace comfytp;
  spin_briefly(argv);
  CLI::App app{"Runs one diffusion model split over several devices.", "comfytp"};
  app.set_version_flag("--version", COMFYTP_VERSION);
  app.require_subcommand(1);
  cli::Command chosen;
  cli::add_inspect(app, chosen);
  cli::add_plan(app, chosen);
  cli::add_run(app, chosen);
  cli::add_verify(app, chosen);
  cli::add_bench(app, chosen);
  cli::add_collectives(app, chosen);
  cli::add_synth(app, chosen);
  // CLI11 would say of an unknown word only that it was not expected, or that a subcommand is missing.
  if (argc > 1 && argv[1][0] != '-') {
    bool known = false;
    std::string names;
    for (const auto* command : app.get_subcommands({})) {
      known = known || command->get_name() == argv[1];
      names += (names.empty() ? "" : ", ") + command->get_name();
    }
    if (!known) return complain(fmt::format("expected a subcommand ({}) but got '{}'", names, argv[1]), kUsage);
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    return complain(error.what(), kUsage);
  }
  return run(chosen);
}
