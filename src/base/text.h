// Numbers as people read them.
#pragma once

#include <cstdint>
#include <string>

namespace comfytp {

/// "1.60 GiB", "512 B".
std::string bytes_text(std::int64_t bytes);

}  // namespace comfytp
