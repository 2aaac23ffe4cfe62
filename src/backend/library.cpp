#include "backend/library.h"

#include "base/error.h"
#include "base/library.h"

namespace comfytp::backend {

const BackendLibrary& cuda_library() {
  static const BackendLibrary& loaded = [&]() -> const BackendLibrary& {
    require(library_exists("comfytp_cuda"), "[devices] this build has no CUDA backend");
    static const Library library("comfytp_cuda");
    return library.of_this_build<const BackendLibrary>("comfytp_backend");
  }();
  return loaded;
}

}  // namespace comfytp::backend
