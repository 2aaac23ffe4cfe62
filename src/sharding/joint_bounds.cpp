#include "sharding/joint_bounds.h"

#include <algorithm>

namespace comfytp::sharding {
namespace {

// Elements of one unit.
struct Steps {
  std::int64_t whole, part;
};

Steps steps_of(const FactorGroups& groups, const Inclusion& i) {
  const auto units = [&](int group) { return groups.all()[static_cast<std::size_t>(group)].units; };
  return {i.whole_size / units(i.whole), i.part_size / units(i.part)};
}

std::vector<Inclusion> inclusions_within(const FactorGroups& groups, const std::set<int>& cut) {
  std::vector<Inclusion> inclusions;
  for (const auto& i : groups.inclusions())
    if (cut.count(i.whole) && cut.count(i.part)) inclusions.push_back(i);
  return inclusions;
}

std::int64_t nearest(std::int64_t at, std::int64_t step) { return (at + step / 2) / step; }

// Moves the bounds of a whole that fall into a part to where that part can be cut: an image's tokens between its rows.
void fit(Bounds& bounds, const Inclusion& i, const Steps& steps) {
  for (auto& b : bounds) {
    const auto inside = b * steps.whole - i.begin;
    if (inside <= 0 || inside >= i.part_size) continue;
    const auto moved = i.begin + nearest(inside, steps.part) * steps.part;
    if (moved % steps.whole == 0) b = moved / steps.whole;
  }
}

}  // namespace

std::map<int, Bounds> joint_bounds_from(const FactorGroups& groups, const std::set<int>& cut, int root, const std::vector<double>& shares) {
  const auto inclusions = inclusions_within(groups, cut);
  const auto units = [&](int group) { return groups.all()[static_cast<std::size_t>(group)].units; };
  std::map<int, Bounds> found;
  found[root] = proportional_bounds(units(root), shares);
  for (const auto& i : inclusions)
    if (i.whole == root) fit(found[root], i, steps_of(groups, i));
  std::vector<int> next = {root};
  for (std::size_t n = 0; n < next.size(); ++n)
    for (const auto& i : inclusions) {
      const int other = i.whole == next[n] ? i.part : i.part == next[n] ? i.whole : -1;
      if (other < 0 || found.count(other)) continue;
      const auto steps = steps_of(groups, i);
      const Bounds from = found.at(next[n]);
      Bounds& to = found[other];
      for (auto b : from)
        to.push_back(other == i.part ? nearest(std::clamp<std::int64_t>(b * steps.whole - i.begin, 0, i.part_size), steps.part)
                                     : nearest(i.begin + b * steps.part, steps.whole));
      to.front() = 0, to.back() = units(other);
      next.push_back(other);
    }
  return found;
}

std::map<int, Bounds> joint_bounds(const FactorGroups& groups, const std::set<int>& cut, const std::vector<double>& shares) {
  auto inclusions = inclusions_within(groups, cut);
  std::stable_sort(inclusions.begin(), inclusions.end(), [](const auto& a, const auto& b) { return a.whole_size > b.whole_size; });
  std::map<int, Bounds> found;
  for (const auto& of : inclusions) {
    if (!found.count(of.whole)) {
      auto bounds = proportional_bounds(groups.all()[static_cast<std::size_t>(of.whole)].units, shares);
      for (const auto& i : inclusions)
        if (i.whole == of.whole) fit(bounds, i, steps_of(groups, i));
      found[of.whole] = bounds;
    }
    if (found.count(of.part)) continue;
    const auto steps = steps_of(groups, of);
    auto& bounds = found[of.part];
    for (auto b : found.at(of.whole)) bounds.push_back(nearest(std::clamp<std::int64_t>(b * steps.whole - of.begin, 0, of.part_size), steps.part));
  }
  return found;
}

}  // namespace comfytp::sharding
