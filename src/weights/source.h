// Where weights come from: a set of named tensors of which anybody may read a part.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "base/shape.h"
#include "base/tensor_view.h"

namespace comfytp::weights {

/// What is known of a tensor without reading it.
struct TensorInfo {
  DType dtype = DType::f32;
  Shape shape;
  std::int64_t bytes() const { return numel(shape) * size_of(dtype); }
};

/// Named tensors. Readers may call from several threads at once.
class Source {
 public:
  virtual ~Source() = default;
  /// For messages: the file's or folder's path, "mapping", ….
  virtual std::string name() const = 0;
  /// All keys with what is known of them, sorted.
  virtual const std::map<std::string, TensorInfo, std::less<>>& tensors() const = 0;
  /// Copies the part of `key` inside `box` to `out`, row-major, in the stored dtype. Throws Error naming source and key.
  virtual void read(std::string_view key, const Box& box, void* out) const = 0;

  bool has(std::string_view key) const { return tensors().find(key) != tensors().end(); }
  /// Throws Error "[weights] expected a tensor 'key' in <name> but there is none".
  const TensorInfo& info(std::string_view key) const;
};

/// A key between quotes as it stands in messages: on one line and of bounded length, whatever a file calls it.
std::string in_quotes(std::string_view key);

/// Tensors in the caller's memory, such as a mapping of arrays; `keep` lives as long as the source.
std::shared_ptr<Source> from_views(std::string name, std::map<std::string, TensorView, std::less<>> views,
                                   std::shared_ptr<const void> keep);

/// The same tensors under other names: `names` maps a new key to the source's; keys not named in it are left out.
/// Throws Error when the source lacks one.
std::shared_ptr<Source> renamed(std::shared_ptr<const Source> source, std::map<std::string, std::string, std::less<>> names);

}  // namespace comfytp::weights
