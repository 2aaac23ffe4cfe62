// Long calls without the GIL that Ctrl-C ends.
#pragma once

#include <functional>

namespace comfytp::python {

/// Runs `work` on a thread of its own while the calling thread, without the GIL, listens for Python's signals. When a handler
/// raises (KeyboardInterrupt), `cancel` is called until the work has ended, and that exception goes on. Otherwise rethrows
/// what `work` throws. `watch`, where there is one, is called with the GIL now and then; a Python exception that it throws ends
/// the work in the same way. Called with the GIL held.
void run_interruptible(const std::function<void()>& work, const std::function<void()>& cancel, const std::function<void()>& watch = {});

}  // namespace comfytp::python
