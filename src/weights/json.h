// JSON from files that nobody vouches for.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace comfytp::weights {

/// Parses an object strictly: no duplicate keys, nothing nested deeper than `max_depth` objects and arrays, nothing behind the
/// object but white space. Throws Error naming `name`, and the key where there is one.
nlohmann::json parse_object(std::string_view text, const std::string& name, int max_depth);

}  // namespace comfytp::weights
