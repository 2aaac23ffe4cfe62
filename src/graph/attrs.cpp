#include "graph/attrs.h"

#include "base/error.h"

namespace comfytp::graph {

template <typename T>
const T& Attrs::get(std::string_view name, std::string_view kind) const {
  const auto it = items_.find(name);
  require(it != items_.end(), "[attribute] expected '{}' but it is missing", name);
  const T* value = std::get_if<T>(&it->second);
  require(value != nullptr, "[attribute] expected '{}' to be {}", name, kind);
  return *value;
}

std::int64_t Attrs::integer(std::string_view name) const { return get<std::int64_t>(name, "an integer"); }
double Attrs::real(std::string_view name) const { return get<double>(name, "a real number"); }
const std::string& Attrs::text(std::string_view name) const { return get<std::string>(name, "a text"); }
const Ints& Attrs::ints(std::string_view name) const { return get<Ints>(name, "a list of integers"); }
const Doubles& Attrs::reals(std::string_view name) const { return get<Doubles>(name, "a list of reals"); }

}  // namespace comfytp::graph
