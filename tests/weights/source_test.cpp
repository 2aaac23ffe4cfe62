// What reading a tensor or a part of it gives.
#include <algorithm>
#include <numeric>
#include <thread>

#include "files.h"

namespace comfytp::weights {
namespace {

std::vector<std::byte> read_whole(const Source& source, std::string_view key) {
  std::vector<std::byte> out(static_cast<std::size_t>(source.info(key).bytes()));
  source.read(key, whole_box(source.info(key).shape), out.data());
  return out;
}

std::vector<std::byte> pattern(std::int64_t bytes) {
  std::vector<std::byte> out(static_cast<std::size_t>(bytes));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<std::byte>(i * 37 + i / 251);
  return out;
}

// All boxes of a shape whose intervals are the whole, a front, a middle and a back part, or empty.
std::vector<Box> boxes_of(const Shape& shape) {
  std::vector<Box> boxes{{}};
  for (const auto size : shape) {
    std::vector<Box> longer;
    for (const auto& box : boxes)
      for (const auto interval : {Interval{0, size}, {0, size / 2}, {size / 3, size - size / 4}, {size / 2, size}, {size, size}}) {
        longer.push_back(box);
        longer.back().push_back(interval);
      }
    boxes = std::move(longer);
  }
  return boxes;
}

// The bytes of a box, element by element.
std::vector<std::byte> naive(const std::vector<std::byte>& whole, const Shape& shape, const Box& box, std::size_t element) {
  std::vector<std::byte> part;
  const auto strides = row_major_strides(shape);
  const auto walk = [&](auto& self, std::size_t d, std::int64_t offset) -> void {
    if (d == shape.size()) {
      const auto* from = whole.data() + static_cast<std::size_t>(offset) * element;
      part.insert(part.end(), from, from + element);
      return;
    }
    for (auto i = box[d].lo; i < box[d].hi; ++i) self(self, d + 1, offset + i * strides[d]);
  };
  walk(walk, 0, 0);
  return part;
}

class EveryDType : public testing::TestWithParam<DType> {};

TEST_P(EveryDType, IsWrittenAndReadBackBitForBit) {
  const DType dtype = GetParam();
  const Folder folder;
  const std::vector<std::pair<std::string, TensorInfo>> tensors = {
      {"scalar", {dtype, {}}}, {"empty", {dtype, {3, 0, 2}}}, {"vector", {dtype, {5}}}, {"conv", {dtype, {3, 2, 3, 3}}}};
  Writer writer(folder / "t.safetensors", tensors, {{"format", "pt"}});
  for (const auto& [key, info] : tensors) writer.append(pattern(info.bytes()).data(), static_cast<std::size_t>(info.bytes()));
  writer.finish();

  const auto source = open_safetensors(folder / "t.safetensors");
  EXPECT_EQ(source->tensors().size(), tensors.size());
  for (const auto& [key, info] : tensors) {
    EXPECT_EQ(source->info(key).dtype, dtype);
    EXPECT_EQ(source->info(key).shape, info.shape);
    EXPECT_EQ(read_whole(*source, key), pattern(info.bytes())) << key;
  }
}

constexpr DType kDTypes[] = {DType::f64, DType::f32, DType::f16, DType::bf16, DType::f8_e4m3, DType::f8_e5m2, DType::i64,    DType::i32,
                             DType::i16, DType::i8,  DType::u64, DType::u32,  DType::u16,     DType::u8,      DType::boolean};
INSTANTIATE_TEST_SUITE_P(Source, EveryDType, testing::ValuesIn(kDTypes), [](const auto& info) { return std::string(name_of(info.param)); });

class Parts : public testing::TestWithParam<std::tuple<Shape, DType>> {};

TEST_P(Parts, EqualTheNaiveLoop) {
  const auto& [shape, dtype] = GetParam();
  const TensorInfo info{dtype, shape};
  const auto whole = pattern(info.bytes());
  // A byte in front puts the tensor where no wide type may stand in memory.
  const Folder folder;
  Writer writer(folder / "t.safetensors", {{"odd", {DType::u8, {1}}}, {"w", info}});
  writer.append("x", 1);
  writer.append(whole.data(), whole.size());
  writer.finish();
  const auto source = open_safetensors(folder / "t.safetensors");
  for (const auto& box : boxes_of(shape)) {
    const auto expected = naive(whole, shape, box, static_cast<std::size_t>(size_of(dtype)));
    std::vector<std::byte> out(expected.size() + 1, std::byte{0xa5});
    source->read("w", box, out.data());
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), out.begin()));
    EXPECT_EQ(out.back(), std::byte{0xa5}) << "written behind the part";
  }
}

INSTANTIATE_TEST_SUITE_P(Source, Parts,
                         testing::Combine(testing::Values(Shape{}, Shape{13}, Shape{7, 10}, Shape{4, 5, 6}, Shape{6, 4, 3, 3},
                                                          Shape{1, 1, 8, 1}),
                                          testing::Values(DType::f32, DType::bf16, DType::f8_e4m3)));

