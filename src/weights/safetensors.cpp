#include "weights/safetensors.h"

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "base/mapped_file.h"
#include "weights/format_names.h"
#include "weights/json.h"

namespace comfytp::weights {
namespace {

using nlohmann::json;

constexpr std::uint64_t kMaxHeader = 100'000'000;  // as the format's own reader
constexpr std::size_t kMaxRank = 64;

const json& field(const json& entry, const char* name, const std::string& where) {
  const auto found = entry.find(name);
  require(found != entry.end(), "[safetensors] expected a field '{}' of {} but there is none", name, where);
  return *found;
}

std::vector<std::uint64_t> numbers(const json& value, const char* name, const std::string& where) {
  bool good = value.is_array();
  if (good)
    for (const auto& v : value) good = good && v.is_number_unsigned();
  require(good, "[safetensors] expected non-negative integers as {} of {} but got something else", name, where);
  return value.get<std::vector<std::uint64_t>>();
}

// No product of sizes may overflow, not even one that a size of 0 makes vanish: strides are such products.
Shape checked_shape(const std::vector<std::uint64_t>& sizes, DType dtype, const std::string& where) {
  require(sizes.size() <= kMaxRank, "[safetensors] expected at most {} dimensions of {} but got {}", kMaxRank, where, sizes.size());
  std::uint64_t room = std::numeric_limits<std::int64_t>::max() / size_of(dtype);
  Shape shape;
  for (const auto size : sizes) {
    require(size <= room, "[safetensors] expected fewer than 2^63 bytes of {} but its shape says more", where);
    room /= std::max<std::uint64_t>(size, 1);
    shape.push_back(static_cast<std::int64_t>(size));
  }
  return shape;
}

Entry parse_entry(const json& value, const std::string& where) {
  require(value.is_object(), "[safetensors] expected an object for {} but got {}", where, value.type_name());
  const auto& dtype_name = field(value, "dtype", where);
  require(dtype_name.is_string(), "[safetensors] expected a string as dtype of {} but got {}", where, dtype_name.type_name());
  const auto dtype = dtype_of_format(dtype_name.get_ref<const std::string&>());
  require(dtype.has_value(), "[safetensors] expected a dtype of {} for {} but got {}", format_names(), where,
          in_quotes(dtype_name.get_ref<const std::string&>()));
  Entry entry;
  entry.info = {*dtype, checked_shape(numbers(field(value, "shape", where), "shape", where), *dtype, where)};
  const auto offsets = numbers(field(value, "data_offsets", where), "data_offsets", where);
  require(offsets.size() == 2 && offsets[0] <= offsets[1], "[safetensors] expected two rising data_offsets of {} but got {}", where,
          offsets.size() == 2 ? fmt::format("[{},{}]", offsets[0], offsets[1]) : fmt::format("{} numbers", offsets.size()));
  entry.begin = offsets[0];
  entry.end = offsets[1];
  require(entry.end - entry.begin == static_cast<std::uint64_t>(entry.info.bytes()),
          "[safetensors] expected {} bytes for {} {} of {} but data_offsets [{},{}] span {}", entry.info.bytes(), name_of(*dtype),
          to_string(entry.info.shape), where, entry.begin, entry.end, entry.end - entry.begin);
  return entry;
}

// The tensors must tile the data: no byte is in two of them, none in no tensor.
void check_tiling(const Header& header, std::uint64_t data_size, const std::string& name) {
  std::vector<const std::pair<const std::string, Entry>*> order;
  for (const auto& entry : header.entries) order.push_back(&entry);
  std::stable_sort(order.begin(), order.end(),
                   [](auto* a, auto* b) { return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end); });
  std::uint64_t position = 0;
  const std::string* previous = nullptr;
  for (const auto* item : order) {
    const auto& [key, entry] = *item;
    require(entry.end <= data_size, "[safetensors] expected tensor {} inside the {} bytes of data in {} but it ends at byte {}: truncated?",
            in_quotes(key), data_size, name, entry.end);
    require(entry.begin >= position, "[safetensors] expected tensor {} in {} to begin at byte {} but it begins at {}: it overlaps {}",
            in_quotes(key), name, position, entry.begin, previous ? in_quotes(*previous) : "");
    require(entry.begin == position, "[safetensors] expected tensor {} in {} to begin at byte {} but it begins at {}: a hole of {} bytes",
            in_quotes(key), name, position, entry.begin, entry.begin - position);
    position = entry.end;
    previous = &key;
  }
  require(position == data_size, "[safetensors] expected the data in {} to end with the last tensor {} at byte {} but {} bytes follow",
          name, previous ? in_quotes(*previous) : "(there is none)", position, data_size - position);
}

}  // namespace

Header parse_header(std::span<const std::byte> bytes, std::uint64_t file_size, const std::string& name) {
  const std::uint64_t size = std::min<std::uint64_t>(bytes.size(), file_size);
  require(size >= 8, "[safetensors] expected 8 bytes of header length in {} but the file has {}: truncated or no safetensors file", name,
          size);
  std::uint64_t length = 0;
  for (int i = 0; i < 8; ++i) length |= std::to_integer<std::uint64_t>(bytes[static_cast<std::size_t>(i)]) << (8 * i);
  require(length <= kMaxHeader, "[safetensors] expected a header of at most {} bytes in {} but got a length of {}: no safetensors file?",
          kMaxHeader, name, length);
  require(length <= size - 8, "[safetensors] expected a header of {} bytes in {} but only {} follow: the header is longer than the file",
          length, name, size - 8);

  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8, length);
  Header header;
  header.data_offset = 8 + length;
  const json root = parse_object(text, name, 3);
  for (const auto& [key, value] : root.items()) {
    if (key != "__metadata__") {
      header.entries[key] = parse_entry(value, fmt::format("tensor {} in {}", in_quotes(key), name));
      continue;
    }
    require(value.is_object(), "[safetensors] expected an object as __metadata__ in {} but got {}", name, value.type_name());
    for (const auto& [property, text_value] : value.items()) {
      require(text_value.is_string(), "[safetensors] expected a string as {} of __metadata__ in {} but got {}", in_quotes(property), name,
              text_value.type_name());
      header.metadata[property] = text_value;
    }
  }
  check_tiling(header, file_size - header.data_offset, name);
  return header;
}

std::shared_ptr<Source> from_bytes(std::string name, std::span<const std::byte> file, std::shared_ptr<const void> keep) {
  const Header header = parse_header(file, file.size(), name);
  std::map<std::string, TensorView, std::less<>> views;
  for (const auto& [key, entry] : header.entries) {
    auto* data = const_cast<std::byte*>(file.data() + header.data_offset + entry.begin);  // only ever read
    views[key] = TensorView::dense(data, entry.info.dtype, entry.info.shape);
  }
  return from_views(std::move(name), std::move(views), std::move(keep));
}

std::shared_ptr<Source> open_safetensors(const std::filesystem::path& path) {
  auto file = std::make_shared<const MappedFile>(path);
  return from_bytes(utf8(path), file->bytes(), file);
}

}  // namespace comfytp::weights
