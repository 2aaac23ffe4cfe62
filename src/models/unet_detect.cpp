// Reads the construction of a UNet off the names and shapes of its tensors.
#include <algorithm>
#include <charconv>

#include "base/error.h"
#include "models/unet.h"

namespace comfytp::models {
namespace {

using Kind = UNetModule::Kind;

/// The first few of `items`, and how many there are.
std::string first_few(const std::vector<std::string>& items) {
  constexpr std::size_t shown = 4;
  std::string text;
  for (std::size_t i = 0; i < std::min(items.size(), shown); ++i) text += (i ? ", " : "") + weights::in_quotes(items[i]);
  return items.size() > shown ? fmt::format("{}, … ({} in all)", text, items.size()) : text;
}

class Detector {
 public:
  Detector(const weights::Source& source, const HeadOptions& heads) : source_(source), name_(source.name()), heads_(heads) {}

  UNet detect() {
    require(any("input_blocks.") && any("middle_block.") && any("output_blocks."),
            "[models] {}: not a diffusion model of a known family (expected tensors input_blocks.…, middle_block.…, output_blocks.…)",
            name_);
    read_sizes();
    read_blocks();
    check_tensors();
    check_groups();
    read_heads();
    name_family();
    return std::move(unet_);
  }

 private:
  bool any(const std::string& prefix) const {
    const auto it = source_.tensors().lower_bound(prefix);
    return it != source_.tensors().end() && it->first.starts_with(prefix);
  }

  /// One more than the largest index i of a key "<prefix>i.…".
  std::int64_t count(const std::string& prefix) const {
    std::int64_t result = 0;
    for (auto it = source_.tensors().lower_bound(prefix); it != source_.tensors().end() && it->first.starts_with(prefix); ++it) {
      const std::string_view rest = std::string_view(it->first).substr(prefix.size());
      std::int64_t index = 0;
      const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), index);
      require(error == std::errc() && end != rest.data() + rest.size() && *end == '.' && index >= 0 && index < 1000,
              "[models] {}: expected a block's number behind {} but got {}", name_, prefix, weights::in_quotes(it->first));
      result = std::max(result, index + 1);
    }
    return result;
  }

  /// Dimension `d` of the first of `keys` that is there with at least that rank.
  std::int64_t dim(std::initializer_list<std::string> keys, std::size_t d, std::int64_t otherwise) const {
    for (const auto& key : keys) {
      const auto it = source_.tensors().find(key);
      if (it == source_.tensors().end() || it->second.shape.size() <= d) continue;
      const auto size = it->second.shape[d];
      require(size >= 1 && size <= 1 << 24, "[models] {}: expected a size of 1 to 2^24 in dimension {} of {} but got {}", name_, d, key,
              to_string(it->second.shape));
      return size;
    }
    return otherwise;
  }

  void read_sizes() {
    unet_.model_channels = dim({"time_embed.0.weight"}, 1, dim({"input_blocks.0.0.weight", "input_blocks.0.0.bias"}, 0, 0));
    unet_.time_embed_dim =
        dim({"time_embed.0.weight", "time_embed.2.weight", "time_embed.0.bias", "time_embed.2.bias"}, 0, 4 * unet_.model_channels);
    unet_.in_channels = dim({"input_blocks.0.0.weight"}, 1, 4);
    unet_.out_channels = dim({"out.2.weight", "out.2.bias"}, 0, 4);
    if (any("label_emb.")) unet_.label_dim = dim({"label_emb.0.0.weight"}, 1, 0);
  }

  void read_blocks() {
    std::vector<std::pair<std::int64_t, std::int64_t>> skips;  // channels and level
    std::int64_t channels = unet_.in_channels, level = 0;
    const auto inputs = count("input_blocks."), outputs = std::max(count("output_blocks."), inputs);
    for (std::int64_t i = 0; i < inputs; ++i) {
      unet_.input_blocks.push_back(read_block(fmt::format("input_blocks.{}", i), channels, level, Kind::upsample));
      skips.emplace_back(channels, level);
    }
    unet_.levels = level + 1;
    unet_.middle_block = read_block("middle_block", channels, level, {});
    require(!has(unet_.middle_block, Kind::downsample) && !has(unet_.middle_block, Kind::upsample),
            "[models] {}: expected a middle_block without down- and upsampling", name_);
    for (std::int64_t i = 0; i < outputs; ++i) {
      const auto path = fmt::format("output_blocks.{}", i);
      require(!skips.empty(), "[models] {}: expected as many output_blocks as input_blocks, {}, but there is {}", name_, inputs, path);
      // Incomplete files are told by what is missing, not by a size that does not fit.
      require(!missing_.empty() || skips.back().second == level,
              "[models] {}: expected {} at resolution {} of its skip but it stands at {}", name_, path, skips.back().second, level);
      channels += skips.back().first;
      skips.pop_back();
      unet_.output_blocks.push_back(read_block(path, channels, level, Kind::downsample));
      require(!skips.empty() || !has(unet_.output_blocks.back(), Kind::upsample),
              "[models] {}: expected no upsampling in the last block, {}", name_, path);
    }
  }

