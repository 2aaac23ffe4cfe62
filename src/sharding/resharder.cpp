#include "sharding/resharder.h"

#include <algorithm>
#include <optional>

#include "base/error.h"
#include "sharding/rule_query.h"

namespace comfytp::sharding {

using graph::Attrs;
using graph::Graph;
using graph::Ints;
using graph::Node;
using graph::ValueId;

namespace {

// Bounds of parts that lie one behind the other and cover [0, size); nothing if they do not.
std::optional<Ints> bounds_of(const Want& want, std::int64_t size) {
  Ints bounds = {0};
  for (const auto& part : want.parts) {
    if (part.lo != bounds.back()) return std::nullopt;
    bounds.push_back(part.hi);
  }
  if (bounds.back() != size) return std::nullopt;
  return bounds;
}

bool uses(const Wants& wants, int axis) {
  return std::any_of(wants.begin(), wants.end(), [&](const Want& w) { return w.axis == axis; });
}

// Every device has what it wants, and maybe more.
bool holds(const Want& have, const Want& want) {
  if (have.axis != want.axis) return false;
  for (std::size_t r = 0; r < want.parts.size(); ++r)
    if (want.parts[r].size() > 0 && intersect(have.parts[r], want.parts[r]) != want.parts[r]) return false;
  return true;
}

bool has(const std::vector<int>& axes, int axis) { return std::find(axes.begin(), axes.end(), axis) != axes.end(); }

}  // namespace

Resharder::Resharder(const Graph& whole, const Mesh& mesh, Placement placement)
    : devices(static_cast<std::size_t>(mesh.size())), whole_(whole), mesh_(mesh), placement_(placement), forms_(whole.value_count()) {}

bool Resharder::is_vector(const Shape& shape) {
  return std::count_if(shape.begin(), shape.end(), [](std::int64_t s) { return s != 1; }) <= 1;
}

std::vector<ValueId> Resharder::emit(const graph::Op& op, const std::vector<ValueId>& inputs, const std::vector<Attrs>& attrs,
                                     const std::string& name) {
  std::vector<ValueId> outputs;
  for (std::size_t d = 0; d < devices.size(); ++d) outputs = devices[d].add_node(op, inputs, attrs[d], name);
  return outputs;
}

void Resharder::define(ValueId value, ValueId id, Wants where, std::vector<int> partial, std::string reason) {
  for (std::size_t d = 0; d < devices.size(); ++d) {
    const Shape expected = shape_of(box(value, where, static_cast<int>(d)));
    require(devices[d].type(id).shape == expected, "[partition] {}: expected device {} to make a part of shape {} but its rule gives {}", reason,
            d, comfytp::to_string(expected), comfytp::to_string(devices[d].type(id).shape));
  }
  forms_[static_cast<std::size_t>(value)].push_back({std::move(where), std::move(partial), id, std::move(reason)});
}

Box Resharder::box(ValueId value, const Wants& wants, int device) const {
  Box box = whole_box(whole_.type(value).shape);
  for (std::size_t d = 0; d < wants.size(); ++d)
    if (wants[d].axis >= 0) box[d] = wants[d].parts[static_cast<std::size_t>(mesh_.coordinate(device, wants[d].axis))];
  return box;
}

bool Resharder::is_partial(ValueId value, int axis) const {
  const auto& forms = forms_[static_cast<std::size_t>(value)];
  return !forms.empty() && has(forms[0].partial, axis);
}

Wants Resharder::where(ValueId value) const {
  const auto& forms = forms_[static_cast<std::size_t>(value)];
  return forms.empty() || is_leaf(whole_.producer(value)) ? Wants(whole_.type(value).shape.size()) : forms[0].where;
}

Sharding Resharder::sharding_of(ValueId value) const {
  Sharding sharding;
  const auto& shape = whole_.type(value).shape;
  const Wants wants = where(value);
  for (std::size_t d = 0; d < wants.size(); ++d)
    sharding.dims.push_back({wants[d].axis, wants[d].axis < 0 ? Ints{} : *bounds_of(wants[d], shape[d])});
  if (!is_leaf(whole_.producer(value))) sharding.partial = forms_[static_cast<std::size_t>(value)][0].partial;
  return sharding;
}

// In the steps of get(): a reduce_scatter or an all_gather gives every device all parts but its own, an all_reduce does both.
std::optional<Resharder::Path> Resharder::path(const Form& form, ValueId value, const Wants& wants, const std::set<int>& keep_partial) const {
  for (int axis : keep_partial)
    if (!has(form.partial, axis)) return std::nullopt;
  const Shape& shape = whole_.type(value).shape;
  const auto parts = [&](int axis) { return static_cast<double>(mesh_.axes()[static_cast<std::size_t>(axis)].size); };
  double size = static_cast<double>(numel(shape)) * mesh_.size();  // on all devices
  for (const auto& w : form.where)
    if (w.axis >= 0) size /= parts(w.axis);
  Path path;
  Wants where = form.where;
  for (std::size_t d = 0; d < wants.size(); ++d)
    if (where[d].axis < 0 && wants[d].axis >= 0 && !uses(where, wants[d].axis) && !has(form.partial, wants[d].axis)) {
      size /= parts(wants[d].axis);
      where[d] = wants[d];
    }
  for (int axis : form.partial) {
    if (keep_partial.count(axis)) continue;
    const double others = size * (parts(axis) - 1) / parts(axis);
    const auto d = static_cast<std::size_t>(std::find_if(wants.begin(), wants.end(), [&](const Want& w) { return w.axis == axis; }) - wants.begin());
    const bool scatter = d < wants.size() && where[d].axis < 0 && bounds_of(wants[d], shape[d]);
    path.elements += scatter ? others : 2 * others;
    ++path.collectives;
    if (scatter) {
      size /= parts(axis);
      where[d] = wants[d];
    }
  }
  for (std::size_t d = 0; d < wants.size(); ++d) {
    const int axis = where[d].axis;
    if (axis < 0 || where[d] == wants[d] || holds(where[d], wants[d])) continue;
    if (!bounds_of(where[d], shape[d])) return std::nullopt;
    ++path.collectives;
    if (wants[d].axis != axis) {
      path.elements += size * (parts(axis) - 1);
      size *= parts(axis);
      where[d] = {};
      continue;
    }
    std::int64_t missing = 0;  // rows of the halos
    for (std::size_t r = 0; r < wants[d].parts.size(); ++r) {
      const Interval own = where[d].parts[r], need = wants[d].parts[r];
      missing += need.size() - std::max<std::int64_t>(0, std::min(own.hi, need.hi) - std::max(own.lo, need.lo));
    }
    path.elements += size * static_cast<double>(missing) / static_cast<double>(std::max<std::int64_t>(1, shape[d]));
    where[d] = wants[d];
  }
  return path;
}

ValueId Resharder::get(ValueId value, const Wants& wants, const std::set<int>& keep_partial, const std::string& reason) {
  const Node& node = whole_.producer(value);
  auto& forms = forms_[static_cast<std::size_t>(value)];
  if (is_leaf(node)) {
    for (const auto& form : forms)
      if (form.where == wants) return form.id;
    const ValueId id = leaf(node, value, wants, {});
    forms.push_back({wants, {}, id, reason});
    return id;
  }
  const Shape& shape = whole_.type(value).shape;
  const Form* source = nullptr;
  std::optional<Path> least;
  for (const auto& form : forms)
    if (const auto way = path(form, value, wants, keep_partial); way && (!source || *way < *least)) source = &form, least = way;
  require(source != nullptr, "[partition] %{} cannot be had as {} wants it", value, reason);
  Form form = *source;
  const auto first_form = form.reason;

  // Cut first what can be cut without talking: it makes the rest smaller.
  for (std::size_t d = 0; d < wants.size(); ++d)
    if (form.where[d].axis < 0 && wants[d].axis >= 0 && !uses(form.where, wants[d].axis) && !has(form.partial, wants[d].axis))
      slice(form, value, wants, d);
  for (int axis : source->partial) {
    if (keep_partial.count(axis)) continue;
    const auto dim = std::find_if(wants.begin(), wants.end(), [&](const Want& w) { return w.axis == axis; }) - wants.begin();
    const auto d = static_cast<std::size_t>(dim);
    const auto bounds = d < wants.size() ? bounds_of(wants[d], shape[d]) : std::nullopt;
    const auto why = fmt::format("partial sums of {} for {}", first_form, reason);
    if (bounds && form.where[d].axis < 0) {
      form.id = collective("reduce_scatter", form.id, axis, {{"dim", static_cast<std::int64_t>(dim)}, {"bounds", *bounds}}, why);
      form.where[d] = wants[d];
    } else {
      form.id = collective("all_reduce", form.id, axis, {}, why);
    }
    form.partial.erase(std::find(form.partial.begin(), form.partial.end(), axis));
  }
  for (std::size_t d = 0; d < wants.size(); ++d) {
    const int axis = form.where[d].axis;
    if (axis < 0 || form.where[d] == wants[d]) continue;
    if (holds(form.where[d], wants[d])) {
      slice(form, value, wants, d);
      continue;
    }
    const auto why = fmt::format("dimension {} of {} for {}", d, first_form, reason);
    Attrs attrs{{"dim", static_cast<std::int64_t>(d)}, {"bounds", *bounds_of(form.where[d], shape[d])}};
    if (wants[d].axis == axis) {
      Ints lo, hi;
      for (const auto& part : wants[d].parts) lo.push_back(part.lo), hi.push_back(part.hi);
      attrs.set("need_lo", lo);
      attrs.set("need_hi", hi);
      form.id = collective("halo_exchange", form.id, axis, attrs, why);
      form.where[d] = wants[d];
    } else {
      form.id = collective("all_gather", form.id, axis, attrs, why);
      form.where[d] = {};
    }
  }
  for (std::size_t d = 0; d < wants.size(); ++d)
    if (!(form.where[d] == wants[d])) slice(form, value, wants, d);
  if (form.id != source->id) forms.push_back(form);
  return form.id;
}

void Resharder::slice(Form& form, ValueId value, const Wants& wants, std::size_t dim) {
  std::vector<Attrs> attrs;
  for (int d = 0; d < mesh_.size(); ++d) {
    const Interval own = box(value, form.where, d)[dim], part = intersect(own, box(value, wants, d)[dim]);
    const auto start = part.size() > 0 ? part.lo - own.lo : 0;
    attrs.push_back({{"dim", static_cast<std::int64_t>(dim)}, {"start", start}, {"stop", start + part.size()}});
  }
  form.id = emit(graph::find_op("slice"), {form.id}, attrs, {})[0];
  form.where[dim] = wants[dim];
}

ValueId Resharder::collective(const std::string& op, ValueId id, int axis, Attrs attrs, const std::string& reason) {
  std::vector<Attrs> all;
  attrs.set("reason", reason);
  for (int d = 0; d < mesh_.size(); ++d) {
    attrs.set("group", mesh_.group(d, axis));
    attrs.set("rank", static_cast<std::int64_t>(mesh_.coordinate(d, axis)));
    all.push_back(attrs);
  }
  return emit(graph::find_op(op), {id}, all, {})[0];
}

ValueId Resharder::gather(ValueId id, int dim, int axis, const std::string& reason) {
  const auto part = devices[0].type(id).shape[static_cast<std::size_t>(dim)];
  Ints bounds;
  for (int r = 0; r <= mesh_.axes()[static_cast<std::size_t>(axis)].size; ++r) bounds.push_back(r * part);
  return collective("all_gather", id, axis, {{"dim", static_cast<std::int64_t>(dim)}, {"bounds", bounds}}, reason);
}

ValueId Resharder::on_first(ValueId value, const Wants& wants, const std::set<int>& axes) {
  return leaf(whole_.producer(value), value, wants, axes);
}

Attrs Resharder::localized(const Node& node, const Box& box) const { return node.op->localize(whole_.context(node), box, {}); }

ValueId Resharder::leaf(const Node& node, ValueId value, const Wants& wants, const std::set<int>& only_first) {
  if (is(node, "constant")) {
    Form form{Wants(wants.size()), {}, emit(*node.op, {}, std::vector<Attrs>(devices.size(), node.attrs), node.name)[0], {}};
    for (std::size_t d = 0; d < wants.size(); ++d)
      if (wants[d].axis >= 0) slice(form, value, wants, d);
    return form.id;
  }
  std::vector<Box> boxes;
  for (int d = 0; d < mesh_.size(); ++d) boxes.push_back(box(value, wants, d));
  // Vectors are so small that fetching them would cost more than keeping them.
  if (is(node, "weight") && placement_ == Placement::gathered && !is_vector(whole_.type(value).shape) && only_first.empty()) return fetch(node, value, boxes);
  ValueId id = -1;
  for (int d = 0; d < mesh_.size(); ++d) {
    auto& device = devices[static_cast<std::size_t>(d)];
    const bool zero = std::any_of(only_first.begin(), only_first.end(), [&](int axis) { return mesh_.coordinate(d, axis) != 0; });
    if (zero) {
      const Attrs attrs{{"shape", shape_of(boxes[d])}, {"values", graph::Doubles{0.0}}, {"dtype", std::string(name_of(whole_.type(value).dtype))}};
      id = device.add_node(graph::find_op("constant"), {}, attrs, node.name)[0];
    } else {
      id = device.add_node(*node.op, {}, localized(node, boxes[d]), node.name)[0];
    }
  }
  return id;
}

// Of a group of devices that want the same part of a weight one stores it, so that it is used there as it lies, and moves in one piece.
// The weights are dealt out by size in the order of their names: with most of one block or layer together, and in the same way whatever
// the call and the mesh.
std::size_t Resharder::owner(ValueId weight, std::size_t group_size) {
  auto& owners = owners_[group_size];
  if (owners.empty()) {
    std::vector<std::pair<const Node*, ValueId>> weights;
    for (const auto* node : whole_.all("weight"))
      if (!is_vector(whole_.type(node->outputs[0]).shape)) weights.emplace_back(node, node->outputs[0]);
    const auto name = [](const Node& node) { return std::pair(node.attrs.text("key"), node.attrs.ints("offset")); };
    std::sort(weights.begin(), weights.end(), [&](const auto& a, const auto& b) { return name(*a.first) < name(*b.first); });
    std::vector<std::int64_t> stored(group_size, 0);
    for (const auto& [node, id] : weights) {
      const auto least = std::min_element(stored.begin(), stored.end());
      *least += numel(whole_.type(id).shape);
      owners[id] = static_cast<std::size_t>(least - stored.begin());
    }
  }
  return owners.at(weight);
}

ValueId Resharder::fetch(const Node& node, ValueId value, const std::vector<Box>& boxes) {
  std::vector<Attrs> parts, fetches;
  bool shared = false;
  for (std::size_t device = 0; device < boxes.size(); ++device) {
    Ints group;
    std::size_t rank = 0;
    for (std::size_t d = 0; d < boxes.size(); ++d) {
      if (d == device) rank = group.size();
      if (boxes[d] == boxes[device]) group.push_back(static_cast<std::int64_t>(d));
    }
    const auto by = owner(value, group.size());
    const auto first = boxes[device][0];
    Ints bounds(group.size() + 1, 0);
    std::fill(bounds.begin() + static_cast<std::ptrdiff_t>(by) + 1, bounds.end(), first.size());
    Box part = boxes[device];
    part[0] = {first.lo + bounds[rank], first.lo + bounds[rank + 1]};
    parts.push_back(localized(node, part));
    fetches.push_back({{"dim", std::int64_t{0}}, {"bounds", bounds}, {"group", group}, {"rank", static_cast<std::int64_t>(rank)},
                       {"reason", fmt::format("'{}' lies on device {}", node.attrs.text("key"), group[by])}});
    shared = shared || group.size() > 1;
  }
  const ValueId stored = emit(*node.op, {}, parts, node.name)[0];
  return shared ? emit(graph::find_op("fetch_weight"), {stored}, fetches, node.name)[0] : stored;
}

}  // namespace comfytp::sharding
