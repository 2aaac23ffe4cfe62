// Where each tensor of a denoiser is found, whatever its file calls it.
#include "weights/layout.h"

#include <deque>

#include "files.h"

namespace comfytp::weights {
namespace {

/// Tensors of one number each, counted from 0 in the order in which they were added.
class Numbered {
 public:
  int add(const std::string& key) {
    numbers_.push_back(static_cast<std::int32_t>(numbers_.size()));
    views_[key] = TensorView::dense(&numbers_.back(), DType::i32, {});
    return numbers_.back();
  }
  std::shared_ptr<Source> source() const { return from_views("model.safetensors", views_, nullptr); }

 private:
  std::deque<std::int32_t> numbers_;
  std::map<std::string, TensorView, std::less<>> views_;
};

std::map<std::string, int> contents(const Source& source) {
  std::map<std::string, int> result;
  for (const auto& [key, info] : source.tensors()) {
    std::int32_t number = -1;
    source.read(key, {}, &number);
    result[key] = number;
  }
  return result;
}

using Pairs = std::vector<std::pair<std::string, std::string>>;

/// A module of diffusers' UNet2DConditionModel and the one of LDM's UNetModel that holds the same weights.
struct UNetNames {
  const char* name;
  Pairs modules;
};
void PrintTo(const UNetNames& names, std::ostream* out) { *out << names.name; }

const Pairs kResnet = {{"norm1.weight", "in_layers.0.weight"},
                       {"norm1.bias", "in_layers.0.bias"},
                       {"conv1.weight", "in_layers.2.weight"},
                       {"conv1.bias", "in_layers.2.bias"},
                       {"time_emb_proj.weight", "emb_layers.1.weight"},
                       {"time_emb_proj.bias", "emb_layers.1.bias"},
                       {"norm2.weight", "out_layers.0.weight"},
                       {"conv2.weight", "out_layers.3.weight"},
                       {"conv2.bias", "out_layers.3.bias"},
                       {"conv_shortcut.weight", "skip_connection.weight"}};
const Pairs kTransformer = {{"norm.weight", "norm.weight"},
                            {"proj_in.weight", "proj_in.weight"},
                            {"proj_out.bias", "proj_out.bias"},
                            {"transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.0.attn1.to_q.weight"},
                            {"transformer_blocks.10.attn2.to_out.0.bias", "transformer_blocks.10.attn2.to_out.0.bias"},
                            {"transformer_blocks.1.ff.net.0.proj.weight", "transformer_blocks.1.ff.net.0.proj.weight"}};
const Pairs kLeaf = {{"weight", "weight"}, {"bias", "bias"}};

const UNetNames kSd15{"sd15",
                      {{"conv_in", "input_blocks.0.0"},
                       {"time_embedding.linear_1", "time_embed.0"},
                       {"time_embedding.linear_2", "time_embed.2"},
                       {"down_blocks.0.resnets.0", "input_blocks.1.0"},
                       {"down_blocks.0.attentions.0", "input_blocks.1.1"},
                       {"down_blocks.0.resnets.1", "input_blocks.2.0"},
                       {"down_blocks.0.attentions.1", "input_blocks.2.1"},
                       {"down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"},
                       {"down_blocks.1.resnets.0", "input_blocks.4.0"},
                       {"down_blocks.1.attentions.0", "input_blocks.4.1"},
                       {"down_blocks.1.resnets.1", "input_blocks.5.0"},
                       {"down_blocks.1.attentions.1", "input_blocks.5.1"},
                       {"down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"},
                       {"down_blocks.2.resnets.0", "input_blocks.7.0"},
                       {"down_blocks.2.attentions.0", "input_blocks.7.1"},
                       {"down_blocks.2.resnets.1", "input_blocks.8.0"},
                       {"down_blocks.2.attentions.1", "input_blocks.8.1"},
                       {"down_blocks.2.downsamplers.0.conv", "input_blocks.9.0.op"},
                       {"down_blocks.3.resnets.0", "input_blocks.10.0"},
                       {"down_blocks.3.resnets.1", "input_blocks.11.0"},
                       {"mid_block.resnets.0", "middle_block.0"},
                       {"mid_block.attentions.0", "middle_block.1"},
                       {"mid_block.resnets.1", "middle_block.2"},
                       {"up_blocks.0.resnets.0", "output_blocks.0.0"},
                       {"up_blocks.0.resnets.1", "output_blocks.1.0"},
                       {"up_blocks.0.resnets.2", "output_blocks.2.0"},
                       {"up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"},
                       {"up_blocks.1.resnets.0", "output_blocks.3.0"},
                       {"up_blocks.1.attentions.0", "output_blocks.3.1"},
                       {"up_blocks.1.resnets.1", "output_blocks.4.0"},
                       {"up_blocks.1.attentions.1", "output_blocks.4.1"},
                       {"up_blocks.1.resnets.2", "output_blocks.5.0"},
                       {"up_blocks.1.attentions.2", "output_blocks.5.1"},
                       {"up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"},
                       {"up_blocks.2.resnets.0", "output_blocks.6.0"},
                       {"up_blocks.2.attentions.0", "output_blocks.6.1"},
                       {"up_blocks.2.resnets.1", "output_blocks.7.0"},
                       {"up_blocks.2.attentions.1", "output_blocks.7.1"},
                       {"up_blocks.2.resnets.2", "output_blocks.8.0"},
                       {"up_blocks.2.attentions.2", "output_blocks.8.1"},
                       {"up_blocks.2.upsamplers.0.conv", "output_blocks.8.2.conv"},
                       {"up_blocks.3.resnets.0", "output_blocks.9.0"},
                       {"up_blocks.3.attentions.0", "output_blocks.9.1"},
                       {"up_blocks.3.resnets.1", "output_blocks.10.0"},
                       {"up_blocks.3.attentions.1", "output_blocks.10.1"},
                       {"up_blocks.3.resnets.2", "output_blocks.11.0"},
                       {"up_blocks.3.attentions.2", "output_blocks.11.1"},
                       {"conv_norm_out", "out.0"},
                       {"conv_out", "out.2"}}};

const UNetNames kSdxl{"sdxl",
                      {{"conv_in", "input_blocks.0.0"},
                       {"time_embedding.linear_1", "time_embed.0"},
                       {"time_embedding.linear_2", "time_embed.2"},
                       {"add_embedding.linear_1", "label_emb.0.0"},
                       {"add_embedding.linear_2", "label_emb.0.2"},
                       {"down_blocks.0.resnets.0", "input_blocks.1.0"},
                       {"down_blocks.0.resnets.1", "input_blocks.2.0"},
                       {"down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"},
                       {"down_blocks.1.resnets.0", "input_blocks.4.0"},
                       {"down_blocks.1.attentions.0", "input_blocks.4.1"},
                       {"down_blocks.1.resnets.1", "input_blocks.5.0"},
                       {"down_blocks.1.attentions.1", "input_blocks.5.1"},
                       {"down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"},
                       {"down_blocks.2.resnets.0", "input_blocks.7.0"},
                       {"down_blocks.2.attentions.0", "input_blocks.7.1"},
                       {"down_blocks.2.resnets.1", "input_blocks.8.0"},
                       {"down_blocks.2.attentions.1", "input_blocks.8.1"},
                       {"mid_block.resnets.0", "middle_block.0"},
                       {"mid_block.attentions.0", "middle_block.1"},
                       {"mid_block.resnets.1", "middle_block.2"},
                       {"up_blocks.0.resnets.0", "output_blocks.0.0"},
                       {"up_blocks.0.attentions.0", "output_blocks.0.1"},
                       {"up_blocks.0.resnets.1", "output_blocks.1.0"},
                       {"up_blocks.0.attentions.1", "output_blocks.1.1"},
                       {"up_blocks.0.resnets.2", "output_blocks.2.0"},
                       {"up_blocks.0.attentions.2", "output_blocks.2.1"},
                       {"up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"},
                       {"up_blocks.1.resnets.0", "output_blocks.3.0"},
                       {"up_blocks.1.attentions.0", "output_blocks.3.1"},
                       {"up_blocks.1.resnets.1", "output_blocks.4.0"},
                       {"up_blocks.1.attentions.1", "output_blocks.4.1"},
                       {"up_blocks.1.resnets.2", "output_blocks.5.0"},
                       {"up_blocks.1.attentions.2", "output_blocks.5.1"},
                       {"up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"},
                       {"up_blocks.2.resnets.0", "output_blocks.6.0"},
                       {"up_blocks.2.resnets.1", "output_blocks.7.0"},
                       {"up_blocks.2.resnets.2", "output_blocks.8.0"},
                       {"conv_norm_out", "out.0"},
                       {"conv_out", "out.2"}}};

// One and three layers, eleven levels' worth of indices, no transformer in the middle, a class embedding.
const UNetNames kUneven{"uneven",
                        {{"conv_in", "input_blocks.0.0"},
                         {"class_embedding.linear_1", "label_emb.0.0"},
                         {"down_blocks.0.resnets.0", "input_blocks.1.0"},
                         {"down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"},
                         {"down_blocks.1.resnets.0", "input_blocks.3.0"},
                         {"down_blocks.1.resnets.1", "input_blocks.4.0"},
                         {"down_blocks.1.attentions.1", "input_blocks.4.1"},
                         {"down_blocks.1.resnets.2", "input_blocks.5.0"},
                         {"mid_block.resnets.0", "middle_block.0"},
                         {"mid_block.resnets.1", "middle_block.1"},
                         {"up_blocks.0.resnets.0", "output_blocks.0.0"},
                         {"up_blocks.0.upsamplers.0.conv", "output_blocks.0.1.conv"},
                         {"up_blocks.1.resnets.0", "output_blocks.1.0"},
                         {"up_blocks.1.attentions.0", "output_blocks.1.1"},
                         {"conv_out", "out.2"}}};

const Pairs& leaves_of(const std::string& module) {
  if (module.find("resnets") != module.npos) return kResnet;
  return module.find("attentions") != module.npos ? kTransformer : kLeaf;
}

class Diffusers : public testing::TestWithParam<UNetNames> {};

TEST_P(Diffusers, TensorsAreFoundUnderLdmNames) {
  Numbered tensors;
  std::map<std::string, int> expected;
  for (const auto& [diffusers, ldm] : GetParam().modules)
    for (const auto& [leaf, ldm_leaf] : leaves_of(diffusers)) expected[ldm + "." + ldm_leaf] = tensors.add(diffusers + "." + leaf);
  const auto denoiser = find_denoiser(tensors.source());
  EXPECT_EQ(denoiser.layout, "diffusers");
  EXPECT_EQ(contents(*denoiser.tensors), expected);
}

TEST_P(Diffusers, AKeyOfAnotherModelIsNamed) {
  for (const char* key : {"down_blocks.0.motion_modules.0.norm.weight", "encoder_hid_proj.weight", "down_blocks.0.resnets.7.conv1.weight",
                          "down_blocks.0.resnets.0.conv3.weight", "controlnet_cond_embedding.conv_in.weight"}) {
    Numbered tensors;
    for (const auto& [diffusers, ldm] : GetParam().modules)
      for (const auto& [leaf, ldm_leaf] : leaves_of(diffusers)) tensors.add(diffusers + "." + leaf);
    tensors.add(key);
    expect_error([&] { find_denoiser(tensors.source()); }, {key, "model.safetensors", "UNet2DConditionModel"});
  }
}

TEST_P(Diffusers, TheSameTensorsInLdmFilesAreFoundToo) {
  for (const std::string prefix : {"model.diffusion_model.", ""}) {
    Numbered tensors;
    std::map<std::string, int> expected;
    for (const auto& [diffusers, ldm] : GetParam().modules)
      for (const auto& [leaf, ldm_leaf] : leaves_of(diffusers)) expected[ldm + "." + ldm_leaf] = tensors.add(prefix + ldm + "." + ldm_leaf);
    for (const char* other : {"first_stage_model.encoder.conv_in.weight", "cond_stage_model.transformer.text_model.embeddings.position_ids",
                              "model_ema.decay", "conditioner.embedders.0.weight"})
      tensors.add(other);
    const auto denoiser = find_denoiser(tensors.source());
    EXPECT_EQ(denoiser.layout, prefix.empty() ? "bare" : "ldm");
    EXPECT_EQ(contents(*denoiser.tensors), expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Layout, Diffusers, testing::Values(kSd15, kSdxl, kUneven),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Layout, TwoTensorsForOnePlaceAreNamed) {
  Numbered tensors;
  for (const char* key : {"down_blocks.0.resnets.0.conv1.weight", "add_embedding.linear_1.weight", "class_embedding.linear_1.weight"})
    tensors.add(key);
  expect_error([&] { find_denoiser(tensors.source()); },
               {"add_embedding.linear_1.weight", "class_embedding.linear_1.weight", "model.safetensors"});
}

TEST(Layout, NoKnownDenoiserIsSaidSo) {
  for (const char* key : {"encoder.down_blocks.0.resnets.0.conv1.weight", "first_stage_model.encoder.conv_in.weight",
                          "text_model.embeddings.position_ids", "double_blocks.0.img_attn.qkv.weight"}) {
    Numbered tensors;
    tensors.add(key);
    const auto denoiser = find_denoiser(tensors.source());
    EXPECT_EQ(denoiser.layout, "") << key;
    EXPECT_EQ(denoiser.tensors, nullptr) << key;
  }
}

}  // namespace
}  // namespace comfytp::weights
