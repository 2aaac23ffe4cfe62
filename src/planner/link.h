// What exchanges between devices are expected to take.
#pragma once

#include <cstdint>
#include <string>

namespace comfytp::planner {

/// A collective takes latency + bytes / rate; the bytes are those that a device sends or receives (runtime/collectives.h).
struct Link {
  double bytes_per_second = 0;
  double latency_seconds = 0;

  double seconds(std::int64_t collectives, std::int64_t bytes) const {
    return static_cast<double>(collectives) * latency_seconds + static_cast<double>(bytes) / bytes_per_second;
  }
  std::string to_string() const;
};

/// "386GB/s,3us"; units MB/s, GB/s, and us, ms; without a latency it is 0. Throws Error.
Link link_from(const std::string& text);

/// What of a step is exchanged, in which way.
struct Exchanged {
  std::int64_t collectives = 0, bytes = 0;  ///< that the step stands still for
  std::int64_t fetches = 0, fetched = 0;    ///< of gathered weights, beside the arithmetic
};

/// A step that takes `alone` without any exchange: fetches are hidden behind the arithmetic as far as that is longer.
double predicted_seconds(double alone, const Exchanged& exchanged, const Link& link);

}  // namespace comfytp::planner
