// Shared libraries that are loaded while the program runs.
#pragma once

#include <string>

#include "base/error.h"

/// Before a function that a library of ours hands out.
#if defined(_WIN32)
#define COMFYTP_EXPORT __declspec(dllexport)
#else
#define COMFYTP_EXPORT __attribute__((visibility("default")))
#endif

namespace comfytp {

/// Loads a library and keeps it until the process ends. `name` is its plain name ("comfytp_cuda"); it lies beside the file that this
/// code is in or up to two folders above. Throws Error with the path and the system's reason.
class Library {
 public:
  explicit Library(const std::string& name);
  /// Address of an exported function. Throws Error with the path.
  void* symbol(const std::string& name) const;
  /// What an exported function of type `T* (const char* build)` gives for this build, COMFYTP_BUILD: null for any other, since classes of
  /// two builds must not meet. Throws Error then.
  template <typename T>
  T& of_this_build(const std::string& name) const {
    T* object = reinterpret_cast<T* (*)(const char*)>(symbol(name))(COMFYTP_BUILD);
    require(object, "[library] '{}' belongs to another build than this one ({})", path_, COMFYTP_BUILD);
    return *object;
  }

 private:
  std::string path_;
  void* handle_ = nullptr;
};

/// Whether a file for it is there.
bool library_exists(const std::string& name);

}  // namespace comfytp
