// What a program may rely on: places of values in use do not overlap, copies and casts stand where they must and nowhere else.
#include "runtime/collectives.h"
#include "runtime/lowering.h"

#include <gtest/gtest.h>

#include <set>

#include "backend/host_device.h"
#include "graph/rewrites.h"
#include "harness.h"
#include "planner/plan.h"
#include "random_graph.h"
#include "runtime/memory_plan.h"
#include "sharding/strategy.h"

namespace comfytp::test {
namespace {

using graph::Builder;
using runtime::Launch;
using runtime::Place;
using runtime::Program;

struct Lowered {
  Watch watch;
  ReferenceDevice device{{"cpu", 0, 0}, watch};
  std::shared_ptr<TestWeights> source;
  runtime::WeightStore store;
  Program program;
  explicit Lowered(const Graph& graph, DType stored = DType::f32) : Lowered(graph, graph, stored) {}
  Lowered(const Graph& whole, const Graph& local, DType stored, bool like_a_gpu = false)
      : source(std::make_shared<TestWeights>(whole, stored)), store(source), program([&] {
          watch.like_a_gpu = like_a_gpu;
          return runtime::lower(local, device, store);
        }()) {}
  int count(const std::string& op, bool prologue = false) const {
    const auto& launches = prologue ? program.prologue : program.step;
    return static_cast<int>(std::count_if(launches.begin(), launches.end(), [&](const Launch& l) { return l.label.starts_with(op); }));
  }
};

bool inside(const Place& place, const Program& program) {
  switch (place.memory) {
    case Place::Memory::arena: return place.offset >= 0 && place.offset <= program.arena_bytes && place.offset % runtime::kAlignment == 0;
    case Place::Memory::prologue: return place.offset >= 0 && place.offset <= program.prologue_bytes && place.offset % runtime::kAlignment == 0;
    case Place::Memory::weight: return place.weight != nullptr;
    case Place::Memory::none: return true;
  }
  return false;
}

void expect_sound_places(const Program& program) {
  for (const auto* launches : {&program.prologue, &program.step})
    for (const auto& launch : *launches) {
      const auto& workspace = launch.workspace;
      for (const auto* places : {&launch.in, &launch.out})
        for (const auto& place : *places) {
          EXPECT_TRUE(inside(place, program)) << launch.label;
          const bool shared = workspace.memory != Place::Memory::none && place.memory == workspace.memory && place.offset == workspace.offset;
          EXPECT_FALSE(shared) << launch.label << " has an operand in its workspace";
        }
      for (const auto& out : launch.out) {
        EXPECT_TRUE(out.memory != Place::Memory::weight) << launch.label << " writes to a weight";
        const bool kept = out.memory == Place::Memory::prologue;
        EXPECT_FALSE(kept && launches == &program.step) << launch.label << " overwrites what is kept of a prompt";
      }
    }
}

TEST(Lowering, PlacesAreInsideTheirMemoryAndTheStepLeavesThePromptAlone) {
  for (std::uint64_t seed = 0; seed < 30; ++seed) expect_sound_places(Lowered(random_graph(seed)).program);
  expect_sound_places(Lowered(small_unet()).program);
}

TEST(Lowering, IsTheSameEveryTime) {
  const auto describe = [](const Program& p) {
    std::string text = fmt::format("{} {}\n", p.arena_bytes, p.prologue_bytes);
    for (const auto* launches : {&p.prologue, &p.step})
      for (const auto& l : *launches) {
        text += l.label;
        for (const auto* places : {&l.in, &l.out})
          for (const auto& place : *places) text += fmt::format(" {}:{}", static_cast<int>(place.memory), place.offset);
        text += "\n";
      }
    return text;
  };
  const Lowered a(small_unet()), b(small_unet());
  EXPECT_EQ(describe(a.program), describe(b.program));
}

TEST(Lowering, ElementwiseOpsOverwriteTheirInputWhereItDies) {
  Graph g;
  Builder b(g, DType::f32);
  auto v = b.input("x", {64, 64}, DType::f32);
  for (int i = 0; i < 5; ++i) v = b.unary("silu", v);
  g.add_output("y", v);
  EXPECT_EQ(Lowered(g).program.arena_bytes, 64 * 64 * 4 + runtime::kAlignment) << "one buffer and a workspace";
}

TEST(Lowering, PartsOfTheOutermostDimensionLieWhereTheWholeDoes) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.unary("sin", b.input("x", {1, 128, 64}, DType::f32));
  const auto part = [&](std::int64_t start, std::int64_t stop) {
    return g.add("slice", {x}, {{"dim", std::int64_t{1}}, {"start", start}, {"stop", stop}});
  };
  g.add_output("y", b.concat({b.unary("silu", part(32, 128)), b.unary("tanh", part(0, 32))}, 1));
  const Lowered l(g);
  ASSERT_EQ(l.program.step.size(), 3u) << "neither slices nor a concat";
  EXPECT_EQ(l.program.step[1].in[0].offset, l.program.step[0].out[0].offset + 32 * 64 * 4);
  EXPECT_EQ(l.program.step[2].out[0].offset, l.program.step[1].out[0].offset + 96 * 64 * 4);
}

TEST(Lowering, AValueThatIsNeededLaterIsNotOverwritten) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.input("x", {64, 64}, DType::f32);
  const auto y = b.unary("silu", x);
  g.add_output("y", b.add(y, b.unary("sin", y)));
  g.add_output("x", b.transpose(x, {1, 0}));
  const Lowered l(g);
  EXPECT_NE(l.program.step[0].in[0].offset, l.program.step[0].out[0].offset) << "a view of x is an output";
  EXPECT_NE(l.program.step[1].in[0].offset, l.program.step[1].out[0].offset) << "y is read again";
  EXPECT_EQ(l.program.step[2].out[0].offset, l.program.step[2].in[0].offset);
}

