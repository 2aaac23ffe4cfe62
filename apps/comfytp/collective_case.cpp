#include "collective_case.h"

#include <algorithm>

#include "base/error.h"
#include "comm/sum.h"
#include "random.h"

namespace comfytp::cli {

CollectiveCase::CollectiveCase(std::string name, DType type, std::int64_t size, int count)
    : op(std::move(name)), dtype(type), bytes(size / size_of(type) * size_of(type)), ranks(count) {
  require(op == "all_reduce" || op == "all_gather" || op == "reduce_scatter" || op == "halo_exchange",
          "[collectives] expected all_reduce, all_gather, reduce_scatter or halo_exchange but got '{}'", op);
  require(dtype == DType::f16 || dtype == DType::bf16 || dtype == DType::f32, "[collectives] expected f16, bf16 or f32 but got '{}'", name_of(dtype));
  const auto elements = bytes / size_of(dtype);
  const bool halo = op == "halo_exchange";
  const auto whole = halo ? 2 * elements * ranks : elements;  // a part is twice what a neighbour gets of it
  for (int r = 0; r <= ranks; ++r) bounds_.push_back(whole * r / ranks);
  if (!halo) return;
  for (std::size_t r = 0; r + 1 < bounds_.size(); ++r) {
    need_lo_.push_back(std::max<std::int64_t>(bounds_[r] - elements, 0));
    need_hi_.push_back(std::min(bounds_[r + 1] + elements, whole));
  }
}

Shape CollectiveCase::in_shape(int rank) const {
  const auto r = static_cast<std::size_t>(rank);
  return {op == "all_reduce" || op == "reduce_scatter" ? bounds_.back() : bounds_[r + 1] - bounds_[r]};
}

Shape CollectiveCase::out_shape(int rank) const {
  const auto r = static_cast<std::size_t>(rank);
  if (op == "halo_exchange") return {need_hi_[r] - need_lo_[r]};
  return {op == "reduce_scatter" ? bounds_[r + 1] - bounds_[r] : bounds_.back()};
}

void CollectiveCase::call(comm::Communicator& end, const TensorView& in, const TensorView& out) const {
  if (op == "all_reduce") return end.all_reduce(in, out);
  if (op == "all_gather") return end.all_gather(in, out, 0, bounds_);
  if (op == "reduce_scatter") return end.reduce_scatter(in, out, 0, bounds_);
  end.halo_exchange(in, out, 0, bounds_, need_lo_, need_hi_);
}

void CollectiveCase::compute(const std::vector<TensorView>& in, int rank, const TensorView& out) const {
  const auto r = static_cast<std::size_t>(rank);
  if (op == "all_reduce") return comm::sum(in, out);
  if (op == "reduce_scatter") {
    std::vector<TensorView> parts;
    for (const auto& view : in) parts.push_back(part_of(view, 0, bounds_[r], bounds_[r + 1]));
    return comm::sum(parts, out);
  }
  const Interval need = op == "all_gather" ? Interval{0, bounds_.back()} : Interval{need_lo_[r], need_hi_[r]};
  for (std::size_t from = 0; from < in.size(); ++from) {
    const Interval common = intersect({bounds_[from], bounds_[from + 1]}, need);
    if (common.size() > 0)
      copy(part_of(in[from], 0, common.lo - bounds_[from], common.hi - bounds_[from]), part_of(out, 0, common.lo - need.lo, common.hi - need.lo));
  }
}

std::int64_t CollectiveCase::traffic_bytes() const {
  if (op == "halo_exchange") return bytes * std::min(ranks - 1, 2);
  return (op == "all_reduce" ? 2 : 1) * bytes * (ranks - 1) / ranks;
}

CaseTensors::CaseTensors(const CollectiveCase& what) : what_(what) {
  constexpr std::size_t kPool = (1 << 18) - 5;  // as many different numbers, repeated: odd, so that no chunk looks like the next
  std::vector<float> pool(kPool);
  for (int r = 0; r < what.ranks; ++r) {
    in.emplace_back(what.dtype, what.in_shape(r));
    out.emplace_back(what.dtype, what.out_shape(r));
    NormalStream(static_cast<std::uint64_t>(r), "collectives").fill(pool, 0, 0, 1);
    const auto view = in.back().view();
    for (std::int64_t at = 0; at < view.numel(); at += static_cast<std::int64_t>(kPool))
      convert(pool.data(), DType::f32, static_cast<std::byte*>(view.data) + at * size_of(what.dtype), what.dtype,
              std::min(view.numel() - at, static_cast<std::int64_t>(kPool)));
  }
}

bool CaseTensors::right() {
  std::vector<TensorView> inputs;
  for (auto& tensor : in) inputs.push_back(tensor.view());
  for (int r = 0; r < what_.ranks; ++r) {
    HostTensor expected(what_.dtype, what_.out_shape(r));
    what_.compute(inputs, r, expected.view());
    if (expected.bytes() != out[static_cast<std::size_t>(r)].bytes()) return false;
  }
  return true;
}

TensorView DeviceBuffers::place(backend::Device& device, Memory& memory, const TensorView& host) {
  if (memory.bytes < host.bytes()) {
    device.release(memory.data, memory.bytes);
    memory = {};
    memory.data = device.allocate(host.bytes());
    memory.bytes = host.bytes();
  }
  TensorView view = host;
  view.data = memory.data;
  view.host = device.queue() == nullptr;
  device.read(host, memory.data, {host.dtype, host.shape}, {0});
  device.synchronize();
  return view;
}

void DeviceBuffers::put(backend::Device& device, const TensorView& host_in, const TensorView& host_out) {
  in = place(device, in_memory_, host_in);
  out = place(device, out_memory_, host_out);
}

void DeviceBuffers::get(backend::Device& device, const TensorView& host_out) const {
  device.write(out.data, {host_out.dtype, host_out.shape}, {0}, host_out);
  device.synchronize();
}

void DeviceBuffers::release(backend::Device& device) {
  for (auto* memory : {&in_memory_, &out_memory_}) {
    device.release(memory->data, memory->bytes);
    *memory = {};
  }
}

}  // namespace comfytp::cli
