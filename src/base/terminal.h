// What a program must know of the terminal it runs in.
#pragma once

#include <cstdio>

namespace comfytp {

/// A person may be watching `stream`: it is no file and no pipe.
bool is_terminal(std::FILE* stream);

}  // namespace comfytp
