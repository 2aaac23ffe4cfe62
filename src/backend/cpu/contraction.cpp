#include "backend/cpu/contraction.h"

#include <cstring>

#include "backend/cpu/parallel.h"
#include "backend/cpu/weight_decoder.h"
#include "backend/cpu/workspace.h"
#include "base/error.h"
#include "graph/ops/epilogue.h"

namespace comfytp::backend::cpu {
namespace {

/// The epilogue as post-ops; an operand is the input behind x and w with its number.
struct Epilogue {
  struct Operand {
    std::size_t input;
    int argument;
    bool whole;  ///< of the result's shape; otherwise one value a channel
  };
  dnnl::primitive_attr attr;
  MemoryDesc bias;
  std::vector<Operand> operands;

  Epilogue(const std::vector<std::string>& steps, const Contraction& contraction, std::int64_t o) {
    dnnl::post_ops ops;
    for (std::size_t i = 0; i < steps.size(); ++i) {
      const auto& step = steps[i];
      if (step == "silu") ops.append_eltwise(dnnl::algorithm::eltwise_swish, 1.f, 0.f);
      if (step == "gelu") ops.append_eltwise(dnnl::algorithm::eltwise_gelu_erf, 0.f, 0.f);
      if (step == "gelu_tanh") ops.append_eltwise(dnnl::algorithm::eltwise_gelu_tanh, 0.f, 0.f);
      if (!graph::takes_operand(step)) continue;
      const std::size_t input = 2 + operands.size();
      if (step == "bias" && i == 0) {
        bias = contraction.bias(o);
        operands.push_back({input, DNNL_ARG_BIAS, false});
        continue;
      }
      operands.push_back({input, DNNL_ARG_ATTR_MULTIPLE_POST_OP(ops.len()) | DNNL_ARG_SRC_1, step != "bias"});
      ops.append_binary(step == "mul" ? dnnl::algorithm::binary_mul : dnnl::algorithm::binary_add,
                        step == "bias" ? contraction.channels(o) : contraction.result(o));
    }
    attr.set_post_ops(ops);
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  }
  MemoryDesc desc(const Operand& operand, const Contraction& contraction, std::int64_t o) const {
    return operand.whole ? contraction.result(o) : operand.argument == DNNL_ARG_BIAS ? bias : contraction.channels(o);
  }
};

/// A primitive with its epilogue; the costly part is made at the first run.
struct Compiled {
  std::int64_t outputs;
  Epilogue epilogue;
  dnnl::primitive_desc desc;
  dnnl::primitive primitive;

  Compiled(const Contraction& contraction, const std::vector<std::string>& steps, std::int64_t o, const MemoryDesc& weights)
      : outputs(o), epilogue(steps, contraction, o), desc(contraction.primitive(o, weights, epilogue.bias, epilogue.attr)) {}
  MemoryDesc weights() const { return desc.query_md(dnnl::query::weights_md); }
  bool fast() const { return std::string(desc.impl_info_str()).find("ref") == std::string::npos; }
  std::int64_t scratchpad_bytes() const { return bytes_of(desc.scratchpad_desc()); }
  Arguments arguments(const Contraction& contraction) const {
    Arguments args = {{DNNL_ARG_SRC, unplaced(desc.query_md(dnnl::query::src_md))},
                      {DNNL_ARG_WEIGHTS, unplaced(weights())},
                      {DNNL_ARG_DST, unplaced(desc.query_md(dnnl::query::dst_md))},
                      {DNNL_ARG_SCRATCHPAD, unplaced(desc.scratchpad_desc())}};
    for (const auto& operand : epilogue.operands) args.emplace(operand.argument, unplaced(epilogue.desc(operand, contraction, outputs)));
    return args;
  }
  void make() {
    if (!primitive) primitive = dnnl::primitive(desc);
  }
};

/// Reads the weights where they lie.
class WholeKernel final : public Kernel {
 public:
  WholeKernel(const Site& site, const ContractionSizes& sizes, const Contraction& contraction, Compiled compiled)
      : compiled_(std::move(compiled)), args_(compiled_.arguments(contraction)) {
    scratchpad_ = workspace_.take(compiled_.scratchpad_bytes());
    if (sizes.zero) zeros_ = std::max(numel(sizes.source), numel(sizes.weight)) * size_of(site.in[0].type.dtype);
    zero_ = workspace_.take(zeros_);
  }
  std::int64_t workspace_bytes() const override { return workspace_.bytes(); }
  void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override {
    compiled_.make();
    if (zeros_) std::memset(at(workspace, zero_), 0, static_cast<std::size_t>(zeros_));
    place(args_, DNNL_ARG_SRC, zeros_ ? at(workspace, zero_) : in[0]);
    place(args_, DNNL_ARG_WEIGHTS, zeros_ ? at(workspace, zero_) : in[1]);
    place(args_, DNNL_ARG_DST, out[0]);
    place(args_, DNNL_ARG_SCRATCHPAD, at(workspace, scratchpad_));
    for (const auto& operand : compiled_.epilogue.operands) place(args_, operand.argument, in[operand.input]);
    compiled_.primitive.execute(stream(), args_);
  }

