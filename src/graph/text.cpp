#include "graph/text.h"

#include <algorithm>
#include <charconv>
#include <set>

#include "base/error.h"

namespace comfytp::graph {
namespace {

// ASCII only, whatever the locale.
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_word(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || is_digit(c) || c == '_' || c == '.' || c == '-'; }

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\')
      out += {'\\', c};
    else if (c == '\n')
      out += "\\n";
    else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f)
      out += fmt::format("\\x{:02x}", c);
    else
      out += c;
  }
  return out + '"';
}

std::string word(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), is_word) ? std::string(text) : quoted(text);
}

std::string number(std::int64_t v) { return fmt::to_string(v); }
std::string number(double v) {
  std::string text = fmt::format("{}", v);  // the shortest that reads back to the same bits
  return text.find_first_of(".en") == std::string::npos ? text + ".0" : text;
}

template <typename T>
std::string list(const std::vector<T>& values) {
  std::string out = "[";
  for (const auto& v : values) out.append(out.size() > 1 ? "," : "").append(number(v));
  return out + "]";
}

struct AttrText {
  std::string operator()(std::int64_t v) const { return number(v); }
  std::string operator()(double v) const { return number(v); }
  std::string operator()(const std::string& v) const { return quoted(v); }
  std::string operator()(const Ints& v) const { return list(v); }
  std::string operator()(const Doubles& v) const { return v.empty() ? "[.]" : list(v); }
};

// What is left of one line. Every failure says what was expected and what stands there.
class Line {
 public:
  explicit Line(std::string_view rest) : rest_(rest) { skip(); }
  bool done() const { return rest_.empty(); }

  bool take(std::string_view token) {
    if (rest_.substr(0, token.size()) != token) return false;
    rest_.remove_prefix(token.size());
    skip();
    return true;
  }
  void expect(std::string_view token) {
    if (!take(token)) wanted(fmt::format("'{}'", token));
  }
  [[noreturn]] void wanted(std::string_view what) const {
    if (done()) fail("expected {} but the line ends", what);
    fail("expected {} but got {}", what, quoted(rest_.substr(0, 24)));
  }

  std::string_view plain(std::string_view what, bool (*allowed)(char) = is_word) {
    const auto end = std::find_if_not(rest_.begin(), rest_.end(), allowed);
    const auto size = static_cast<std::size_t>(end - rest_.begin());
    if (size == 0) wanted(what);
    const auto text = rest_.substr(0, size);
    rest_.remove_prefix(size);
    skip();
    return text;
  }
  std::string word(std::string_view what) { return !done() && rest_[0] == '"' ? string() : std::string(plain(what)); }

  std::string string() {
    if (done() || rest_[0] != '"') wanted("a text in quotes");
    std::string out;
    std::size_t at = 1;
    for (; at < rest_.size() && rest_[at] != '"'; ++at) {
      if (rest_[at] != '\\') {
        out += rest_[at];
        continue;
      }
      const char kind = ++at < rest_.size() ? rest_[at] : '\0';
      unsigned code = 0;
      if (kind == '"' || kind == '\\') {
        out += kind;
      } else if (kind == 'n') {
        out += '\n';
      } else if (const auto hex = rest_.substr(std::min(at + 1, rest_.size()), 2);
                 kind == 'x' && hex.size() == 2 && std::from_chars(hex.data(), hex.data() + 2, code, 16).ptr == hex.data() + 2) {
        out += static_cast<char>(code);
        at += 2;
      } else {
        fail("expected one of \\\" \\\\ \\n \\x00 in a text but got {}", quoted(rest_.substr(at - 1, 4)));
      }
    }
    if (at >= rest_.size()) fail("expected a closing '\"' of {} but the line ends", quoted(rest_.substr(0, 24)));
    rest_.remove_prefix(at + 1);
    skip();
    return out;
  }

  std::int64_t integer(std::string_view what) { return to_number<std::int64_t>(plain(what), what); }

  Attr number() {
    const auto text = plain("a number, a text or a list", [](char c) { return is_word(c) || c == '+'; });
    if (std::all_of(text.begin() + (text[0] == '-'), text.end(), is_digit)) return to_number<std::int64_t>(text, "an integer");
    return to_number<double>(text, "a real number");
  }

  Attr value() {
    if (!done() && rest_[0] == '"') return string();
    if (!take("[")) return number();
    if (take("]")) return Ints{};
    if (take(".]")) return Doubles{};
    const Attr first = number();
    return std::holds_alternative<double>(first) ? numbers(std::get<double>(first)) : numbers(std::get<std::int64_t>(first));
  }

