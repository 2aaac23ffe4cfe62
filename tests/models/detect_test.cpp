// What is read off a checkpoint's names and shapes, and what is said of one that does not fit.
#include <gtest/gtest.h>

#include "models/model.h"
#include "shapes_only.h"

namespace comfytp::test {
namespace {

using models::detect_unet;
using models::HeadOptions;
using models::UNet;
using models::unet_tensors;
using testing::Values;

std::string detect_error(const Tensors& tensors, const HeadOptions& heads = {}) {
  return error_of([&] { detect_unet(*shapes_only(tensors), heads); });
}

Tensors prefixed(const Tensors& tensors, const std::string& prefix) {
  Tensors result;
  for (const auto& [key, info] : tensors) result[prefix + key] = info;
  return result;
}

struct Published {
  const char* family;
  std::int64_t parameters, context_dim, label_dim, levels, transformers, first_heads, middle_heads;
};
void PrintTo(const Published& p, std::ostream* out) { *out << p.family; }

class PublishedFamily : public testing::TestWithParam<Published> {};

// Parameters as diffusers counts them for the published configurations.
TEST_P(PublishedFamily, HasThePublishedNumberOfParameters) {
  std::int64_t count = 0;
  for (const auto& [key, info] : unet_tensors(GetParam().family, DType::f16)) count += numel(info.shape);
  EXPECT_EQ(count, GetParam().parameters);
}

TEST_P(PublishedFamily, IsReadOffItsTensors) {
  const auto& p = GetParam();
  const UNet unet = detect_unet(*shapes_only(unet_tensors(p.family, DType::f16)));
  EXPECT_EQ(unet.family, p.family);
  EXPECT_EQ(unet.in_channels, 4);
  EXPECT_EQ(unet.out_channels, 4);
  EXPECT_EQ(unet.time_embed_dim, 4 * unet.model_channels);
  EXPECT_EQ(unet.context_dim, p.context_dim);
  EXPECT_EQ(unet.label_dim.value_or(0), p.label_dim);
  EXPECT_EQ(unet.levels, p.levels);
  ASSERT_EQ(static_cast<std::int64_t>(unet.transformers.size()), p.transformers);
  EXPECT_EQ(unet.transformers.front().heads, p.first_heads);
  EXPECT_EQ(unet.transformers[unet.middle_block[1].transformer].heads, p.middle_heads);
}

TEST_P(PublishedFamily, KeepsItsNameWhenNarrower) {
  EXPECT_EQ(detect_unet(*shapes_only(unet_tensors(GetParam().family, DType::f32, 64))).family, GetParam().family);
}

INSTANTIATE_TEST_SUITE_P(Families, PublishedFamily,
                         Values(Published{"sd1", 859520964, 768, 0, 4, 16, 8, 8}, Published{"sd2", 865910724, 1024, 0, 4, 16, 5, 20},
                                Published{"sdxl", 2567463684, 2048, 2816, 3, 11, 10, 20},
                                Published{"sdxl-refiner", 2259526660, 1280, 2560, 4, 11, 12, 24}),
                         [](const auto& info) {
                           return std::string(info.param.family == std::string("sdxl-refiner") ? "refiner" : info.param.family);
                         });

TEST(Detect, TellsInpaintingAndInstructModelsByTheirInputChannels) {
  for (std::int64_t channels : {9, 8}) {
    auto tensors = unet_tensors("sd1", DType::f16, 32);
    tensors["input_blocks.0.0.weight"].shape[1] = channels;
    const UNet unet = detect_unet(*shapes_only(tensors));
    EXPECT_EQ(unet.family, "sd1");
    EXPECT_EQ(unet.in_channels, channels);
  }
}

TEST(Detect, TakesAnotherContextWidthAsAUNetOfNoPublishedFamily) {
  auto tensors = unet_tensors("sd1", DType::f32, 32);
  for (auto& [key, info] : tensors)
    if (key.ends_with("attn2.to_k.weight") || key.ends_with("attn2.to_v.weight")) info.shape[1] = 48;
  const UNet unet = detect_unet(*shapes_only(tensors));
  EXPECT_EQ(unet.family, "unet");
  EXPECT_EQ(unet.context_dim, 48);
  EXPECT_EQ(unet.transformers.front().heads, 8);
}

// Deeper transformers at one place only, as in distilled SDXL variants.
TEST(Detect, ReadsTheDepthOfEachTransformer) {
  auto tensors = unet_tensors("sdxl", DType::f32, 64);
  std::erase_if(tensors, [](const auto& item) { return item.first.starts_with("input_blocks.7.1.transformer_blocks.9."); });
  const UNet unet = detect_unet(*shapes_only(tensors));
  for (const auto& t : unet.transformers)
    EXPECT_EQ(t.depth, t.channels == 2 * 64 ? 2 : t.prefix == "input_blocks.7.1" ? 9 : 10) << t.prefix;
}

TEST(Detect, LetsTheCallerChooseTheHeads) {
  const auto tensors = unet_tensors("sd2", DType::f32, 64);
  const auto heads_of = [&](const HeadOptions& options) { return detect_unet(*shapes_only(tensors), options).transformers[2].heads; };
  EXPECT_EQ(heads_of({}), 2);
  EXPECT_EQ(heads_of({.heads = 4, .head_dim = {}}), 4);
  EXPECT_EQ(heads_of({.heads = {}, .head_dim = 16}), 8);
}

TEST(Detect, RefusesHeadsThatDoNotDivideTheChannels) {
  EXPECT_EQ(
      detect_error(unet_tensors("sd2", DType::f32, 32)),
      "[models] some.safetensors: expected the 32 channels of input_blocks.1.1 to be divisible by 64, the width of a head; a UNet of other "
      "heads needs heads or head_dim");
  EXPECT_NE(detect_error(unet_tensors("sd1", DType::f32, 32), {.heads = 3, .head_dim = {}}).find("by 3, the number of heads"),
            std::string::npos);
  EXPECT_NE(detect_error(unet_tensors("sd1", DType::f32, 32), {.heads = 0, .head_dim = {}}).find("at least 1 but got 0"),
            std::string::npos);
  EXPECT_NE(detect_error(unet_tensors("sd1", DType::f32, 32), {.heads = 2, .head_dim = 2}).find("got both"), std::string::npos);
}

TEST(Detect, RefusesChannelsThatTheNormGroupsDoNotDivide) {
  auto tensors = unet_tensors("sd1", DType::f32, 32);
  for (auto& [key, info] : tensors)
    for (auto& size : info.shape) size = size % 32 ? size : size / 4 * 3;
  EXPECT_NE(detect_error(tensors).find("32 norm groups divide but"), std::string::npos) << detect_error(tensors);
}

TEST(Detect, NamesTheFirstMissingTensorsAndCountsAll) {
  auto tensors = unet_tensors("sd1", DType::f16, 32);
  tensors.erase("time_embed.2.bias");
  EXPECT_EQ(detect_error(tensors), "[models] some.safetensors: expected all tensors of a UNet but 1 is missing: 'time_embed.2.bias'");
  for (const char* key : {"out.2.weight", "input_blocks.1.0.in_layers.2.weight", "middle_block.1.proj_in.weight",
                          "output_blocks.0.0.skip_connection.bias", "output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight"})
    tensors.erase(key);
  EXPECT_EQ(detect_error(tensors),
            "[models] some.safetensors: expected all tensors of a UNet but 6 are missing: 'time_embed.2.bias', "
            "'input_blocks.1.0.in_layers.2.weight', "
            "'middle_block.1.proj_in.weight', 'output_blocks.0.0.skip_connection.bias', … (6 in all)");
}

// Whatever single tensor is gone, it is the one that is named.
TEST(Detect, NamesAnyMissingTensor) {
  const auto whole = unet_tensors("sd1", DType::f16, 32);
  for (const auto& [key, info] : whole) {
    auto tensors = whole;
    tensors.erase(key);
    ASSERT_EQ(detect_error(tensors), fmt::format("[models] some.safetensors: expected all tensors of a UNet but 1 is missing: '{}'", key));
  }
}

TEST(Detect, NamesAMissingBlock) {
  auto tensors = unet_tensors("sd1", DType::f16, 32);
  std::erase_if(
      tensors, [](const auto& item) { return item.first.starts_with("output_blocks.11.") || item.first.starts_with("input_blocks.4.0."); });
  EXPECT_NE(detect_error(tensors).find("2 are missing: 'input_blocks.4.0.*', 'output_blocks.11.*'"), std::string::npos)
      << detect_error(tensors);
}

TEST(Detect, NamesAWrongShapeOrDtype) {
  auto tensors = unet_tensors("sd1", DType::f16, 32);
  tensors["middle_block.1.transformer_blocks.0.ff.net.2.weight"].shape = {128, 500};
  EXPECT_EQ(detect_error(tensors),
            "[models] some.safetensors: expected middle_block.1.transformer_blocks.0.ff.net.2.weight of shape [128,512] but got [128,500]");
  tensors = unet_tensors("sd1", DType::f16, 32);
  tensors["out.2.weight"].dtype = DType::i8;
  EXPECT_EQ(detect_error(tensors), "[models] some.safetensors: expected out.2.weight of a floating-point dtype but got i8");
}

TEST(Detect, RefusesSizesThatNoUNetHas) {
  for (std::int64_t size : {std::int64_t{0}, std::int64_t{1} << 60}) {
    auto tensors = unet_tensors("sd1", DType::f16, 32);
    for (auto& [key, info] : tensors)
      for (auto& d : info.shape) d = d == 64 ? size : d;
    EXPECT_NE(detect_error(tensors).find(
                  fmt::format("expected a size of 1 to 2^24 in dimension 0 of input_blocks.4.0.out_layers.3.weight but got [{}", size)),
              std::string::npos)
        << detect_error(tensors);
  }
  auto tensors = unet_tensors("sd1", DType::f16, 32);
  tensors["time_embed.0.weight"].shape[1] = 33;
  EXPECT_NE(detect_error(tensors).find("expected an even width"), std::string::npos) << detect_error(tensors);
}

TEST(Detect, TakesEveryFloatingPointDtype) {
  for (DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16, DType::f8_e4m3, DType::f8_e5m2})
    EXPECT_EQ(detect_error(unet_tensors("sd1", dtype, 32)), "") << name_of(dtype);
}

// As ComfyUI's two forms of scaled fp8 name them.
TEST(Detect, FindsTheScalesOfWeightsInFp8) {
  for (const bool older : {true, false}) {
    auto tensors = unet_tensors("sdxl", DType::f16, 32);
    std::size_t scaled = 0;
    for (const auto& [key, info] : unet_tensors("sdxl", DType::f16, 32)) {
      if (info.shape.size() != 2 || !key.ends_with(".weight")) continue;
      const auto owner = key.substr(0, key.size() - 6);
      tensors[key].dtype = DType::f8_e4m3;
      tensors[owner + (older ? "scale_weight" : "weight_scale")] = {DType::f32, older ? Shape{1} : Shape{}};
      tensors[owner + (older ? "scale_input" : "input_scale")] = {DType::f32, {}};
      if (!older) tensors[owner + "comfy_quant"] = {DType::u8, {27}};
      ++scaled;
    }
    if (older) tensors["scaled_fp8"] = {DType::f8_e4m3, {0}};
    const UNet unet = detect_unet(*shapes_only(tensors));
    EXPECT_EQ(unet.family, "sdxl");
    EXPECT_EQ(unet.scales.size(), scaled);
    EXPECT_EQ(unet.scales.at("time_embed.0.weight"), older ? "time_embed.0.scale_weight" : "time_embed.0.weight_scale");
  }
}

TEST(Detect, RefusesOtherQuantisedWeights) {
  const std::string linear = "middle_block.1.transformer_blocks.0.ff.net.2";
  const auto error_for = [&](DType stored, DType scale_dtype, const Shape& scale) {
    auto tensors = unet_tensors("sd1", DType::f16, 32);
    tensors[linear + ".weight"].dtype = stored;
    tensors[linear + ".weight_scale"] = {scale_dtype, scale};
    tensors[linear + ".comfy_quant"] = {DType::u8, {20}};
    return detect_error(tensors);
  };
  EXPECT_EQ(error_for(DType::f8_e4m3, DType::f32, {}), "");
  EXPECT_EQ(error_for(DType::f8_e4m3, DType::f32, {128, 1}),
            "[models] some.safetensors: expected a quantised middle_block.1.transformer_blocks.0.ff.net.2.weight in fp8 with one scale but it is "
            "f8_e4m3 with a scale 'middle_block.1.transformer_blocks.0.ff.net.2.weight_scale' of f32[128,1]: such weights are read by the ComfyUI "
            "node only");
  for (const auto& error : {error_for(DType::i8, DType::f32, {}), error_for(DType::u8, DType::f8_e4m3, {128, 32}), error_for(DType::f16, DType::f32, {}),
                            error_for(DType::f8_e4m3, DType::u8, {})})
    EXPECT_NE(error.find("expected a quantised"), std::string::npos) << error;
  auto tensors = unet_tensors("sd1", DType::f8_e4m3, 32);
  tensors[linear + ".comfy_quant"] = {DType::u8, {20}};
  EXPECT_NE(detect_error(tensors).find("its blocks also hold '" + linear + ".comfy_quant'"), std::string::npos) << detect_error(tensors);
}

// A video model's time layers: a picture without them would be wrong.
TEST(Detect, RefusesTensorsInABlockThatHaveNoPlaceInIt) {
  auto tensors = unet_tensors("sd1", DType::f16, 32);
  tensors["input_blocks.1.0.time_stack.in_layers.0.weight"] = {DType::f16, {32}};
  EXPECT_EQ(detect_error(tensors),
            "[models] some.safetensors: expected a UNet of Stable Diffusion's construction but its blocks also hold "
            "'input_blocks.1.0.time_stack.in_layers.0.weight'");
}

TEST(Detect, RefusesAnotherConstruction) {
  auto tensors = unet_tensors("sd1", DType::f16, 32);
  tensors["input_blocks.2.2.qkv.weight"] = {DType::f16, {32}};
  EXPECT_NE(detect_error(tensors).find("at input_blocks.2.2 but got 'input_blocks.2.2.qkv.weight'"), std::string::npos)
      << detect_error(tensors);
  tensors = unet_tensors("sd1", DType::f16, 32);
  tensors["middle_block.3.op.weight"] = tensors["middle_block.4.conv.weight"] = {DType::f16, {128, 128, 3, 3}};
  EXPECT_NE(detect_error(tensors).find("a middle_block without down- and upsampling"), std::string::npos) << detect_error(tensors);
  tensors = unet_tensors("sd1", DType::f16, 32);
  tensors["output_blocks.12.0.op.weight"] = {DType::f16, {32}};
  EXPECT_NE(detect_error(tensors).find("as many output_blocks as input_blocks, 12"), std::string::npos) << detect_error(tensors);
  EXPECT_NE(detect_error({{"double_blocks.0.weight", {DType::f16, {32}}}}).find("not a diffusion model"), std::string::npos);
}

TEST(Recognise, FindsTheDenoiserInASingleFileAndCountsTheOtherParts) {
  auto tensors = prefixed(unet_tensors("sd1", DType::f16, 32), "model.diffusion_model.");
  const auto count = static_cast<std::int64_t>(tensors.size());
  tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = {DType::i64, {1, 77}};
  tensors["conditioner.embedders.1.model.text_projection"] = {DType::f16, {8, 8}};
  tensors["first_stage_model.decoder.conv_in.weight"] = {DType::f32, {4, 4, 3, 3}};
  tensors["model_ema.decay"] = {DType::f32, {}};
  const auto checkpoint = models::recognise(shapes_only(tensors));
  EXPECT_EQ(checkpoint.layout, "ldm");
  EXPECT_EQ(checkpoint.unet.family, "sd1");
  EXPECT_TRUE(checkpoint.denoiser->has("input_blocks.0.0.weight"));
  ASSERT_EQ(checkpoint.components.size(), 4u);
  const auto& [denoiser, text, vae, other] =
      std::tie(checkpoint.components[0], checkpoint.components[1], checkpoint.components[2], checkpoint.components[3]);
  EXPECT_EQ(denoiser.name, "denoiser");
  EXPECT_EQ(denoiser.tensors, count);
  EXPECT_EQ(denoiser.bytes, 2 * denoiser.parameters);
  EXPECT_EQ(text.name, "text encoder");
  EXPECT_EQ(text.parameters, 77 + 64);
  EXPECT_EQ(text.bytes, 77 * 8 + 64 * 2);
  EXPECT_EQ(text.parameters_of_dtype, (std::map<std::string, std::int64_t>{{"f16", 64}, {"i64", 77}}));
  EXPECT_EQ(vae.name, "vae");
  EXPECT_EQ(vae.parameters, 144);
  EXPECT_EQ(other.name, "other");
  EXPECT_EQ(other.tensors, 1);
}

TEST(Recognise, FindsABareDenoiser) {
  auto tensors = unet_tensors("sdxl", DType::bf16, 32);
  tensors["v_pred"] = {DType::f32, {0}};
  const auto checkpoint = models::recognise(shapes_only(tensors));
  EXPECT_EQ(checkpoint.layout, "bare");
  EXPECT_EQ(checkpoint.unet.family, "sdxl");
  ASSERT_EQ(checkpoint.components.size(), 2u);
  EXPECT_EQ(checkpoint.components[0].tensors + 1, static_cast<std::int64_t>(tensors.size()));
  EXPECT_EQ(checkpoint.components[1].name, "other");
}

TEST(Recognise, RefusesWhatIsNoDiffusionModel) {
  EXPECT_EQ(
      error_of([] {
        models::recognise(shapes_only({{"text_model.embeddings.weight", {DType::f16, {8}}}}));
      }),
      "[models] some.safetensors: not a diffusion model (expected tensors model.diffusion_model.…, input_blocks.… or, from diffusers, "
      "down_blocks.…)");
}

TEST(UNetTensors, RefusesAnotherFamilyOrWidth) {
  EXPECT_EQ(error_of([] { unet_tensors("sd3", DType::f16); }), "[models] expected a family sd1, sd2, sdxl or sdxl-refiner but got 'sd3'");
  EXPECT_EQ(error_of([] { unet_tensors("sd1", DType::f16, 40); }), "[models] expected a width that is a multiple of 32 but got 40");
}

}  // namespace
}  // namespace comfytp::test
