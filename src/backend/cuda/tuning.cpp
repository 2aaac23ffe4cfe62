#include "backend/cuda/tuning.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "backend/cuda/context.h"
#include "base/error.h"

namespace comfytp::backend::cuda {
namespace {

std::filesystem::path cache_folder() {
  const auto from = [](const char* name) -> std::filesystem::path {
    const char* value = std::getenv(name);
    return value ? value : "";
  };
  if (const auto own = from("COMFYTP_CACHE"); !own.empty()) return own / "tuning";
  for (const char* name : {"XDG_CACHE_HOME", "LOCALAPPDATA"})
    if (const auto base = from(name); !base.empty()) return base / "comfytp" / "tuning";
  if (const auto home = from("HOME"); !home.empty()) return home / ".cache" / "comfytp" / "tuning";
  return {};
}

}  // namespace

Tuning& Tuning::of(const std::string& identity) {
  static std::mutex mutex;
  static std::map<std::string, std::unique_ptr<Tuning>> all;
  std::lock_guard lock(mutex);
  auto& found = all[identity];
  if (!found) found.reset(new Tuning(identity));
  return *found;
}

Tuning::Tuning(const std::string& identity) : identity_(identity) {
  const auto folder = cache_folder();
  if (folder.empty()) return;
  path_ = (folder / fmt::format("{:016x}.json", std::hash<std::string>()(identity))).string();
  std::ifstream file(path_);
  const auto content = nlohmann::json::parse(file, nullptr, false);
  if (!content.is_object() || content.value("device", "") != identity || !content.contains("choices") || !content["choices"].is_object()) return;
  for (const auto& [key, value] : content["choices"].items())
    if (value.is_string()) choices_[key] = value.get<std::string>();
}

std::optional<std::string> Tuning::find(const std::string& key) {
  std::lock_guard lock(mutex_);
  const auto it = choices_.find(key);
  return it == choices_.end() ? std::nullopt : std::optional(it->second);
}

void Tuning::store(const std::string& key, const std::string& choice) {
  std::lock_guard lock(mutex_);
  choices_[key] = choice;
  changed_ = true;
}

void Tuning::save() {
  std::lock_guard lock(mutex_);
  if (!changed_ || path_.empty()) return;
  changed_ = false;
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(path_).parent_path(), error);
  const auto temporary = fmt::format("{}.{:08x}", path_, std::random_device()());
  {
    std::ofstream file(temporary);
    file << nlohmann::json{{"device", identity_}, {"choices", choices_}}.dump(1) << '\n';
    if (!file.good()) {
      file.close();
      std::filesystem::remove(temporary, error);
      return;
    }
  }
  std::filesystem::rename(temporary, path_, error);
  if (error) std::filesystem::remove(temporary, error);
}

Tuning& tuning_of(const Context& context) {
  const auto& p = context.properties;
  return Tuning::of(fmt::format("{} sm_{}{} cublasLt {}", p.name, p.major, p.minor, cublasLtGetVersion()));
}

}  // namespace comfytp::backend::cuda
