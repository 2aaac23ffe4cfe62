#include "planner/profile.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace comfytp::planner {
namespace {

using nlohmann::json;

constexpr int kVersion = 1;
constexpr double kPcieBytesPerSecond = 25e9;  // PCIe 4.0 x16, as copies reach it
constexpr std::int64_t kGiB = std::int64_t{1} << 30;

// The vendor's data sheets: dense, bf16 with sums in f32.
const DeviceProfile kCards[] = {
    {"RTX 3060", 12 * kGiB, 12.7e12, 25.6e12, 360e9, false},  {"RTX 3090", 24 * kGiB, 35.6e12, 71e12, 936e9, false},
    {"RTX 4060 Ti", 16 * kGiB, 22e12, 44e12, 288e9, false},   {"RTX 4090", 24 * kGiB, 82.6e12, 165e12, 1008e9, false},
    {"RTX 5090", 32 * kGiB, 104.8e12, 209e12, 1792e9, false}, {"A100", 80 * kGiB, 19.5e12, 312e12, 1935e9, false},
    {"H100", 80 * kGiB, 66.9e12, 989e12, 3350e9, false},
};
// Of UNets on an H100: a launch takes longer than its rates say, the more so the smaller it is.
constexpr double kReachedFlops = 0.6, kReachedBytes = 0.7, kLaunchSeconds = 5e-6;
constexpr const char* kAssumedCard = "RTX 3090";

double number(const json& object, const char* name, const std::string& where, double otherwise) {
  const auto at = object.find(name);
  if (at == object.end()) return otherwise;
  require(at->is_number() && *at > 0 && at->get<double>() < 1e18, "[profile] expected a positive number as '{}{}' but got {}", where, name,
          at->dump());
  return at->get<double>();
}

std::string text(const json& object, const char* name, const std::string& where) {
  const auto at = object.find(name);
  require(at != object.end() && at->is_string(), "[profile] expected a text as '{}{}' but got {}", where, name,
          at == object.end() ? "none" : at->dump());
  return at->get<std::string>();
}

}  // namespace

std::optional<DeviceProfile> card(const std::string& model) {
  std::optional<DeviceProfile> found;
  for (const auto& known : kCards)  // by the longest name
    if (model.find(known.model) != std::string::npos && (!found || known.model.size() > found->model.size())) found = known;
  return found;
}

Profile profile_from_json(const std::string& text_of) {
  const auto root = json::parse(text_of, nullptr, false);
  require(root.is_object(), "[profile] expected a JSON object but got {}", root.is_discarded() ? "something else" : root.type_name());
  require(root.value("version", json()) == kVersion, "[profile] expected 'version' {} but got {}", kVersion,
          root.value("version", json()).dump());
  const auto devices = root.value("devices", json());
  require(devices.is_array(), "[profile] expected a list of devices as 'devices' but got {}", devices.dump());
  Profile profile;
  for (std::size_t i = 0; i < devices.size(); ++i) {
    const auto where = fmt::format("devices[{}].", i);
    require(devices[i].is_object(), "[profile] expected an object as 'devices[{}]' but got {}", i, devices[i].dump());
    const auto model = text(devices[i], "model", where);
    auto device = card(model).value_or(DeviceProfile{});
    device.model = model;
    device.memory_bytes = static_cast<std::int64_t>(number(devices[i], "memory_bytes", where, static_cast<double>(device.memory_bytes)));
    device.flops_f32 = number(devices[i], "flops_f32", where, device.flops_f32);
    device.flops_bf16 = number(devices[i], "flops_bf16", where, device.flops_bf16);
    device.bytes_per_second = number(devices[i], "bytes_per_second", where, device.bytes_per_second);
    const auto name = text(devices[i], "name", where);
    require(profile.devices.emplace(name, device).second, "[profile] expected every device once but got '{}' twice", name);
  }
  profile.link_bytes_per_second = number(root, "link_bytes_per_second", "", 0);
  return profile;
}

std::optional<DeviceProfile> profile_of(const backend::DeviceSpec& spec, const Profile& profile) {
  if (const auto given = profile.devices.find(spec.name()); given != profile.devices.end()) return given->second;
  if (spec.kind != "cuda") return std::nullopt;
  auto assumed = card(kAssumedCard);
  assumed->assumed = true;
  return assumed;
}

double link_bytes_per_second(const Profile& profile) {
  return profile.link_bytes_per_second > 0 ? profile.link_bytes_per_second : kPcieBytesPerSecond;
}

double expected_seconds(const DeviceProfile& device, const std::vector<Work>& launches, DType compute) {
  const double flops = compute == DType::f32 ? device.flops_f32 : device.flops_bf16;
  if (flops <= 0 || device.bytes_per_second <= 0) return 0;
  double seconds = 0;
  for (const auto& launch : launches)
    seconds += kLaunchSeconds +
               std::max(launch.flops / (flops * kReachedFlops), static_cast<double>(launch.bytes) / (device.bytes_per_second * kReachedBytes));
  return seconds;
}

double fetching_seconds(const DeviceProfile& device, std::int64_t fetched_bytes) {
  return device.bytes_per_second > 0 ? 2 * static_cast<double>(fetched_bytes) / (device.bytes_per_second * kReachedBytes) : 0;
}

double compute_seconds(const DeviceProfile& device, double flops, DType compute) {
  const double rate = compute == DType::f32 ? device.flops_f32 : device.flops_bf16;
  return rate > 0 ? flops / rate : 0;
}

}  // namespace comfytp::planner
