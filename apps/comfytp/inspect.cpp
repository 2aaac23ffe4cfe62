// comfytp inspect: what a checkpoint holds.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/mapped_file.h"
#include "base/text.h"
#include "commands.h"
#include "models/model.h"
#include "options.h"
#include "table.h"
#include "weights/checkpoint.h"

namespace comfytp::cli {
namespace {

using nlohmann::ordered_json;

struct Options {
  std::string checkpoint;
  models::HeadOptions heads;
  bool json = false;
};

ordered_json to_json(const models::Checkpoint& checkpoint) {
  const auto& unet = checkpoint.unet;
  ordered_json transformers = ordered_json::array();
  for (const auto& t : unet.transformers)
    transformers.push_back({{"name", t.prefix}, {"channels", t.channels}, {"depth", t.depth}, {"heads", t.heads}});
  ordered_json components = ordered_json::array();
  for (const auto& c : checkpoint.components)
    components.push_back({{"name", c.name},
                          {"tensors", c.tensors},
                          {"parameters", c.parameters},
                          {"bytes", c.bytes},
                          {"parameters_of_dtype", c.parameters_of_dtype}});
  return {{"family", unet.family},
          {"layout", checkpoint.layout},
          {"in_channels", unet.in_channels},
          {"out_channels", unet.out_channels},
          {"model_channels", unet.model_channels},
          {"time_embed_dim", unet.time_embed_dim},
          {"context_dim", unet.context_dim},
          {"label_dim", unet.label_dim ? ordered_json(*unet.label_dim) : ordered_json()},
          {"levels", unet.levels},
          {"norm_groups", unet.norm_groups},
          {"transformers", transformers},
          {"components", components}};
}

// "12 x 8 heads, 4 x 10 heads": runs of transformers that are alike.
std::string heads_text(const std::vector<models::UNetTransformer>& transformers) {
  std::map<std::int64_t, int> count;
  for (const auto& t : transformers) ++count[t.heads];
  std::string text;
  for (const auto& [heads, times] : count) text += fmt::format("{}{} x {} heads", text.empty() ? "" : ", ", times, heads);
  return text.empty() ? "none" : text;
}

void print(const models::Checkpoint& checkpoint) {
  const auto& unet = checkpoint.unet;
  fmt::print("family        {}\n", unet.family);
  fmt::print("key layout    {}\n", checkpoint.layout);
  fmt::print("channels      {} in, {} out, {} at the first of {} levels\n", unet.in_channels, unet.out_channels, unet.model_channels,
             unet.levels);
  fmt::print("text          {} wide{}\n", unet.context_dim, unet.label_dim ? fmt::format(", y {} wide", *unet.label_dim) : "");
  fmt::print("transformers  {}\n\n", heads_text(unet.transformers));
  std::vector<std::vector<std::string>> rows = {{"component", "tensors", "parameters", "bytes", "dtypes"}};
  for (const auto& c : checkpoint.components) {
    std::string dtypes;
    for (const auto& [dtype, parameters] : c.parameters_of_dtype)
      dtypes += fmt::format("{}{} {}", dtypes.empty() ? "" : ", ", dtype, percent_text(parameters, c.parameters));
    rows.push_back({c.name, count_text(c.tensors), count_text(c.parameters), bytes_text(c.bytes), dtypes});
  }
  print_table(rows);
}

int inspect(const Options& options) {
  const auto checkpoint = models::recognise(weights::open_checkpoint(path_from_utf8(options.checkpoint)), options.heads);
  if (options.json)
    fmt::print("{}\n", to_json(checkpoint).dump(2));
  else
    print(checkpoint);
  return 0;
}

}  // namespace

void add_inspect(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  auto* command = app.add_subcommand("inspect", "Shows what a checkpoint holds: family, dimensions, components, dtypes, key layout");
  command->add_option("checkpoint", options->checkpoint, "A .safetensors file, its index, or a diffusers folder")
      ->required()
      ->type_name("CKPT");
  add_heads(*command, options->heads);
  command->add_flag("--json", options->json, "Print JSON");
  command->callback([options, &chosen] { chosen = [options] { return inspect(*options); }; });
}

}  // namespace comfytp::cli
