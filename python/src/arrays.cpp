#include "arrays.h"

#include <nanobind/stl/string.h>

#include <array>
#include <new>
#include <utility>

#include "base/error.h"
#include "weights/checkpoint.h"

namespace comfytp::python {
namespace {

using Code = nb::dlpack::dtype_code;
struct DTypeCode {
  DType dtype;
  Code code;
};
constexpr std::array kDTypes = {
    DTypeCode{DType::f64, Code::Float},  DTypeCode{DType::f32, Code::Float},           DTypeCode{DType::f16, Code::Float},
    DTypeCode{DType::bf16, Code::Bfloat}, DTypeCode{DType::f8_e4m3, Code::Float8_E4M3FN}, DTypeCode{DType::f8_e5m2, Code::Float8_E5M2},
    DTypeCode{DType::i64, Code::Int},    DTypeCode{DType::i32, Code::Int},             DTypeCode{DType::i16, Code::Int},
    DTypeCode{DType::i8, Code::Int},     DTypeCode{DType::u8, Code::UInt},             DTypeCode{DType::boolean, Code::Bool},
};

std::string class_name(nb::handle object) { return nb::cast<std::string>(nb::str(object.type().attr("__name__"))); }

template <typename Array>
TensorView view_of(const Array& array, nb::handle object, const std::string& what) {
  constexpr int kHost = 1, kCuda = 2, kPinned = 3;  // DLPack's kDLCPU, kDLCUDA and kDLCUDAHost
  require(array.device_type() == kHost || array.device_type() == kPinned || array.device_type() == kCuda,
          "[python] expected {} in host memory or on a CUDA device but got a {} on another (DLPack device type {}); copy it with .cpu()", what,
          class_name(object), array.device_type());
  const auto dtype = array.dtype();
  const DTypeCode* found = nullptr;
  for (const auto& known : kDTypes)
    if (static_cast<std::uint8_t>(known.code) == dtype.code && size_of(known.dtype) * 8 == dtype.bits && dtype.lanes == 1) found = &known;
  if (!found)
    fail("[python] expected {} of a floating or integer dtype but got DLPack dtype (code {}, {} bits)", what, int{dtype.code}, int{dtype.bits});
  TensorView view{const_cast<void*>(static_cast<const void*>(array.data())), found->dtype, {}, {}, array.device_type() != kCuda, array.device_id()};
  for (std::size_t d = 0; d < array.ndim(); ++d) {
    view.shape.push_back(static_cast<std::int64_t>(array.shape(d)));
    view.strides.push_back(array.stride(d));
  }
  return view;
}

// A parameter that records gradients does not export itself; its values do.
nb::object detached(nb::handle array) {
  return nb::getattr(array, "requires_grad", nb::none()).is(nb::bool_(true)) ? nb::object(array.attr("detach")()) : nb::borrow(array);
}

template <typename Array>
std::pair<TensorView, nb::object> import_array(nb::handle object, const std::string& what, const char* expected) {
  const nb::object source = detached(object);
  Array array;
  if (!nb::try_cast<Array>(source, array, false))
    fail("[python] expected {} to be {} (torch, numpy or anything with __dlpack__) but got a {}", what, expected, class_name(object));
  const auto view = view_of(array, object, what);
  // The capsule owns a reference to the exported memory, beyond the array that the caller holds.
  auto* owner = new Array(std::move(array));
  return {view, nb::capsule(owner, [](void* p) noexcept { delete static_cast<Array*>(p); })};
}

std::string key_of(nb::handle key, const char* kind) {
  std::string name;
  if (!nb::try_cast(key, name)) fail("[python] expected names of {}s as str but got a {}", kind, class_name(key));
  return name;
}

}  // namespace

Arrays::Arrays()
    : kept_(new std::vector<nb::object>, [](std::vector<nb::object>* kept) {
        const nb::gil_scoped_acquire gil;
        delete kept;
      }) {}

TensorView Arrays::read(nb::handle array, const std::string& what) {
  auto [view, owner] = import_array<nb::ndarray<nb::ro>>(array, what, "an array");
  kept_->push_back(std::move(owner));
  return view;
}

TensorView Arrays::write(nb::handle array, const std::string& what) {
  auto [view, owner] = import_array<nb::ndarray<>>(array, what, "an array that can be written to");
  kept_->push_back(std::move(owner));
  return view;
}

Views Arrays::read_all(const nb::dict& arrays, const char* kind) {
  Views views;
  for (auto [key, array] : arrays) {
    const auto name = key_of(key, kind);
    views[name] = read(array, fmt::format("{} '{}'", kind, name));
  }
  return views;
}

Views Arrays::write_all(const nb::dict& arrays, const char* kind) {
  Views views;
  for (auto [key, array] : arrays) {
    const auto name = key_of(key, kind);
    views[name] = write(array, fmt::format("{} '{}'", kind, name));
  }
  return views;
}

std::shared_ptr<weights::Source> weights_of(nb::handle source) {
  if (nb::isinstance<nb::str>(source) || nb::hasattr(source, "__fspath__")) {
    const auto path = nb::cast<std::string>(nb::module_::import_("os").attr("fsdecode")(source));
    const nb::gil_scoped_release release;
    return weights::open_checkpoint(path);
  }
  require(nb::hasattr(source, "items"), "[python] expected weights as a path or a mapping of names to arrays but got a {}", class_name(source));
  Arrays arrays;
  std::map<std::string, TensorView, std::less<>> views;
  const nb::object mapping = nb::module_::import_("builtins").attr("dict")(source);
  for (auto& [name, view] : arrays.read_all(nb::cast<nb::dict>(mapping), "weight")) {
    require(view.host, "[python] expected weight '{}' in host memory but got one on a device; copy it with .cpu()", name);
    views.emplace(name, std::move(view));
  }
  return weights::from_views("mapping", std::move(views), arrays.keep());
}

nb::ndarray<nb::array_api> empty(const Shape& shape, DType dtype) {
  constexpr std::align_val_t kAlignment{64};
  std::vector<std::size_t> sizes(shape.begin(), shape.end());
  const auto bytes = static_cast<std::size_t>(numel(shape) * size_of(dtype));
  void* data = ::operator new(bytes ? bytes : 1, kAlignment);
  const nb::capsule owner(data, [](void* p) noexcept { ::operator delete(p, kAlignment); });
  for (const auto& known : kDTypes)
    if (known.dtype == dtype)
      return nb::ndarray<nb::array_api>(data, sizes.size(), sizes.data(), owner, nullptr,
                           {static_cast<std::uint8_t>(known.code), static_cast<std::uint8_t>(size_of(dtype) * 8), 1});
  fail("[python] expected a dtype that DLPack knows but got {}", name_of(dtype));
}

nb::tuple to_tuple(const Shape& shape) {
  nb::list sizes;
  for (auto size : shape) sizes.append(size);
  return nb::tuple(sizes);
}

}  // namespace comfytp::python
