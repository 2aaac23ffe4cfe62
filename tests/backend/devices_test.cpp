#include <gtest/gtest.h>

#include <cstdint>
#include <thread>

#include "base/affinity.h"
#include "base/error.h"
#include "fixture.h"

namespace comfytp::test {
namespace {

using backend::open_device;
using backend::parse_devices;

std::string error_of(const auto& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(ParseDevices, ReadsKindsIndicesAndLimits) {
  const auto specs = parse_devices("cpu:0,cpu:13@512MiB,cuda:1@1.5GiB,cuda:1");
  ASSERT_EQ(specs.size(), 4u);
  EXPECT_EQ(specs[0].name(), "cpu:0");
  EXPECT_EQ(specs[0].limit_bytes, 0);
  EXPECT_EQ(specs[1].name(), "cpu:13");
  EXPECT_EQ(specs[1].limit_bytes, std::int64_t{512} << 20);
  EXPECT_EQ(specs[2].name(), "cuda:1");
  EXPECT_EQ(specs[2].limit_bytes, std::int64_t{3} << 29);
}

TEST(ParsedLimits, AreKept) {
  const auto specs = parse_devices("cpu:0,cpu:1@512MiB");
  const std::int64_t mib = 1 << 20;
  EXPECT_NO_THROW(specs[0].expect_room(std::int64_t{1} << 50, 1));
  EXPECT_NO_THROW(specs[1].expect_room(511 * mib, mib));
  EXPECT_EQ(error_of([&] { specs[1].expect_room(511 * mib, 3 * mib); }),
            "[memory] cpu:1 needs 3.00 MiB more, has 511.00 MiB in use and a limit of 512.00 MiB");
}

class BadDeviceLists : public testing::TestWithParam<std::pair<std::string, std::string>> {};

TEST_P(BadDeviceLists, AreRefusedWithTheReason) {
  const auto& [list, reason] = GetParam();
  const auto error = error_of([&list = list] { parse_devices(list); });
  EXPECT_NE(error.find(reason), std::string::npos) << error;
  EXPECT_EQ(error.find('\n'), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(All, BadDeviceLists,
                         testing::Values(std::pair{"", "but got ''"}, std::pair{"cpu:0,,x", "but got '' in 'cpu:0,,x'"},
                                         std::pair{"cpu:0,x", "but got 'x'"}, std::pair{"cpu:-1", "but got 'cpu:-1'"},
                                         std::pair{"cpu:", "but got 'cpu:'"}, std::pair{"cpu", "but got 'cpu'"},
                                         std::pair{"cpu:0 ", "but got 'cpu:0 '"}, std::pair{"cpu:1x", "but got 'cpu:1x'"},
                                         std::pair{"npu:0", "but got 'npu:0'"}, std::pair{"cpu:99999999999", "but got 'cpu:99999999999'"},
                                         std::pair{"cpu:0,cpu:1,cpu:0", "'cpu:0' twice"}, std::pair{"cpu:0@", "but got 'cpu:0@'"},
                                         std::pair{"cpu:0@2", "such as @2GiB"}, std::pair{"cpu:0@-1GiB", "such as @2GiB"},
                                         std::pair{"cpu:0@2GiBs", "such as @2GiB"}, std::pair{"cpu:0@0MiB", "such as @2GiB"}));

TEST(OpenDevice, NamesTheDevicesThatExist) {
  EXPECT_NE(error_of([] {
              open_device({"cpu", 64}, 0, 1);
            }).find("'cpu:64': there is no such device; devices here: cpu:0"),
            std::string::npos);
  const auto cuda = error_of([] { open_device({"cuda", 7}, 0, 1); });
  for (const auto* part : {"'cuda:7': ", "devices here: cpu:0"}) EXPECT_NE(cuda.find(part), std::string::npos) << cuda;
  EXPECT_EQ(cuda.find('\n'), std::string::npos) << cuda;
}

TEST(OpenDevice, GivesEveryDeviceSomeOfTheCores) {
  const auto all = allowed_cores();
  for (int count : {1, 2, 3, 64}) {
    std::vector<int> met;
    for (int position = 0; position < count; ++position)
      std::thread([&] {
        open_device({"cpu", position}, position, count)->attach();
        const auto cores = allowed_cores();
        EXPECT_FALSE(cores.empty());
        if (met.empty() || met.back() != cores.back()) met.insert(met.end(), cores.begin(), cores.end());
      }).join();
    if (count <= static_cast<int>(all.size())) {
      EXPECT_EQ(met, all) << count << " devices";
    }
  }
}

TEST(DeviceMemory, IsAlignedAndCountedAgainstTheLimit) {
  const auto device = open_device({"cpu", 3, 1000}, 0, 1);
  void* a = device->allocate(600);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(a) % 64, 0u);
  const auto error = error_of([&] { device->allocate(500); });
  for (const auto* part : {"cpu:3", "500", "600", "1000"}) EXPECT_NE(error.find(part), std::string::npos) << error;
  void* b = device->allocate(400);
  device->release(b, 400);
  device->release(a, 600);
  void* c = device->allocate(1000);
  device->release(c, 1000);
}

TEST(DeviceMemory, MoreThanTheMachineHasIsAnError) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the sanitizers' allocators end the process instead";
#endif
  const auto device = open_device({"cpu", 0}, 0, 1);
  EXPECT_NE(error_of([&] { device->allocate(std::int64_t{1} << 60); }).find("cpu:0"), std::string::npos);
}

TEST(Compile, NamesAnOpOrDtypeThatIsNotSupported) {
  const auto device = open_device({"cpu", 0}, 0, 1);
  graph::Graph graph;
  const auto x = graph::Builder(graph, DType::f16).input("x", {2, 3}, DType::f16);
  graph.add("silu", {x});
  const backend::Operand operand{graph.type(x), {0, 1}};
  const auto error = error_of([&] { device->compile(graph.nodes().back(), {{operand}}, {{operand}}); });
  EXPECT_NE(error.find("[silu] expected f32 or bf16"), std::string::npos) << error;
  const auto none = error_of([&] { device->compile(graph.nodes().front(), {}, {{operand}}); });
  EXPECT_NE(none.find("[input] cpu:0 has no kernel"), std::string::npos) << none;
  EXPECT_NE(error_of([&] { device->expect_compute(DType::f16); }).find("cpu:0 computes in f32 or bf16 but not in f16"), std::string::npos);
  EXPECT_NO_THROW(device->expect_compute(DType::f32));
}

class HostCopies : public testing::TestWithParam<std::tuple<DType, DType>> {};

TEST_P(HostCopies, ConvertAndReorderThereAndBack) {
  const auto [host, inside] = GetParam();
  const auto device = open_device({"cpu", 0}, 0, 1);
  const graph::Type type{inside, {3, 40, 5, 2}};
  const graph::Order order = {3, 0, 2, 1};
  const auto values = values_of("x", type.shape, host);
  std::vector<char> there(values.data.size() * 8), back(values.data.size() * 8);
  for (std::size_t i = 0; i < values.data.size(); ++i) store_element(there.data(), host, static_cast<std::int64_t>(i), values.data[i]);
  void* data = device->allocate(type.bytes());
  device->read(TensorView::dense(there.data(), host, type.shape), data, type, order);
  const auto strides = graph::strides_of(type.shape, order);
  EXPECT_EQ(load_element(data, inside, 2 * strides[0] + 7 * strides[1] + 1 * strides[3]), values.data[2 * 400 + 7 * 10 + 1]);
  device->write(data, type, order, TensorView::dense(back.data(), host, type.shape));
  device->synchronize();
  EXPECT_EQ(there, back);
  device->release(data, type.bytes());
}

INSTANTIATE_TEST_SUITE_P(All, HostCopies,
                         testing::Values(std::tuple{DType::f32, DType::f32}, std::tuple{DType::f16, DType::f32},
                                         std::tuple{DType::bf16, DType::f32}, std::tuple{DType::f64, DType::f64},
                                         std::tuple{DType::i64, DType::f32}, std::tuple{DType::u8, DType::u8}));

}  // namespace
}  // namespace comfytp::test
