// Long calls without the GIL that Ctrl-C ends.
#pragma once

#include <functional>
#include <mutex>

namespace comfytp::python {

/// Held by the call that runs, of those that may be told to end: the others wait for it, and an interrupt of theirs is not its own.
using Turn = std::timed_mutex;

/// Takes its turn and runs `work` on a thread of its own while the calling thread, without the GIL, listens for Python's signals. When a
/// handler raises (KeyboardInterrupt), `cancel` is called until the work has ended, and that exception goes on. Otherwise rethrows
/// what `work` throws. `watch`, where there is one, is called with the GIL now and then; a Python exception that it throws ends
/// the work in the same way. Before its turn either ends the wait. Called with the GIL held.
void run_interruptible(Turn& turn, const std::function<void()>& work, const std::function<void()>& cancel, const std::function<void()>& watch = {});

}  // namespace comfytp::python