 private:
  Compiled compiled_;
  Arguments args_;
  Workspace workspace_;
  std::int64_t scratchpad_ = 0, zero_ = 0, zeros_ = 0;
};

// Output channels of a chunk: 64 is what a microkernel likes and keeps a chunk in the cache; fewer where the threads would
// otherwise be out of step, but always whole blocks of a packed source.
std::int64_t chunk_size(std::int64_t outputs, std::int64_t block, int threads) {
  std::int64_t size = (64 + block - 1) / block * block;
  for (std::int64_t smaller : {32, 16}) {
    const auto chunks = (outputs + size - 1) / size, rounds = (chunks + threads - 1) / threads;
    if (rounds * threads * 10 <= chunks * 11 || smaller % block) break;
    size = smaller;
  }
  return std::min(size, outputs);
}

class ChunkedKernel final : public Kernel {
 public:
  ChunkedKernel(const Site& site, const ContractionSizes& sizes, const Contraction& contraction, const std::vector<std::string>& steps,
                WeightSource source)
      : dtype_(site.in[0].type.dtype),
        rows_(sizes.rows),
        outputs_(sizes.outputs),
        size_(contraction.divisible() ? chunk_size(sizes.outputs, source.block(), site.threads) : sizes.outputs),
        callers_(size_ < outputs_ ? site.threads : 1),
        threads_(size_ < outputs_ ? 1 : site.threads),
        compiled_(compile(contraction, steps, size_, threads_)),
        decoder_(contraction, sizes, source, dtype_, size_, compiled_.weights(), callers_, threads_, work_) {
    const auto bytes = rows_ * size_ * size_of(dtype_);
    result_ = work_.take(bytes);
    for (const auto& operand : compiled_.epilogue.operands) slices_.push_back(operand.whole ? work_.take(bytes) : -1);
    scratchpad_ = work_.take(compiled_.scratchpad_bytes());
    for (int c = 0; c < callers_; ++c) args_.push_back(compiled_.arguments(contraction));
  }
  std::int64_t workspace_bytes() const override { return callers_ * work_.bytes(); }
  void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override {
    {
      const ThreadCount threads(threads_);
      compiled_.make();
      decoder_.make();
    }
    parallel((outputs_ + size_ - 1) / size_, 1, [&](std::int64_t begin, std::int64_t end, int caller) {
      for (std::int64_t i = begin; i < end; ++i) chunk(i * size_, in, out, at(workspace, caller * work_.bytes()), caller);
    });
  }

 private:
  static Compiled compile(const Contraction& contraction, const std::vector<std::string>& steps, std::int64_t o, int threads) {
    const ThreadCount count(threads);
    return {contraction, steps, o, contraction.candidates(o).front()};
  }

  // Channels [begin, begin + size), the last chunk moved back so that it is as large as the others.
  void chunk(std::int64_t wanted, std::span<const void* const> in, std::span<void* const> out, void* work, int caller) {
    const auto begin = std::min(wanted, outputs_ - size_);
    const auto element = size_of(dtype_);
    auto& args = args_[static_cast<std::size_t>(caller)];
    place(args, DNNL_ARG_SRC, in[0]);
    place(args, DNNL_ARG_WEIGHTS, decoder_.run(in[1], begin, work, caller));
    place(args, DNNL_ARG_DST, at(work, result_));
    place(args, DNNL_ARG_SCRATCHPAD, at(work, scratchpad_));
    const auto& operands = compiled_.epilogue.operands;
    for (std::size_t k = 0; k < operands.size(); ++k) {
      const char* operand = static_cast<const char*>(in[operands[k].input]) + begin * element;
      if (operands[k].whole) copy_rows(operand, outputs_, at(work, slices_[k]), size_, size_);
      place(args, operands[k].argument, operands[k].whole ? at(work, slices_[k]) : operand);
    }
    compiled_.primitive.execute(stream(), args);
    const auto skip = wanted - begin;
    copy_rows(at(work, result_) + skip * element, size_, static_cast<char*>(out[0]) + wanted * element, outputs_, size_ - skip);
  }

  void copy_rows(const char* from, std::int64_t from_step, char* to, std::int64_t to_step, std::int64_t count) const {
    const auto element = size_of(dtype_);
    for (std::int64_t r = 0; r < rows_; ++r)
      std::memcpy(to + r * to_step * element, from + r * from_step * element, static_cast<std::size_t>(count * element));
  }

