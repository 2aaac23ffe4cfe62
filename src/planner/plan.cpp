#include "planner/plan.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace comfytp::planner {
namespace {

using nlohmann::ordered_json;

constexpr int kVersion = 1;

const ordered_json& field(const ordered_json& object, const char* name, const std::string& where) {
  const auto found = object.find(name);
  require(found != object.end(), "[plan] expected a field '{}' but there is none", where);
  return *found;
}

std::string text(const ordered_json& object, const char* name, const std::string& where) {
  const auto& value = field(object, name, where);
  require(value.is_string(), "[plan] expected a text as '{}' but got {}", where, value.dump());
  return value.get<std::string>();
}

// What another layer says of a field's value, with the field's name.
template <typename Read>
auto read_field(const std::string& where, Read read) {
  try {
    return read();
  } catch (const Error& error) {
    fail("[plan] '{}': {}", where, error.what());
  }
}

backend::DeviceSpec device(const ordered_json& value, const std::string& where) {
  require(value.is_object(), "[plan] expected an object as '{}' but got {}", where, value.dump());
  const auto name = text(value, "name", where + ".name");
  const auto parsed = read_field(where + ".name", [&] { return backend::parse_devices(name); });
  require(parsed.size() == 1, "[plan] expected one device as '{}.name' but got '{}'", where, name);
  auto spec = parsed.front();
  if (value.contains("limit_bytes")) {
    const auto& limit = value["limit_bytes"];
    require(limit.is_number_integer() && limit > 0 && limit <= std::numeric_limits<std::int64_t>::max(),
            "[plan] expected a positive integer as '{}.limit_bytes' but got {}", where, limit.dump());
    spec.limit_bytes = limit;
  }
  return spec;
}

std::vector<std::string> texts(const ordered_json& object, const char* name, const std::string& where) {
  std::vector<std::string> list;
  if (!object.contains(name)) return list;
  const auto& values = object[name];
  require(values.is_array() && std::all_of(values.begin(), values.end(), [](const auto& v) { return v.is_string(); }),
          "[plan] expected a list of names as '{}' but got {}", where, values.type_name());
  for (const auto& v : values) list.push_back(v.template get<std::string>());
  return list;
}

// What the mesh's axes cut.
std::map<std::string, sharding::Cuts> cuts(const ordered_json& value, const sharding::Mesh& mesh) {
  require(value.is_object(), "[plan] expected an object as 'cuts' but got {}", value.type_name());
  std::map<std::string, sharding::Cuts> result;
  for (const auto& [axis, one] : value.items()) {
    const auto where = "cuts." + axis;
    require(axis == "tensor", "[plan] expected 'cuts' of the axis tensor, the only one that has a choice, but got '{}'", axis);
    require(std::any_of(mesh.axes().begin(), mesh.axes().end(), [&](const auto& a) { return a.name == axis; }),
            "[plan] expected '{}' to name an axis of the mesh '{}'", where, mesh.to_string());
    require(one.is_object(), "[plan] expected an object as '{}' but got {}", where, one.type_name());
    result[axis] = {texts(one, "groups", where + ".groups"), texts(one, "alone", where + ".alone")};
  }
  return result;
}

std::string list_of(const std::vector<backend::DeviceSpec>& devices) {
  std::string list;
  for (const auto& d : devices) list.append(list.empty() ? "" : ",").append(d.name());
  return list;
}

}  // namespace

std::string to_json(const Plan& plan) {
  ordered_json root = {{"version", kVersion}, {"devices", ordered_json::array()}};
  for (const auto& d : plan.devices) {
    ordered_json entry = {{"name", d.name()}};
    if (d.limit_bytes) entry["limit_bytes"] = d.limit_bytes;
    root["devices"].push_back(std::move(entry));
  }
  root["mesh"] = plan.mesh.to_string();
  root["weights"] = plan.placement == sharding::Placement::gathered ? "gathered" : "resident";
  for (const auto& [axis, c] : plan.mesh.cuts) root["cuts"][axis] = {{"groups", c.groups}, {"alone", c.alone}};
  return root.dump(2);
}

Plan from_json(const std::string& json) {
  ordered_json root;
  try {
    root = ordered_json::parse(json);
  } catch (const ordered_json::parse_error& error) {
    fail("[plan] expected JSON, as `comfytp plan --json` prints it, but at byte {} of {} it is none", error.byte, json.size());
  }
  require(root.is_object(), "[plan] expected a JSON object but got {}", root.type_name());
  const auto& version = field(root, "version", "version");
  require(version == kVersion, "[plan] expected 'version' {} but got {}", kVersion, version.dump());

  Plan plan;
  const auto& devices = field(root, "devices", "devices");
  require(devices.is_array() && !devices.empty(), "[plan] expected a list of devices as 'devices' but got {}", devices.dump());
  for (std::size_t i = 0; i < devices.size(); ++i) plan.devices.push_back(device(devices[i], fmt::format("devices[{}]", i)));
  read_field("devices", [&] { return backend::parse_devices(list_of(plan.devices)); });  // together they may repeat one
  const auto mesh = text(root, "mesh", "mesh");
  // One device alone needs no axis.
  if (!mesh.empty()) plan.mesh = read_field("mesh", [&] { return sharding::Mesh::parse(mesh); });
  const auto weights = text(root, "weights", "weights");
  plan.placement = read_field("weights", [&] { return placement_from_name(weights); });
  if (root.contains("cuts")) plan.mesh.cuts = cuts(root["cuts"], plan.mesh);
  check(plan);
  return plan;
}

sharding::Placement placement_from_name(const std::string& name) {
  require(name == "resident" || name == "gathered", "[plan] expected weights 'resident' or 'gathered' but got '{}'", name);
  return name == "gathered" ? sharding::Placement::gathered : sharding::Placement::resident;
}

std::vector<std::string> rank_names(const std::vector<backend::DeviceSpec>& devices) {
  std::map<std::string, int> count, met;
  for (const auto& d : devices) ++count[d.name()];
  std::vector<std::string> names;
  for (const auto& d : devices) {
    const auto name = d.name();
    names.push_back(count[name] == 1 ? name : fmt::format("{}#{}", name, met[name]++));
  }
  return names;
}

sharding::Mesh default_mesh(const std::vector<backend::DeviceSpec>& devices) {
  if (devices.size() < 2) return {};
  return sharding::Mesh({{"tensor", static_cast<int>(devices.size()), {}}});
}

double least_work(const std::vector<backend::DeviceSpec>& devices) {
  const bool gpus = std::all_of(devices.begin(), devices.end(), [](const auto& d) { return d.kind == "cuda"; });
  return gpus ? 1500 : 0;
}

void check(const Plan& plan) {
  require(!plan.devices.empty(), "[plan] expected at least one device but got none");
  require(plan.mesh.size() == static_cast<int>(plan.devices.size()), "[plan] expected a mesh of {} devices ({}) but '{}' has {}",
          plan.devices.size(), list_of(plan.devices), plan.mesh.to_string(), plan.mesh.size());
}

}  // namespace comfytp::planner
