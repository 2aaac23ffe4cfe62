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

std::string to_json(const Plan& plan);
/// Throws Error naming the field.
Plan from_json(const std::string& text);

/// The mesh for `devices` where the user named none.
sharding::Mesh default_mesh(const std::vector<backend::DeviceSpec>& devices);
/// Throws Error when the mesh has not one device a coordinate.
void check(const Plan& plan);

}  // namespace comfytp::planner
