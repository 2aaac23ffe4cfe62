// Whatever ends a call, all devices stop, the caller is told why, and the next call works.
#include <gtest/gtest.h>

#include <thread>

#include "backend/host_device.h"
#include "base/error.h"
#include "harness.h"
#include "runtime/compiled.h"

namespace comfytp::test {
namespace {

class Failures : public ::testing::TestWithParam<const char*> {
 protected:
  const Graph graph = small_unet();
  const HostInputs inputs{graph};

  // What a call throws, and that the outputs are then as they were.
  template <typename E>
  std::string thrown(Fixture& f) {
    const auto compiled = f.engine->compile(graph);
    HostOutputs outputs(graph);
    std::string message = "nothing was thrown";
    try {
      f.engine->run(*compiled, inputs.views, outputs.views);
    } catch (const E& e) {
      message = e.what();
    }
    for (float v : outputs.values["output"]) EXPECT_TRUE(std::isnan(v)) << "a failed call writes nothing";
    return message;
  }
  void expect_works(Fixture& f) {
    f.watch.before_kernel = nullptr;
    f.weights->before_read = nullptr;
    EXPECT_LT(f.run_and_compare(graph, inputs), 1e-5);
  }
};

INSTANTIATE_TEST_SUITE_P(Meshes, Failures, ::testing::Values("tensor=2", "tensor=4", "patch=2", "batch=2,tensor=2"));

TEST_P(Failures, AFailingKernelIsNamedWithItsDevice) {
  Fixture f(graph, options_for(GetParam()));
  for (const auto* where : {"in", "res.conv2", "out"}) {  // in the first, a middle and the last launches
    f.watch.before_kernel = [&](const std::string& device, const graph::Node& node) {
      require(!(device == "cpu:1" && node.name == where), "[conv2d] it broke");
    };
    EXPECT_EQ(thrown<Error>(f), fmt::format("cpu:1: conv2d '{}': [conv2d] it broke", where));
    expect_works(f);
  }
}

TEST_P(Failures, AForeignExceptionIsAnErrorToo) {
  Fixture f(graph, options_for(GetParam()));
  f.watch.before_kernel = [&](const std::string& device, const graph::Node& node) {
    if (device == "cpu:1" && node.name == "res.conv2") throw std::bad_alloc();
  };
  EXPECT_EQ(thrown<OutOfMemory>(f), "cpu:1: conv2d 'res.conv2': the system has no more memory");
  f.watch.before_kernel = [&](const std::string& device, const graph::Node& node) {
    if (device == "cpu:1" && node.name == "res.conv2") throw std::runtime_error("it broke");
  };
  EXPECT_EQ(thrown<Error>(f), "cpu:1: conv2d 'res.conv2': it broke");
  expect_works(f);
}

// So that a caller can tell what a device could not do now from what no device can.
TEST_P(Failures, ADevicesFailureIsToldFromOtherErrors) {
  Fixture f(graph, options_for(GetParam()));
  const auto meet = [](auto error) {
    return [error](const std::string& device, const graph::Node& node) {
      if (device == "cpu:1" && node.name == "res.conv2") throw error;
    };
  };
  // What compiling throws then.
  const auto compiling = [&](auto error) -> std::string {
    f.watch.before_compile = meet(error);
    try {
      f.engine->compile(graph);
    } catch (const OutOfMemory& e) {
      return std::string("out of memory: ") + e.what();
    } catch (const DeviceFailure& e) {
      return std::string("a device's failure: ") + e.what();
    } catch (const Error& e) {
      return e.what();
    }
    return "nothing";
  };
  EXPECT_EQ(compiling(OutOfMemory("[memory] it is full")), "out of memory: cpu:1: conv2d 'res.conv2': [memory] it is full");
  EXPECT_EQ(compiling(DeviceFailure("[cuda] it broke")), "a device's failure: cpu:1: conv2d 'res.conv2': [cuda] it broke");
  EXPECT_EQ(compiling(Error("[conv2d] no such kernel")), "cpu:1: conv2d 'res.conv2': [conv2d] no such kernel");
  f.watch.before_compile = nullptr;
  f.watch.before_kernel = meet(OutOfMemory("[memory] it is full"));
  EXPECT_EQ(thrown<OutOfMemory>(f), "cpu:1: conv2d 'res.conv2': [memory] it is full");
  expect_works(f);
}

TEST_P(Failures, AFailingPrologueIsRunAgain) {
  Fixture f(graph, options_for(GetParam()));
  f.watch.before_kernel = [&](const std::string& device, const graph::Node& node) {
    require(!(device == "cpu:0" && node.name == "t.cross.k"), "it broke");
  };
  EXPECT_EQ(thrown<Error>(f), "cpu:0: linear 't.cross.k': it broke");
  expect_works(f);
  EXPECT_EQ(f.engine->stats().prologues, 1);
}

TEST_P(Failures, CancellingEndsTheCallOnAllDevices) {
  Fixture f(graph, options_for(GetParam()));
  f.engine->cancel();  // without a call it does nothing
  expect_works(f);
  f.watch.before_kernel = [&](const std::string& device, const graph::Node& node) {
    if (device == "cpu:1" && node.name == "res.conv1") f.engine->cancel();
  };
  EXPECT_EQ(thrown<Cancelled>(f), "cancelled by the caller");
  expect_works(f);
}

TEST_P(Failures, ADeviceThatIsWaitedForTooLongIsNamed) {
  auto options = options_for(GetParam());
  options.timeout_seconds = 0.05;
  Fixture f(graph, options);
  const auto compiled = f.engine->compile(graph);
  f.watch.before_kernel = [&](const std::string& device, const graph::Node& node) {
    // Busy until its peers have lost patience.
    while (device == "cpu:1" && node.name == "res.conv2" && !compiled->team->abort()->raised())
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  const auto message = thrown<Timeout>(f);
  EXPECT_NE(message.find(" waited 0.05 s for cpu:"), std::string::npos) << message;
  EXPECT_NE(message.find("cpu:1", message.find(" for ")), std::string::npos) << message;
}

TEST_P(Failures, AFailingLoadFreesWhatItLoaded) {
  Fixture f(graph, options_for(GetParam()));
  int reads = 0;
  std::mutex mutex;
  f.weights->before_read = [&](const std::string& key) {
    std::lock_guard lock(mutex);
    require(++reads < 9, "[weights] cannot read '{}'", key);
  };
  EXPECT_NE(thrown<Error>(f).find("[weights] cannot read"), std::string::npos);
  EXPECT_EQ(f.live_bytes(), 0);
  for (auto bytes : f.engine->stats().allocated_weight_bytes) EXPECT_EQ(bytes, 0);
  expect_works(f);
}

TEST_P(Failures, AFailingLoadLeavesOtherProgramsTheirWeights) {
  Graph other;
  graph::Builder b(other, DType::f32);
  other.add_output("y", b.linear(b.input("x", {2, 4}, DType::f32), b.weight("other", {5, 4}), "l"));
  Graph both = small_unet();
  graph::Builder(both, DType::f32).weight("other", {5, 4});  // so that the source has it
  Fixture f(both, options_for(GetParam()));
  expect_works(f);
  const auto weights = f.engine->stats().allocated_weight_bytes;
  f.weights->before_read = [](const std::string& key) { fail("[weights] cannot read '{}'", key); };
  const auto compiled = f.engine->compile(other);
  EXPECT_THROW(f.engine->load(*compiled), Error);
  EXPECT_EQ(f.engine->stats().allocated_weight_bytes, weights);
  expect_works(f);
  EXPECT_EQ(f.engine->stats().prologues, 1) << "nor are its prompts forgotten";
}

TEST_P(Failures, AnEndedLoadCanBeTriedAgain) {
  auto options = options_for(GetParam());
  bool stop = true;
  options.progress = [&](std::int64_t, std::int64_t) {
    if (stop) throw Cancelled("enough");
  };
  Fixture f(graph, options);
  EXPECT_EQ(thrown<Cancelled>(f), "enough");
  EXPECT_EQ(f.live_bytes(), 0);
  stop = false;
  expect_works(f);
}

TEST_P(Failures, ALimitIsKeptAndNamed) {
  auto options = options_for(GetParam());
  options.plan.devices[1].limit_bytes = 10000;
  Fixture f(graph, options);
  const auto message = thrown<Error>(f);
  EXPECT_TRUE(message.starts_with("cpu:1: [memory] cpu:1 needs ")) << message;
  EXPECT_EQ(f.live_bytes(), 0);
}

TEST(Inputs, ThatDoNotFitAreNamed) {
  const Graph g = small_unet();
  Fixture f(g, options_for("tensor=2"));
  const auto compiled = f.engine->compile(g);
  const HostInputs inputs(g);
  HostOutputs outputs(g);
  std::int64_t integers[4] = {};
  const auto message = [&](auto change) -> std::string {
    auto in = inputs.views, out = outputs.views;
    change(in, out);
    try {
      f.engine->run(*compiled, in, out);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  using Views = std::map<std::string, TensorView>;
  EXPECT_EQ(message([](Views& in, Views&) { in.erase("t"); }), "[run] expected the inputs context, t, x but got no 't'");
  EXPECT_EQ(message([](Views& in, Views&) { in["y"] = in["t"]; }), "[run] expected the inputs context, t, x but got 'y'");
  EXPECT_EQ(message([](Views& in, Views&) { in["t"] = in["x"]; }), "[run] expected input 't' of shape [2,12] but got [2,4,8,6]");
  EXPECT_EQ(message([&](Views& in, Views&) { in["t"] = {integers, DType::i64, {2, 12}, {0, 0}}; }),
            "[run] expected input 't' in a floating dtype but got i64");
  EXPECT_EQ(message([&](Views& in, Views&) { in["t"].data = nullptr; }), "[run] expected memory for input 't' but got none");
  EXPECT_EQ(message([](Views&, Views& out) { out.clear(); }), "[run] expected the outputs output but got no 'output'");
  EXPECT_EQ(message([](Views&, Views& out) { out["output"].dtype = DType::f8_e4m3; }),
            "[run] expected output 'output' in a floating dtype but got f8_e4m3");
  EXPECT_EQ(message([](Views&, Views&) {}), "no error");
}

TEST(Inputs, OfAnotherEnginesProgramAreRefused) {
  const Graph g = small_unet();
  Fixture a(g, options_for("tensor=2")), b(g, options_for("tensor=2"));
  const auto compiled = a.engine->compile(g);
  const HostInputs inputs(g);
  HostOutputs outputs(g);
  EXPECT_THROW(b.engine->run(*compiled, inputs.views, outputs.views), Error);
  EXPECT_THROW(b.engine->load(*compiled), Error);
}

TEST(Devices, ThatDoNotOpenOrAttachAreErrors) {
  const Graph g = small_unet();
  auto options = options_for("tensor=3");
  Watch watch;
  struct Detached final : backend::HostDevice {
    backend::DeviceSpec spec_{"cpu", 1, 0};
    const backend::DeviceSpec& spec() const override { return spec_; }
    void attach() override { fail("[devices] no cores left"); }
    std::unique_ptr<backend::Kernel> compile(const graph::Node&, std::span<const backend::Operand>, std::span<const backend::Operand>) override {
      return nullptr;
    }
    bool decodes(const graph::Node&, std::size_t) const override { return true; }
    void expect_compute(DType) const override {}
    void* allocate(std::int64_t) override { return nullptr; }
    void release(void*, std::int64_t) override {}
    void read(const TensorView&, void*, const graph::Type&, const graph::Order&) override {}
    void write(const void*, const graph::Type&, const graph::Order&, const TensorView&) override {}
  };
  options.open = [&](const backend::DeviceSpec& spec, int position, int) -> std::unique_ptr<backend::Device> {
    if (position == 1) return std::make_unique<Detached>();
    return std::make_unique<ReferenceDevice>(spec, watch);
  };
  const auto weights = std::make_shared<TestWeights>(g, DType::f32);
  try {
    runtime::Engine engine(options, weights);
    FAIL() << "expected an Error";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "cpu:1: [devices] no cores left");
  }
  auto short_of_one = options_for("tensor=3");
  short_of_one.plan.devices.pop_back();
  EXPECT_THROW(runtime::Engine(short_of_one, weights), Error);
}

}  // namespace
}  // namespace comfytp::test
