// Errors of the whole engine: one line that says what was expected, what was got, and where.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace comfytp {

/// Any failure that a user can act on. `what()` is one line without a trailing full stop.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The caller asked the running call to stop.
class Cancelled : public Error {
 public:
  using Error::Error;
};

/// A device waited for a peer longer than the time-out allows.
class Timeout : public Error {
 public:
  using Error::Error;
};

/// A device could not do what was asked of it, though that may be right: its driver reports a fault.
class DeviceFailure : public Error {
 public:
  using Error::Error;
};

/// A device, or the host, has too little memory.
class OutOfMemory : public DeviceFailure {
 public:
  using DeviceFailure::DeviceFailure;
};

/// In a handler: throws what is handled again, as an Error of the same class whose text says first where it happened.
[[noreturn]] void rethrow_from(std::string_view where);

/// Throws an Error with a formatted message.
template <typename... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

/// Throws an Error with a formatted message unless `condition` holds.
template <typename... Args>
void require(bool condition, fmt::format_string<Args...> format, Args&&... args) {
  if (!condition) fail(format, std::forward<Args>(args)...);
}

}  // namespace comfytp
