// Count, mean and sum of squared deviations of a set, and how two sets' are merged (Chan, Golub, LeVeque 1979): what
// parts of a normalised set exchange, without the cancellation that sums of squares have.
#pragma once

#include <cstdint>

namespace comfytp::graph {

template <typename T>
struct Moments {
  T count = 0, mean = 0, squares = 0;

  void add(T x) {
    count += 1;
    const T delta = x - mean;
    mean += delta / count;
    squares += delta * (x - mean);
  }
  void merge(const Moments& other) {
    if (other.count == 0) return;
    const T total = count + other.count, delta = other.mean - mean;
    mean += delta * other.count / total;
    squares += other.squares + delta * delta * count * other.count / total;
    count = total;
  }
};

}  // namespace comfytp::graph
