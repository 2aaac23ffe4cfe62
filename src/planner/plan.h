// What the user chose or the planner chose for him, as JSON that a later run accepts.
#pragma once

#include <string>
#include <vector>

#include "backend/backend.h"
#include "graph/graph.h"
#include "sharding/partition.h"

namespace comfytp::planner {

struct Plan {
  std::vector<backend::DeviceSpec> devices;
  sharding::Mesh mesh;
  sharding::Placement placement = sharding::Placement::resident;
};

/// {"version": 1, "devices": [{"name": "cpu:0", "limit_bytes": …}, …], "mesh": "tensor=2", "weights": "resident",
///  "cuts": {"tensor": {"groups": ["….ff.net.2.weight[1]", …], "alone": […]}}}; without "cuts" the strategy chooses (sharding/mesh.h).
std::string to_json(const Plan& plan);
/// The inverse, checked; fields of other names are passed over. Throws Error naming the field.
Plan from_json(const std::string& json);

/// "resident" or "gathered". Throws Error.
sharding::Placement placement_from_name(const std::string& name);

/// A name for each device of a plan: its own; where it stands for several ranks "cuda:0#0", "cuda:0#1", ….
std::vector<std::string> rank_names(const std::vector<backend::DeviceSpec>& devices);

/// The mesh for `devices` where the user named none.
sharding::Mesh default_mesh(const std::vector<backend::DeviceSpec>& devices);
/// What sharding::decide() leaves whole between these devices, in multiplications for a channel that is sent. Two bytes of a sum cross two
/// H100s' NVLink in the time of 3300 of their multiplications in f16 (550 TFLOP/s, 330 GB/s; docs/performance.md), and an RTX 3090's in that
/// of 1400: so between GPUs 1500, below which a cut seldom pays (a small model's groups are compared with each other instead, since its weights
/// shall be divided all the same). Between CPUs, which share a memory, it always does.
double least_work(const std::vector<backend::DeviceSpec>& devices);
/// Throws Error when the mesh has not one device a coordinate.
void check(const Plan& plan);

}  // namespace comfytp::planner