  DType dtype_;
  std::int64_t rows_, outputs_, size_;
  int callers_, threads_;  ///< threads that run chunks at once, each alone; where there is but one chunk, all threads run it
  Compiled compiled_;
  Workspace work_;  ///< of one caller
  WeightDecoder decoder_;
  std::int64_t result_ = 0, scratchpad_ = 0;
  std::vector<std::int64_t> slices_;
  std::vector<Arguments> args_;  ///< by caller
};

class EmptyKernel final : public Kernel {
 public:
  void run(std::span<const void* const>, std::span<void* const>, void*) override {}
};

class Matmul final : public Contraction {
 public:
  Matmul(DType dtype, std::int64_t rows, const Shape& weight)
      : dtype_(dtype), rows_(rows), inner_(numel(weight) / weight[0]), weight_(weight) {}
  dnnl::primitive_desc primitive(std::int64_t o, const MemoryDesc& weights, const MemoryDesc& bias,
                                 const dnnl::primitive_attr& attr) const override {
    const auto x = dense({rows_, inner_}, dtype_);
    if (bias) return dnnl::matmul::primitive_desc(engine(), x, weights, bias, result(o), attr);
    return dnnl::matmul::primitive_desc(engine(), x, weights, result(o), attr);
  }
  MemoryDesc bias(std::int64_t o) const override { return dense({1, o}, dtype_); }
  MemoryDesc channels(std::int64_t o) const override { return dense({1, o}, dtype_); }
  MemoryDesc result(std::int64_t o) const override { return dense({rows_, o}, dtype_); }
  MemoryDesc as_weights(const MemoryDesc& own) const override {
    const auto dims = own.get_dims();
    return own.reshape({dims[0], numel(dims) / dims[0]}).permute_axes({1, 0});
  }
  MemoryDesc as_own(const MemoryDesc& weights) const override { return weights.permute_axes({1, 0}).reshape(weight_); }
  std::vector<MemoryDesc> candidates(std::int64_t o) const override {
    return {MemoryDesc({inner_, o}, onednn_type(dtype_), dnnl::memory::format_tag::any)};
  }
  std::int64_t input_dim() const override { return 0; }
  bool reads_plain() const override { return true; }

 private:
  DType dtype_;
  std::int64_t rows_, inner_;
  Shape weight_;
};

// A layout for the whole weight that takes no more bytes than the row-major one, with its primitive; null if there is none.
std::unique_ptr<Compiled> pack(const Contraction& contraction, const std::vector<std::string>& steps, const ContractionSizes& sizes,
                               std::int64_t bytes) {
  for (const auto& candidate : contraction.candidates(sizes.outputs)) {
    auto compiled = std::make_unique<Compiled>(contraction, steps, sizes.outputs, candidate);
    if (compiled->fast() && bytes_of(compiled->weights()) == bytes) return compiled;
  }
  return nullptr;
}

}  // namespace

std::shared_ptr<const Contraction> matmul_contraction(DType dtype, std::int64_t rows, const Shape& weight) {
  return std::make_shared<Matmul>(dtype, rows, weight);
}

std::unique_ptr<Kernel> make_contraction(const Site& site, const ContractionSizes& sizes, std::shared_ptr<const Contraction> contraction) {
  const DType dtype = site.in[0].type.dtype;
  const auto steps = graph::epilogue_of(site.attrs());
  auto* weight = sizes.zero ? nullptr : site.in[1].weight;
  const auto settle = [&] {
    if (weight && !weight->format) weight->packable = false;
  };
  if (sizes.rows * sizes.outputs == 0) {
    settle();
    return std::make_unique<EmptyKernel>();
  }
  const auto whole = [&](Compiled compiled) { return std::make_unique<WholeKernel>(site, sizes, *contraction, std::move(compiled)); };
  const MemoryDesc plain = contraction->as_weights(dense(sizes.weight, dtype));
  if (sizes.zero) return whole({*contraction, steps, sizes.outputs, plain});

  const WeightSource source{weight ? weight->stored : dtype, weight ? packed_desc(*weight) : nullptr};
  if (source.stored == dtype && weight && weight->packable && !weight->format && !weight->data)
    if (auto compiled = contraction->divisible() ? pack(*contraction, steps, sizes, weight->bytes()) : nullptr) {
      weight->format = packed_format(*weight, contraction->as_own(compiled->weights()));
      return whole(std::move(*compiled));
    }
  settle();
  if (source.stored == dtype && (source.packed || contraction->reads_plain())) {
    Compiled compiled(*contraction, steps, sizes.outputs, source.packed ? contraction->as_weights(*source.packed) : plain);
    if (compiled.fast()) return whole(std::move(compiled));
  }
  return std::make_unique<ChunkedKernel>(site, sizes, *contraction, steps, source);
}

}  // namespace comfytp::backend::cpu