TEST(Lowering, ViewsMoveNothing) {
  Graph g;
  Builder b(g, DType::f32);
  // An image as tokens and back: convolutions run NHWC, so all of this is one memory.
  const auto x = b.input("x", {1, 3, 4, 4}, DType::f32);
  auto v = b.conv2d(x, b.weight("k", {8, 3, 3, 3}), -1, 1, 1, "c1");
  v = b.linear(b.transpose(b.merge_dims(v, 2, 2), {0, 2, 1}), b.weight("w", {8, 8}), "l");
  v = b.split_dim(b.transpose(v, {0, 2, 1}), 2, {4, 4});
  g.add_output("y", b.conv2d(v, b.weight("k2", {3, 8, 3, 3}), -1, 1, 1, "c2"));
  const Lowered l(g);
  EXPECT_EQ(l.program.step.size(), 4u) << "the input's copy to NHWC, two convolutions and a linear";
  EXPECT_EQ(l.count("cast"), 1);
}

TEST(Lowering, WhatIsCopiedForTwoReadersIsCopiedOnce) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.input("x", {1, 3, 4, 4}, DType::f32);
  g.add_output("y", b.conv2d(x, b.weight("k", {8, 3, 3, 3}), -1, 1, 1, "c1"));
  g.add_output("z", b.conv2d(x, b.weight("k2", {8, 3, 3, 3}), -1, 1, 1, "c2"));
  EXPECT_EQ(Lowered(g).count("cast"), 1);
}

TEST(Lowering, WhatIsKeptOfAPromptIsReadButNotOverwritten) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.input("x", {4, 4}, DType::f32), p = b.unary("sin", b.input("p", {4, 4}, DType::f32, "prompt"));
  const auto y = b.graph.add("sub", {p, x});
  g.add_output("y", b.unary("sin", y));
  g.add_output("x", x);
  const Lowered l(g);
  EXPECT_EQ(l.program.prologue_bytes, runtime::kAlignment);
  expect_sound_places(l.program);
}

TEST(Lowering, ACopyOfWhatIsKeptOfAPromptIsMadeOncePerPrompt) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.conv2d(b.input("x", {1, 4, 4, 4}, DType::f32), b.weight("k", {4, 4, 3, 3}), -1, 1, 1, "c");
  g.add_output("y", b.concat({x, b.unary("sin", b.input("p", {1, 4, 4, 4}, DType::f32, "prompt"))}, 1));
  const Lowered l(g);
  EXPECT_EQ(l.count("cast", true), 1) << "to the order of what it is joined with";
  EXPECT_EQ(l.count("cast"), 1) << "the convolution's input";
}

