// Calls that are queued: the caller's tensors lie on a GPU, here on a reference device that says so.
#include <gtest/gtest.h>

#include "base/error.h"
#include "harness.h"
#include "runtime/compiled.h"

namespace comfytp::test {
namespace {

using runtime::CallOptions;
using Views = std::map<std::string, TensorView>;

void* const kStream = reinterpret_cast<void*>(0x1);

Views on_gpu(Views views, int ordinal) {
  for (auto& [name, view] : views) view.host = false, view.ordinal = ordinal;
  return views;
}

struct Queued : Fixture {
  explicit Queued(const Graph& g, const std::string& mesh = "tensor=1") : Fixture(g, options_for(mesh), DType::f32, true), graph(g) {}
  void call(const HostInputs& inputs, HostOutputs& outputs, const CallOptions& options = {kStream, {}}, int ordinal = 0) {
    engine->run(*engine->compile(graph), on_gpu(inputs.views, ordinal), on_gpu(outputs.views, ordinal), options);
  }
  void call(const HostInputs& inputs, const CallOptions& options = {kStream, {}}) {
    HostOutputs outputs(graph);
    call(inputs, outputs, options);
    engine->synchronize();
  }
  std::int64_t digests() const { return std::count(watch.queue_log.begin(), watch.queue_log.end(), "digest"); }
  std::int64_t prologues() const { return engine->stats().prologues; }

