// How far a long task is, for a person at a terminal.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>

namespace comfytp::cli {

/// One line on stderr that is renewed and in the end removed. It appears when the task has taken two seconds, and only on a
/// terminal. May be called from several threads.
class Progress {
 public:
  explicit Progress(std::string task);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void operator()(std::int64_t done, std::int64_t total);

 private:
  using Clock = std::chrono::steady_clock;
  const std::string task_;
  const bool terminal_;
  std::mutex mutex_;
  Clock::time_point next_;  // when the line is to be renewed
  bool shown_ = false;
};

}  // namespace comfytp::cli