TEST(Lowering, WeightsAreCastWhereTheKernelDoesNotDecodeThem) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.input("x", {2, 6}, DType::f32);
  g.add_output("y", b.add(b.linear(x, b.weight("w", {6, 6}), "l"), b.unary("sin", b.weight("p", {2, 6}))));
  EXPECT_EQ(Lowered(g).count("cast") + Lowered(g).count("cast", true), 0);
  const Lowered l(g, DType::f16);
  // sin reads its input as given: the weight is cast once, where it is used; the linear decodes its own.
  EXPECT_EQ(l.count("cast", true), 1);
  EXPECT_EQ(l.count("cast"), 0);
}

TEST(Lowering, OnlyWeightsWithOneKindOfReaderArePacked) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.input("x", {6, 6}, DType::f32);
  const auto alone = b.weight("alone", {6, 6}), viewed = b.weight("viewed", {6, 6}), both = b.weight("both", {6, 6});
  auto v = b.linear(b.linear(x, alone, "a"), alone, "b");
  v = b.unary("sin", b.linear(b.linear(v, viewed, "c"), b.transpose(viewed, {1, 0}), "d"));
  g.add_output("y", b.linear(b.mul(v, both), both, "e"));
  const Lowered l(g);
  for (const auto* w : l.program.weights) EXPECT_EQ(w->format.has_value(), w->key == "alone") << w->key;
  EXPECT_EQ(l.program.weights.size(), 3u);
}

// So that one matmul can do them all.
TEST(Lowering, LinearsOfOneXReadAndWriteSideBySide) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.input("x", {70, 6}, DType::f32);
  for (const char* name : {"q", "k", "v"}) {
    const auto y = b.linear(x, b.weight(name, {5, 6}), -1, name);
    g.add_output(name, b.unary("cos", y));
  }
  const Lowered l(g, g, DType::f32, true);
  ASSERT_FALSE(l.program.step.empty());
  const auto& launch = l.program.step[0];
  EXPECT_EQ(launch.work.op, "linears");
  ASSERT_EQ(launch.out.size(), 3u);
  for (std::size_t k = 0; k < 3; ++k) {
    EXPECT_EQ(launch.out[k].offset, launch.out[0].offset + static_cast<std::int64_t>(k) * runtime::aligned(70 * 5 * 4));
    EXPECT_EQ(l.program.weights[k], launch.in[1 + k].weight);
  }
}

// As keys and values are that one exchange brings to all.
TEST(Lowering, WhatLiesSideBySideIsNotCopiedForAConcat) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.input("x", {64, 6}, DType::f32);
  std::map<std::string, graph::ValueId> y;
  for (const char* name : {"q", "k", "v"}) y[name] = b.split_dim(b.linear(x, b.weight(name, {16, 6}), -1, name), 0, {1, 64});
  g.add_output("behind", b.unary("cos", b.concat({y["k"], y["v"]}, 0)));
  g.add_output("apart", b.unary("sin", b.concat({y["q"], y["v"]}, 0)));
  const Lowered l(g, g, DType::f32, true);
  EXPECT_EQ(l.count("concat"), 1) << "of q and v, which do not stand side by side";
  const auto launch = [&](const std::string& op) {
    return std::find_if(l.program.step.begin(), l.program.step.end(), [&](const Launch& s) { return s.work.op == op; });
  };
  EXPECT_EQ(launch("cos")->in[0].offset, launch("linears")->out[1].offset);
}

TEST(Lowering, WhatLiesOtherwiseOrElsewhereIsCopiedForAConcat) {
  const auto concats = [](const std::string& first, const std::string& second, bool turned) {
    Graph g;
    Builder b(g, DType::f32);
    std::map<std::string, graph::ValueId> y;
    for (const char* of : {"a", "b"}) {
      const auto x = b.input(of, {64, 6}, DType::f32);
      for (const char* name : {"q", "k"}) y[std::string(of) + name] = b.linear(x, b.weight(std::string(of) + name, {64, 6}), -1, name);
    }
    const auto row = [&](graph::ValueId v) { return b.split_dim(v, 0, {1, 64}); };
    g.add_output("y", b.unary("cos", b.concat({row(y.at(first)), row(turned ? b.transpose(y.at(second), {1, 0}) : y.at(second))}, 0)));
    for (const auto& [name, value] : y) g.add_output(name, value);
    return Lowered(g, g, DType::f32, true).count("concat");
  };
  EXPECT_EQ(concats("aq", "ak", false), 0);
  EXPECT_EQ(concats("aq", "bk", false), 1) << "at the right distance, but in other memory";
  EXPECT_EQ(concats("aq", "ak", true), 1) << "in another order";
}

