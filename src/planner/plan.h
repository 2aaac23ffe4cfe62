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

/// {"version": 1, "devices": [{"name": "cpu:0", "limit_bytes": …}, …], "mesh": "tensor=2", "weights": "resident"}.
std::string to_json(const Plan& plan);
/// The inverse, checked; fields of other names are passed over. Throws Error naming the field.
Plan from_json(const std::string& json);

/// "resident" or "gathered". Throws Error.
sharding::Placement placement_from_name(const std::string& name);

/// The mesh for `devices` where the user named none.
sharding::Mesh default_mesh(const std::vector<backend::DeviceSpec>& devices);
/// Throws Error when the mesh has not one device a coordinate.
void check(const Plan& plan);

}  // namespace comfytp::planner
