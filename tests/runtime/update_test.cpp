// Weights whose values have changed are read again, and no others.
#include <gtest/gtest.h>

#include "base/error.h"
#include "harness.h"

namespace comfytp::test {
namespace {

struct Case {
  std::string mesh;
  sharding::Placement placement = sharding::Placement::resident;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.mesh << (c.placement == sharding::Placement::gathered ? " gathered" : ""); }

class Updates : public ::testing::TestWithParam<Case> {
 protected:
  const Graph graph = small_unet();
  const HostInputs inputs{graph};
};

INSTANTIATE_TEST_SUITE_P(Meshes, Updates,
                         ::testing::Values(Case{"tensor=1"}, Case{"tensor=2"}, Case{"tensor=3"}, Case{"patch=2"}, Case{"batch=2"},
                                           Case{"tensor=2", sharding::Placement::gathered}));

TEST_P(Updates, MoveTheirOwnBytesAndNoOthers) {
  Fixture f(graph, options_for(GetParam().mesh, GetParam().placement), DType::f16);
  EXPECT_LT(f.run_and_compare(graph, inputs), 1e-5);
  const auto whole = f.engine->stats();

  std::mutex mutex;
  std::set<std::string> read;
  f.weights->before_read = [&](const std::string& key) {
    std::lock_guard lock(mutex);
    read.insert(key);
  };
  const std::set<std::string> changed{"res.conv1.weight", "t.ff2.weight", "t.cross.k.weight"};
  std::int64_t most = 0, least = 0;  // held once by all devices together, or once by each
  for (const auto& key : changed) {
    f.weights->multiply(key, 1.5);
    least += f.weights->info(key).bytes();
    most += f.weights->info(key).bytes() * static_cast<std::int64_t>(f.engine->options().plan.devices.size());
  }
  f.engine->update(changed);
  EXPECT_LT(f.run_and_compare(graph, inputs), 1e-5) << "also what was kept of the prompt";

  EXPECT_EQ(read, changed);
  const auto moved = f.engine->stats().uploaded_bytes - whole.uploaded_bytes;
  EXPECT_GE(moved, least);
  EXPECT_LE(moved, most);
  EXPECT_EQ(f.engine->stats().allocated_weight_bytes, whole.allocated_weight_bytes);
}

TEST_P(Updates, BeforeAnythingIsLoadedReadNothing) {
  Fixture f(graph, options_for(GetParam().mesh, GetParam().placement));
  f.engine->update({"res.conv1.weight", "no such key"});
  EXPECT_EQ(f.engine->stats().uploaded_bytes, 0);
  EXPECT_LT(f.run_and_compare(graph, inputs), 1e-5);
}

TEST_P(Updates, ThatFailAreMadeUpForByTheNextCall) {
  Fixture f(graph, options_for(GetParam().mesh, GetParam().placement));
  EXPECT_LT(f.run_and_compare(graph, inputs), 1e-5);
  f.weights->multiply("res.conv1.weight", 2);
  f.weights->multiply("out.weight", 2);
  f.weights->before_read = [](const std::string& key) { require(key != "out.weight", "[weights] cannot read '{}'", key); };
  EXPECT_THROW(f.engine->update({"res.conv1.weight", "out.weight"}), Error);
  f.weights->before_read = nullptr;
  EXPECT_LT(f.run_and_compare(graph, inputs), 1e-5);
}

}  // namespace
}  // namespace comfytp::test