// As of models that have the tokens before the samples.
TEST(Lowering, WhatIsStackedIsWrittenWhereItWillLieInWhateverOrder) {
  Graph g;
  Builder b(g, DType::f32);
  const auto turned = [&](const char* name, const char* op) { return b.split_dim(b.transpose(b.unary(op, b.input(name, {16, 1, 32}, DType::f32)), {1, 0, 2}), 0, {1, 1}); };
  g.add_output("y", b.unary("cos", b.concat({turned("k", "silu"), turned("v", "tanh")}, 0)));
  const Lowered l(g, g, DType::f32, true);
  EXPECT_EQ(l.program.step.size(), 3u);
}

// What stays whole between GPUs is measured by what the model's other groups do: so the tests' own models are divided there too.
TEST(Lowering, NarrowModelsAreDividedBetweenGpus) {
  const Graph g = graph::normalise(small_unet());
  const auto mesh = sharding::Mesh::parse("tensor=2");
  const auto decision = sharding::decide(g, mesh, planner::least_work(backend::parse_devices("cuda:0,cuda:1")));
  const auto parts = sharding::partition(g, mesh, decision.assignment, sharding::Placement::resident);
  const auto varies = graph::varies_per_call(parts.devices[0]);
  int sums = 0;
  for (std::size_t i = 0; i < varies.size(); ++i) sums += varies[i] && graph::is(parts.devices[0].nodes()[i], "all_reduce");
  EXPECT_GE(sums, 3);
}

TEST(Lowering, GatheredWeightsPassThroughTheArenaAndStayStored) {
  const Graph g = graph::normalise(small_unet());
  const auto mesh = sharding::Mesh::parse("patch=2");
  const auto assignment = sharding::decide(g, mesh).assignment;
  const auto gathered = sharding::partition(g, mesh, assignment, sharding::Placement::gathered);
  std::int64_t held = 0;
  for (const auto& local : gathered.devices) {
    const Lowered l(g, local, DType::f16);
    ASSERT_FALSE(l.program.fetched.empty());
    for (const auto& weight : l.program.fetched) {
      EXPECT_FALSE(weight->packable);
      EXPECT_EQ(weight->stored, DType::f16);
    }
    std::int64_t here = 0;
    for (const auto* w : l.program.weights) here += w->bytes();
    EXPECT_LT(here, l.source->bytes() * 6 / 10);
    held += here;
  }
  EXPECT_LT(held, TestWeights(g, DType::f16).bytes() * 11 / 10);
}

// What is stored here is used where it lies.
TEST(Lowering, FetchesNothingThatItStores) {
  const Graph g = graph::normalise(small_unet());
  const auto mesh = sharding::Mesh::parse("patch=2");
  const auto gathered = sharding::partition(g, mesh, sharding::decide(g, mesh).assignment, sharding::Placement::gathered);
  const Lowered l(g, gathered.devices[0], DType::f32);
  int stored = 0, fetched = 0;
  for (const auto& launch : l.program.step) {
    if (!launch.collective || !graph::is(*launch.collective->node, "fetch_weight")) continue;
    const bool here = launch.collective->in.numel() > 0;
    EXPECT_EQ(runtime::traffic_bytes(*launch.collective), here ? 0 : launch.collective->out.bytes()) << launch.label;
    (here ? stored : fetched) += 1;
    EXPECT_EQ(launch.out[0].memory, here ? runtime::Place::Memory::weight : runtime::Place::Memory::arena) << launch.label;
    if (here) {
      EXPECT_EQ(launch.out[0].weight, launch.in[0].weight);
    }
  }
  EXPECT_GT(stored, 0);
  EXPECT_GT(fetched, 0);
}

class Hoisting : public testing::TestWithParam<const char*> {};