  static bool has(const UNetBlock& block, Kind kind) {
    return std::any_of(block.begin(), block.end(), [&](const UNetModule& m) { return m.kind == kind; });
  }

  /// Moves `channels` and `level` to what they are behind the block.
  UNetBlock read_block(const std::string& path, std::int64_t& channels, std::int64_t& level, std::optional<Kind> refused) {
    UNetBlock block;
    const auto modules = count(path + ".");
    if (modules == 0) missing_.push_back(path + ".*");
    for (std::int64_t j = 0; j < modules; ++j) {
      const auto prefix = fmt::format("{}.{}", path, j);
      if (!any(prefix + ".")) {
        missing_.push_back(prefix + ".*");
        continue;
      }
      UNetModule m{kind_of(prefix), prefix, channels, channels, unet_.transformers.size()};
      require(m.kind != refused, "[models] {}: expected no change of resolution of that kind at {}", name_, prefix);
      switch (m.kind) {
        case Kind::conv:
          m.out = dim({prefix + ".weight", prefix + ".bias"}, 0, channels);
          break;
        case Kind::resnet:
          m.out = dim({prefix + ".out_layers.3.weight", prefix + ".in_layers.2.weight", prefix + ".emb_layers.1.weight"}, 0, channels);
          break;
        case Kind::downsample:
          ++level, m.out = dim({prefix + ".op.weight", prefix + ".op.bias"}, 0, channels);
          break;
        case Kind::upsample:
          --level, m.out = dim({prefix + ".conv.weight", prefix + ".conv.bias"}, 0, channels);
          break;
        case Kind::transformer:
          read_transformer(prefix, channels);
          break;
      }
      channels = m.out;
      block.push_back(std::move(m));
    }
    return block;
  }

  Kind kind_of(const std::string& prefix) const {
    const auto inside = [&](const char* part) { return any(fmt::format("{}.{}", prefix, part)); };
    if (inside("in_layers.") || inside("out_layers.") || inside("emb_layers.")) return Kind::resnet;
    if (inside("transformer_blocks.") || inside("proj_in.") || inside("proj_out.")) return Kind::transformer;
    if (inside("op.")) return Kind::downsample;
    if (inside("conv.")) return Kind::upsample;
    if (source_.has(prefix + ".weight") || source_.has(prefix + ".bias")) return Kind::conv;
    fail("[models] {}: expected a ResBlock, a transformer, a convolution or a change of resolution at {} but got {}", name_, prefix,
         weights::in_quotes(source_.tensors().lower_bound(prefix + ".")->first));
  }

  void read_transformer(const std::string& prefix, std::int64_t channels) {
    UNetTransformer t{prefix, channels};
    const auto block = prefix + ".transformer_blocks.";
    t.depth = std::max<std::int64_t>(1, count(block));  // where there is none, the first is missing
    const auto projection = source_.tensors().find(prefix + ".proj_in.weight");
    t.linear = projection != source_.tensors().end() && projection->second.shape.size() == 2;
    t.context_dim = dim({block + "0.attn2.to_k.weight", block + "0.attn2.to_v.weight"}, 1, unet_.context_dim);
    if (unet_.context_dim == 0) unet_.context_dim = t.context_dim;
    t.context_dim = unet_.context_dim;  // one context serves all
    unet_.transformers.push_back(std::move(t));
  }

  void check_tensors() {
    const auto required = missing_.empty() ? required_tensors(unet_) : std::vector<std::pair<std::string, Shape>>{};
    for (const auto& [key, shape] : required)
      if (!source_.has(key)) missing_.push_back(key);
    require(missing_.empty(), "[models] {}: expected all tensors of a UNet but {} {} missing: {}", name_, missing_.size(),
            missing_.size() == 1 ? "is" : "are", first_few(missing_));
    require(!unet_.transformers.empty(), "[models] {}: expected a UNet with transformers that attend to a text but it has none", name_);
    for (const auto& [key, shape] : required) {
      const auto& info = source_.info(key);
      if (shape.size() >= 2) read_scale(key, info);
      require(info.shape == shape, "[models] {}: expected {} of shape {} but got {}", name_, key, to_string(shape), to_string(info.shape));
      require(is_float(info.dtype), "[models] {}: expected {} of a floating-point dtype but got {}", name_, key, name_of(info.dtype));
      unet_.tensors[key] = info;
    }
    std::vector<std::string> unknown;
    for (const auto& [key, info] : source_.tensors()) {
      const bool block = key.starts_with("input_blocks.") || key.starts_with("middle_block.") || key.starts_with("output_blocks.");
      if (block && !unet_.tensors.contains(key) && !is_of_scaled(key)) unknown.push_back(key);
    }
    require(unknown.empty(), "[models] {}: expected a UNet of Stable Diffusion's construction but its blocks also hold {}", name_,
            first_few(unknown));
  }

