#include "base/shape.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>

#include "base/error.h"

namespace comfytp {

std::int64_t numel(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

std::string to_string(const Shape& shape) { return fmt::format("[{}]", fmt::join(shape, ",")); }

Shape row_major_strides(const Shape& shape) {
  Shape strides(shape.size());
  std::int64_t step = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = step;
    step *= shape[i];
  }
  return strides;
}

Box whole_box(const Shape& shape) {
  Box box;
  for (auto s : shape) box.push_back({0, s});
  return box;
}

Shape shape_of(const Box& box) {
  Shape shape;
  for (auto i : box) shape.push_back(i.size());
  return shape;
}

Interval intersect(Interval a, Interval b) {
  const auto lo = std::max(a.lo, b.lo);
  return {lo, std::max(lo, std::min(a.hi, b.hi))};
}

std::vector<std::int64_t> proportional_bounds(std::int64_t size, const std::vector<double>& shares) {
  const double total = std::accumulate(shares.begin(), shares.end(), 0.0);
  require(!shares.empty() && total > 0, "[shares] expected positive shares but got a total of {}", total);
  const std::size_t n = shares.size();
  std::vector<std::int64_t> part(n);
  std::vector<std::size_t> order(n);
  std::vector<double> remainder(n);
  std::int64_t given = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const double exact = static_cast<double>(size) * shares[i] / total;
    part[i] = static_cast<std::int64_t>(exact + 1e-9);
    remainder[i] = exact - static_cast<double>(part[i]);
    given += part[i];
    order[i] = i;
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return remainder[a] > remainder[b] + 1e-9; });
  for (std::size_t i = 0; given < size; ++i, ++given) ++part[order[i % n]];
  std::vector<std::int64_t> bounds(n + 1, 0);
  for (std::size_t i = 0; i < n; ++i) bounds[i + 1] = bounds[i] + part[i];
  return bounds;
}

}  // namespace comfytp
