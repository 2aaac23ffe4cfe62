#include "graph/text.h"

#include <gtest/gtest.h>

#include <bit>
#include <limits>

#include "base/error.h"
#include "graph/builder.h"
#include "random_graph.h"

namespace comfytp::graph {
namespace {

std::string error_of(std::string_view text) {
  try {
    parse(text);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

// A constant takes any further attribute, so it can carry one of every kind.
Graph with_attribute(const std::string& name, Attr value) {
  Graph g;
  Attrs attrs{{"shape", Ints{}}, {"values", Doubles{0.0}}, {"dtype", std::string("f32")}};
  attrs.set(name, std::move(value));
  g.add_output("y", g.add("constant", {}, attrs));
  return g;
}

TEST(Text, PrintsOneLineANode) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.input("x", {2, 4}, DType::f32);
  const auto y = b.linear(x, b.weight("proj.weight", {3, 4}), "proj");
  g.add_output("y", g.add("group_norm", {y, b.weight("n.w", {3}), b.weight("n.b", {3})}, {{"groups", 1}, {"epsilon", 1e-5}}));
  EXPECT_EQ(to_text(g),
            "%0 = input() {dtype=\"f32\", name=\"x\", shape=[2,4], varies=\"call\"} : f32[2,4] \"x\"\n"
            "%1 = weight() {dtype=\"f32\", full=[3,4], key=\"proj.weight\", offset=[0,0], shape=[3,4]} : f32[3,4] \"proj.weight\"\n"
            "%2 = linear(%0, %1) : f32[2,3] \"proj\"\n"
            "%3 = weight() {dtype=\"f32\", full=[3], key=\"n.w\", offset=[0], shape=[3]} : f32[3] \"n.w\"\n"
            "%4 = weight() {dtype=\"f32\", full=[3], key=\"n.b\", offset=[0], shape=[3]} : f32[3] \"n.b\"\n"
            "%5 = group_norm(%2, %3, %4) {epsilon=1e-05, groups=1} : f32[2,3]\n"
            "output y = %5\n");
}

class TextAttribute : public testing::TestWithParam<std::pair<Attr, std::string>> {};
TEST_P(TextAttribute, KeepsItsKindAndValue) {
  const auto& [value, printed] = GetParam();
  const auto text = to_text(with_attribute("a", value));
  EXPECT_NE(text.find("{a=" + printed + ", "), std::string::npos) << text;
  const Graph back = parse(text);
  EXPECT_EQ(to_text(back), text);
  const Attr& read = back.nodes()[0].attrs.items().at("a");
  EXPECT_EQ(read.index(), value.index());
  if (const auto* real = std::get_if<double>(&value); real && *real != *real)
    EXPECT_NE(std::get<double>(read), std::get<double>(read));
  else if (real)
    EXPECT_EQ(std::bit_cast<std::uint64_t>(std::get<double>(read)), std::bit_cast<std::uint64_t>(*real));
  else
    EXPECT_EQ(read, value);
}
using Limits = std::numeric_limits<double>;
INSTANTIATE_TEST_SUITE_P(Kinds, TextAttribute,
                         testing::Values(std::pair<Attr, std::string>{std::int64_t{3}, "3"},
                                         std::pair<Attr, std::string>{std::numeric_limits<std::int64_t>::min(), "-9223372036854775808"},
                                         std::pair<Attr, std::string>{3.0, "3.0"}, std::pair<Attr, std::string>{-0.0, "-0.0"},
                                         std::pair<Attr, std::string>{0.1, "0.1"}, std::pair<Attr, std::string>{1e22, "1e+22"},
                                         std::pair<Attr, std::string>{Limits::denorm_min(), "5e-324"},
                                         std::pair<Attr, std::string>{Limits::max(), "1.7976931348623157e+308"},
                                         std::pair<Attr, std::string>{-Limits::infinity(), "-inf"},
                                         std::pair<Attr, std::string>{Limits::quiet_NaN(), "nan"},
                                         std::pair<Attr, std::string>{std::string(), "\"\""},
                                         std::pair<Attr, std::string>{std::string("a \"quote\"\\ {x=1}"), R"("a \"quote\"\\ {x=1}")"},
                                         std::pair<Attr, std::string>{std::string("two\nlines\x01\x7f", 11), R"("two\nlines\x01\x7f")"},
                                         std::pair<Attr, std::string>{std::string("Größe 模型"), "\"Größe 模型\""},
                                         std::pair<Attr, std::string>{Ints{}, "[]"}, std::pair<Attr, std::string>{Ints{1, -2}, "[1,-2]"},
                                         std::pair<Attr, std::string>{Doubles{}, "[.]"},
                                         std::pair<Attr, std::string>{Doubles{1, -2.5, Limits::infinity()}, "[1.0,-2.5,inf]"}));

TEST(Text, KeepsNamesThatAreNoPlainWords) {
  Graph g = with_attribute("odd = name,", std::int64_t{1});
  g.add_output("a \"b\" = %0\n", 0);
  g.add_output("", 0);
  const Graph back = parse(to_text(g));
  EXPECT_EQ(to_text(back), to_text(g));
  EXPECT_TRUE(back.nodes()[0].attrs.has("odd = name,"));
  EXPECT_EQ(back.outputs()[1].name, "a \"b\" = %0\n");
  EXPECT_EQ(back.outputs()[2].name, "");
}

TEST(Text, PrintsEveryValueOfALongConstant) {
  Doubles values(3000);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = 1.0 / static_cast<double>(i + 1);
  Graph g;
  g.add_output("y", Builder(g, DType::f32).constant({30, 100}, values, DType::f32));
  EXPECT_EQ(parse(to_text(g)).nodes()[0].attrs.reals("values"), values);
}

TEST(Text, ReadsWhatPeopleWrite) {
  const Graph g = parse(
      "# a comment\n"
      "\n"
      "  %10 = input() { name = \"x\" , shape = [ 2, 3 ], dtype = \"f32\" }\r\n"
      "%7=silu(%10)\n"
      "%8 = add( %7 , %10 ) : f32[2,3] \"sum\"\n"
      "\toutput y = %8");
  EXPECT_EQ(g.nodes().size(), 3u);
  EXPECT_EQ(g.nodes()[2].name, "sum");
  EXPECT_EQ(g.nodes()[2].inputs, (std::vector<ValueId>{1, 0}));
  EXPECT_EQ(g.outputs()[0].value, 2);
}

TEST(Text, SaysTheLineAndWhatWasExpected) {
  const std::string x = "%0 = input() {name=\"x\", shape=[2], dtype=\"f32\"}\n";
  EXPECT_EQ(error_of("nonsense"), "[text] line 1: expected '%' but got \"nonsense\"");
  EXPECT_EQ(error_of(x + "\n%1 = frobnicate(%0)\n"), "[text] line 3: [graph] expected a known op but got 'frobnicate'");
  EXPECT_EQ(error_of(x + "%1 = silu(%7)\n"), "[text] line 2: expected an earlier value but got %7");
  EXPECT_EQ(error_of(x + "%1 = silu(%1)\n"), "[text] line 2: expected an earlier value but got %1");
  EXPECT_EQ(error_of(x + "%0 = silu(%0)\n"), "[text] line 2: expected %0 to be made once but got it twice");
  EXPECT_EQ(error_of(x + "%1 = silu(%0) : f32[3]\n"), "[text] line 2: expected f32[2] from silu but got f32[3]");
  EXPECT_EQ(error_of(x + "%1 = silu(%0) : f16[2]\n"), "[text] line 2: expected f32[2] from silu but got f16[2]");
  EXPECT_EQ(error_of(x + "%1 = silu(%0) : f32[2], f32[2]\n"), "[text] line 2: expected 1 types but got 2");
  EXPECT_EQ(error_of(x + "%1, %2 = silu(%0)\n"), "[text] line 2: expected 1 outputs of silu but got 2");
  EXPECT_EQ(error_of(x + "%1 = silu(%0, %0)\n"), "[text] line 2: [silu] expected 1 to 1 inputs but got 2");
  EXPECT_EQ(error_of(x + "%1 = silu(%0\n"), "[text] line 2: expected ')' but the line ends");
  EXPECT_EQ(error_of(x + "%1 = silu(%0) {a=[1,2.0]}\n"), "[text] line 2: expected a list of integers or one of reals but got both");
  EXPECT_EQ(error_of(x + "%1 = silu(%0) {a=1, a=2}\n"), "[text] line 2: expected one attribute 'a' but got two");
  EXPECT_EQ(error_of(x + "%1 = silu(%0) {a=99999999999999999999}\n"),
            "[text] line 2: expected an integer but got \"99999999999999999999\"");
  EXPECT_EQ(error_of(x + "%1 = silu(%0) {a=1e999}\n"), "[text] line 2: expected a real number but got \"1e999\"");
  EXPECT_EQ(error_of(x + "%1 = silu(%0) {a=\"open\n"), "[text] line 2: expected a closing '\"' of \"\\\"open\" but the line ends");
  EXPECT_EQ(error_of(x + "%1 = silu(%0) \"name\" more\n"), "[text] line 2: expected the end of the line but got \"more\"");
  EXPECT_EQ(error_of(x + "output y = %3\n"), "[text] line 2: expected an earlier value but got %3");
  EXPECT_EQ(error_of(x + "output y = %0\noutput y = %0\n"), "[text] line 3: expected one output 'y' but got two");
  EXPECT_EQ(error_of(x + x), "[text] line 2: expected %0 to be made once but got it twice");
  EXPECT_EQ(error_of(x + "%1" + x.substr(2)), "[text] line 2: expected one input 'x' but got two");
}

TEST(Text, RefusesShapesThatWouldOverflow) {
  EXPECT_NE(error_of("%0 = input() {name=\"x\", shape=[-1], dtype=\"f32\"}").find("expected sizes from 0"), std::string::npos);
  EXPECT_NE(error_of("%0 = input() {name=\"x\", shape=[4294967296,4294967296], dtype=\"f32\"}").find("2^48"), std::string::npos);
}

class TextRandom : public testing::TestWithParam<int> {};

TEST_P(TextRandom, RoundTripsExactly) {
  for (int i = 0; i < 20; ++i) {
    const std::string text = to_text(test::random_graph(static_cast<std::uint32_t>(GetParam() * 100 + i), 40));
    ASSERT_EQ(to_text(parse(text)), text);
  }
}

// Whatever stands in the text, parse gives a graph that round-trips or throws Error.
TEST_P(TextRandom, SurvivesMutatedTexts) {
  std::mt19937 random(static_cast<std::uint32_t>(GetParam()));
  const auto below = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random); };
  std::string seed = to_text(test::random_graph(static_cast<std::uint32_t>(GetParam()), 12));
  seed += "%900 = input() {name=\"p\", shape=[2,4], dtype=\"f32\"}\n";
  const std::string group = "{bounds=[0,2,4], dim=1, group=[0,1], rank=1, need_lo=[0,1], need_hi=[3,4]}\n";
  for (const char* op : {"all_reduce", "reduce_scatter"})
    seed += std::string("%9") + std::to_string(seed.size()) + " = " + op + "(%900) " + group;
  seed += "%901 = slice(%900) {dim=1, start=2, stop=4}\n%902 = all_gather(%901) " + group + "%903 = halo_exchange(%901) " + group;
  seed += R"(%904 = input() {name="i", shape=[1,4,3,2], dtype="f32"}
%905 = weight() {key="k", dtype="f32", full=[4,2,3,3], offset=[0,0,0,0], shape=[4,2,3,3]}
%906 = conv2d(%904, %905) {stride=[1,2], padding=[1,1,1,1], groups=2}
%907 = upsample_nearest(%904) {from=[4,3], to=[8,3], size=[4,2], from_offset=[1,0], to_offset=[3,0]}
%908 = pad(%904) {before=[0,0,1,1], after=[0,0,2,1], mode="circular"}
%909 = constant() {shape=[2], values=[1.0,0.0], dtype="i64"}
%910 = gather(%904, %909) {dim=1}
)";
  ASSERT_EQ(error_of(seed), "");
  const std::vector<std::string> spice = {"-1", "9223372036854775807", "[]", "[.]", "\"", "%", "\\x", "nan", "1e308", "{", "}", "[[[[", "0",
                                          "\n", "output y = %0\n",     "=",  ","};
  int parsed = 0;
  for (int i = 0; i < 1500; ++i) {
    std::string text = seed;
    for (auto edits = 1 + below(3); edits-- > 0;) {
      const auto at = below(text.size());
      switch (below(5)) {
        case 0:
          text[at] = static_cast<char>(below(256));
          break;
        case 1:
          text.erase(at, 1 + below(6));
          break;
        case 2:
          text.insert(at, spice[below(spice.size())]);
          break;
        case 3:
          text.insert(at, text.substr(below(text.size()), below(40)));
          break;
        case 4:  // another number
          if (const auto digit = text.find_first_of("0123456789", at); digit != std::string::npos) text.replace(digit, 1, spice[below(4)]);
          break;
      }
    }
    try {
      const auto printed = to_text(parse(text));
      ASSERT_EQ(to_text(parse(printed)), printed);
      ++parsed;
    } catch (const Error&) {
    }
  }
  EXPECT_GT(parsed, 20);
}
INSTANTIATE_TEST_SUITE_P(Seeds, TextRandom, testing::Range(0, 8));

}  // namespace
}  // namespace comfytp::graph