  const Graph& graph;
};

bool all_nan(const HostOutputs& outputs) {
  return std::all_of(outputs.values.at("output").begin(), outputs.values.at("output").end(), [](float v) { return std::isnan(v); });
}

class Queues : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Meshes, Queues, ::testing::Values("tensor=1", "tensor=2", "patch=2", "batch=2", "batch=2,tensor=2"));

TEST_P(Queues, TensorsOnAnyOfTheGpusGiveTheSame) {
  const Graph g = small_unet();
  Queued f(g, GetParam());
  for (int ordinal = 0; ordinal < f.engine->options().plan.mesh.size(); ++ordinal)
    for (std::uint64_t seed = 0; seed < 2; ++seed) {
      const HostInputs inputs(g, seed);
      HostOutputs outputs(g);
      f.call(inputs, outputs, {kStream, {}}, ordinal);
      f.engine->synchronize();
      EXPECT_LT(error_of(oracle(g, *f.weights, inputs), outputs), 1e-5) << ordinal;
    }
}

TEST_P(Queues, SomeTensorsMayLieInTheHostsMemory) {
  const Graph g = small_unet();
  Queued f(g, GetParam());
  const HostInputs inputs(g);
  const auto expected = oracle(g, *f.weights, inputs);
  for (const auto* name : {"x", "t", "context", "output"}) {
    auto in = on_gpu(inputs.views, 0);
    HostOutputs outputs(g);
    auto out = on_gpu(outputs.views, 0);
    auto& view = out.contains(name) ? out[name] : in[name];
    view.host = true;
    f.engine->run(*f.engine->compile(g), in, out, {kStream, {}});
    if (!out.contains(name)) f.engine->synchronize();
    EXPECT_LT(error_of(expected, outputs), 1e-5) << name;
  }
}

// Two results that have nothing to do with each other.
Graph two_results() {
  Graph g;
  graph::Builder b(g, DType::f32);
  const auto w = b.weight("w", {8, 8});
  for (const std::string name : {"a", "b"}) g.add_output(name + "_out", b.linear(b.input(name, {4, 6, 8}, DType::f32), w, -1, name));
  return g;
}

TEST_P(Queues, SomeResultsMayLieInTheHostsMemory) {
  const Graph g = two_results();
  Queued f(g, GetParam());
  for (int ordinal = 0; ordinal < f.engine->options().plan.mesh.size(); ++ordinal)
    for (const auto* on_host : {"a_out", "b_out"})
      for (const auto* infinite : {"", "a", "b"}) {
        HostInputs inputs(g);
        HostOutputs outputs(g);
        auto out = on_gpu(outputs.views, ordinal);
        out[on_host].host = true;
        if (*infinite) inputs.values[infinite][3] = INFINITY;
        f.engine->run(*f.engine->compile(g), on_gpu(inputs.views, ordinal), out, {kStream, {}});
        EXPECT_EQ(f.engine->take_not_finite(), *infinite != 0) << infinite << ", " << on_host << " in the host's memory";
        if (!*infinite) {
          EXPECT_LT(error_of(oracle(g, *f.weights, inputs), outputs), 1e-5) << ordinal << " " << on_host;
        }
      }
}

TEST_P(Queues, AStridedResultIsWrittenWhereItLies) {
  const Graph g = small_unet();
  Queued f(g, GetParam());
  const HostInputs inputs(g);
  HostOutputs outputs(g);
  const auto& dense = outputs.views["output"];
  std::vector<float> memory(static_cast<std::size_t>(dense.numel()));
  const TensorView target{memory.data(), DType::f32, dense.shape, graph::strides_of(dense.shape, graph::channels_last(4)), false};
  f.engine->run(*f.engine->compile(g), on_gpu(inputs.views, 0), {{"output", target}}, {kStream, {}});
  f.engine->synchronize();
  copy(on_host(target), dense);
  EXPECT_LT(error_of(oracle(g, *f.weights, inputs), outputs), 1e-5);
}

TEST_P(Queues, AFailureAfterTheReturnIsToldOnceAndItsResultIsNan) {
  const Graph g = small_unet();
  Queued f(g, GetParam());
  const HostInputs inputs(g);
  f.call(inputs);
  for (int how = 0; how < 3; ++how) {
    HostOutputs outputs(g);
    f.watch.breaks = true;
    f.call(inputs, outputs);
    if (how < 2) {
      EXPECT_THROW(f.engine->synchronize(), Error);
    } else {
      f.engine->unload();  // waits, and keeps for later what it finds
      EXPECT_THROW(f.engine->check(), Error);
    }
    f.watch.breaks = false;
    EXPECT_TRUE(all_nan(outputs));
    f.engine->check();
    f.engine->synchronize();
    EXPECT_LT(f.run_and_compare(g, inputs), 1e-5);
  }
  EXPECT_EQ(f.prologues(), 6) << "what the prompt's part left is not trusted either";
}

TEST(Queue, TheCallersStreamIsFollowedAndLed) {
  const Graph g = small_unet();
  Queued f(g);
  const HostInputs inputs(g);
  f.call(inputs, {kStream, {{"context", 1}}});
  f.watch.queue_log.clear();
  f.call(inputs, {kStream, {{"context", 1}}});
  EXPECT_EQ(f.watch.queue_log, (std::vector<std::string>{"follow 0x1", "lead 0x1"}));
}

TEST(Queue, WithoutAStreamACallWaitsAndThrowsItself) {
  const Graph g = small_unet();
  Queued f(g);
  const HostInputs inputs(g);
  HostOutputs outputs(g);
  f.call(inputs, outputs, {});
  EXPECT_LT(error_of(oracle(g, *f.weights, inputs), outputs), 1e-5);
}

TEST(Queue, PromptsWithNumbersAreNotLookedAt) {
  const Graph g = small_unet();
  Queued f(g);
  const HostInputs a(g, 0), b(g, 1);
  const auto numbered = [](std::uint64_t number) { return CallOptions{kStream, {{"context", number}}}; };
  f.call(a, numbered(7));
  EXPECT_EQ(f.digests(), 1);
  f.call(a, numbered(7));
  EXPECT_EQ(f.digests(), 1) << "known by its number";
  f.call(b, numbered(8));
  EXPECT_EQ(f.prologues(), 2);
  f.call(a, numbered(7));
  f.call(b, numbered(8));
  EXPECT_EQ(f.digests(), 2) << "both are kept";
  f.call(a, numbered(9));
  EXPECT_EQ(f.digests(), 3);
  f.call(a, numbered(9));
  EXPECT_EQ(f.digests(), 3) << "another number for a known content";
  f.call(a);
  EXPECT_EQ(f.digests(), 4) << "no number";
  EXPECT_EQ(f.prologues(), 2);
}

TEST(Queue, APromptsPartInHostMemoryIsComparedThereAndTheRestIsNotLookedAt) {
  Graph g;
  graph::Builder b(g, DType::f32);
  const auto w = b.weight("w", {8, 8});
  const auto prompt = b.add(b.linear(b.input("text", {4, 8}, DType::f32, "prompt"), w, -1, "text"), b.input("scale", {1, 8}, DType::f32, "prompt"));
  g.add_output("output", b.add(b.input("x", {4, 8}, DType::f32), prompt));
  Queued f(g);
  HostInputs inputs(g);
  HostOutputs outputs(g);
  const auto call = [&](std::uint64_t number) {
    auto in = on_gpu(inputs.views, 0);
    in["scale"].host = true;
    f.engine->run(*f.engine->compile(g), in, on_gpu(outputs.views, 0), {kStream, {{"text", number}}});
    f.engine->synchronize();
    EXPECT_LT(error_of(oracle(g, *f.weights, inputs), outputs), 1e-5);
  };
  call(7);
  call(7);
  EXPECT_EQ(f.digests(), 1);
  inputs.values["scale"][3] += 1;
  call(7);
  EXPECT_EQ(f.prologues(), 2);
  call(7);
  inputs.values["scale"][3] -= 1;
  call(7);
  EXPECT_EQ(f.prologues(), 2) << "both are kept";
  EXPECT_EQ(f.digests(), 2);
  call(8);
  EXPECT_EQ(f.prologues(), 2);
  EXPECT_EQ(f.digests(), 3);
}

TEST(Queue, CancelMakesWhatIsQueuedNanAndIsToldOnce) {
  const Graph g = small_unet();
  Queued f(g);
  const HostInputs inputs(g);
  f.call(inputs);
  f.engine->cancel();  // of nothing
  f.call(inputs);
  HostOutputs outputs(g);
  f.call(inputs, outputs);
  f.engine->cancel();
  const auto compiled = f.engine->compile(g);
  EXPECT_THROW(f.engine->run(*compiled, inputs.views, outputs.views), Cancelled);
  EXPECT_TRUE(all_nan(outputs));
  EXPECT_LT(f.run_and_compare(g, inputs), 1e-5);
}

TEST(Queue, ACancelThatComesTooLateIsNone) {
  const Graph g = small_unet();
  Queued f(g);
  const HostInputs inputs(g);
  HostOutputs outputs(g);
  f.watch.behind_end = [&] { f.engine->cancel(); };
  f.call(inputs, outputs);
  f.engine->synchronize();
  f.watch.behind_end = nullptr;
  EXPECT_LT(error_of(oracle(g, *f.weights, inputs), outputs), 1e-5);
  EXPECT_LT(f.run_and_compare(g, inputs), 1e-5);
}

std::string thrown(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& e) {
    return e.what();
  }
  return "nothing was thrown";
}

