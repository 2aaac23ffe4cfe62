#include "interruptible.h"

#include <nanobind/nanobind.h>

#include <chrono>
#include <future>
#include <optional>

namespace comfytp::python {

namespace nb = nanobind;

void run_interruptible(Turn& turn, const std::function<void()>& work, const std::function<void()>& cancel, const std::function<void()>& watch) {
  constexpr std::chrono::milliseconds kInterval{50};
  const auto listen = [&] {
    const nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    if (watch) watch();
  };
  std::optional<nb::python_error> interrupted;
  std::exception_ptr failure;
  {
    const nb::gil_scoped_release release;
    std::unique_lock mine(turn, std::defer_lock);
    while (!mine.try_lock_for(kInterval)) listen();
    auto done = std::async(std::launch::async, work);
    while (done.wait_for(kInterval) != std::future_status::ready) {
      // A cancel that comes before the call has begun has no effect, so it is said again.
      if (interrupted) {
        cancel();
        continue;
      }
      try {
        listen();
      } catch (nb::python_error& error) {
        interrupted.emplace(std::move(error));
        cancel();
      }
    }
    try {
      done.get();
    } catch (...) {
      failure = std::current_exception();
    }
  }
  if (interrupted) throw nb::python_error(std::move(*interrupted));
  if (failure) std::rethrow_exception(failure);
}

}  // namespace comfytp::python