TEST(Source, NamesSourceAndKeyWhenAPartDoesNotFit) {
  const Folder folder;
  const auto source = open_safetensors(folder.write("t.safetensors", file_with("w")));
  char out[8];
  for (const Box& box : {Box{}, Box{{0, 5}}, Box{{-1, 2}}, Box{{3, 2}}, Box{{0, 1}, {0, 1}}})
    expect_error([&] { source->read("w", box, out); }, {"'w'", "t.safetensors", "[4]"});
  expect_error([&] { source->read("v", {{0, 1}}, out); }, {"expected a tensor 'v'", "t.safetensors"});
}

TEST(Source, IsReadFromSeveralThreadsAtOnce) {
  const Folder folder;
  const TensorInfo info{DType::f32, {64, 32}};
  const auto whole = pattern(info.bytes());
  Writer writer(folder / "t.safetensors", {{"w", info}});
  writer.append(whole.data(), whole.size());
  writer.finish();
  const auto source = open_safetensors(folder / "t.safetensors");
  std::vector<std::vector<std::byte>> parts(4, std::vector<std::byte>(whole.size() / 4));
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] { source->read("w", {{t * 16, t * 16 + 16}, {0, 32}}, parts[static_cast<std::size_t>(t)].data()); });
  for (auto& thread : threads) thread.join();
  std::vector<std::byte> joined;
  for (const auto& part : parts) joined.insert(joined.end(), part.begin(), part.end());
  EXPECT_EQ(joined, whole);
}

// Anonymous memory of this process in bytes, or -1 where the system does not say.
std::int64_t anonymous_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (std::int64_t kilobytes; word == "RssAnon:" && status >> kilobytes) return kilobytes * 1024;
  return -1;
}

TEST(Source, ReadingAddsNoAnonymousMemoryBeyondTheParts) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "the sanitizer's shadow of what is read is anonymous memory too";
#endif
  if (anonymous_bytes() < 0) GTEST_SKIP() << "the system does not tell anonymous memory";
  constexpr std::int64_t kRows = 32, kRow = 1 << 20;
  const Folder folder;
  std::vector<std::byte> row(kRow);
  Writer writer(folder / "t.safetensors", {{"w", {DType::u8, {kRows, kRow}}}});
  for (int i = 0; i < kRows; ++i) {
    std::fill(row.begin(), row.end(), static_cast<std::byte>(i));
    writer.append(row.data(), row.size());
  }
  writer.finish();
  const auto before = anonymous_bytes();
  const auto source = open_safetensors(folder / "t.safetensors");
  for (int i = 0; i < kRows; ++i) {
    source->read("w", {{i, i + 1}, {0, kRow}}, row.data());
    ASSERT_EQ(row.back(), static_cast<std::byte>(i));
  }
  EXPECT_LT(anonymous_bytes() - before, kRows * kRow / 4);
}

TEST(FromViews, ReadsStridedViewsAndKeepsTheirOwner) {
  auto owner = std::make_shared<std::vector<float>>(12);
  std::iota(owner->begin(), owner->end(), 0.f);
  std::weak_ptr<std::vector<float>> watch = owner;
  auto* data = owner->data();
  auto source = from_views("mapping",
                           {{"transposed", {data, DType::f32, {4, 3}, {1, 4}}},  // of [3,4]
                            {"expanded", {data + 5, DType::f32, {2, 2}, {0, 1}}}},
                           owner);
  owner.reset();
  EXPECT_FALSE(watch.expired());
  EXPECT_EQ(source->name(), "mapping");
  std::vector<float> out(4);
  source->read("transposed", {{1, 3}, {1, 3}}, out.data());
  EXPECT_EQ(out, (std::vector<float>{5, 9, 6, 10}));
  source->read("expanded", {{0, 2}, {0, 2}}, out.data());
  EXPECT_EQ(out, (std::vector<float>{5, 6, 5, 6}));
  source.reset();
  EXPECT_TRUE(watch.expired());
}

TEST(Renamed, ShowsOnlyTheNamedTensorsUnderTheirNewNames) {
  std::uint8_t data[] = {1, 2, 3};
  const auto source =
      from_views("mapping", {{"a", TensorView::dense(data, DType::u8, {1})}, {"b", TensorView::dense(data + 1, DType::u8, {2})}}, nullptr);
  const auto fresh = renamed(source, {{"new", "b"}});
  EXPECT_EQ(fresh->name(), "mapping");
  EXPECT_EQ(fresh->tensors().size(), 1u);
  EXPECT_FALSE(fresh->has("a"));
  EXPECT_EQ(read_whole(*fresh, "new"), (std::vector<std::byte>{std::byte{2}, std::byte{3}}));
  expect_error([&] { fresh->read("b", {{0, 2}}, data); }, {"'b'", "mapping"});
  expect_error([&] { renamed(source, {{"new", "c"}}); }, {"'c'", "mapping"});
}

}  // namespace
}  // namespace comfytp::weights
