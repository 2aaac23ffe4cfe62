// What the operating system must be told about a thread.
#pragma once

#include <string>

namespace comfytp {

/// Names the calling thread for debuggers and profilers; systems that allow fewer characters get the first of them.
void name_thread(const std::string& name);

}  // namespace comfytp
