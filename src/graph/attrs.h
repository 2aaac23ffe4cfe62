// The attributes of an op: a small ordered map, so that every op prints, parses and compares the same way.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace comfytp::graph {

using Ints = std::vector<std::int64_t>;
using Doubles = std::vector<double>;
using Attr = std::variant<std::int64_t, double, std::string, Ints, Doubles>;

class Attrs {
 public:
  Attrs() = default;
  Attrs(std::initializer_list<std::pair<const std::string, Attr>> items) : items_(items) {}

  bool has(std::string_view name) const { return items_.find(name) != items_.end(); }
  void set(std::string name, Attr value) { items_[std::move(name)] = std::move(value); }
  void erase(const std::string& name) { items_.erase(name); }

  // Throw Error naming the attribute when it is missing or of another kind.
  std::int64_t integer(std::string_view name) const;
  double real(std::string_view name) const;
  const std::string& text(std::string_view name) const;
  const Ints& ints(std::string_view name) const;
  const Doubles& reals(std::string_view name) const;

  std::int64_t integer_or(std::string_view name, std::int64_t otherwise) const { return has(name) ? integer(name) : otherwise; }
  std::string text_or(std::string_view name, std::string otherwise) const { return has(name) ? text(name) : otherwise; }

  const std::map<std::string, Attr, std::less<>>& items() const { return items_; }
  bool operator==(const Attrs&) const = default;

 private:
  template <typename T>
  const T& get(std::string_view name, std::string_view kind) const;
  std::map<std::string, Attr, std::less<>> items_;
};

}  // namespace comfytp::graph
