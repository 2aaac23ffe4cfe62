// The safetensors format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header,
// then the tensors' bytes. All its dtypes are read but C64, F8_E8M0 and those of less than a byte.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "weights/source.h"

namespace comfytp::weights {

/// Where a tensor lies: bytes [begin, end) behind the header.
struct Entry {
  TensorInfo info;
  std::uint64_t begin = 0, end = 0;
};
struct Header {
  std::map<std::string, Entry, std::less<>> entries;
  std::map<std::string, std::string> metadata;
  std::uint64_t data_offset = 0;  ///< of the first tensor byte in the file
};

/// Checks everything a hostile file could get wrong before any tensor is touched: lengths, JSON, dtypes, shapes against
/// byte counts, overlapping and out-of-range offsets, holes. `bytes` is the file's beginning (at least the header),
/// `file_size` its size; `name` stands in messages. Throws Error.
Header parse_header(std::span<const std::byte> bytes, std::uint64_t file_size, const std::string& name);

/// Maps one file read-only.
std::shared_ptr<Source> open_safetensors(const std::filesystem::path& path);

/// A whole file in memory; `keep` lives as long as the source.
std::shared_ptr<Source> from_bytes(std::string name, std::span<const std::byte> file, std::shared_ptr<const void> keep);

/// A file that appears under its name only when it is complete: written to a temporary name beside it, renamed by finish(),
/// removed by the destructor otherwise. What exists and is no regular file (a device, a pipe) is written to directly.
/// Throws Error naming the file when the disk is full or cannot be written.
class Writer {
 public:
  /// The header is written at once; tensors must then be appended in the order of `tensors`.
  Writer(const std::filesystem::path& path, const std::vector<std::pair<std::string, TensorInfo>>& tensors,
         const std::map<std::string, std::string>& metadata = {});
  ~Writer();
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;
  /// The next `bytes` bytes of the data: any cut will do.
  void append(const void* data, std::size_t bytes);
  /// Throws Error when bytes are missing.
  void finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace comfytp::weights
