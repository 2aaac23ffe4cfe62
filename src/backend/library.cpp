#include "backend/library.h"

#include "base/error.h"
#include "base/library.h"

namespace comfytp::backend {

const BackendLibrary& cuda_library() {
  static const BackendLibrary& loaded = [&]() -> const BackendLibrary& {
    require(library_exists("comfytp_cuda"), "[devices] this build has no CUDA backend");
    static const Library library("comfytp_cuda");
    const auto entry = reinterpret_cast<BackendEntry>(library.symbol("comfytp_backend"));
    const BackendLibrary* backend = entry(COMFYTP_BUILD);
    require(backend, "[devices] '{}' belongs to another build than this one ({})", library.path(), COMFYTP_BUILD);
    return *backend;
  }();
  return loaded;
}

}  // namespace comfytp::backend