const std::string kFailed = "[run] a call that was queued has failed";

TEST(Queue, AFailureThatLoadingFindsIsThrownFirst) {
  const Graph g = small_unet(), other = small_unet(1);
  Queued f(g);
  const HostInputs inputs(g), others(other);
  HostOutputs outputs(other), broken(g);
  const auto compiled = f.engine->compile(other);
  f.watch.breaks = true;
  f.call(inputs, broken);
  const auto calls = f.engine->stats().calls;
  EXPECT_EQ(thrown([&] { f.engine->run(*compiled, on_gpu(others.views, 0), on_gpu(outputs.views, 0), {kStream, {}}); }), kFailed);
  EXPECT_EQ(f.engine->stats().calls, calls) << "and the call does not run";
  f.watch.breaks = false;
  f.engine->synchronize();
  EXPECT_LT(f.run_and_compare(g, inputs), 1e-5);
}

TEST(Queue, AFailingCallDoesNotHideAnEarlierOnes) {
  const Graph g = small_unet();
  Queued f(g, "tensor=2");
  const HostInputs inputs(g);
  f.call(inputs);
  HostOutputs earlier(g), outputs(g);
  f.watch.breaks = true;
  f.call(inputs, earlier);
  f.watch.before_kernel = [](const std::string&, const graph::Node& node) { require(node.name != "res.conv2", "it broke"); };
  EXPECT_TRUE(thrown([&] { f.call(inputs, outputs); }).ends_with("it broke"));
  f.watch.before_kernel = nullptr;
  f.watch.breaks = false;
  EXPECT_EQ(thrown([&] { f.engine->check(); }), kFailed);
  f.engine->check();
  EXPECT_LT(f.run_and_compare(g, inputs), 1e-5);
}

TEST(Queue, WhatIsNotFiniteIsNoted) {
  const Graph g = small_unet();
  Queued f(g);
  HostInputs inputs(g);
  f.call(inputs);
  EXPECT_FALSE(f.engine->take_not_finite());
  inputs.values["x"][3] = INFINITY;
  f.call(inputs);
  EXPECT_TRUE(f.engine->take_not_finite());
  EXPECT_FALSE(f.engine->take_not_finite());
  HostOutputs outputs(g);
  f.engine->run(*f.engine->compile(g), inputs.views, outputs.views);
  EXPECT_TRUE(f.engine->take_not_finite()) << "in the host's memory";
}

std::string refusal(Queued& f, const Views& in, const Views& out) {
  try {
    f.engine->run(*f.engine->compile(f.graph), in, out, {kStream, {}});
  } catch (const Error& e) {
    return e.what();
  }
  return "nothing was thrown";
}

TEST(Queue, TensorsOnOtherGpusAreRefused) {
  const Graph g = small_unet();
  Queued f(g, "tensor=2");
  const HostInputs inputs(g);
  HostOutputs outputs(g);
  EXPECT_EQ(refusal(f, on_gpu(inputs.views, 5), on_gpu(outputs.views, 5)),
            "[run] expected 'context' in host memory or on one of the engine's GPUs (0, 1) but got it on GPU 5");
  EXPECT_EQ(refusal(f, on_gpu(inputs.views, 0), on_gpu(outputs.views, 1)),
            "[run] expected all tensors that are on a GPU on the same but got 'context' on 0 and 'output' on 1");
  Fixture host(g, options_for("tensor=2"));
  try {
    host.engine->run(*host.engine->compile(g), on_gpu(inputs.views, 0), outputs.views);
    FAIL();
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "[run] expected 'context' in host memory, as the engine does not run on GPUs, but got it on GPU 0");
  }
}

}  // namespace
}  // namespace comfytp::test
