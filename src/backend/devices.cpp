#include <algorithm>
#include <charconv>

#include "backend/backend.h"
#include "backend/cpu/cpu_device.h"
#include "backend/library.h"
#include "base/error.h"

namespace comfytp::backend {
namespace {

constexpr int kCpuDevices = 64;

std::int64_t parse_limit(const std::string& text, const std::string& item) {
  double size = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), size);
  const std::string unit(end, text.data() + text.size());
  const int shift = unit == "KiB" ? 10 : unit == "MiB" ? 20 : unit == "GiB" ? 30 : 0;
  require(error == std::errc() && shift != 0 && size > 0 && size < 1e6, "[devices] expected a limit such as @2GiB or @512MiB but got '{}'",
          item);
  return static_cast<std::int64_t>(size * static_cast<double>(std::int64_t{1} << shift));
}

DeviceSpec parse_device(const std::string& item, const std::string& list) {
  DeviceSpec spec;
  const auto at = std::min(item.find('@'), item.size());
  const auto colon = std::min(item.find(':'), at);
  spec.kind = item.substr(0, colon);
  const char *first = item.data() + std::min(colon + 1, at), *last = item.data() + at;
  const auto [end, error] = std::from_chars(first, last, spec.index);
  require((spec.kind == "cpu" || spec.kind == "cuda") && error == std::errc() && end == last && *first != '-',
          "[devices] expected names such as cpu:0 or cuda:1@10GiB, separated by commas, but got '{}' in '{}'", item, list);
  if (at < item.size()) spec.limit_bytes = parse_limit(item.substr(at + 1), item);
  return spec;
}

}  // namespace

std::vector<DeviceSpec> parse_devices(const std::string& list) {
  std::vector<DeviceSpec> specs;
  for (std::size_t at = 0; at <= list.size();) {
    const auto end = std::min(list.find(',', at), list.size());
    specs.push_back(parse_device(list.substr(at, end - at), list));
    at = end + 1;
  }
  for (std::size_t i = 0; i < specs.size(); ++i)
    for (std::size_t j = 0; j < i; ++j)
      require(specs[i].kind != "cpu" || specs[i].name() != specs[j].name(),
              "[devices] expected each cpu device once, since every one is a share of the cores, but got '{}' twice", specs[i].name());
  return specs;
}

std::unique_ptr<Device> open_device(const DeviceSpec& spec, int position, int count) {
  auto here = fmt::format("devices here: cpu:0, cpu:1, … cpu:{}", kCpuDevices - 1);
  if (spec.kind == "cuda") {
    try {
      const auto& cuda = cuda_library();
      const auto devices = cuda.devices();
      const auto has = [&](const DeviceInfo& d) { return d.name == spec.name(); };
      if (std::any_of(devices.begin(), devices.end(), has)) return cuda.open(spec);
      for (const auto& d : devices) here += fmt::format(", {} ({})", d.name, d.model);
    } catch (const Error& error) {
      fail("[devices] '{}': {}; {}", spec.name(), error.what(), here);
    }
  }
  require(spec.kind == "cpu" && spec.index >= 0 && spec.index < kCpuDevices, "[devices] '{}': there is no such device; {}", spec.name(),
          here);
  return std::make_unique<cpu::CpuDevice>(spec, position, count);
}

}  // namespace comfytp::backend
