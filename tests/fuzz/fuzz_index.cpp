// Any text is either refused with an Error of one line, or names shards below the index's folder only.
#include <cstdlib>
#include <filesystem>

#include "base/error.h"
#include "base/mapped_file.h"
#include "weights/checkpoint.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace comfytp;
  try {
    for (const auto& [key, shard] : weights::parse_index({reinterpret_cast<const char*>(data), size}, "fuzz")) {
      const auto path = (std::filesystem::path("/folder") / path_from_utf8(shard)).lexically_normal();
      if (!utf8(path).starts_with("/folder/")) std::abort();
    }
  } catch (const Error& error) {
    if (std::string_view(error.what()).find('\n') != std::string_view::npos) std::abort();
  }
  return 0;
}
