// GPUs that wait for each other: whatever happens to one of them, the caller is told, the other one is free, and calls work again.
// Ranks that share a GPU must keep this too. Skipped where a device is missing.
#include <gtest/gtest.h>

#include <fmt/ranges.h>

#include <thread>

#include "base/error.h"
#include "harness.h"
#include "runtime/compiled.h"
#include "wrapped_device.h"

namespace comfytp::test {
namespace {

// What happens to a rank; called on its thread.
struct Fault {
  std::function<void(int rank)> before_replay, before_synchronize;
};

class FaultyDevice final : public WrappedDevice {
 public:
  FaultyDevice(std::unique_ptr<backend::Device> device, int rank, const Fault& fault)
      : WrappedDevice(std::move(device)), rank_(rank), fault_(fault) {}

  std::unique_ptr<backend::Recording> record(const std::function<void()>& launches) override {
    return std::make_unique<FaultyRecording>(WrappedDevice::record(launches), *this);
  }
  void synchronize() override {
    if (fault_.before_synchronize) fault_.before_synchronize(rank_);
    WrappedDevice::synchronize();
  }

 private:
  struct FaultyRecording final : backend::Recording {
    FaultyRecording(std::unique_ptr<backend::Recording> recording, FaultyDevice& device) : recording_(std::move(recording)), device_(device) {}
    void replay() override {
      if (device_.fault_.before_replay) device_.fault_.before_replay(device_.rank_);
      recording_->replay();
    }
    std::unique_ptr<backend::Recording> recording_;
    FaultyDevice& device_;
  };

  const int rank_;
  const Fault& fault_;
};

struct Setting {
  std::string devices, mesh;
  comm::Route route;
  sharding::Placement placement;
};

class GpuFailures : public ::testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    for (const auto& spec : backend::parse_devices(GetParam().devices)) try {
        backend::open_device(spec, 0, 1)->attach();
      } catch (const Error& e) {
        GTEST_SKIP() << e.what();
      }
    if (GetParam().route == comm::Route::staged) return;
    try {
      engine_with(300);
    } catch (const Error& e) {
      if (std::string(e.what()).find("read each other's memory") != std::string::npos) GTEST_SKIP() << e.what();
      throw;
    }
  }
  std::unique_ptr<runtime::Engine> engine_with(double timeout) {
    runtime::EngineOptions options;
    options.plan.mesh = sharding::Mesh::parse(GetParam().mesh);
    options.plan.devices = backend::parse_devices(GetParam().devices);
    options.plan.placement = GetParam().placement;
    options.route = GetParam().route;
    options.timeout_seconds = timeout;
    options.open = [this](const backend::DeviceSpec& spec, int position, int count) {
      return std::make_unique<FaultyDevice>(backend::open_device(spec, position, count), position, fault);
    };
    return std::make_unique<runtime::Engine>(std::move(options), weights);
  }
  // What the call throws; nothing is written then.
  template <typename E>
  std::string thrown(runtime::Engine& engine) {
    const auto compiled = engine.compile(graph);
    EXPECT_FALSE(engine.report(*compiled).at(0).collectives.empty()) << "nobody would wait for anybody";
    HostOutputs outputs(graph);
    std::string message = "nothing was thrown";
    try {
      engine.run(*compiled, inputs.views, outputs.views);
    } catch (const E& e) {
      message = e.what();
    }
    for (float v : outputs.values["output"]) EXPECT_TRUE(std::isnan(v)) << "a failed call writes nothing";
    return message;
  }
  void expect_works(runtime::Engine& engine) {
    HostOutputs outputs(graph);
    engine.run(*engine.compile(graph), inputs.views, outputs.views);
    EXPECT_LT(error_of(expected, outputs), 1e-5);
  }
  // The engine that met it works again, and so does another beside it.
  void expect_all_works(std::unique_ptr<runtime::Engine> engine) {
    fault = {};
    expect_works(*engine);
    const auto beside = engine_with(300);
    expect_works(*beside);
  }

  const Graph graph = small_unet();
  const HostInputs inputs{graph};
  const std::shared_ptr<TestWeights> weights = std::make_shared<TestWeights>(graph, DType::f32);
  const graph::Results expected = oracle(graph, *weights, inputs);
  Fault fault;
};

std::vector<Setting> settings() {
  std::vector<Setting> all;
  for (const auto* devices : {"cuda:0,cuda:0", "cuda:0,cuda:1"})
    for (auto route : {comm::Route::peer, comm::Route::staged}) {
      all.push_back({devices, "tensor=2", route, sharding::Placement::resident});
      all.push_back({devices, "patch=2", route, sharding::Placement::gathered});
      all.push_back({devices, "patch=2", route, sharding::Placement::resident});
    }
  return all;
}

std::string label(const ::testing::TestParamInfo<Setting>& info) {
  std::string name = info.param.devices + (info.param.route == comm::Route::peer ? "_peer_" : "_staged_") + info.param.mesh.substr(0, info.param.mesh.find('='));
  name += info.param.placement == sharding::Placement::gathered ? "_gathered" : "_resident";
  std::erase(name, ':');
  std::replace(name.begin(), name.end(), ',', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Groups, GpuFailures, ::testing::ValuesIn(settings()), label);

TEST_P(GpuFailures, AFailingStreamEndsTheCallOnAllDevices) {
  auto engine = engine_with(300);
  expect_works(*engine);
  for (bool queued : {false, true}) {  // before the rank's peers have anything of it, and behind all that it queued
    const auto breaks = [](int rank) { require(rank != 1, "[cuda] running: it broke"); };
    (queued ? fault.before_synchronize : fault.before_replay) = breaks;
    const auto message = thrown<Error>(*engine);
    EXPECT_TRUE(message.starts_with("cuda:") && message.ends_with(": [cuda] running: it broke")) << message;
    fault = {};
    expect_works(*engine);
  }
  expect_all_works(std::move(engine));
}

TEST_P(GpuFailures, AFirstCallMayFailToo) {
  auto engine = engine_with(300);
  fault.before_replay = [](int rank) { require(rank != 0, "it broke"); };
  EXPECT_TRUE(thrown<Error>(*engine).ends_with(": it broke"));
  expect_all_works(std::move(engine));
}

TEST_P(GpuFailures, AStalledWorkerIsATimeoutOfItsPeer) {
  auto engine = engine_with(3);
  expect_works(*engine);
  const auto compiled = engine->compile(graph);
  fault.before_replay = [&](int rank) {
    while (rank == 1 && !compiled->team->abort()->raised()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  const auto message = thrown<Timeout>(*engine);
  EXPECT_NE(message.find(" waited 3 s for cuda:"), std::string::npos) << message;
  expect_all_works(std::move(engine));
}

TEST_P(GpuFailures, CancellingInTheMiddleEndsTheCall) {
  auto engine = engine_with(300);
  expect_works(*engine);
  fault.before_replay = [&](int rank) {
    if (rank != 1) return;
    engine->cancel();
    std::this_thread::sleep_for(std::chrono::milliseconds(100));  // what all ranks have queued by then would go on to its end
  };
  EXPECT_EQ(thrown<Cancelled>(*engine), "cancelled by the caller");
  expect_all_works(std::move(engine));
}

}  // namespace
}  // namespace comfytp::test
