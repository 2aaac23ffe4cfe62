#include "backend/cpu/weight_decoder.h"

#include "backend/cpu/parallel.h"

namespace comfytp::backend::cpu {
namespace {

constexpr std::int64_t kSliceBytes = 3 << 20;  // long runs of the source matter more than the second level cache

// How many of a blocked layout's inner elements belong to dimension `dim`.
std::int64_t block_of(const MemoryDesc& desc, std::int64_t dim) {
  std::int64_t block = 1;
  const auto sizes = desc.get_inner_blks(), dims = desc.get_inner_idxs();
  for (std::size_t i = 0; i < sizes.size(); ++i) block *= dims[i] == dim ? sizes[i] : 1;
  return block;
}

// The most input channels that divide `inputs`, are whole blocks of any layout, and with `bytes` each stay in the cache.
std::int64_t slice_size(std::int64_t inputs, std::int64_t bytes) {
  constexpr std::int64_t kBlocks = 64;
  if (inputs % kBlocks) return inputs;
  for (std::int64_t parts = 1; parts < inputs / kBlocks; ++parts)
    if (inputs % (parts * kBlocks) == 0 && inputs / parts * bytes <= kSliceBytes) return inputs / parts;
  return kBlocks;
}

// The part of `whole` of these sizes that begins with its first element.
MemoryDesc first_part(const MemoryDesc& whole, const dnnl::memory::dims& sizes) {
  return whole.submemory_desc(sizes, dnnl::memory::dims(sizes.size(), 0));
}

}  // namespace

std::int64_t WeightSource::block() const { return packed ? block_of(*packed, 0) : 1; }

WeightDecoder::WeightDecoder(const Contraction& contraction, const ContractionSizes& sizes, const WeightSource& source, DType dtype,
                             std::int64_t channels, const MemoryDesc& target, int callers, int threads, Workspace& work)
    : source_(source), dtype_(dtype), channels_(channels), threads_(threads), step_(numel(sizes.weight) / sizes.outputs) {
  Shape part = sizes.weight;
  part[0] = channels;
  MemoryDesc from, to = target;
  if (source.packed) {
    from = contraction.as_weights(first_part(*source.packed, part));
    step_ = source.packed->get_strides()[0] / source.block();
  } else {
    const auto window = step_ / part[1];
    if (contraction.divisible()) {
      const auto inputs = part[1], dim = contraction.input_dim();
      part[1] = slice_size(inputs, channels * window * size_of(dtype));
      slices_ = inputs / part[1];
      if (slices_ > 1) target_step_ = part[1] / block_of(target, dim) * target.get_strides()[static_cast<std::size_t>(dim)];
    }
    run_ = part[1] * window;
    from = contraction.as_weights(dense(part, dtype));
    if (slices_ > 1) to = first_part(target, from.get_dims());
    slice_ = work.take(channels * run_ * size_of(dtype));
  }
  target_ = work.take(bytes_of(target));
  const ThreadCount count(threads);
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  desc_ = dnnl::reorder::primitive_desc(engine(), from, engine(), to, attr);
  scratchpad_ = work.take(bytes_of(desc_.scratchpad_desc()));
  for (int c = 0; c < callers; ++c)
    args_.push_back(
        {{DNNL_ARG_FROM, unplaced(from)}, {DNNL_ARG_TO, unplaced(to)}, {DNNL_ARG_SCRATCHPAD, unplaced(desc_.scratchpad_desc())}});
}

void WeightDecoder::make() {
  const ThreadCount count(static_cast<int>(threads_));
  if (!primitive_) primitive_ = dnnl::reorder(desc_);
}

void* WeightDecoder::run(const void* weight, std::int64_t begin, void* work, int caller) {
  auto& args = args_[static_cast<std::size_t>(caller)];
  const auto* from = static_cast<const char*>(weight) + begin * step_ * size_of(source_.stored);
  for (std::int64_t s = 0; s < slices_; ++s) {
    const void* slice = from;
    if (slice_ >= 0) {
      convert_slice(from + s * run_ * size_of(source_.stored), at(work, slice_));
      slice = at(work, slice_);
    }
    place(args, DNNL_ARG_FROM, slice);
    place(args, DNNL_ARG_TO, at(work, target_) + s * target_step_ * size_of(dtype_));
    place(args, DNNL_ARG_SCRATCHPAD, at(work, scratchpad_));
    primitive_.execute(stream(), args);
  }
  return at(work, target_);
}

// The slice's part of every channel, one behind the other and in the primitive's dtype.
void WeightDecoder::convert_slice(const char* from, char* to) const {
  const auto channels = [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t c = begin; c < end; ++c)
      convert(from + c * step_ * size_of(source_.stored), source_.stored, to + c * run_ * size_of(dtype_), dtype_, run_);
  };
  if (threads_ == 1)
    channels(0, channels_, 0);
  else
    parallel(channels_, row_grain(run_), channels);
}

}  // namespace comfytp::backend::cpu
