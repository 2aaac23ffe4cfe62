// Shared libraries that are loaded while the program runs.
#pragma once

#include <string>

namespace comfytp {

/// Loads a library and keeps it until the process ends. `name` is its plain name ("comfytp_cuda"); it lies beside the file that this
/// code is in or up to two folders above. Throws Error with the path and the system's reason.
class Library {
 public:
  explicit Library(const std::string& name);
  /// Address of an exported function. Throws Error with the path.
  void* symbol(const std::string& name) const;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  void* handle_ = nullptr;
};

/// Whether a file for it is there.
bool library_exists(const std::string& name);

}  // namespace comfytp
