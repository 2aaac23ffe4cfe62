// Exchanges that stand together made one.
#pragma once

#include <vector>

#include "graph/graph.h"

namespace comfytp::sharding {

/// Two all_gathers of values of one type, as of an attention's keys and values, become one of both: a small exchange takes as long as the
/// devices need to meet, whatever it moves. It stands where the second stood, with nothing between the two that reads the first.
/// `devices`: the graphs of a partition, whose nodes correspond; they still do afterwards.
void pair_gathers(std::vector<graph::Graph>& devices);

}  // namespace comfytp::sharding
