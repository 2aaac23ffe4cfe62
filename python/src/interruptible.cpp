#include "interruptible.h"

#include <nanobind/nanobind.h>

#include <chrono>
#include <future>
#include <optional>

namespace comfytp::python {

namespace nb = nanobind;

void run_interruptible(const std::function<void()>& work, const std::function<void()>& cancel, const std::function<void()>& watch) {
  constexpr std::chrono::milliseconds kInterval{50};
  std::optional<nb::python_error> interrupted;
  std::exception_ptr failure;
  {
    const nb::gil_scoped_release release;
    auto done = std::async(std::launch::async, work);
    while (done.wait_for(kInterval) != std::future_status::ready) {
      // A cancel that comes before the call has begun has no effect, so it is said again.
      if (interrupted) {
        cancel();
        continue;
      }
      const nb::gil_scoped_acquire gil;
      try {
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
        if (watch) watch();
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
