#include "base/mapped_file.h"

#include <system_error>

#include "base/error.h"

#ifdef _WIN32
#define NOMINMAX
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace comfytp {
namespace {

[[noreturn]] void fail_reading(const std::filesystem::path& path, int error) {
  fail("[file] cannot read {}: {}", utf8(path), std::system_category().message(error));
}

// Asked before opening, which would wait for a writer on a pipe.
void require_regular(const std::filesystem::path& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (error) fail_reading(path, error.value());
  require(std::filesystem::is_regular_file(status), "[file] expected a regular file but got {}", utf8(path));
}

}  // namespace

#ifdef _WIN32

namespace {

struct Handle {
  HANDLE value;
  ~Handle() {
    if (value && value != INVALID_HANDLE_VALUE) CloseHandle(value);
  }
};

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  require_regular(path);
  const Handle file{CreateFileW(path.c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr)};
  if (file.value == INVALID_HANDLE_VALUE) fail_reading(path, static_cast<int>(GetLastError()));
  LARGE_INTEGER size;
  if (!GetFileSizeEx(file.value, &size)) fail_reading(path, static_cast<int>(GetLastError()));
  if (size.QuadPart == 0) return;
  const Handle mapping{CreateFileMappingW(file.value, nullptr, PAGE_READONLY, 0, 0, nullptr)};
  if (!mapping.value) fail_reading(path, static_cast<int>(GetLastError()));
  const void* data = MapViewOfFile(mapping.value, FILE_MAP_READ, 0, 0, 0);
  if (!data) fail_reading(path, static_cast<int>(GetLastError()));
  data_ = static_cast<const std::byte*>(data);
  size_ = static_cast<std::size_t>(size.QuadPart);
}

MappedFile::~MappedFile() {
  if (data_) UnmapViewOfFile(data_);
}

#else

MappedFile::MappedFile(const std::filesystem::path& path) {
  require_regular(path);
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) fail_reading(path, errno);
  struct stat status;
  void* data = nullptr;
  int error = 0;
  if (fstat(file, &status) != 0) {
    error = errno;
  } else if (status.st_size > 0) {
    data = mmap(nullptr, static_cast<std::size_t>(status.st_size), PROT_READ, MAP_SHARED, file, 0);
    if (data == MAP_FAILED) error = errno;
  }
  close(file);
  if (error) fail_reading(path, error);
  if (!data) return;
  data_ = static_cast<const std::byte*>(data);
  size_ = static_cast<std::size_t>(status.st_size);
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<std::byte*>(data_), size_);
}

#endif

std::string utf8(const std::filesystem::path& path) {
  const auto text = path.u8string();
  return {text.begin(), text.end()};
}

std::filesystem::path path_from_utf8(const std::string& text) { return std::u8string(text.begin(), text.end()); }

}  // namespace comfytp
