#include "progress.h"

#include <cstdio>

#include "base/terminal.h"

namespace comfytp::cli {

using namespace std::chrono_literals;

Progress::Progress(std::string task) : task_(std::move(task)), terminal_(is_terminal(stderr)), next_(Clock::now() + 2s) {}

Progress::~Progress() {
  if (shown_) std::fputs("\r\033[K", stderr);
}

void Progress::operator()(std::int64_t done, std::int64_t total) {
  if (!terminal_) return;
  std::lock_guard lock(mutex_);
  if (Clock::now() < next_) return;
  next_ = Clock::now() + 100ms;
  shown_ = true;
  std::fprintf(stderr, "\r\033[K%s: %d %%", task_.c_str(), total > 0 ? static_cast<int>(100.0 * done / total) : 0);
}

}  // namespace comfytp::cli
