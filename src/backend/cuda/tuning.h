// Choices that were timed once: in memory for the process, and in a file per device and library version for the next.
#pragma once

#include <map>
#include <mutex>
#include <optional>
#include <string>

namespace comfytp::backend::cuda {

class Tuning {
 public:
  /// The choices of a device; `identity` names it and the libraries ("NVIDIA H100 80GB HBM3 cublasLt 130002"). The file is
  /// <cache>/comfytp/tuning/<hash>.json, <cache> being COMFYTP_CACHE, else XDG_CACHE_HOME, else ~/.cache (LOCALAPPDATA on Windows). One that
  /// cannot be read or written is as good as none.
  static Tuning& of(const std::string& identity);

  std::optional<std::string> find(const std::string& key);
  void store(const std::string& key, const std::string& choice);
  /// Writes what is new, whole or not at all.
  void save();

 private:
  explicit Tuning(const std::string& identity);
  std::mutex mutex_;
  std::string identity_, path_;
  std::map<std::string, std::string> choices_;
  bool changed_ = false;
};

struct Context;
/// Of the device that kernels are made for, and its libraries.
Tuning& tuning_of(const Context& context);

}  // namespace comfytp::backend::cuda
