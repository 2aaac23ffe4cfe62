// What the runtime knows of the collective ops: how each is called, and what it moves.
#pragma once

#include "runtime/program.h"

namespace comfytp::runtime {

void run_collective(const CollectiveCall& call, const void* in, void* out);

/// Bytes that the device sends or receives, whichever is more: of a tensor of B bytes over N ranks an all_reduce moves
/// 2 B (N-1)/N (every rank sums a slice, then all exchange them); of the others what a rank takes from its peers' parts, or they
/// from its own. Of a weight what it takes: over all weights it gives as much, the other way at the same time.
std::int64_t traffic_bytes(const CollectiveCall& call);

}  // namespace comfytp::runtime
