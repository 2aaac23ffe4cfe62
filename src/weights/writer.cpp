#include <algorithm>
#include <cerrno>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <system_error>

#include "base/error.h"
#include "base/mapped_file.h"
#include "weights/format_names.h"
#include "weights/safetensors.h"

namespace comfytp::weights {
namespace fs = std::filesystem;
namespace {

std::string make_header(const std::vector<std::pair<std::string, TensorInfo>>& tensors, const std::map<std::string, std::string>& metadata,
                        const std::string& name) {
  using nlohmann::json;
  json header = json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::int64_t position = 0;
  for (const auto& [key, info] : tensors) {
    require(key != "__metadata__" && !header.contains(key), "[safetensors] expected every tensor once but got another {} for {}",
            in_quotes(key), name);
    header[key] = {{"dtype", format_name(info.dtype)}, {"shape", info.shape}, {"data_offsets", {position, position + info.bytes()}}};
    position += info.bytes();
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const json::exception&) {
    fail("[safetensors] expected keys and metadata in UTF-8 for {}", name);
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the data is aligned
  return text;
}

}  // namespace

struct Writer::State {
  fs::path target, temporary;  // the same where the target is written to directly
  std::ofstream out;
  std::uint64_t size = 0, written = 0;
  bool finished = false;

  ~State() {
    if (finished) return;
    out.close();
    std::error_code ignored;
    if (temporary != target) fs::remove(temporary, ignored);
  }

  [[noreturn]] void fail_writing(int error) const {
    fail("[safetensors] cannot write {}: {}", utf8(target), error ? std::generic_category().message(error) : "the stream failed");
  }

  void write(const void* data, std::size_t bytes) {
    errno = 0;
    out.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
    if (!out) fail_writing(errno);
  }
};

Writer::Writer(const fs::path& path, const std::vector<std::pair<std::string, TensorInfo>>& tensors,
               const std::map<std::string, std::string>& metadata)
    : state_(std::make_unique<State>()) {
  const std::string header = make_header(tensors, metadata, utf8(path));
  for (const auto& [key, info] : tensors) state_->size += static_cast<std::uint64_t>(info.bytes());

  std::error_code ignored;
  const auto status = fs::status(path, ignored);
  state_->target = state_->temporary = path;
  if (!fs::exists(status) || fs::is_regular_file(status)) {
    // Through a link, so that what it names is replaced and not the link.
    const fs::path real = fs::weakly_canonical(path, ignored);
    if (!real.empty()) state_->target = real;
    std::random_device random;
    const std::string name = fmt::format(".{}.{:08x}.tmp", utf8(state_->target.filename()), random());
    state_->temporary = state_->target.parent_path() / path_from_utf8(name);
  }
  errno = 0;
  state_->out.open(state_->temporary, std::ios::binary | std::ios::trunc);
  if (!state_->out) state_->fail_writing(errno);

  char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i) & 0xff);
  state_->write(length, sizeof length);
  state_->write(header.data(), header.size());
}

Writer::~Writer() = default;

void Writer::append(const void* data, std::size_t bytes) {
  require(bytes <= state_->size - state_->written, "[safetensors] expected {} bytes of tensors for {} but got {} more after {}",
          state_->size, utf8(state_->target), bytes, state_->written);
  state_->write(data, bytes);
  state_->written += bytes;
}

void Writer::finish() {
  require(state_->written == state_->size, "[safetensors] expected {} bytes of tensors for {} but got {}", state_->size,
          utf8(state_->target), state_->written);
  errno = 0;
  state_->out.close();
  if (!state_->out) state_->fail_writing(errno);
  std::error_code error;
  if (state_->temporary != state_->target) fs::rename(state_->temporary, state_->target, error);
  if (error) fail("[safetensors] cannot write {}: {}", utf8(state_->target), error.message());
  state_->finished = true;
}

}  // namespace comfytp::weights
