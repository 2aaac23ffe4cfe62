#include "weights/json.h"

#include <set>
#include <vector>

#include "base/error.h"
#include "weights/source.h"

namespace comfytp::weights {

nlohmann::json parse_object(std::string_view text, const std::string& name, int max_depth) {
  using nlohmann::json;
  require(text.starts_with('{'), "[json] expected an object, so '{{' as the first byte of the JSON in {}", name);
  // The parser takes a zero byte for the end of its input and would ignore what follows.
  require(text.find('\0') == text.npos, "[json] expected text but got a zero byte at byte {} of the JSON in {}", text.find('\0'), name);
  std::vector<std::set<std::string>> keys(static_cast<std::size_t>(max_depth) + 1);  // of the open object at each depth
  std::string top;                                                                   // the outermost key
  const auto check = [&](int depth, json::parse_event_t event, json& value) {
    if (event == json::parse_event_t::object_start || event == json::parse_event_t::array_start) {
      require(depth < max_depth, "[json] expected at most {} levels of nesting but key {} in {} has more", max_depth, in_quotes(top), name);
      keys[static_cast<std::size_t>(depth) + 1].clear();
    } else if (event == json::parse_event_t::key) {
      const auto& key = value.get_ref<const std::string&>();
      if (depth == 1) top = key;
      require(keys[static_cast<std::size_t>(depth)].insert(key).second, "[json] expected every key once but {} in {} is there twice",
              in_quotes(key), name);
    }
    return true;
  };
  // The library's own messages quote the text, which may be long and of several lines.
  try {
    return json::parse(text, check);
  } catch (const json::parse_error& error) {
    fail("[json] expected JSON in {} but it is malformed at byte {}, at or behind key {}", name, error.byte, in_quotes(top));
  } catch (const json::exception&) {
    fail("[json] expected JSON in {} but a number is out of range at or behind key {}", name, in_quotes(top));
  }
}

}  // namespace comfytp::weights
