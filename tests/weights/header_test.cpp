// What a broken safetensors file is answered with.
#include <fmt/ranges.h>

#include "files.h"

namespace comfytp::weights {
namespace {

struct BadFile {
  const char* name;
  std::string bytes;
  std::vector<std::string> message;  ///< what must stand in it beside the file's name
};

void PrintTo(const BadFile& bad, std::ostream* out) { *out << bad.name; }

std::string tensor(const std::string& key, const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return fmt::format(R"("{}":{{"dtype":"{}","shape":{},"data_offsets":{}}})", key, dtype, shape, offsets);
}
std::string braces(const std::string& inside) { return fmt::format("{{{}}}", inside); }
std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets, std::size_t data) {
  return file_of(braces(tensor("layer.weight", dtype, shape, offsets)), data);
}
std::string two(const std::string& first, const std::string& second, std::size_t data) {
  return file_of(braces(tensor("a.first", "U8", "[4]", first) + "," + tensor("b.second", "U8", "[4]", second)), data);
}
std::string field(const std::string& entry) { return file_of(braces(R"("layer.weight":)" + entry), 4); }

const std::vector<BadFile> kBadFiles = {
    {"empty_file", "", {"8 bytes of header length", "truncated"}},
    {"shorter_than_the_length", "abc", {"8 bytes of header length", "has 3"}},
    {"header_longer_than_the_file", length_bytes(1000) + "{}", {"header of 1000 bytes", "only 2 follow"}},
    {"header_longer_than_100_MB", length_bytes(100'000'001) + "{}", {"at most 100000000 bytes", "100000001"}},
    {"header_length_near_2_to_the_64", length_bytes(~std::uint64_t{0}) + "{}", {"at most 100000000 bytes"}},
    {"truncated_header", file_of(braces(tensor("w", "U8", "[4]", "[0,4]")), 0).substr(0, 30), {"header is longer than the file"}},
    {"truncated_data", one("F32", "[4]", "[0,16]", 10), {"'layer.weight'", "10 bytes of data", "ends at byte 16", "truncated"}},
    {"no_json", file_of("hello", 0), {"expected an object"}},
    {"an_array", file_of("[]", 0), {"expected an object"}},
    {"malformed_json", file_of(R"({"layer.weight":{"dtype":)", 0), {"malformed at byte", "'layer.weight'"}},
    {"text_behind_the_json", file_of("{} {}", 0), {"malformed at byte"}},
    {"zero_byte_in_the_json", file_of(std::string("{}\0{}", 5), 0), {"zero byte at byte 2"}},
    {"no_utf8", file_of("{\"\xff\":1}", 0), {"malformed at byte"}},
    {"number_out_of_range", field(R"({"dtype":"U8","shape":[1e999],"data_offsets":[0,4]})"), {"number is out of range", "'layer.weight'"}},
    {"duplicate_key", file_of(braces(tensor("w", "U8", "[4]", "[0,4]") + "," + tensor("w", "U8", "[4]", "[0,4]")), 4), {"'w'", "twice"}},
    {"duplicate_field", field(R"({"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]})"), {"'dtype'", "twice"}},
    {"deep_nesting", field(std::string(100'000, '[')), {"nesting", "'layer.weight'"}},
    {"metadata_no_object", file_of(R"({"__metadata__":[]})", 0), {"__metadata__", "array"}},
    {"metadata_no_text", file_of(R"({"__metadata__":{"version":1}})", 0), {"__metadata__", "'version'", "number"}},
    {"entry_no_object", field("4"), {"'layer.weight'", "expected an object", "number"}},
    {"no_dtype", field(R"({"shape":[4],"data_offsets":[0,4]})"), {"'layer.weight'", "'dtype'"}},
    {"no_shape", field(R"({"dtype":"U8","data_offsets":[0,4]})"), {"'layer.weight'", "'shape'"}},
    {"no_offsets", field(R"({"dtype":"U8","shape":[4]})"), {"'layer.weight'", "'data_offsets'"}},
    {"dtype_no_text", field(R"({"dtype":1,"shape":[4],"data_offsets":[0,4]})"), {"'layer.weight'", "string as dtype"}},
    {"dtype_unknown", one("F12", "[4]", "[0,4]", 4), {"'layer.weight'", "'F12'", "BF16"}},
    {"shape_no_array", one("U8", "4", "[0,4]", 4), {"'layer.weight'", "non-negative integers as shape"}},
    {"shape_negative", one("U8", "[-4]", "[0,4]", 4), {"'layer.weight'", "non-negative integers as shape"}},
    {"shape_fraction", one("U8", "[4.0]", "[0,4]", 4), {"'layer.weight'", "non-negative integers as shape"}},
    {"shape_beyond_64_bits", one("U8", "[99999999999999999999]", "[0,4]", 4), {"'layer.weight'", "non-negative integers as shape"}},
    {"shape_overflows", one("F32", "[4294967296,4294967296]", "[0,4]", 4), {"'layer.weight'", "2^63 bytes"}},
    {"shape_overflows_in_bytes", one("F64", "[2305843009213693952]", "[0,0]", 0), {"'layer.weight'", "2^63 bytes"}},
    {"shape_overflows_behind_a_zero", one("U8", "[0,4294967296,4294967296]", "[0,0]", 0), {"'layer.weight'", "2^63 bytes"}},
    {"shape_of_many_dimensions",
     one("U8", fmt::format("[{}]", fmt::join(std::vector<int>(65, 1), ",")), "[0,1]", 1),
     {"'layer.weight'", "64 dimensions"}},
    {"offsets_no_array", one("U8", "[4]", "4", 4), {"'layer.weight'", "non-negative integers as data_offsets"}},
    {"offsets_one_number", one("U8", "[4]", "[4]", 4), {"'layer.weight'", "two rising data_offsets"}},
    {"offsets_falling", one("U8", "[4]", "[4,0]", 4), {"'layer.weight'", "two rising data_offsets", "[4,0]"}},
    {"bytes_do_not_fit_shape", one("F32", "[2,3]", "[0,20]", 20), {"'layer.weight'", "expected 24 bytes", "[2,3]", "span 20"}},
    {"bytes_do_not_fit_dtype", one("F16", "[4]", "[0,16]", 16), {"'layer.weight'", "expected 8 bytes", "span 16"}},
    {"offsets_out_of_range", two("[0,4]", "[100,104]", 8), {"'b.second'", "ends at byte 104"}},
    {"offsets_near_2_to_the_64", two("[0,4]", "[18446744073709551611,18446744073709551615]", 8), {"'b.second'", "ends at byte"}},
    {"overlap", two("[0,4]", "[2,6]", 6), {"'b.second'", "'a.first'", "overlaps"}},
    {"the_same_bytes", two("[0,4]", "[0,4]", 4), {"'b.second'", "'a.first'", "overlaps"}},
    {"hole", two("[0,4]", "[6,10]", 10), {"'b.second'", "hole of 2 bytes"}},
    {"hole_at_the_beginning", one("U8", "[4]", "[1,5]", 5), {"'layer.weight'", "hole of 1 bytes"}},
    {"trailing_bytes", one("U8", "[4]", "[0,4]", 7), {"'layer.weight'", "3 bytes follow"}},
    {"trailing_bytes_without_tensors", file_of("{}", 5), {"5 bytes follow"}},
    {"key_of_several_lines", file_of(R"({"a\nb":4})", 0), {"'a?b'"}},
};

class BadFiles : public testing::TestWithParam<BadFile> {};

TEST_P(BadFiles, AreRefusedWithOneLineNamingFileAndKey) {
  const Folder folder;
  const auto path = folder.write("bad.safetensors", GetParam().bytes);
  auto parts = GetParam().message;
  parts.push_back(path.string());
  expect_error([&] { open_safetensors(path); }, parts);
}

INSTANTIATE_TEST_SUITE_P(Header, BadFiles, testing::ValuesIn(kBadFiles), [](const auto& info) { return std::string(info.param.name); });

TEST(Header, AFileCutAnywhereIsRefused) {
  const std::string whole = two("[0,4]", "[4,8]", 8);
  const auto bytes = [&](std::size_t n) { return std::span(reinterpret_cast<const std::byte*>(whole.data()), n); };
  for (std::size_t n = 0; n < whole.size(); ++n) expect_error([&] { parse_header(bytes(n), n, "cut"); }, {"cut"});
  EXPECT_EQ(parse_header(bytes(whole.size()), whole.size(), "whole").entries.size(), 2u);
}

TEST(Header, HoldsMetadataOffsetsAndInfo) {
  const std::string bytes = file_of(R"({"__metadata__":{"format":"pt"},"w":{"shape":[2],"data_offsets":[0,4],"dtype":"BF16"}}   )", 4);
  const auto header = parse_header(std::as_bytes(std::span(bytes)), bytes.size(), "good");
  EXPECT_EQ(header.metadata, (std::map<std::string, std::string>{{"format", "pt"}}));
  EXPECT_EQ(header.data_offset, bytes.size() - 4);
  const auto& entry = header.entries.at("w");
  EXPECT_EQ(entry.info.dtype, DType::bf16);
  EXPECT_EQ(entry.info.shape, (Shape{2}));
  EXPECT_EQ(entry.begin, 0u);
  EXPECT_EQ(entry.end, 4u);
}

TEST(Header, NeedsTheHeaderOnlyAndNotTheData) {
  const std::string bytes = one("F32", "[1000]", "[0,4000]", 0);
  EXPECT_EQ(parse_header(std::as_bytes(std::span(bytes)), bytes.size() + 4000, "good").entries.count("layer.weight"), 1u);
}

TEST(OpenSafetensors, NamesAMissingFileAndAFolder) {
  const Folder folder;
  expect_error([&] { open_safetensors(folder / "none.safetensors"); }, {(folder / "none.safetensors").string(), "No such file"});
  expect_error([&] { open_safetensors(folder.path()); }, {folder.path().string(), "regular file"});
}

}  // namespace
}  // namespace comfytp::weights
