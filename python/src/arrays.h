// Python's arrays as the engine sees them: anything that speaks DLPack, in host memory, read where it lies.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/tensor_view.h"
#include "weights/source.h"

namespace comfytp::python {

namespace nb = nanobind;
using Views = std::map<std::string, TensorView>;

/// Keeps Python's arrays alive while the engine reads them. Made with the GIL held, it may die on any thread without it.
class Arrays {
 public:
  Arrays();
  /// A view of `array`, whatever its strides. `what` stands in messages: "input 'x'". Throws Error when it is no array, lies
  /// neither in host memory nor on a CUDA device, or has a dtype that the engine lacks.
  TensorView read(nb::handle array, const std::string& what);
  /// The same for an array that the engine writes; throws Error when it cannot be written to.
  TensorView write(nb::handle array, const std::string& what);
  /// Named ones; `kind` stands before the name in messages.
  Views read_all(const nb::dict& arrays, const char* kind);
  Views write_all(const nb::dict& arrays, const char* kind);
  /// Lives on after this object.
  std::shared_ptr<const void> keep() const { return kept_; }

 private:
  std::shared_ptr<std::vector<nb::object>> kept_;
};

/// A path (str or os.PathLike) is opened as a checkpoint; a mapping of names to arrays is read where it lies.
std::shared_ptr<weights::Source> weights_of(nb::handle path_or_mapping);

/// A new dense array in host memory, to be handed to any library through DLPack.
nb::ndarray<nb::array_api> empty(const Shape& shape, DType dtype);

nb::tuple to_tuple(const Shape& shape);

}  // namespace comfytp::python