// Ranks of a group meet in collectives one by one: another order on one of them is a deadlock.
TEST_P(Hoisting, LeavesTheCollectivesOfAllDevicesInOneOrder) {
  const Graph g = graph::normalise(small_unet());
  const auto mesh = sharding::Mesh::parse(GetParam());
  const auto local = sharding::partition(g, mesh, sharding::decide(g, mesh).assignment, sharding::Placement::gathered);
  std::vector<std::vector<std::string>> orders;
  int aside = 0;
  for (const auto& graph : local.devices) {
    const Lowered l(g, graph, DType::f32, true);
    const auto& program = l.program;
    auto& order = orders.emplace_back();
    for (const auto* launches : {&program.prologue, &program.step})
      for (const auto& launch : *launches) {
        if (!launch.collective) continue;
        const auto& a = launch.collective->node->attrs;
        order.push_back(fmt::format("{}{} of {} at {}", launch.aside ? "aside " : "", launch.label, to_string(a.ints("group")),
                                    a.has("bounds") ? to_string(a.ints("bounds")) : ""));
        aside += launch.aside;
      }
  }
  EXPECT_GT(aside, 0);
  for (const auto& order : orders) EXPECT_EQ(order, orders[0]);
}

// What is fetched takes memory from then until it is read: of two chunks at most.
TEST_P(Hoisting, FetchesNoMoreThanAChunkAhead) {
  const Graph g = graph::normalise(small_unet());
  const auto mesh = sharding::Mesh::parse(GetParam());
  const auto local = sharding::partition(g, mesh, sharding::decide(g, mesh).assignment, sharding::Placement::gathered);
  const Lowered l(g, local.devices[0], DType::f32, true);
  const auto& program = l.program;
  std::size_t read = 0;
  for (const auto* launches : {&program.prologue, &program.step}) {
    std::int64_t total = 0, largest = 0, waiting = 0;
    for (const auto& launch : *launches)
      if (launch.aside) total += launch.collective->out.bytes(), largest = std::max(largest, launch.collective->out.bytes());
    struct Fetch {
      std::size_t at;
      std::int64_t bytes;
    };
    std::map<std::int64_t, Fetch> coming;  // by where it will lie
    std::size_t done = 0;                  // what went aside before this one has been waited for
    for (std::size_t i = 0; i < launches->size(); ++i) {
      const auto& launch = launches->at(i);
      for (auto fetch : launch.after) done = std::max(done, fetch + 1);
      for (const auto& place : launch.in) {
        const auto fetch = place.memory == runtime::Place::Memory::arena ? coming.find(place.offset) : coming.end();
        if (fetch == coming.end()) continue;
        EXPECT_LT(fetch->second.at, done) << launch.label << " reads what may not be there";
        waiting -= fetch->second.bytes;
        coming.erase(fetch);
        ++read;
      }
      if (!launch.aside || launch.out[0].memory != runtime::Place::Memory::arena) continue;
      coming[launch.out[0].offset] = {i, launch.collective->out.bytes()};
      waiting += launch.collective->out.bytes();
      EXPECT_LE(waiting, 2 * (total / 64 + largest)) << launch.label;
    }
    EXPECT_EQ(waiting, 0) << "every fetch has a reader";
  }
  EXPECT_GT(read, 0u);
}

// Every wait between the queues costs a gap: but for the first chunk's there is one for a chunk, not for a weight.
TEST(Lowering, WaitsOnceForAChunkOfWeights) {
  constexpr std::size_t kWeights = 1024, kChunks = 64;
  Graph g;
  Builder b(g, DType::f32);
  auto x = b.input("x", {8, 8, 16}, DType::f32);
  for (std::size_t i = 0; i < kWeights; ++i) x = b.linear(x, b.weight(fmt::format("{:04}", i), {16, 16}), fmt::format("linear {}", i));
  g.add_output("y", x);
  const auto local = sharding::partition(g, sharding::Mesh::parse("batch=2"), {}, sharding::Placement::gathered);
  const Lowered l(g, local.devices[0], DType::f32, true);
  const auto& program = l.program;
  std::size_t waits = 0, fetched = 0;
  for (const auto& launch : program.step) {
    waits += launch.after.size();
    fetched += launch.aside && launch.out[0].memory == runtime::Place::Memory::arena;
  }
  EXPECT_EQ(fetched, kWeights / 2);
  EXPECT_GE(waits, kChunks);
  EXPECT_LE(waits, kChunks + kWeights / kChunks);
}