 private:
  template <typename T>
  static T to_number(std::string_view text, std::string_view what) {
    T value{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    require(error == std::errc() && end == text.data() + text.size(), "expected {} but got {}", what, quoted(text));
    return value;
  }
  template <typename T>
  Attr numbers(T first) {
    std::vector<T> values = {first};
    while (take(",")) {
      const Attr next = number();
      if (!std::holds_alternative<T>(next)) fail("expected a list of integers or one of reals but got both");
      values.push_back(std::get<T>(next));
    }
    expect("]");
    return values;
  }
  void skip() { rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t\r"), rest_.size())); }
  std::string_view rest_;
};

class Parser {
 public:
  void read(Line line) {
    if (line.done() || line.take("#")) return;
    if (line.take("output "))
      output(line);
    else
      node(line);
    if (!line.done()) line.wanted("the end of the line");
  }
  Graph take() { return std::move(graph_); }

 private:
  std::int64_t label(Line& line) {
    line.expect("%");
    return line.integer("a value's number");
  }
  ValueId known(Line& line) {
    const auto number = label(line);
    const auto it = values_.find(number);
    require(it != values_.end(), "expected an earlier value but got %{}", number);
    return it->second;
  }

  void output(Line& line) {
    const auto name = line.word("the output's name");
    line.expect("=");
    require(names_.insert("output " + name).second, "expected one output '{}' but got two", name);
    graph_.add_output(name, known(line));
  }

  void node(Line& line) {
    std::vector<std::int64_t> made;
    do made.push_back(label(line));
    while (line.take(","));
    line.expect("=");
    const Op& op = find_op(line.plain("an op"));

    std::vector<ValueId> inputs;
    line.expect("(");
    if (!line.take(")")) {
      do inputs.push_back(known(line));
      while (line.take(","));
      line.expect(")");
    }
    const Attrs attrs = attributes(line);

    std::vector<Type> types;
    if (line.take(":")) {
      do types.push_back(type(line));
      while (line.take(","));
    }
    const auto outputs = graph_.add_node(op, std::move(inputs), attrs, line.done() ? "" : line.string());
    require(outputs.size() == made.size(), "expected {} outputs of {} but got {}", outputs.size(), op.name(), made.size());
    for (std::size_t i = 0; i < made.size(); ++i)
      require(values_.emplace(made[i], outputs[i]).second, "expected %{} to be made once but got it twice", made[i]);
    if (const Node& node = graph_.producer(outputs[0]); is(node, "input") && !is_input_part(node))
      require(names_.insert("input " + attrs.text("name")).second, "expected one input '{}' but got two", attrs.text("name"));
    if (types.empty()) return;
    require(types.size() == outputs.size(), "expected {} types but got {}", outputs.size(), types.size());
    for (std::size_t i = 0; i < types.size(); ++i)
      require(types[i] == graph_.type(outputs[i]), "expected {} from {} but got {}", to_string(graph_.type(outputs[i])), op.name(),
              to_string(types[i]));
  }

  Attrs attributes(Line& line) {
    Attrs attrs;
    if (!line.take("{") || line.take("}")) return attrs;
    do {
      const auto name = line.word("an attribute's name");
      line.expect("=");
      require(!attrs.has(name), "expected one attribute '{}' but got two", name);
      attrs.set(name, line.value());
    } while (line.take(","));
    line.expect("}");
    return attrs;
  }

  Type type(Line& line) {
    Type type{dtype_from_name(line.plain("a type")), {}};
    line.expect("[");
    if (line.take("]")) return type;
    do type.shape.push_back(line.integer("a size"));
    while (line.take(","));
    line.expect("]");
    return type;
  }

  Graph graph_;
  std::map<std::int64_t, ValueId> values_;
  std::set<std::string> names_;
};

}  // namespace

std::string to_text(const Attrs& attrs) {
  std::string out = "{";
  for (const auto& [name, value] : attrs.items())
    out += fmt::format("{}{}={}", out.size() > 1 ? ", " : "", word(name), std::visit(AttrText{}, value));
  return out + "}";
}

std::string to_text(const Graph& graph) {
  const auto values = [](const std::vector<ValueId>& ids) {
    std::string out;
    for (ValueId id : ids) out += fmt::format("{}%{}", out.empty() ? "" : ", ", id);
    return out;
  };
  std::string text;
  for (const auto& node : graph.nodes()) {
    text += fmt::format("{} = {}({})", values(node.outputs), node.op->name(), values(node.inputs));
    if (!node.attrs.items().empty()) text.append(" ").append(to_text(node.attrs));
    for (std::size_t i = 0; i < node.outputs.size(); ++i) text.append(i ? ", " : " : ").append(to_string(graph.type(node.outputs[i])));
    if (!node.name.empty()) text.append(" ").append(quoted(node.name));
    text += "\n";
  }
  for (const auto& output : graph.outputs()) text += fmt::format("output {} = %{}\n", word(output.name), output.value);
  return text;
}

Graph parse(std::string_view text) {
  Parser parser;
  for (std::int64_t number = 1; !text.empty(); ++number) {
    const auto line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    try {
      parser.read(Line(line));
    } catch (const Error& e) {
      fail("[text] line {}: {}", number, e.what());
    }
  }
  return parser.take();
}

}  // namespace comfytp::graph
