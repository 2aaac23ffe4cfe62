// An engine over any mesh and placement gives what the graph gives, and keeps what it promises to keep.
#include <gtest/gtest.h>

#include <thread>

#include "base/error.h"
#include "../models/shapes_only.h"
#include "harness.h"
#include "random_graph.h"

namespace comfytp::test {
namespace {

using sharding::Placement;

struct Split {
  std::string mesh;
  Placement placement = Placement::resident;
};
void PrintTo(const Split& s, std::ostream* out) { *out << s.mesh << (s.placement == Placement::gathered ? " gathered" : ""); }

class EverySplit : public ::testing::TestWithParam<Split> {};

INSTANTIATE_TEST_SUITE_P(Meshes, EverySplit,
                         ::testing::Values(Split{"tensor=1"}, Split{"tensor=2"}, Split{"tensor=3"}, Split{"tensor=4"}, Split{"tensor=2:1"},
                                           Split{"batch=2"}, Split{"batch=3"}, Split{"patch=2"}, Split{"patch=3"}, Split{"batch=2,tensor=2"},
                                           Split{"patch=2,tensor=2"}, Split{"batch=2,patch=2"}, Split{"tensor=2", Placement::gathered},
                                           Split{"batch=2", Placement::gathered}, Split{"patch=3", Placement::gathered},
                                           Split{"batch=2,tensor=2", Placement::gathered}));

TEST_P(EverySplit, ASmallUNetGivesWhatItsGraphGives) {
  for (const DType stored : {DType::f32, DType::f16}) {
    const Graph g = small_unet();
    Fixture f(g, options_for(GetParam().mesh, GetParam().placement), stored);
    const HostInputs inputs(g);
    EXPECT_LT(f.run_and_compare(g, inputs), 1e-5) << name_of(stored);
    EXPECT_LT(f.run_and_compare(g, inputs), 1e-5) << "with a known prompt";
  }
}

TEST_P(EverySplit, TheCpuDevicesGiveWhatTheGraphGives) {
  for (const DType stored : {DType::f32, DType::f16, DType::bf16}) {
    const Graph g = small_unet();
    const auto weights = std::make_shared<TestWeights>(g, stored);
    runtime::Engine engine(options_for(GetParam().mesh, GetParam().placement), weights);
    const auto compiled = engine.compile(g);
    const HostInputs inputs(g);
    const auto expected = oracle(g, *weights, inputs);
    for (int call = 0; call < 2; ++call) {
      HostOutputs outputs(g);
      engine.run(*compiled, inputs.views, outputs.views);
      EXPECT_LT(error_of(expected, outputs), 1e-5) << name_of(stored) << " call " << call;
    }
  }
}

TEST_P(EverySplit, RandomGraphsGiveWhatTheyGiveWhole) {
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    const Graph g = random_graph(seed);
    Fixture f(g, options_for(GetParam().mesh, GetParam().placement), seed % 2 ? DType::f16 : DType::f32);
    EXPECT_LT(f.run_and_compare(g, HostInputs(g, seed)), 1e-5) << "seed " << seed;
  }
}

TEST_P(EverySplit, TheSameCallGivesTheSameBits) {
  const Graph g = small_unet();
  Fixture f(g, options_for(GetParam().mesh, GetParam().placement));
  const auto compiled = f.engine->compile(g);
  const HostInputs inputs(g);
  HostOutputs first(g), second(g);
  f.engine->run(*compiled, inputs.views, first.views);
  f.engine->run(*compiled, inputs.views, second.views);
  EXPECT_EQ(first.values, second.values);
}

TEST_P(EverySplit, TheReportIsWhatGetsAllocated) {
  const Graph g = small_unet();
  Fixture f(g, options_for(GetParam().mesh, GetParam().placement), DType::f16);
  const auto compiled = f.engine->compile(g);
  EXPECT_EQ(f.watch.allocations, 0) << "compiling allocates nothing";
  const auto reports = f.engine->report(*compiled);
  const HostInputs inputs(g);
  HostOutputs outputs(g);
  f.engine->run(*compiled, inputs.views, outputs.views);
  const auto stats = f.engine->stats();
  std::int64_t weights = 0;
  for (std::size_t d = 0; d < reports.size(); ++d) {
    EXPECT_EQ(stats.allocated_weight_bytes[d], reports[d].weight_bytes);
    EXPECT_EQ(stats.allocated_activation_bytes[d], reports[d].activation_bytes);
    EXPECT_GE(f.watch.live_bytes[d], reports[d].weight_bytes + reports[d].activation_bytes);
    EXPECT_LE(f.watch.live_bytes[d], reports[d].weight_bytes + reports[d].activation_bytes + 256 * static_cast<std::int64_t>(g.nodes().size()));
    weights += reports[d].weight_bytes;
  }
  EXPECT_EQ(stats.uploaded_bytes, weights);
  EXPECT_GE(weights, f.weights->bytes());
  EXPECT_LE(f.watch.allocations, 3 * static_cast<std::int64_t>(reports.size())) << "a device's weights lie in one piece, beside activations and a prompt's values";
}

TEST_P(EverySplit, NothingIsAllocatedAfterTheFirstCallOfAShape) {
  const Graph small = small_unet(2, 4, 4), large = small_unet(2, 8, 4);
  Fixture f(small, options_for(GetParam().mesh, GetParam().placement));
  f.run_and_compare(small, HostInputs(small));
  f.run_and_compare(large, HostInputs(large));
  const std::int64_t allocations = f.watch.allocations;
  for (std::uint64_t seed = 1; seed < 3; ++seed) {
    EXPECT_LT(f.run_and_compare(small, HostInputs(small, seed)), 1e-5);
    EXPECT_LT(f.run_and_compare(large, HostInputs(large, seed)), 1e-5);
  }
  EXPECT_EQ(f.watch.allocations, allocations);
  EXPECT_EQ(f.engine->stats().programs_built, 2);
}

TEST(Engine, ShapesShareTheWeightsAndTheLargestArena) {
  const Graph small = small_unet(2, 4, 4), large = small_unet(2, 12, 10);
  Fixture f(small, options_for("tensor=2"));
  const auto a = f.engine->compile(small), b = f.engine->compile(large);
  f.run_and_compare(small, HostInputs(small));
  const auto first = f.engine->stats();
  f.run_and_compare(large, HostInputs(large));
  f.run_and_compare(small, HostInputs(small));
  const auto second = f.engine->stats();
  EXPECT_EQ(first.allocated_weight_bytes, second.allocated_weight_bytes);
  EXPECT_EQ(first.uploaded_bytes, second.uploaded_bytes);
  for (std::size_t d = 0; d < 2; ++d) {
    EXPECT_GT(second.allocated_activation_bytes[d], f.engine->report(*b)[d].activation_bytes) << "the small shape's prompts are kept as well";
    EXPECT_LT(second.allocated_activation_bytes[d], f.engine->report(*a)[d].activation_bytes + f.engine->report(*b)[d].activation_bytes);
  }
}

// What is stored in fp8 is told by the source; nothing is loaded here.
TEST(Engine, SaysWhyNothingIsMultipliedInFp8) {
  const auto compiled = [](DType compute, DType stored, bool able) {
    Graph g;
    graph::Builder b(g, compute);
    g.add_output("y", b.linear(b.input("x", {64, 32}, compute), b.weight("w", {48, 32})));
    Watch watch;
    watch.multiplies_in_fp8 = able;
    auto options = options_for("tensor=2");
    options.fp8_products = true;
    options.open = [&](const backend::DeviceSpec& spec, int, int) { return std::make_unique<ReferenceDevice>(spec, watch); };
    runtime::Engine engine(options, shapes_only({{"w", {stored, {48, 32}}}}));
    const auto program = engine.compile(g);
    std::pair<std::size_t, std::string> result;
    for (const auto* linear : engine.partition(*program).devices[0].all("linear")) result.first += linear->attrs.text_or("product", "") == "fp8";
    const auto& products = engine.fp8_products(*program);
    EXPECT_TRUE(products && products->linears == static_cast<std::int64_t>(result.first));
    result.second = products->note;
    const auto notes = engine.notes(*program);
    EXPECT_EQ(std::count(notes.begin(), notes.end(), products->note), products->note.empty() ? 0 : 1);
    return result;
  };
  using Result = std::pair<std::size_t, std::string>;
  EXPECT_EQ(compiled(DType::bf16, DType::f8_e4m3, true), Result(1, ""));
  EXPECT_EQ(compiled(DType::f16, DType::f8_e5m2, true), Result(1, ""));
  EXPECT_EQ(compiled(DType::f32, DType::f8_e4m3, false),
            Result(0, "fp8: nothing is multiplied in it, for cpu:0, cpu:1 cannot (GPUs can from sm_89 on)"));
  EXPECT_EQ(compiled(DType::bf16, DType::bf16, true), Result(0, "fp8: nothing is multiplied in it, for no linear's weight is stored in it"));
  EXPECT_EQ(compiled(DType::f32, DType::f8_e4m3, true),
            Result(0, "fp8: nothing is multiplied in it, for the model computes in f32 and not in f16 or bf16"));
}

TEST(Engine, EqualGraphsShareOneProgram) {
  const Graph g = small_unet();
  Fixture f(g, options_for("tensor=2"));
  EXPECT_EQ(f.engine->compile(g), f.engine->compile(small_unet()));
  EXPECT_NE(f.engine->compile(g), f.engine->compile(small_unet(1)));
  EXPECT_EQ(f.engine->stats().programs_built, 2);
}

TEST(Engine, AProgramThatGaveWayStillRunsAndReturnsItsMemory) {
  auto options = options_for("tensor=2");
  options.programs = 1;
  const Graph a = small_unet(2), b = small_unet(1);
  Fixture f(a, options);
  const auto first = f.engine->compile(a);
  const HostInputs inputs(a);
  HostOutputs outputs(a);
  f.engine->run(*first, inputs.views, outputs.views);
  const auto only_a = f.live_bytes();
  EXPECT_LT(f.run_and_compare(b, HostInputs(b)), 1e-5);
  EXPECT_LT(f.live_bytes(), only_a);
  f.engine->run(*first, inputs.views, outputs.views);
  EXPECT_LT(error_of(oracle(a, *f.weights, inputs), outputs), 1e-5);
  EXPECT_EQ(f.live_bytes(), only_a);
}

TEST(Engine, ThePrologueRunsOncePerPromptContent) {
  const Graph g = small_unet();
  for (const auto* mesh : {"tensor=1", "tensor=2", "patch=2"}) {
    Fixture f(g, options_for(mesh));
    HostInputs a(g, 1), a_elsewhere(g, 1), b(g, 2), c(g, 3);
    const auto prologues_after = [&](const HostInputs& inputs) {
      EXPECT_LT(f.run_and_compare(g, inputs), 1e-5);
      return f.engine->stats().prologues;
    };
    EXPECT_EQ(prologues_after(a), 1);
    EXPECT_EQ(prologues_after(a), 1);
    EXPECT_EQ(prologues_after(a_elsewhere), 1) << "content counts, not the pointer";
    EXPECT_EQ(prologues_after(b), 2);
    EXPECT_EQ(prologues_after(a), 2) << "two prompts are kept";
    EXPECT_EQ(prologues_after(b), 2);
    EXPECT_EQ(prologues_after(c), 3) << "the least recently used gives way: a";
    EXPECT_EQ(prologues_after(b), 3);
    EXPECT_EQ(prologues_after(a), 4);
    a.values["context"][7] += 1;
    EXPECT_EQ(prologues_after(a), 5) << "the same memory with other content is another prompt";
    a.values["x"][7] += 1;
    EXPECT_EQ(prologues_after(a), 5) << "what is no prompt does not matter";
  }
}

TEST(Engine, ThePrologueIsNoPartOfTheStep) {
  const Graph g = small_unet();
  Fixture f(g, options_for("tensor=1"));
  f.run_and_compare(g, HostInputs(g));
  const std::int64_t first = f.watch.kernels;
  f.run_and_compare(g, HostInputs(g));
  EXPECT_LT(f.watch.kernels - first, first) << "keys and values of the prompt are not made again";
}

TEST(Engine, TakesAnyFloatingDtypeAndAnyStrides) {
  const Graph g = small_unet();
  Fixture f(g, options_for("tensor=2"));
  HostInputs inputs(g);
  const auto& x = inputs.views["x"];
  // x in f16 and transposed in memory, the context in f64.
  std::vector<std::uint16_t> half(static_cast<std::size_t>(x.numel()));
  TensorView transposed{half.data(), DType::f16, x.shape, graph::strides_of(x.shape, {3, 1, 0, 2})};
  copy(x, transposed);
  copy(transposed, x);  // so that the oracle sees the same values
  std::vector<double> wide(static_cast<std::size_t>(inputs.views["context"].numel()));
  auto given = inputs.views;
  given["x"] = transposed;
  given["context"] = TensorView::dense(wide.data(), DType::f64, inputs.views["context"].shape);
  copy(inputs.views["context"], given["context"]);
  HostOutputs outputs(g);
  auto channels_last = outputs.views["output"];
  std::vector<double> memory(static_cast<std::size_t>(channels_last.numel()));
  const TensorView target{memory.data(), DType::f64, channels_last.shape, graph::strides_of(channels_last.shape, graph::channels_last(4))};
  f.engine->run(*f.engine->compile(g), given, {{"output", target}});
  copy(target, outputs.views["output"]);
  EXPECT_LT(error_of(oracle(g, *f.weights, inputs), outputs), 1e-5);
}

TEST(Engine, AnOutputMayBeAnInputsMemory) {
  Graph g;
  graph::Builder b(g, DType::f32);
  g.add_output("y", b.unary("silu", b.input("x", {4, 5}, DType::f32)));
  for (const auto* mesh : {"tensor=1", "batch=2"}) {
    Fixture f(g, options_for(mesh));
    HostInputs inputs(g);
    const auto expected = oracle(g, *f.weights, inputs);
    HostOutputs outputs(g);
    f.engine->run(*f.engine->compile(g), inputs.views, {{"y", inputs.views["x"]}});
    outputs.values["y"] = inputs.values["x"];
    EXPECT_LT(error_of(expected, outputs), 1e-6);
  }
}

TEST(Engine, InputsWeightsAndConstantsCanBeOutputs) {
  Graph g;
  graph::Builder b(g, DType::f32);
  const auto x = b.input("x", {3, 4}, DType::f32), p = b.input("p", {2, 2}, DType::f32, "prompt"), w = b.weight("w", {5, 4});
  g.add_output("x", x);
  g.add_output("x_again", x);
  g.add_output("x_view", b.transpose(x, {1, 0}));
  g.add_output("p", p);
  g.add_output("w", w);
  g.add_output("w_view", b.transpose(w, {1, 0}));
  g.add_output("c", b.constant({3}, {1, 2, 3}, DType::f32));
  for (const DType stored : {DType::f32, DType::f16})
    for (const auto* mesh : {"tensor=1", "tensor=2"}) {
      Fixture f(g, options_for(mesh), stored);
      const HostInputs inputs(g);
      EXPECT_EQ(f.run_and_compare(g, inputs), 0);
      EXPECT_EQ(f.run_and_compare(g, inputs), 0);
    }
}

TEST(Engine, CallsFromSeveralThreadsComeOneAfterTheOther) {
  const Graph g = small_unet();
  Fixture f(g, options_for("tensor=2"));
  std::vector<std::thread> threads;
  std::vector<double> errors(4, INFINITY);
  for (std::size_t i = 0; i < errors.size(); ++i)
    threads.emplace_back([&, i] { errors[i] = f.run_and_compare(g, HostInputs(g, i)); });
  for (auto& t : threads) t.join();
  for (double e : errors) EXPECT_LT(e, 1e-5);
  EXPECT_EQ(f.engine->stats().calls, 4);
}

TEST(Engine, UnloadFreesAllAndTheNextCallLoadsAgain) {
  const Graph g = small_unet();
  Fixture f(g, options_for("tensor=2"), DType::f16);
  const HostInputs inputs(g);
  for (int round = 0; round < 3; ++round) {
    EXPECT_LT(f.run_and_compare(g, inputs), 1e-5);
    EXPECT_GT(f.live_bytes(), 0);
    f.engine->unload();
    EXPECT_EQ(f.live_bytes(), 0);
    for (auto bytes : f.engine->stats().allocated_weight_bytes) EXPECT_EQ(bytes, 0);
  }
  EXPECT_EQ(f.engine->stats().prologues, 3);
}

TEST(Engine, NothingIsLeftBehind) {
  const Graph g = small_unet();
  Fixture f(g, options_for("tensor=3"));
  auto outlives = f.engine->compile(g);
  f.run_and_compare(g, HostInputs(g));
  f.engine.reset();
  EXPECT_EQ(f.live_bytes(), 0);
  outlives.reset();
  EXPECT_EQ(f.watch.live_kernels, 0);
}

TEST(Engine, ProgressReachesTheTotal) {
  const Graph g = small_unet();
  auto options = options_for("tensor=2");
  std::vector<std::pair<std::int64_t, std::int64_t>> seen;
  const auto caller = std::this_thread::get_id();
  options.progress = [&](std::int64_t done, std::int64_t total) {
    EXPECT_TRUE(std::this_thread::get_id() == caller);
    seen.emplace_back(done, total);
  };
  Fixture f(g, options);
  f.run_and_compare(g, HostInputs(g));
  ASSERT_FALSE(seen.empty());
  EXPECT_EQ(seen.back().first, seen.back().second);
  EXPECT_EQ(seen.back().second, f.engine->stats().uploaded_bytes);
}

TEST_P(EverySplit, AnInputThatIsReadInTwoWaysGivesWhatTheGraphGives) {
  // The first convolution wants all channels, the norm behind which the other stands a part of them.
  Graph g;
  graph::Builder b(g, DType::f32);
  const std::int64_t c = 12;
  const auto x = b.input("x", {2, c, 6, 5}, DType::f32);
  const auto norm = b.unary("silu", b.group_norm(x, b.weight("norm.weight", {c}), b.weight("norm.bias", {c}), 6, 1e-5, "norm"));
  const auto inner = b.conv2d(norm, b.weight("conv.weight", {c, c, 3, 3}), b.weight("conv.bias", {c, 1, 1}), 1, 1, "conv");
  const auto skip = b.conv2d(x, b.weight("skip.weight", {c, c, 1, 1}), b.weight("skip.bias", {c, 1, 1}), 1, 0, "skip");
  g.add_output("y", b.add(inner, skip));
  Fixture f(g, options_for(GetParam().mesh, GetParam().placement));
  EXPECT_LT(f.run_and_compare(g, HostInputs(g)), 1e-5);
}

TEST(Meshes, AnotherArrangementOfTheSameDevicesGivesTheSame) {
  const Graph g = small_unet();
  Fixture f(g, options_for("batch=2"));
  const HostInputs inputs(g);
  EXPECT_LT(f.run_and_compare(g, inputs), 1e-5);
  const auto held = f.engine->stats().allocated_weight_bytes;
  for (const char* mesh : {"patch=2", "batch=2", "tensor=2"}) {
    const auto compiled = f.engine->compile(g, sharding::Mesh::parse(mesh));
    HostOutputs outputs(g);
    f.engine->run(*compiled, inputs.views, outputs.views);
    EXPECT_LT(error_of(oracle(g, *f.weights, inputs), outputs), 1e-5) << mesh;
    EXPECT_EQ(f.engine->mesh(*compiled).to_string(), mesh);
    if (std::string_view(mesh) != "tensor=2") {
      EXPECT_EQ(f.engine->stats().allocated_weight_bytes, held) << "whole weights serve both";
    }
  }
  EXPECT_EQ(f.engine->stats().programs_built, 3);
  EXPECT_THROW(f.engine->compile(g, sharding::Mesh::parse("tensor=3")), Error);
}

// A concat that is another name for what lies there, read whole and in parts, beside what it is made of, and joined once more.
TEST(Engine, WhatLiesSideBySideIsReadUnderEveryName) {
  Graph g;
  graph::Builder b(g, DType::f32);
  const auto x = b.input("x", {64, 6}, DType::f32);
  std::map<std::string, graph::ValueId> y;
  for (const char* name : {"q", "k", "v"}) y[name] = b.split_dim(b.linear(x, b.weight(name, {16, 6}), -1, name), 0, {1, 64});
  const auto both = b.concat({y["k"], y["v"]}, 0);
  g.add_output("both", both);
  g.add_output("k", b.unary("sin", b.slice(both, 0, 0, 1)));
  g.add_output("v", b.unary("cos", b.slice(both, 0, 1, 2)));
  g.add_output("again", b.unary("tanh", b.concat({both, y["k"]}, 0)));
  g.add_output("others", b.mul(b.unary("silu", both), b.concat({y["q"], b.unary("neg", y["k"])}, 0)));
  Fixture f(g, options_for("tensor=1"));
  f.watch.like_a_gpu = true;
  for (std::uint64_t seed : {0, 1}) EXPECT_LT(f.run_and_compare(g, HostInputs(g, seed)), 1e-6);
}

// Whoever stores a weight packs it as those that fetch it read it, also where it has nothing to do with it itself.
TEST(Engine, GatheredWeightsAreReadAsTheyWerePackedElsewhere) {
  Graph two;  // tokens, of which a third device has none
  graph::Builder b(two, DType::f32);
  auto x = b.input("x", {1, 2, 16}, DType::f32);
  for (const char* key : {"a", "b", "c", "d"}) x = b.unary("silu", b.linear(x, b.weight(key, {16, 16})));
  two.add_output("y", x);
  for (const char* mesh : {"patch=2", "patch=3"})
    for (const Graph& g : {small_unet(), two}) {
      const auto normalised = graph::normalise(g);
      for (const bool agree : {false, true}) {
        Fixture f(normalised, options_for(mesh, sharding::Placement::gathered));
        f.watch.formats_agree = agree;
        EXPECT_LT(f.run_and_compare(normalised, HostInputs(normalised)), 1e-5) << mesh << " " << agree;
      }
    }
}

}  // namespace
}  // namespace comfytp::test