// A concat takes what was fetched under another name: whoever reads it waits all the same.
TEST(Lowering, WaitsForWhatIsFetchedIntoAConcat) {
  Graph g;
  Builder b(g, DType::f32);
  const auto x = b.input("x", {8, 64}, DType::f32);
  auto parts = b.linear(x, b.weight("linear", {64, 64}), "linear");
  for (const char* key : {"first", "second", "third"}) parts = b.concat({b.merge_dims(b.weight(key, {4, 2, 64}), 0, 2), parts}, 0);
  g.add_output("y", b.unary("sin", b.unary("tanh", parts)));
  const auto local = sharding::partition(g, sharding::Mesh::parse("batch=2"), {}, sharding::Placement::gathered);
  std::size_t fetched = 0;
  for (const auto& graph : local.devices) {
    const Lowered l(g, graph, DType::f32, true);
    const auto& program = l.program;
    for (const auto* launches : {&program.prologue, &program.step}) {
      std::set<std::size_t> coming;
      for (std::size_t i = 0; i < launches->size(); ++i) {
        const auto& launch = launches->at(i);
        for (auto fetch : launch.after) coming.erase(coming.begin(), coming.upper_bound(fetch));
        const bool fills = launch.aside && launch.out[0].memory == runtime::Place::Memory::arena;
        if (fills) coming.insert(i), ++fetched;
        if (launch.label.starts_with("tanh")) {
          EXPECT_TRUE(coming.empty()) << launch.label;
        }
      }
    }
  }
  EXPECT_GT(fetched, 1u);
}

INSTANTIATE_TEST_SUITE_P(All, Hoisting, testing::Values("patch=2", "batch=2", "patch=3", "patch=2:1"));

TEST(Lowering, AnOpIsNamedWhenItCannotBeCompiled) {
  struct Refusing final : backend::HostDevice {
    backend::DeviceSpec spec_{"cpu", 0, 0};
    const backend::DeviceSpec& spec() const override { return spec_; }
    void attach() override {}
    std::unique_ptr<backend::Kernel> compile(const graph::Node&, std::span<const backend::Operand>, std::span<const backend::Operand>) override {
      fail("[silu] cpu:0 has no kernel for this op");
    }
    bool decodes(const graph::Node&, std::size_t) const override { return true; }
    void expect_compute(DType) const override {}
    void* allocate(std::int64_t) override { return nullptr; }
    void release(void*, std::int64_t) override {}
    void read(const TensorView&, void*, const graph::Type&, const graph::Order&) override {}
    void write(const void*, const graph::Type&, const graph::Order&, const TensorView&) override {}
  } device;
  Graph g;
  Builder b(g, DType::f32);
  g.add_output("y", g.add("silu", {b.input("x", {2}, DType::f32)}, {}, "block.act"));
  runtime::WeightStore store(std::make_shared<TestWeights>(g, DType::f32));
  try {
    runtime::lower(g, device, store);
    FAIL() << "expected an Error";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "silu 'block.act': [silu] cpu:0 has no kernel for this op");
  }
}

TEST(Lowering, ComputingInATypeThatTheDeviceLacksIsAnError) {
  Graph g;
  Builder b(g, DType::bf16);
  g.add_output("y", b.linear(b.input("x", {2, 3}, DType::bf16), b.weight("w", {4, 3}), "l"));
  EXPECT_THROW(Lowered{g}, Error);
}

TEST(Lowering, AWeightMustFitTheFile) {
  Graph g;
  Builder b(g, DType::f32);
  g.add_output("y", b.linear(b.input("x", {2, 3}, DType::f32), b.weight("w", {4, 3}), "l"));
  const auto message = [&](auto change) -> std::string {
    Watch watch;
    ReferenceDevice device({"cpu", 0, 0}, watch);
    auto source = std::make_shared<TestWeights>(g, DType::f32);
    change(*source);
    runtime::WeightStore store(source);
    try {
      runtime::lower(g, device, store);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_EQ(message([](TestWeights&) {}), "no error");
  EXPECT_EQ(message([](TestWeights& w) { w.reshape("w", {1, 4, 1, 3}); }), "no error");
  EXPECT_EQ(message([](TestWeights& w) { w.reshape("w", {3, 4}); }), "[weights] expected 'w' in test weights to be of shape [4,3] but got [3,4]");
  EXPECT_EQ(message([](TestWeights& w) { w.reshape("w", {12}); }), "[weights] expected 'w' in test weights to be of shape [4,3] but got [12]");
  EXPECT_NE(message([](TestWeights& w) { w.rename("w", "v"); }).find("'w'"), std::string::npos);
}

}  // namespace
}  // namespace comfytp::test
