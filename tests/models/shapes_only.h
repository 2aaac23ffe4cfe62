// A source that knows its tensors' names and shapes and holds no data: enough to detect a model and to build its graph.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "base/error.h"
#include "weights/source.h"

namespace comfytp::test {

using Tensors = std::map<std::string, weights::TensorInfo, std::less<>>;

class ShapesOnly final : public weights::Source {
 public:
  explicit ShapesOnly(Tensors tensors) : tensors_(std::move(tensors)) {}
  std::string name() const override { return "some.safetensors"; }
  const Tensors& tensors() const override { return tensors_; }
  void read(std::string_view, const Box&, void*) const override { fail("[test] expected nobody to read"); }

 private:
  Tensors tensors_;
};

inline std::shared_ptr<weights::Source> shapes_only(Tensors tensors) { return std::make_shared<ShapesOnly>(std::move(tensors)); }

/// The message of the Error that `action` throws; "" when it throws none.
template <typename Action>
std::string error_of(Action&& action) {
  try {
    action();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

}  // namespace comfytp::test
