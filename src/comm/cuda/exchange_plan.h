// From what the ranks call to what a rank's kernel does.
#pragma once

#include <vector>

#include "comm/cuda/exchange.h"
#include "comm/host_group.h"

namespace comfytp::comm::cuda {

/// `requests` fit together (check_requests), `blocks` is how many blocks the ranks may have; both are the same on all ranks, and so is
/// how the message is cut. Throws Error when a view has more than kMaxDims dimensions that cannot be merged.
Exchange plan_exchange(const World& world, const std::vector<Request>& requests, int blocks);

}  // namespace comfytp::comm::cuda
