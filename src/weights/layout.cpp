#include "weights/layout.h"

#include <fmt/format.h>

#include <array>
#include <optional>
#include <utility>

#include "base/error.h"

namespace comfytp::weights {
namespace {

using Names = std::map<std::string, std::string, std::less<>>;
using Pair = std::pair<std::string_view, std::string_view>;

bool has_prefix(const Source& source, std::string_view prefix) {
  const auto found = source.tensors().lower_bound(prefix);
  return found != source.tensors().end() && found->first.starts_with(prefix);
}

// Modules of diffusers' UNet2DConditionModel and of LDM's UNetModel outside the blocks.
constexpr Pair kOutside[] = {{"conv_in.", "input_blocks.0.0."},
                             {"time_embedding.linear_1.", "time_embed.0."},
                             {"time_embedding.linear_2.", "time_embed.2."},
                             {"add_embedding.linear_1.", "label_emb.0.0."},
                             {"add_embedding.linear_2.", "label_emb.0.2."},
                             {"class_embedding.linear_1.", "label_emb.0.0."},
                             {"class_embedding.linear_2.", "label_emb.0.2."},
                             {"class_embedding.weight", "label_emb.weight"},
                             {"conv_norm_out.", "out.0."},
                             {"conv_out.", "out.2."}};
constexpr Pair kResnet[] = {{"norm1.", "in_layers.0."},  {"conv1.", "in_layers.2."},  {"time_emb_proj.", "emb_layers.1."},
                            {"norm2.", "out_layers.0."}, {"conv2.", "out_layers.3."}, {"conv_shortcut.", "skip_connection."}};
// Both projects took over the transformer's names.
constexpr Pair kTransformer[] = {
    {"norm.", "norm."}, {"proj_in.", "proj_in."}, {"transformer_blocks.", "transformer_blocks."}, {"proj_out.", "proj_out."}};
constexpr Pair kDown[] = {{"conv.", "op."}};
constexpr Pair kUp[] = {{"conv.", "conv."}};

// Collects new name -> old name by going through the blocks in the order in which they run.
class DiffusersNames {
 public:
  explicit DiffusersNames(const Source& source) : source_(source) {
    map("", "", kOutside);
    int n = 1;
    for (int block = 0; has(fmt::format("down_blocks.{}.", block)); ++block) {
      const std::string from = fmt::format("down_blocks.{}.", block);
      for (int i = 0; has(fmt::format("{}resnets.{}.", from, i)); ++i, ++n) layer(from, i, fmt::format("input_blocks.{}.", n));
      if (has(from + "downsamplers.0.")) map(from + "downsamplers.0.", fmt::format("input_blocks.{}.0.", n++), kDown);
    }
    n = 0;
    for (int i = 0; has(fmt::format("mid_block.resnets.{}.", i)); ++i) {
      map(fmt::format("mid_block.resnets.{}.", i), fmt::format("middle_block.{}.", n++), kResnet);
      const std::string attention = fmt::format("mid_block.attentions.{}.", i);
      if (has(attention)) map(attention, fmt::format("middle_block.{}.", n++), kTransformer);
    }
    n = 0;
    for (int block = 0; has(fmt::format("up_blocks.{}.", block)); ++block) {
      const std::string from = fmt::format("up_blocks.{}.", block);
      int behind = 1;  // where the upsampler stands in the block's last layer
      for (int i = 0; has(fmt::format("{}resnets.{}.", from, i)); ++i, ++n) behind = layer(from, i, fmt::format("output_blocks.{}.", n));
      map(from + "upsamplers.0.", fmt::format("output_blocks.{}.{}.", n - 1, behind), kUp);
    }
  }

  // Throws unless every key found its place.
  Names take() {
    Names mapped;
    for (const auto& [name, key] : names_) mapped.emplace(key, name);
    for (const auto& [key, info] : source_.tensors())
      require(mapped.count(key) == 1, "[weights] expected the tensors of a UNet2DConditionModel in {} but got {}", source_.name(),
              in_quotes(key));
    return std::move(names_);
  }

 private:
  bool has(std::string_view prefix) const { return has_prefix(source_, prefix); }

  // A ResBlock and, where there is one, its transformer; returns how many modules that makes.
  int layer(const std::string& from, int i, const std::string& to) {
    map(fmt::format("{}resnets.{}.", from, i), to + "0.", kResnet);
    const std::string attention = fmt::format("{}attentions.{}.", from, i);
    if (!has(attention)) return 1;
    map(attention, to + "1.", kTransformer);
    return 2;
  }

  template <std::size_t N>
  void map(const std::string& from, const std::string& to, const Pair (&modules)[N]) {
    for (const auto& [old_module, new_module] : modules) {
      const std::string prefix = from + std::string(old_module);
      for (auto it = source_.tensors().lower_bound(prefix); it != source_.tensors().end() && it->first.starts_with(prefix); ++it) {
        const auto [place, fresh] = names_.emplace(to + std::string(new_module) + it->first.substr(prefix.size()), it->first);
        require(fresh, "[weights] expected one of {} and {} in {} but got both", in_quotes(place->second), in_quotes(it->first),
                source_.name());
      }
    }
  }

  const Source& source_;
  Names names_;
};

}  // namespace

DenoiserTensors find_denoiser(std::shared_ptr<const Source> source) {
  constexpr std::string_view kPrefix = "model.diffusion_model.";
  constexpr std::string_view kBare[] = {"input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out."};
  Names names;
  std::string layout;
  if (has_prefix(*source, kPrefix)) {
    layout = "ldm";
    for (const auto& [key, info] : source->tensors())
      if (key.starts_with(kPrefix)) names.emplace(key.substr(kPrefix.size()), key);
  } else if (has_prefix(*source, "input_blocks.")) {
    layout = "bare";
    for (const auto& [key, info] : source->tensors())
      for (const auto prefix : kBare)
        if (key.starts_with(prefix)) names.emplace(key, key);
  } else if (has_prefix(*source, "down_blocks.")) {
    layout = "diffusers";
    names = DiffusersNames(*source).take();
  } else {
    return {};
  }
  return {layout, renamed(std::move(source), std::move(names))};
}

}  // namespace comfytp::weights
