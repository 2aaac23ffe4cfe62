#include "backend/cpu/onednn.h"

#include <fmt/ranges.h>

#include "base/error.h"

namespace comfytp::backend::cpu {

const dnnl::engine& engine() {
  static const dnnl::engine the_engine(dnnl::engine::kind::cpu, 0);
  return the_engine;
}

dnnl::stream& stream() {
  thread_local dnnl::stream the_stream(engine());
  return the_stream;
}

dnnl::memory::data_type onednn_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return dnnl::memory::data_type::f32;
    case DType::bf16:
      return dnnl::memory::data_type::bf16;
    case DType::f16:
      return dnnl::memory::data_type::f16;
    default:
      fail("[cpu] expected f32, bf16 or f16 but got {}", name_of(dtype));
  }
}

void reorder(const MemoryDesc& from, const void* source, const MemoryDesc& to, void* target) {
  const dnnl::reorder::primitive_desc desc(engine(), from, engine(), to);
  dnnl::memory in(from, engine(), const_cast<void*>(source)), out(to, engine(), target);
  dnnl::reorder(desc).execute(stream(), in, out);
}

WeightFormat packed_format(const WeightBuffer& weight, const MemoryDesc& packed) {
  const MemoryDesc plain = dense(weight.shape, weight.stored);
  return {fmt::format("{} strides {} blocks {} of {}", name_of(weight.stored), fmt::join(packed.get_strides(), ","),
                      fmt::join(packed.get_inner_blks(), ","), fmt::join(packed.get_inner_idxs(), ",")),
          [plain, packed](const void* source, void* target) { reorder(plain, source, packed, target); },
          std::make_shared<const MemoryDesc>(packed)};
}

const MemoryDesc* packed_desc(const WeightBuffer& weight) {
  return weight.format ? static_cast<const MemoryDesc*>(weight.format->detail.get()) : nullptr;
}

}  // namespace comfytp::backend::cpu
