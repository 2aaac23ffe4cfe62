// Any bytes are either refused with an Error of one line, or every tensor they hold can be read to its last byte.
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "weights/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace comfytp;
  try {
    const auto source = weights::from_bytes("fuzz", {reinterpret_cast<const std::byte*>(data), size}, nullptr);
    for (const auto& [key, info] : source->tensors()) {
      std::vector<std::byte> out(static_cast<std::size_t>(info.bytes()));
      source->read(key, whole_box(info.shape), out.data());
      Box part = whole_box(info.shape);
      for (auto& interval : part) interval.lo = interval.hi / 2;
      source->read(key, part, out.data());
    }
  } catch (const Error& error) {
    if (std::string_view(error.what()).find('\n') != std::string_view::npos) std::abort();
  }
  return 0;
}
