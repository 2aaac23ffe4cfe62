// A device whose kernels are the ops' references: it can run everything, watches its memory, and fails when told to.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <new>

#include "backend/host_device.h"
#include "base/error.h"

namespace comfytp::test {

/// Shared by the devices of one engine and the test.
struct Watch {
  bool like_a_gpu = false;  ///< passes between heavy ops, a side queue that fetches are hoisted for
  bool formats_agree = false;  ///< gathered weights are fetched as they were packed where they lie
  bool multiplies_in_fp8 = false;  ///< and so computes in f16 and bf16 too
  bool queues = false;      ///< calls can be queued; they run at once, but end at synchronize() alone
  bool breaks = false;      ///< queued calls that end from now on have failed
  std::vector<std::string> queue_log;  ///< "follow 0x1", "lead 0x1", "digest"
  std::atomic<std::int64_t> allocations{0}, kernels{0};
  std::atomic<std::int64_t> live_bytes[8] = {};
  std::atomic<std::int64_t> live_kernels{0};
  std::function<void()> behind_end;  ///< called when it is settled how a queued call ends, and not known yet
  std::map<const void*, std::int64_t> shared;  ///< bytes by address, of what all devices reach
  /// Called before a kernel runs, or is made; may throw.
  std::function<void(const std::string& device, const graph::Node& node)> before_kernel, before_compile;
};

/// A device's memory is the host's here, whatever the view says.
inline TensorView on_host(TensorView view) {
  view.host = true;
  return view;
}

class ReferenceQueue final : public backend::CallQueue {
 public:
  ReferenceQueue(Watch& watch, int ordinal) : watch_(watch), ordinal_(ordinal) {}
  bool here() const override { return false; }
  void follow(void* theirs) override { watch_.queue_log.push_back(fmt::format("follow {}", theirs)); }
  void lead(void* theirs) override { watch_.queue_log.push_back(fmt::format("lead {}", theirs)); }
  void* moment() override { return this; }
  void await(void* moment) override { require(moment && moment != this, "[test] a device waits for itself"); }
  void* allocate_shared(std::int64_t bytes) override {
    void* memory = ::operator new(static_cast<std::size_t>(bytes));
    watch_.shared[memory] = bytes;
    return memory;
  }
  void release_shared(void* memory) override {
    watch_.shared.erase(memory);
    ::operator delete(memory);
  }
  /// As a GPU may that does not reach another's memory.
  void expect_reach(const TensorView& outside) const {
    if (outside.host || outside.ordinal == ordinal_) return;
    const auto shared = [&](const auto& range) {
      const auto* first = static_cast<const char*>(range.first);
      return first <= outside.data && outside.data < first + range.second;
    };
    require(std::any_of(watch_.shared.begin(), watch_.shared.end(), shared), "[test] device {} does not reach what lies on {}", ordinal_, outside.ordinal);
  }
  std::vector<backend::Digest> digest(const std::vector<TensorView>& tensors) override {
    watch_.queue_log.push_back("digest");
    std::vector<backend::Digest> digests;
    for (const auto& tensor : tensors) {
      const auto values = read(tensor);
      backend::Digest digest{};
      for (std::size_t i = 0; i < values.size(); ++i) digest[i % 2] = digest[i % 2] * 31 + std::bit_cast<std::uint64_t>(values[i]);
      digests.push_back(digest);
    }
    return digests;
  }
  void end(backend::CallState* state, std::uint32_t number, const std::vector<const std::uint32_t*>&,
           const std::vector<TensorView>& outputs) override {
    ends_.push_back([this, state, number, outputs] {
      const bool failed = watch_.breaks || std::atomic_ref(state->cancelled).load() != 0;
      for (const auto& output : outputs) {
        auto values = read(output);
        if (failed) std::fill(values.begin(), values.end(), NAN);
        if (!failed && !std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); })) std::atomic_ref(state->not_finite) = 1;
        copy(TensorView::dense(values.data(), DType::f64, output.shape), on_host(output));
      }
      if (failed) std::atomic_ref(state->failed) = 1;
      if (watch_.behind_end) watch_.behind_end();
      std::atomic_ref(state->done) = number;
    });
  }
  void run() {
    for (const auto& end : ends_) end();
    ends_.clear();
  }

 private:
  static std::vector<double> read(const TensorView& view) {
    std::vector<double> values(static_cast<std::size_t>(view.numel()));
    copy(on_host(view), TensorView::dense(values.data(), DType::f64, view.shape));
    return values;
  }
  Watch& watch_;
  const int ordinal_;
  std::vector<std::function<void()>> ends_;
};

class ReferenceDevice final : public backend::HostDevice {
 public:
  ReferenceDevice(backend::DeviceSpec spec, Watch& watch) : spec_(std::move(spec)), watch_(watch), queue_(watch, spec_.index) {}
  const backend::DeviceSpec& spec() const override { return spec_; }
  void attach() override {}

