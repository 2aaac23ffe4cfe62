#include "planner/link.h"

#include <algorithm>
#include <charconv>

#include "base/error.h"

namespace comfytp::planner {
namespace {

struct Unit {
  std::string_view name;
  double factor;
};
constexpr Unit kRates[] = {{"MB/s", 1e6}, {"GB/s", 1e9}}, kTimes[] = {{"us", 1e-6}, {"ms", 1e-3}};

// 0 where `text` is no such number.
template <std::size_t N>
double number(std::string_view text, const Unit (&units)[N]) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const std::string_view name(end, static_cast<std::size_t>(text.data() + text.size() - end));
  for (const auto& unit : units)
    if (error == std::errc() && name == unit.name && value > 0 && value < 1e9) return value * unit.factor;
  return 0;
}

}  // namespace

std::string Link::to_string() const {
  const auto rate = bytes_per_second >= 10e9 ? fmt::format("{:.0f}GB/s", bytes_per_second / 1e9) : fmt::format("{:.4g}MB/s", bytes_per_second / 1e6);
  return latency_seconds > 0 ? fmt::format("{},{:.1f}us", rate, latency_seconds * 1e6) : rate;
}

Link link_from(const std::string& text) {
  const auto comma = text.find(',');
  const std::string_view all = text;
  const bool latency = comma != std::string::npos;
  const Link link{number(all.substr(0, comma), kRates), latency ? number(all.substr(comma + 1), kTimes) : 0};
  require(link.bytes_per_second > 0 && (!latency || link.latency_seconds > 0), "[link] expected a rate in MB/s or GB/s and a latency in us or ms, as in 386GB/s,3us, but got '{}'", text);
  return link;
}

double predicted_seconds(double alone, const Exchanged& exchanged, const Link& link) {
  return std::max(alone, link.seconds(exchanged.fetches, exchanged.fetched)) + link.seconds(exchanged.collectives, exchanged.bytes);
}

}  // namespace comfytp::planner
