// Loops over the threads of a device.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace comfytp::backend::cpu {

/// Cuts [0, count) into one range a thread, each at least `grain` long, and calls body(begin, end, thread) on them at
/// once. `body` must not throw.
template <typename Body>
void parallel(std::int64_t count, std::int64_t grain, const Body& body) {
  const auto parts = std::min<std::int64_t>(omp_get_max_threads(), count / std::max<std::int64_t>(1, grain));
  if (parts <= 1) {
    if (count > 0) body(std::int64_t{0}, count, 0);
    return;
  }
#pragma omp parallel num_threads(static_cast <int>(parts))
  {
    const std::int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const std::int64_t begin = count * thread / team, end = count * (thread + 1) / team;
    if (begin < end) body(begin, end, static_cast<int>(thread));
  }
}

/// Elements below which a second thread costs more than it does.
inline constexpr std::int64_t kGrain = 16384;

/// Rows of `size` elements each that are worth a thread.
inline std::int64_t row_grain(std::int64_t size) { return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, size)); }

/// How many threads the calling thread's parallel regions (oneDNN's included) get, while this lives.
class ThreadCount {
 public:
  explicit ThreadCount(int threads) : before_(omp_get_max_threads()) { omp_set_num_threads(threads); }
  ~ThreadCount() { omp_set_num_threads(before_); }
  ThreadCount(const ThreadCount&) = delete;
  ThreadCount& operator=(const ThreadCount&) = delete;

 private:
  int before_;
};

}  // namespace comfytp::backend::cpu