  std::unique_ptr<backend::Kernel> compile(const graph::Node& node, std::span<const backend::Operand> in,
                                           std::span<const backend::Operand> out) override {
    if (watch_.before_compile) watch_.before_compile(spec_.name(), node);
    for (std::size_t i = 0; i < in.size(); ++i) {
      auto* weight = in[i].weight;
      // Packed where a real device would; here the format is the bytes from the last to the first.
      if (weight && i == 1 && graph::is(node, "linear") && weight->packable && !weight->format)
        weight->format = {"reversed", [bytes = weight->bytes()](const void* plain, void* packed) {
                            const auto* from = static_cast<const char*>(plain);
                            std::reverse_copy(from, from + bytes, static_cast<char*>(packed));
                          }, nullptr};
    }
    return std::make_unique<ReferenceKernel>(*this, node, in, out);
  }
  bool formats_agree() const override { return watch_.formats_agree; }
  bool multiplies_in_fp8() const override { return watch_.multiplies_in_fp8; }
  graph::Fusion fusion() const override { return watch_.like_a_gpu ? graph::Fusion::passes : graph::Fusion::epilogues; }
  void* side_queue() const override { return watch_.like_a_gpu ? &watch_ : nullptr; }
  backend::CallQueue* call_queue() override { return watch_.queues ? &queue_ : nullptr; }
  void synchronize() override { queue_.run(); }
  bool decodes(const graph::Node& node, std::size_t i) const override { return graph::is(node, "cast") || i == 1; }
  void expect_compute(DType dtype) const override { require(dtype == DType::f32 || watch_.multiplies_in_fp8, "[devices] {} computes in f32 only", spec_.name()); }

  // Filled with NaNs, so that what is read before it is written shows.
  void* allocate(std::int64_t bytes) override {
    auto& live = watch_.live_bytes[spec_.index];
    require(!spec_.limit_bytes || live + bytes <= spec_.limit_bytes, "[memory] {} needs {} bytes more than its limit", spec_.name(), bytes);
    live += bytes;
    ++watch_.allocations;
    void* memory = ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{64});
    return std::memset(memory, 0xff, static_cast<std::size_t>(bytes));
  }
  void release(void* memory, std::int64_t bytes) override {
    watch_.live_bytes[spec_.index] -= bytes;
    ::operator delete(memory, std::align_val_t{64});
  }
  void read(const TensorView& outside, void* data, const graph::Type& type, const graph::Order& order) override {
    queue_.expect_reach(outside);
    copy(on_host(outside), {data, type.dtype, type.shape, graph::strides_of(type.shape, order)});
  }
  void write(const void* data, const graph::Type& type, const graph::Order& order, const TensorView& outside) override {
    queue_.expect_reach(outside);
    copy({const_cast<void*>(data), type.dtype, type.shape, graph::strides_of(type.shape, order)}, on_host(outside));
  }

 private:
  class ReferenceKernel final : public backend::Kernel {
   public:
    ReferenceKernel(ReferenceDevice& device, const graph::Node& node, std::span<const backend::Operand> in, std::span<const backend::Operand> out)
        : device_(device), node_(node), in_(in.begin(), in.end()), out_(out.begin(), out.end()) {
      ++device_.watch_.live_kernels;
    }
    ~ReferenceKernel() override { --device_.watch_.live_kernels; }
    std::int64_t workspace_bytes() const override { return 24; }

    void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override {
      if (device_.watch_.before_kernel) device_.watch_.before_kernel(device_.spec_.name(), node_);
      ++device_.watch_.kernels;
      std::memset(workspace, 0x7f, 24);
      graph::OpContext op{node_.attrs, {}, {}};
      std::vector<graph::RefTensor> inputs, outputs;
      for (std::size_t i = 0; i < in.size(); ++i) {
        op.in.push_back(in_[i].type);
        inputs.push_back(read(in_[i], in[i]));
      }
      for (const auto& o : out_) {
        op.out.push_back(o.type);
        outputs.emplace_back(o.type.shape);
      }
      node_.op->reference(op, inputs, outputs);
      for (std::size_t i = 0; i < out.size(); ++i) copy(dense(outputs[i]), view(out_[i], out_[i].type.dtype, out[i]));
    }

   private:
    static TensorView dense(graph::RefTensor& t) { return TensorView::dense(t.data.data(), DType::f64, t.shape); }
    static TensorView view(const backend::Operand& o, DType dtype, const void* data) {
      return {const_cast<void*>(data), dtype, o.type.shape, graph::strides_of(o.type.shape, o.order)};
    }
    static graph::RefTensor read(const backend::Operand& o, const void* data) {
      graph::RefTensor t(o.type.shape);
      if (!o.weight) {
        copy(view(o, o.type.dtype, data), dense(t));
        return t;
      }
      std::vector<char> plain(static_cast<std::size_t>(o.weight->bytes()));
      const auto* bytes = static_cast<const char*>(data);
      if (o.weight->format)
        std::reverse_copy(bytes, bytes + plain.size(), plain.begin());
      else
        std::copy(bytes, bytes + plain.size(), plain.begin());
      copy(view(o, o.weight->stored, plain.data()), dense(t));
      return t;
    }

    ReferenceDevice& device_;
    graph::Node node_;
    std::vector<backend::Operand> in_, out_;
  };

  backend::DeviceSpec spec_;
  Watch& watch_;
  ReferenceQueue queue_;
};

}  // namespace comfytp::test
