#include "backend/cpu/cpu_device.h"

#include <algorithm>
#include <new>

#include "backend/cpu/copy_plan.h"
#include "backend/cpu/decoding.h"
#include "backend/cpu/kernel_table.h"
#include "backend/cpu/onednn.h"
#include "backend/cpu/parallel.h"
#include "base/affinity.h"
#include "base/error.h"

namespace comfytp::backend::cpu {
namespace {

// libgomp is not instrumented: to the thread sanitizer its barriers do not exist.
#if defined(__SANITIZE_THREAD__)
constexpr bool kOneThread = true;
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
constexpr bool kOneThread = true;
#else
constexpr bool kOneThread = false;
#endif
#else
constexpr bool kOneThread = false;
#endif

constexpr std::align_val_t kAlignment{64};

}  // namespace

CpuDevice::CpuDevice(DeviceSpec spec, int position, int count) : spec_(std::move(spec)) {
  const auto cores = allowed_cores();
  const auto have = static_cast<std::int64_t>(cores.size());
  const auto first = have * position / count, last = std::max(first + 1, have * (position + 1) / count);
  cores_.assign(cores.begin() + first, cores.begin() + last);
  threads_ = kOneThread ? 1 : static_cast<int>(cores_.size());
}

// Between two parallel regions libgomp's threads spin for a few milliseconds, then sleep (OMP_WAIT_POLICY=passive: at once), unless the
// environment says otherwise when it is loaded, as the command line's does (apps/comfytp/main.cpp); with more devices than cores, and so
// one thread each, there are no regions. Where torch has brought its own libgomp, all this holds
// for that one: the thread counts set here are the calling thread's alone.
void CpuDevice::attach() {
  bind_thread(cores_);  // before the first parallel region: OpenMP's threads inherit it
  omp_set_num_threads(threads_);
}

std::unique_ptr<Kernel> CpuDevice::compile(const graph::Node& node, std::span<const Operand> in, std::span<const Operand> out) {
  const auto* entry = find_kernel(node.op->name());
  require(entry, "[{}] {} has no kernel for this op", node.op->name(), spec_.name());
  const ThreadCount threads(threads_);  // what oneDNN decides here holds for the threads that will run it
  try {
    return compile_decoding(*entry, {node, in, out, threads_});
  } catch (const dnnl::error& error) {
    const auto text = fmt::format("[{}] oneDNN on {}: {} (status {})", node.op->name(), spec_.name(), error.what(), static_cast<int>(error.status));
    if (error.status == dnnl_out_of_memory) throw OutOfMemory(text);
    throw Error(text);
  }
}

bool CpuDevice::decodes(const graph::Node&, std::size_t) const { return true; }

void CpuDevice::expect_compute(DType dtype) const {
  if (dtype == DType::f32) return;
  require(dtype == DType::bf16, "[devices] {} computes in f32 or bf16 but not in {}", spec_.name(), name_of(dtype));
  const auto isa = dnnl::get_effective_cpu_isa();
  const bool has = isa == dnnl::cpu_isa::avx512_core_bf16 || isa == dnnl::cpu_isa::avx512_core_fp16 ||
                   isa == dnnl::cpu_isa::avx512_core_amx || isa == dnnl::cpu_isa::avx512_core_amx_fp16;
  require(has, "[devices] {} cannot compute in bf16: this processor has neither AVX512-BF16 nor AMX; use f32", spec_.name());
}

void* CpuDevice::allocate(std::int64_t bytes) {
  spec_.expect_room(allocated_, bytes);
  void* memory = ::operator new(static_cast<std::size_t>(bytes), kAlignment, std::nothrow);
  if (!memory)
    throw OutOfMemory(fmt::format("[memory] {} needs {} more, has {} in use and got none from the system", spec_.name(), bytes_text(bytes),
                                  bytes_text(allocated_)));
  allocated_ += bytes;
  return memory;
}

void CpuDevice::release(void* memory, std::int64_t bytes) {
  if (!memory) return;
  ::operator delete(memory, kAlignment);
  allocated_ -= bytes;
}

void CpuDevice::read(const TensorView& outside, void* data, const graph::Type& type, const graph::Order& order) {
  require(outside.host, "[copy] expected a tensor in host memory for {} but got one on a GPU", spec_.name());
  require(outside.shape == type.shape, "[copy] expected shape {} but got {}", to_string(type.shape), to_string(outside.shape));
  CopyPlan(type.shape, outside.dtype, outside.strides, type.dtype, graph::strides_of(type.shape, order)).run(outside.data, data);
}

void CpuDevice::write(const void* data, const graph::Type& type, const graph::Order& order, const TensorView& outside) {
  require(outside.host, "[copy] expected a tensor in host memory for {} but got one on a GPU", spec_.name());
  require(outside.shape == type.shape, "[copy] expected shape {} but got {}", to_string(type.shape), to_string(outside.shape));
  CopyPlan(type.shape, type.dtype, graph::strides_of(type.shape, order), outside.dtype, outside.strides).run(data, outside.data);
}

}  // namespace comfytp::backend::cpu
