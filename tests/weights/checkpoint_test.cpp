// What a path may name, and what is said when it names something else.
#include "weights/checkpoint.h"

#include "files.h"

namespace comfytp::weights {
namespace {

std::string index(const std::string& weight_map) { return R"({"metadata":{"total_size":8},"weight_map":)" + weight_map + "}"; }

TEST(OpenCheckpoint, OpensAFile) {
  const Folder folder;
  for (const char* name : {"m.safetensors", "m.sft"}) EXPECT_TRUE(open_checkpoint(folder.write(name, file_with("w")))->has("w"));
}

TEST(OpenCheckpoint, ReadsEachKeyFromItsShard) {
  const Folder folder;
  folder.write("1.safetensors", file_with("a"));
  folder.write(
      "more/2.safetensors",
      file_of(R"({"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"unlisted":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})", 6));
  const auto path = folder.write("m.safetensors.index.json", index(R"({"a":"1.safetensors","b":"more/2.safetensors"})"));
  const auto source = open_checkpoint(path);
  EXPECT_EQ(source->name(), path.string());
  EXPECT_EQ(source->tensors().size(), 2u);
  EXPECT_EQ(source->info("b").shape, (Shape{2}));
  std::vector<std::uint8_t> out(2);
  source->read("a", {{2, 4}}, out.data());
  EXPECT_EQ(out, (std::vector<std::uint8_t>{2, 3}));
  source->read("b", {{0, 2}}, out.data());
  EXPECT_EQ(out, (std::vector<std::uint8_t>{0, 1}));
  expect_error([&] { source->read("unlisted", {{0, 1}}, out.data()); }, {"'unlisted'", path.string()});
  expect_error([&] { source->read("b", {{0, 3}}, out.data()); }, {"'b'", "2.safetensors"});
}

struct BadIndex {
  const char* name;
  std::string text;
  std::vector<std::string> message;
};
void PrintTo(const BadIndex& bad, std::ostream* out) { *out << bad.name; }

class BadIndexes : public testing::TestWithParam<BadIndex> {};

TEST_P(BadIndexes, AreRefusedWithOneLineNamingIndexKeyAndShard) {
  const Folder folder;
  folder.write("outside.safetensors", file_with("w"));
  folder.write("model/1.safetensors", file_with("w"));
  folder.write("model/broken.safetensors", "abc");
  const auto path = folder.write("model/m.safetensors.index.json", GetParam().text);
  expect_error([&] { open_checkpoint(path); }, GetParam().message);
}

const std::string kIndex = "m.safetensors.index.json";
INSTANTIATE_TEST_SUITE_P(
    OpenCheckpoint, BadIndexes,
    testing::Values(
        BadIndex{"empty_file", "", {kIndex}},  //
        BadIndex{"malformed", R"({"weight_map":{)", {kIndex, "malformed"}},
        BadIndex{"no_weight_map", R"({"metadata":{}})", {kIndex, "weight_map", "there is none"}},
        BadIndex{"weight_map_no_object", index(R"(["w"])"), {kIndex, "weight_map", "array"}},
        BadIndex{"weight_map_empty", index("{}"), {kIndex, "weight_map", "empty"}},
        BadIndex{"duplicate_key", index(R"({"w":"1.safetensors","w":"1.safetensors"})"), {kIndex, "'w'", "twice"}},
        BadIndex{"deep", R"({"metadata":)" + std::string(100'000, '['), {kIndex, "nesting", "'metadata'"}},
        BadIndex{"shard_no_text", index(R"({"w":1})"), {kIndex, "'w'", "number"}},
        BadIndex{"missing_shard", index(R"({"w":"2.safetensors"})"), {kIndex, "'w'", "2.safetensors", "no such file"}},
        BadIndex{"missing_key", index(R"({"v":"1.safetensors"})"), {kIndex, "'v'", "1.safetensors"}},
        BadIndex{"broken_shard", index(R"({"w":"broken.safetensors"})"), {"broken.safetensors", "truncated"}},
        BadIndex{"other_type_of_shard", index(R"({"w":"pytorch_model.bin"})"), {kIndex, "'w'", "'pytorch_model.bin'"}},
        BadIndex{"above", index(R"({"w":"../outside.safetensors"})"), {kIndex, "'w'", "'../outside.safetensors'", "inside the folder"}},
        BadIndex{"above_in_the_middle", index(R"({"w":"a/../../outside.safetensors"})"), {kIndex, "'w'", "inside the folder"}},
        BadIndex{"absolute", index(R"({"w":"/outside.safetensors"})"), {kIndex, "'w'", "inside the folder"}},
        BadIndex{"backslash", index(R"({"w":"..\\outside.safetensors"})"), {kIndex, "'w'", "inside the folder"}},
        BadIndex{"drive", index(R"({"w":"C:outside.safetensors"})"), {kIndex, "'w'", "inside the folder"}},
        BadIndex{"zero_byte", index(R"({"w":"1.safetensors\u0000.safetensors"})"), {kIndex, "'w'", "inside the folder"}}),
    [](const auto& info) { return std::string(info.param.name); });

struct FolderCase {
  const char* name;
  std::vector<std::string> files;  ///< each holds the one key "in <its name>"; an index is made for those that end in .json
  std::string chosen;              ///< empty: refused
};
void PrintTo(const FolderCase& c, std::ostream* out) { *out << c.name; }

class Folders : public testing::TestWithParam<FolderCase> {};

TEST_P(Folders, OpenTheOneModelTheyHold) {
  const Folder folder;
  for (const auto& file : GetParam().files)
    folder.write(file, file.ends_with(".json")          ? index(R"({"in shard":"shard.safetensors"})")
                       : file.ends_with(".safetensors") ? file_with(file.ends_with("shard.safetensors") ? "in shard" : "in " + file)
                                                        : "something");
  if (GetParam().chosen.empty())
    expect_error([&] { open_checkpoint(folder.path()); }, {folder.path().string(), "expected"});
  else
    EXPECT_TRUE(open_checkpoint(folder.path())->has("in " + GetParam().chosen));
}

const std::string kDiffusers = "diffusion_pytorch_model.safetensors", kHalf = "diffusion_pytorch_model.fp16.safetensors";
INSTANTIATE_TEST_SUITE_P(
    OpenCheckpoint, Folders,
    testing::Values(FolderCase{"one_file", {"m.safetensors", "config.json.txt"}, "m.safetensors"},
                    FolderCase{"one_index", {"m.safetensors.index.json", "shard.safetensors", "other.safetensors"}, "shard"},
                    FolderCase{"several_files", {"m.safetensors", "n.safetensors"}, ""},
                    FolderCase{"several_indexes", {"m.safetensors.index.json", "n.safetensors.index.json", "shard.safetensors"}, ""},
                    FolderCase{"nothing", {"m.ckpt"}, ""}, FolderCase{"diffusers_file", {kDiffusers, kHalf, "ema.safetensors"}, kDiffusers},
                    FolderCase{"diffusers_half", {kHalf, "ema.safetensors"}, kHalf},
                    FolderCase{"diffusers_index", {kDiffusers + ".index.json", kHalf, "shard.safetensors"}, "shard"},
                    FolderCase{
                        "diffusers_index_of_half", {"diffusion_pytorch_model.safetensors.index.fp16.json", "shard.safetensors"}, "shard"},
                    FolderCase{"pipeline_unet", {"unet/" + kDiffusers, "vae/" + kDiffusers, "m.safetensors"}, "unet/" + kDiffusers},
                    FolderCase{"pipeline_unet_half", {"unet/" + kHalf}, "unet/" + kHalf},
                    FolderCase{"pipeline_unet_sharded", {"unet/" + kDiffusers + ".index.json", "unet/shard.safetensors"}, "shard"},
                    FolderCase{"pipeline_transformer", {"transformer/" + kDiffusers}, "transformer/" + kDiffusers},
                    FolderCase{"pipeline_with_both", {"unet/" + kDiffusers, "transformer/" + kDiffusers}, ""},
                    FolderCase{"pipeline_of_other_files", {"unet/diffusion_pytorch_model.bin", "m.safetensors"}, ""}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(OpenCheckpoint, SaysWhichFilesItTakes) {
  const Folder folder;
  for (const char* name : {"m.ckpt", "m.pt", "m.gguf", "m.json"})
    expect_error([&] { open_checkpoint(folder.write(name, file_with("w"))); },
                 {name, ".safetensors file", ".safetensors.index.json", "unet/"});
  expect_error([&] { open_checkpoint(folder / "none.safetensors"); }, {"none.safetensors", "there is no"});
}

}  // namespace
}  // namespace comfytp::weights
