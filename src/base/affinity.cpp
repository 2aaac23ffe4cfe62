#include "base/affinity.h"

#include <algorithm>
#include <numeric>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#elif defined(_WIN32)
#include <windows.h>
#endif

namespace comfytp {

std::vector<int> allowed_cores() {
  std::vector<int> cores;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int c = 0; c < CPU_SETSIZE; ++c)
      if (CPU_ISSET(c, &set)) cores.push_back(c);
#elif defined(_WIN32)
  DWORD_PTR process = 0, system = 0;
  if (GetProcessAffinityMask(GetCurrentProcess(), &process, &system))
    for (int c = 0; c < static_cast<int>(8 * sizeof process); ++c)
      if (process >> c & 1) cores.push_back(c);
#endif
  if (cores.empty()) {
    cores.resize(std::max(1u, std::thread::hardware_concurrency()));
    std::iota(cores.begin(), cores.end(), 0);
  }
  return cores;
}

void bind_thread(const std::vector<int>& cores) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int c : cores) CPU_SET(c, &set);
  sched_setaffinity(0, sizeof set, &set);
#elif defined(_WIN32)
  DWORD_PTR mask = 0;
  for (int c : cores) mask |= DWORD_PTR{1} << c;
  SetThreadAffinityMask(GetCurrentThread(), mask);
#else
  (void)cores;
#endif
}

}  // namespace comfytp
