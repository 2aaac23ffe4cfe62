#include "weights/checkpoint.h"

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "base/mapped_file.h"
#include "weights/json.h"
#include "weights/safetensors.h"

namespace comfytp::weights {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kAccepted =
    "a .safetensors file, a .safetensors.index.json, or a folder with one of them or with unet/ or transformer/";

bool is_tensors(const fs::path& path) { return path.extension() == ".safetensors" || path.extension() == ".sft"; }

// "….safetensors.index.json", and with a variant "….safetensors.index.fp16.json".
bool is_index(const fs::path& path) {
  return path.extension() == ".json" && utf8(path.filename()).find(".safetensors.index.") != std::string::npos;
}

class Sharded : public Source {
 public:
  explicit Sharded(const fs::path& index) : name_(utf8(index)) {
    const MappedFile file(index);
    const auto bytes = file.bytes();
    const auto weight_map = parse_index({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, name_);
    std::map<std::string, std::shared_ptr<Source>> shards;
    for (const auto& [key, shard] : weight_map) {
      auto& source = shards[shard];
      if (!source) source = open_shard(index.parent_path() / path_from_utf8(shard), key);
      require(source->has(key), "[weights] expected a tensor {} in shard {}, as {} says, but there is none", in_quotes(key), source->name(),
              name_);
      tensors_[key] = source->info(key);
      shard_of_[key] = source;
    }
  }
  std::string name() const override { return name_; }
  const std::map<std::string, TensorInfo, std::less<>>& tensors() const override { return tensors_; }

  void read(std::string_view key, const Box& box, void* out) const override {
    info(key);
    shard_of_.find(key)->second->read(key, box, out);
  }

 private:
  std::shared_ptr<Source> open_shard(const fs::path& path, const std::string& key) const {
    std::error_code ignored;
    require(fs::exists(path, ignored), "[weights] expected shard {} for key {} of {} but there is no such file", utf8(path), in_quotes(key),
            name_);
    return open_safetensors(path);
  }

  std::string name_;
  std::map<std::string, TensorInfo, std::less<>> tensors_;
  std::map<std::string, std::shared_ptr<Source>, std::less<>> shard_of_;
};

std::shared_ptr<Source> open_file(const fs::path& path) {
  if (is_index(path)) return std::make_shared<Sharded>(path);
  require(is_tensors(path), "[weights] expected {} but got {}", kAccepted, utf8(path));
  return open_safetensors(path);
}

// The one file of a folder that stands for a model, or an empty path when there is none.
fs::path choose(const fs::path& folder) {
  std::vector<fs::path> files, indexes, tensors;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) files.push_back(it->path());
  require(!error, "[weights] cannot read the folder {}: {}", utf8(folder), error.message());
  std::sort(files.begin(), files.end());
  std::copy_if(files.begin(), files.end(), std::back_inserter(indexes), is_index);
  std::copy_if(files.begin(), files.end(), std::back_inserter(tensors), is_tensors);

  for (const char* name :
       {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model.fp16.safetensors.index.json"})
    if (std::find(files.begin(), files.end(), folder / name) != files.end()) return folder / name;
  const auto& found = indexes.empty() ? tensors : indexes;
  if (found.empty()) return {};
  require(found.size() == 1, "[weights] expected one {} in the folder {} but got {}, among them {} and {}: name one of them",
          indexes.empty() ? ".safetensors file" : "index", utf8(folder), found.size(), utf8(found.front().filename()),
          utf8(found.back().filename()));
  return found.front();
}

std::shared_ptr<Source> open_folder(const fs::path& folder) {
  const bool unet = fs::is_directory(folder / "unet"), transformer = fs::is_directory(folder / "transformer");
  require(!(unet && transformer), "[weights] expected either unet or transformer in the folder {} but got both: name one of them",
          utf8(folder));
  const fs::path model = unet ? folder / "unet" : transformer ? folder / "transformer" : folder;
  const fs::path file = choose(model);
  require(!file.empty(), "[weights] expected {} but the folder {} holds none", kAccepted, utf8(model));
  return open_file(file);
}

}  // namespace

std::map<std::string, std::string, std::less<>> parse_index(std::string_view text, const std::string& name) {
  const nlohmann::json root = parse_object(text, name, 8);
  const auto map = root.find("weight_map");
  require(map != root.end() && map->is_object(), "[weights] expected an object weight_map in {} but {}", name,
          map == root.end() ? "there is none" : fmt::format("got {}", map->type_name()));
  std::map<std::string, std::string, std::less<>> weight_map;
  for (const auto& [key, value] : map->items()) {
    require(value.is_string(), "[weights] expected the name of a shard for key {} of {} but got {}", in_quotes(key), name,
            value.type_name());
    const auto& shard = value.get_ref<const std::string&>();
    // ':' and '\' only mean something on Windows, and are refused everywhere so that a file means the same everywhere.
    const fs::path path = path_from_utf8(shard);
    require(path.is_relative() && std::find(path.begin(), path.end(), "..") == path.end() && shard.find_first_of(":\\") == shard.npos &&
                shard.find('\0') == shard.npos,
            "[weights] expected a shard inside the folder of {} for key {} but got {}", name, in_quotes(key), in_quotes(shard));
    require(is_tensors(path), "[weights] expected a .safetensors shard for key {} of {} but got {}", in_quotes(key), name,
            in_quotes(shard));
    weight_map[key] = shard;
  }
  require(!weight_map.empty(), "[weights] expected keys in the weight_map of {} but it is empty", name);
  return weight_map;
}

std::shared_ptr<Source> open_checkpoint(const fs::path& path) {
  std::error_code ignored;
  const auto status = fs::status(path, ignored);
  require(fs::exists(status), "[weights] expected {} but there is no {}", kAccepted, utf8(path));
  return fs::is_directory(status) ? open_folder(path) : open_file(path);
}

}  // namespace comfytp::weights
