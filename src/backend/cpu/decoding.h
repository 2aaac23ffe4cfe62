// Gives a kernel its weights row-major and in the graph's dtype, whatever they are stored as.
#pragma once

#include "backend/cpu/kernel_table.h"

namespace comfytp::backend::cpu {

/// Compiles `entry` at `site`; weights that it does not read as stored are decoded into the workspace before each run.
std::unique_ptr<Kernel> compile_decoding(const KernelEntry& entry, const Site& site);

}  // namespace comfytp::backend::cpu
