#include "sharding/joint_bounds.h"

#include <algorithm>

namespace comfytp::sharding {
namespace {

std::int64_t units_of(const FactorGroups& groups, int group) { return groups.all()[static_cast<std::size_t>(group)].units; }

// Elements of one unit.
struct Steps {
  std::int64_t whole, part;
};

Steps steps_of(const FactorGroups& groups, const Inclusion& i) {
  return {i.whole_size / units_of(groups, i.whole), i.part_size / units_of(groups, i.part)};
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

Bounds evenly(const FactorGroups& groups, const std::vector<Inclusion>& inclusions, int group, const std::vector<double>& shares) {
  auto bounds = proportional_bounds(units_of(groups, group), shares);
  for (const auto& i : inclusions)
    if (i.whole == group) fit(bounds, i, steps_of(groups, i));
  return bounds;
}

// A part's bounds where its whole has these, and the other way round.
Bounds of_part(const Bounds& whole, const Inclusion& i, const Steps& steps) {
  Bounds bounds;
  for (auto b : whole) bounds.push_back(nearest(std::clamp<std::int64_t>(b * steps.whole - i.begin, 0, i.part_size), steps.part));
  return bounds;
}
Bounds of_whole(const Bounds& part, const Inclusion& i, const Steps& steps) {
  Bounds bounds;
  for (auto b : part) bounds.push_back(nearest(i.begin + b * steps.part, steps.whole));
  bounds.front() = 0, bounds.back() = i.whole_size / steps.whole;
  return bounds;
}

}  // namespace

std::map<int, Bounds> joint_bounds_from(const FactorGroups& groups, const std::set<int>& cut, int root, const std::vector<double>& shares) {
  const auto inclusions = inclusions_within(groups, cut);
  std::map<int, Bounds> found = {{root, evenly(groups, inclusions, root, shares)}};
  std::vector<int> next = {root};
  for (std::size_t n = 0; n < next.size(); ++n)
    for (const auto& i : inclusions) {
      const int other = i.whole == next[n] ? i.part : i.part == next[n] ? i.whole : -1;
      if (other < 0 || found.count(other)) continue;
      const auto& from = found.at(next[n]);
      found[other] = other == i.part ? of_part(from, i, steps_of(groups, i)) : of_whole(from, i, steps_of(groups, i));
      next.push_back(other);
    }
  return found;
}

std::map<int, Bounds> joint_bounds(const FactorGroups& groups, const std::set<int>& cut, const std::vector<double>& shares) {
  auto inclusions = inclusions_within(groups, cut);
  std::stable_sort(inclusions.begin(), inclusions.end(), [](const auto& a, const auto& b) { return a.whole_size > b.whole_size; });
  std::map<int, Bounds> found;
  for (const auto& i : inclusions) {
    if (!found.count(i.whole)) found[i.whole] = evenly(groups, inclusions, i.whole, shares);
    if (!found.count(i.part)) found[i.part] = of_part(found.at(i.whole), i, steps_of(groups, i));
  }
  return found;
}

}  // namespace comfytp::sharding
