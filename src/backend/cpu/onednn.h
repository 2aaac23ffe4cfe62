// What the kernels share of oneDNN: the engine, memory descriptors, weight formats.
#pragma once

#include <dnnl.hpp>
#include <string>
#include <unordered_map>

#include "backend/backend.h"

namespace comfytp::backend::cpu {

using MemoryDesc = dnnl::memory::desc;

const dnnl::engine& engine();
/// The calling thread's.
dnnl::stream& stream();

/// f32, bf16 or f16.
dnnl::memory::data_type onednn_type(DType dtype);

/// A plain tensor: strides in elements.
inline MemoryDesc dense(const Shape& shape, DType dtype, const Shape& strides) { return {shape, onednn_type(dtype), strides}; }
inline MemoryDesc dense(const Shape& shape, DType dtype) { return dense(shape, dtype, row_major_strides(shape)); }

inline std::int64_t bytes_of(const MemoryDesc& desc) { return static_cast<std::int64_t>(desc.get_size()); }

/// Memory whose address is set before each use.
inline dnnl::memory unplaced(const MemoryDesc& desc) { return {desc, engine(), nullptr}; }

/// A primitive's operands by DNNL_ARG_….
using Arguments = std::unordered_map<int, dnnl::memory>;
inline void place(Arguments& args, int argument, const void* data) { args.at(argument).set_data_handle(const_cast<void*>(data)); }

/// Copies between layouts (and f32, bf16) on the calling thread's share of threads.
void reorder(const MemoryDesc& from, const void* source, const MemoryDesc& to, void* target);

/// The format that keeps a row-major weight as `packed`, whose dimensions are the weight's.
WeightFormat packed_format(const WeightBuffer& weight, const MemoryDesc& packed);
/// How `weight` lies in memory, as packed_format was told; null for a row-major one.
const MemoryDesc* packed_desc(const WeightBuffer& weight);

}  // namespace comfytp::backend::cpu
