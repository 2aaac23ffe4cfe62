// Ctrl-C: the running call is cancelled, what was half written is removed, and the program ends with 128 + the signal.
#pragma once

#include "runtime/engine.h"

namespace comfytp::cli {

/// Once, at the start.
void watch_interrupts();
/// Throws Cancelled if the user asked to stop.
void check_interrupt();
/// The exit status of a program that a signal ended.
int interrupt_status();

/// While it lives, an interrupt cancels this engine's call.
class Interruptible {
 public:
  explicit Interruptible(runtime::Engine& engine);
  ~Interruptible();
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;
};

}  // namespace comfytp::cli
