// A file's bytes without a copy. All that differs between operating systems in reading files stands in mapped_file.cpp.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

namespace comfytp {

/// A regular file mapped read-only. Its pages belong to the system's page cache, not to the process. The file must not shrink
/// while it is mapped: the system then ends the process at the first access behind the new end.
class MappedFile {
 public:
  /// Throws Error naming the path when it is no readable regular file.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;  // nullptr for an empty file, which no system maps
  std::size_t size_ = 0;
};

/// A path in UTF-8, for messages and JSON, and the inverse.
std::string utf8(const std::filesystem::path& path);
std::filesystem::path path_from_utf8(const std::string& text);

}  // namespace comfytp
