#include "base/environment.h"

#include <cstdlib>
#include <filesystem>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace comfytp {

void restart_with(const char* variable, const char* value, char** argv) {
#if defined(__linux__)
  if (std::getenv(variable)) return;
  std::error_code error;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);  // by its own name, which tools show
  if (program.filename().string().starts_with("ld-")) return;  // the loader, which was told to run us
  if (!error && setenv(variable, value, 1) == 0) execv(program.c_str(), argv);
#else
  static_cast<void>(variable), static_cast<void>(value), static_cast<void>(argv);
#endif
}

}  // namespace comfytp
