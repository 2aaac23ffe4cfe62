// What the process was started with.
#pragma once

namespace comfytp {

/// Starts the running program anew, in this process, with an environment variable more: for what a library reads before main() begins.
/// Returns where that cannot be done, and at once where the variable is set.
void restart_with(const char* variable, const char* value, char** argv);

}  // namespace comfytp
