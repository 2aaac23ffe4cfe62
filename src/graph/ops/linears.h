// What the kernels of linears ask of its attributes.
#pragma once

#include <cstddef>
#include <span>
#include <type_traits>
#include <vector>

#include "graph/attrs.h"

namespace comfytp::graph {

/// One linear of several: the numbers of its operands among the inputs, and its own attributes.
struct LinearOfSeveral {
  std::vector<std::size_t> inputs;  ///< x, its weight and, where it has one, its bias
  Attrs attrs;

  /// Its own, of those of all.
  template <typename T>
  std::vector<std::remove_cv_t<T>> operands(std::span<T> all) const {
    std::vector<std::remove_cv_t<T>> own;
    for (auto i : inputs) own.push_back(all[i]);
    return own;
  }
};
std::vector<LinearOfSeveral> linears_of(const Attrs& attrs);

}  // namespace comfytp::graph
