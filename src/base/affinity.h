// Which cores the process may use, and keeping a thread on some of them.
#pragma once

#include <vector>

namespace comfytp {

/// The numbers of the cores that the calling thread may run on, ascending; at least one.
std::vector<int> allowed_cores();

/// Keeps the calling thread, and threads that it starts later, on `cores`. Where the system refuses, nothing changes.
void bind_thread(const std::vector<int>& cores);

}  // namespace comfytp
