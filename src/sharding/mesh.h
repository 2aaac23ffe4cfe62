// The devices of an engine as a grid with named axes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace comfytp::sharding {

/// batch: samples; patch: image rows, tokens; tensor: channels, heads. See docs/architecture.md.
struct Axis {
  std::string name;
  int size = 1;
  std::vector<double> shares;  ///< the part of the work that each coordinate gets, in proportion; empty: equal
};

/// Which weights an axis cuts. A dimension of a weight is named "key[1]", of a part of a merged one "key[1]@offset". Names hold for
/// every shape of a call: so a weight is cut alike in all of them.
struct Cuts {
  std::vector<std::string> groups;  ///< and all that has to be cut with it: the heads of a block, a feed-forward
  std::vector<std::string> alone;   ///< nothing else but the bias behind it
};

class Mesh {
 public:
  Mesh() = default;
  explicit Mesh(std::vector<Axis> axes) : axes_(std::move(axes)) {}

  /// "batch=2,tensor=2" or with shares "tensor=2:1" (two coordinates, 2/3 and 1/3). Throws Error.
  static Mesh parse(std::string_view text);
  std::string to_string() const;

  const std::vector<Axis>& axes() const { return axes_; }
  int size() const;
  /// The coordinate of a device along an axis; devices are numbered with the last axis fastest.
  int coordinate(int device, int axis) const;
  /// The devices that differ from `device` along `axis` alone, itself included, in the order of the coordinate.
  std::vector<std::int64_t> group(int device, int axis) const;

  /// By axis. Where an axis has none, the strategy chooses.
  std::map<std::string, Cuts> cuts;

 private:
  std::vector<Axis> axes_;
};

}  // namespace comfytp::sharding
