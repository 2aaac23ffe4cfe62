// Where the tokens of a text, of an image and of both together are cut, so that each device has the same of all.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <vector>

#include "sharding/strategy.h"

namespace comfytp::sharding {

/// Ascending from 0, one more than there are parts, in a group's units.
using Bounds = std::vector<std::int64_t>;

/// Bounds of those of `cut` that are parts of each other (FactorGroups::inclusions()), in proportion to `shares`: the whole is divided, and its
/// parts as it is. So a device that has the first tokens of both has those of the text, and nothing moves where they are joined.
std::map<int, Bounds> joint_bounds(const FactorGroups& groups, const std::set<int>& cut, const std::vector<double>& shares);
/// The same, with `root` divided in proportion and all that are its parts or wholes as it is.
std::map<int, Bounds> joint_bounds_from(const FactorGroups& groups, const std::set<int>& cut, int root, const std::vector<double>& shares);

}  // namespace comfytp::sharding
