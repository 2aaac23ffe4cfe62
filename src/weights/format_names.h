// The names that the safetensors format gives to element types.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "base/dtype.h"

namespace comfytp::weights {

/// "BF16" for bf16, …
std::string_view format_name(DType dtype);
/// Nothing for a name that the format or this reader does not know.
std::optional<DType> dtype_of_format(std::string_view name);
/// All names, for messages.
std::string format_names();

}  // namespace comfytp::weights
