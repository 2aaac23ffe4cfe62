#include "base/library.h"

#include <filesystem>

#include "base/error.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace comfytp {
namespace {

std::filesystem::path own_folder() {
#if defined(_WIN32)
  HMODULE module = nullptr;
  wchar_t path[32768];
  GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                     reinterpret_cast<const wchar_t*>(&own_folder), &module);
  GetModuleFileNameW(module, path, 32768);
  return std::filesystem::path(path).parent_path();
#else
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&own_folder), &info);
  std::error_code error;
  auto path = std::filesystem::canonical(info.dli_fname ? info.dli_fname : "", error);
  if (error) path = std::filesystem::read_symlink("/proc/self/exe", error);  // a program's own name may be relative to another folder
  return path.parent_path();
#endif
}

// Beside this file, or where a build folder has it: up to two folders above a test's or the Python module's.
std::filesystem::path file_of(const std::string& name) {
#if defined(_WIN32)
  const auto file = name + ".dll";
#else
  const auto file = "lib" + name + ".so";
#endif
  const auto own = own_folder();
  for (const auto& folder : {own, own.parent_path(), own.parent_path().parent_path()})
    if (std::filesystem::exists(folder / file)) return folder / file;
  return own / file;
}

}  // namespace

bool library_exists(const std::string& name) { return std::filesystem::exists(file_of(name)); }

Library::Library(const std::string& name) : path_(file_of(name).string()) {
#if defined(_WIN32)
  handle_ = LoadLibraryW(file_of(name).c_str());
  require(handle_, "[library] cannot load '{}' (Windows error {})", path_, GetLastError());
#else
  handle_ = dlopen(path_.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle_) {
    const char* reason = dlerror();
    fail("[library] cannot load '{}': {}", path_, reason ? reason : "unknown reason");
  }
#endif
}

void* Library::symbol(const std::string& name) const {
#if defined(_WIN32)
  void* address = reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(handle_), name.c_str()));
#else
  void* address = dlsym(handle_, name.c_str());
#endif
  require(address, "[library] expected '{}' in '{}' but it is not there", name, path_);
  return address;
}

}  // namespace comfytp
