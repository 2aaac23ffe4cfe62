#include "comm/device_group.h"

#include <algorithm>

#include "base/error.h"
#include "base/library.h"

namespace comfytp::comm {
namespace {

const GroupLibrary& cuda_groups() {
  static const Library library("comfytp_cuda");
  static const auto& groups = library.of_this_build<const GroupLibrary>("comfytp_group");
  return groups;
}

}  // namespace

Route route_from_name(const std::string& name) {
  require(name == "best" || name == "peer" || name == "staged", "[comm] expected a communicator 'best', 'peer' or 'staged' but got '{}'", name);
  return name == "peer" ? Route::peer : name == "staged" ? Route::staged : Route::best;
}

std::vector<std::unique_ptr<Communicator>> device_group(const std::vector<DeviceRank>& ranks, std::shared_ptr<Abort> abort,
                                                        std::chrono::duration<double> timeout, Route route) {
  const auto on_host = [](const DeviceRank& rank) { return rank.queue == nullptr; };
  if (std::all_of(ranks.begin(), ranks.end(), on_host)) {
    std::vector<std::string> names;
    for (const auto& rank : ranks) names.push_back(rank.name);
    return host_group(names, std::move(abort), timeout);
  }
  const auto host = std::find_if(ranks.begin(), ranks.end(), on_host);
  const auto cuda = std::find_if_not(ranks.begin(), ranks.end(), on_host);
  require(host == ranks.end(), "[comm] expected devices of one kind in a group but got {} and {}", host == ranks.end() ? "" : host->name,
          cuda->name);
  return cuda_groups().group(ranks, std::move(abort), timeout, route);
}

}  // namespace comfytp::comm
