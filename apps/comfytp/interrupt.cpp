#include "interrupt.h"

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "base/error.h"

namespace comfytp::cli {
namespace {

using namespace std::chrono_literals;

constexpr auto kPoll = 50ms;
constexpr auto kGrace = 5s;  // what does not stop by then (a read from a slow disk) is ended

std::atomic<int> received{0};
static_assert(std::atomic<int>::is_always_lock_free);
std::mutex mutex;
runtime::Engine* running = nullptr;  // guarded by mutex

extern "C" void on_signal(int signal) {
  // The second time the user does not want to wait.
  if (received.exchange(signal) != 0) std::_Exit(128 + signal);
}

// A handler may do next to nothing, so a thread of its own looks whether it was called.
void watch() {
  while (received.load() == 0) std::this_thread::sleep_for(kPoll);
  const auto end = std::chrono::steady_clock::now() + kGrace;
  while (std::chrono::steady_clock::now() < end) {
    {
      std::lock_guard lock(mutex);
      if (running) running->cancel();  // again and again: a call may be about to begin
    }
    std::this_thread::sleep_for(kPoll);
  }
  std::_Exit(interrupt_status());
}

}  // namespace

void watch_interrupts() {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  std::thread(watch).detach();
}

void check_interrupt() {
  if (received.load() != 0) throw Cancelled("interrupted");
}

int interrupt_status() { return 128 + received.load(); }

Interruptible::Interruptible(runtime::Engine& engine) {
  check_interrupt();
  std::lock_guard lock(mutex);
  running = &engine;
}

Interruptible::~Interruptible() {
  std::lock_guard lock(mutex);
  running = nullptr;
}

}  // namespace comfytp::cli
