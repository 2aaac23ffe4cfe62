// A file appears whole or not at all.
#include <sys/resource.h>

#include <csignal>

#include "files.h"

namespace comfytp::weights {
namespace {

const std::vector<std::pair<std::string, TensorInfo>> kTensors = {{"w", {DType::u8, {4}}}};

TEST(Writer, ShowsNothingUnderTheNameBeforeItIsFinished) {
  const Folder folder;
  Writer writer(folder / "out.safetensors", kTensors);
  writer.append("ab", 2);
  writer.append("cd", 2);
  EXPECT_FALSE(std::filesystem::exists(folder / "out.safetensors"));
  writer.finish();
  EXPECT_EQ(folder.names(), (std::vector<std::string>{"out.safetensors"}));
  EXPECT_TRUE(open_safetensors(folder / "out.safetensors")->has("w"));
}

TEST(Writer, LeavesNothingBehindWhenItIsGivenUp) {
  const Folder folder;
  {
    Writer writer(folder / "out.safetensors", kTensors);
    writer.append("ab", 2);
    EXPECT_EQ(folder.names().size(), 1u);
  }
  EXPECT_TRUE(folder.names().empty());
}

TEST(Writer, ReplacesAFileOnlyWhenTheNewOneIsWhole) {
  const Folder folder;
  folder.write("out.safetensors", file_with("old"));
  { Writer given_up(folder / "out.safetensors", kTensors); }
  EXPECT_TRUE(open_safetensors(folder / "out.safetensors")->has("old"));
  Writer writer(folder / "out.safetensors", kTensors);
  writer.append("abcd", 4);
  writer.finish();
  EXPECT_TRUE(open_safetensors(folder / "out.safetensors")->has("w"));
}

TEST(Writer, WritesThroughALink) {
  const Folder folder;
  folder.write("real.safetensors", file_with("old"));
  std::filesystem::create_symlink("real.safetensors", folder / "link.safetensors");
  Writer writer(folder / "link.safetensors", kTensors);
  writer.append("abcd", 4);
  writer.finish();
  EXPECT_TRUE(std::filesystem::is_symlink(folder / "link.safetensors"));
  EXPECT_TRUE(open_safetensors(folder / "real.safetensors")->has("w"));
}

TEST(Writer, RefusesTooManyOrTooFewBytes) {
  const Folder folder;
  const std::string path = (folder / "out.safetensors").string();
  {
    Writer writer(path, kTensors);
    expect_error([&] { writer.append("abcde", 5); }, {path, "4 bytes", "5 more"});
    writer.append("abc", 3);
    expect_error([&] { writer.finish(); }, {path, "4 bytes", "got 3"});
  }
  EXPECT_TRUE(folder.names().empty());
}

TEST(Writer, RefusesKeysThatTheFormatCannotHold) {
  const Folder folder;
  const TensorInfo info{DType::u8, {}};
  expect_error([&] { Writer(folder / "o.safetensors", {{"w", info}, {"w", info}}); }, {"'w'", "o.safetensors"});
  expect_error([&] { Writer(folder / "o.safetensors", {{"__metadata__", info}}); }, {"'__metadata__'", "o.safetensors"});
  expect_error([&] { Writer(folder / "o.safetensors", {{"\xff", info}}); }, {"UTF-8", "o.safetensors"});
  EXPECT_TRUE(folder.names().empty());
}

TEST(Writer, NamesAFileThatCannotBeMade) {
  const Folder folder;
  const auto inside = folder / "no/such/folder.safetensors";
  expect_error([&] { Writer(inside, kTensors); }, {inside.string(), "No such file"});
  expect_error([&] { Writer(folder.path(), kTensors); }, {folder.path().string(), "directory"});
}

// Appends until something fails; every size from a buffer's worth on must be noticed at finish() at the latest.
void write_bytes(const std::filesystem::path& path, std::size_t bytes) {
  const std::string data(bytes, 'x');
  Writer writer(path, {{"w", {DType::u8, {static_cast<std::int64_t>(bytes)}}}});
  writer.append(data.data(), bytes);
  writer.finish();
}

class FullDisk : public testing::TestWithParam<std::size_t> {};

TEST_P(FullDisk, IsOneLineNamingTheFile) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  expect_error([&] { write_bytes("/dev/full", GetParam()); }, {"/dev/full", "No space left"});
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/full"));
}

// The limit on a file's size stands for the disk's end, which a test cannot bring about.
TEST_P(FullDisk, LeavesNothingBehind) {
  const Folder folder;
  rlimit old;
  getrlimit(RLIMIT_FSIZE, &old);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit low{64, old.rlim_max};
  setrlimit(RLIMIT_FSIZE, &low);
  expect_error([&] { write_bytes(folder / "out.safetensors", GetParam()); }, {(folder / "out.safetensors").string(), "File too large"});
  setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, handler);
  EXPECT_TRUE(folder.names().empty());
}

INSTANTIATE_TEST_SUITE_P(Writer, FullDisk, testing::Values(100, 10'000, 3'000'000));

}  // namespace
}  // namespace comfytp::weights