  void read_scale(const std::string& key, const weights::TensorInfo& weight) {
    for (const char* name : {"scale_weight", "weight_scale"}) {
      const auto scale = owner_of(key) + name;
      if (!source_.has(scale)) continue;
      const auto& info = source_.info(scale);
      const bool fp8 = is_fp8(weight.dtype);
      require(fp8 && is_float(info.dtype) && numel(info.shape) == 1 && !unet_.scales.contains(key),
              "[models] {}: expected a quantised {} in fp8 with one scale but it is {} with a scale {} of {}{}: such weights are read by the ComfyUI node only",
              name_, key, name_of(weight.dtype), weights::in_quotes(scale), name_of(info.dtype), to_string(info.shape));
      unet_.scales[key] = scale;
      unet_.tensors[scale] = info;
    }
  }

  /// "a.b." of "a.b.weight".
  static std::string owner_of(const std::string& key) { return key.substr(0, key.rfind('.') + 1); }

  /// What else stands beside a scaled weight: the quantisation's name, and a scale for rounding the layer's input.
  bool is_of_scaled(const std::string& key) const {
    const auto owner = owner_of(key), name = key.substr(owner.size());
    return (name == "comfy_quant" || name == "scale_input" || name == "input_scale") && unet_.scales.contains(owner + "weight");
  }

  void check_groups() const {
    require(unet_.model_channels % 2 == 0, "[models] {}: expected an even width of the timestep's embedding but time_embed.0.weight has {}",
            name_, unet_.model_channels);
    for (const auto& [key, info] : unet_.tensors) {
      const bool norm = key.ends_with(".in_layers.0.weight") || key.ends_with(".out_layers.0.weight") || key.ends_with(".norm.weight") ||
                        key == "out.0.weight";
      if (!norm) continue;  // others may be scalars, as the scales of fp8 are
      require(info.shape[0] % unet_.norm_groups == 0, "[models] {}: expected channels that {} norm groups divide but {} has {}",
              name_, unet_.norm_groups, key, info.shape[0]);
    }
  }

  void read_heads() {
    require(!heads_.heads || !heads_.head_dim, "[models] expected a number of heads or a width of a head but got both");
    require(heads_.heads.value_or(1) >= 1 && heads_.head_dim.value_or(1) >= 1, "[models] expected heads of at least 1 but got {}",
            heads_.heads ? *heads_.heads : *heads_.head_dim);
    const bool wide = unet_.label_dim || unet_.transformers.front().linear;
    const bool by_width = heads_.head_dim || (!heads_.heads && wide);
    const auto divisor = by_width ? heads_.head_dim.value_or(64) : heads_.heads.value_or(8);
    for (auto& t : unet_.transformers) {
      require(t.channels % divisor == 0,
              "[models] {}: expected the {} channels of {} to be divisible by {}, the {}; {}",
              name_, t.channels, t.prefix, divisor, by_width ? "width of a head" : "number of heads",
              heads_.heads || heads_.head_dim ? "where it is not given, the family's rule holds" : "a UNet of other heads needs heads or head_dim");
      t.heads = by_width ? t.channels / divisor : divisor;
    }
  }

  void name_family() {
    const bool linear = unet_.transformers.front().linear, label = unet_.label_dim.has_value();
    const auto context = unet_.context_dim;
    unet_.family = context == 768 && !linear && !label  ? "sd1"
                   : context == 1024 && linear          ? "sd2"
                   : context == 2048 && linear && label ? "sdxl"
                   : context == 1280 && linear && label ? "sdxl-refiner"
                                                        : "unet";
  }

  const weights::Source& source_;
  std::string name_;
  HeadOptions heads_;
  UNet unet_;
  std::vector<std::string> missing_;
};

}  // namespace

UNet detect_unet(const weights::Source& source, const HeadOptions& heads) { return Detector(source, heads).detect(); }

}  // namespace comfytp::models
