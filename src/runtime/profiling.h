// Where the time of a program's step goes.
#pragma once

#include <vector>

#include "runtime/engine.h"
#include "runtime/team.h"

namespace comfytp::runtime {

/// By device, of the step as it was bound by the last call.
std::vector<StepProfile> profile_steps(Team& team, Compiled& compiled);

}  // namespace comfytp::runtime
