#include "sharding/mesh.h"

#include <algorithm>
#include <charconv>

#include "base/error.h"

namespace comfytp::sharding {
namespace {

constexpr int kMaxDevices = 64;

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (;;) {
    const auto end = text.find(separator);
    parts.push_back(text.substr(0, end));
    if (end == std::string_view::npos) return parts;
    text.remove_prefix(end + 1);
  }
}

template <typename T>
T number(std::string_view text, std::string_view item) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  require(error == std::errc() && end == text.data() + text.size() && value > 0,
          "[mesh] expected a positive number in '{}' but got '{}'", item, text);
  return value;
}

}  // namespace

Mesh Mesh::parse(std::string_view text) {
  std::vector<Axis> axes;
  for (auto item : split(text, ',')) {
    const auto equals = item.find('=');
    require(equals != std::string_view::npos, "[mesh] expected axis=size as in 'tensor=2' but got '{}' in '{}'", item, text);
    Axis axis{std::string(item.substr(0, equals)), 1, {}};
    require(axis.name == "batch" || axis.name == "patch" || axis.name == "tensor",
            "[mesh] expected an axis batch, patch or tensor but got '{}' in '{}'", axis.name, text);
    const bool twice = std::any_of(axes.begin(), axes.end(), [&](const Axis& other) { return other.name == axis.name; });
    require(!twice, "[mesh] expected every axis once but got '{}' twice in '{}'", axis.name, text);
    const auto value = item.substr(equals + 1);
    if (value.find(':') == std::string_view::npos) {
      axis.size = number<int>(value, item);
    } else {
      for (auto share : split(value, ':')) axis.shares.push_back(number<double>(share, item));
      axis.size = static_cast<int>(axis.shares.size());
    }
    require(axis.size <= kMaxDevices, "[mesh] expected at most {} devices along an axis but got '{}'", kMaxDevices, item);
    axes.push_back(std::move(axis));
  }
  Mesh mesh(std::move(axes));
  require(mesh.size() <= kMaxDevices, "[mesh] expected at most {} devices but '{}' has {}", kMaxDevices, text, mesh.size());
  return mesh;
}

std::string Mesh::to_string() const {
  std::string text;
  for (const auto& axis : axes_) {
    text += (text.empty() ? "" : ",") + axis.name + "=";
    if (axis.shares.empty()) text += std::to_string(axis.size);
    for (std::size_t i = 0; i < axis.shares.size(); ++i) text += fmt::format("{}{}", i ? ":" : "", axis.shares[i]);
  }
  return text;
}

int Mesh::size() const {
  int size = 1;
  for (const auto& axis : axes_) size *= axis.size;
  return size;
}

namespace {
int stride_of(const std::vector<Axis>& axes, int axis) {
  int stride = 1;
  for (std::size_t a = static_cast<std::size_t>(axis) + 1; a < axes.size(); ++a) stride *= axes[a].size;
  return stride;
}
}  // namespace

int Mesh::coordinate(int device, int axis) const {
  return device / stride_of(axes_, axis) % axes_[static_cast<std::size_t>(axis)].size;
}

std::vector<std::int64_t> Mesh::group(int device, int axis) const {
  const int stride = stride_of(axes_, axis);
  const int first = device - coordinate(device, axis) * stride;
  std::vector<std::int64_t> devices;
  for (int r = 0; r < axes_[static_cast<std::size_t>(axis)].size; ++r) devices.push_back(first + r * stride);
  return devices;
}

}  // namespace comfytp::sharding
