#include "comm/cuda/cuda_group.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "backend/cuda/status.h"

namespace comfytp::comm::cuda {

namespace {

constexpr std::size_t kShared = kStaging + kFlags * sizeof(std::uint32_t);

std::uint32_t load(std::uint32_t& word) { return std::atomic_ref(word).load(std::memory_order_acquire); }
void store(std::uint32_t& word, std::uint32_t value) { std::atomic_ref(word).store(value, std::memory_order_release); }

std::vector<std::string> names_of(const std::vector<DeviceRank>& ranks) {
  std::vector<std::string> names;
  for (const auto& rank : ranks) names.push_back(rank.name);
  return names;
}

}  // namespace

CurrentDevice::CurrentDevice(int ordinal) {
  backend::cuda::check(cudaGetDevice(&before_), "asking for the device");
  backend::cuda::check(cudaSetDevice(ordinal), "choosing the device");
}

CurrentDevice::~CurrentDevice() { cudaSetDevice(before_); }

CudaGroup::CudaGroup(const std::vector<DeviceRank>& ranks, std::shared_ptr<Abort> abort, std::chrono::duration<double> timeout, bool peers)
    : HostGroup(names_of(ranks), abort, timeout),
      ranks_(ranks),
      abort_(abort),
      timeout_(timeout),
      peers_(peers),
      worlds_(ranks.size()),
      staging_(ranks.size()) {
  require(ranks.size() <= kMaxRanks, "[comm] expected at most {} CUDA devices in a group but got {}", kMaxRanks, ranks.size());
  try {
    allocate();
    connect();
  } catch (...) {
    release();
    throw;
  }
}

CudaGroup::~CudaGroup() { release(); }

void CudaGroup::allocate() {
  for (std::size_t r = 0; r < ranks_.size(); ++r) {
    const CurrentDevice current(ranks_[r].ordinal);
    World& w = worlds_[r];
    const auto what = [&](const char* memory) { return fmt::format("{} for the collectives of {}", memory, ranks_[r].name); };
    void* shared = nullptr;
    if (peers_)
      backend::cuda::check(cudaMalloc(&shared, kShared), what("memory").c_str());
    else
      backend::cuda::check(cudaHostAlloc(&shared, kShared, cudaHostAllocPortable | cudaHostAllocMapped), what("page-locked memory").c_str());
    staging_[r] = static_cast<char*>(shared);
    w.flags[r] = reinterpret_cast<std::uint32_t*>(staging_[r] + kStaging);
    backend::cuda::check(cudaMalloc(reinterpret_cast<void**>(&w.local), sizeof(Local)), what("memory").c_str());
    backend::cuda::check(cudaHostAlloc(reinterpret_cast<void**>(&w.control), sizeof(Control), cudaHostAllocPortable | cudaHostAllocMapped),
          what("page-locked memory").c_str());
    w.rank = static_cast<int>(r);
    w.ranks = static_cast<int>(ranks_.size());
    w.shared = !peers_;
    w.region = w.shared || w.ranks < 2 ? kRegion : kRegion / static_cast<std::uint32_t>(w.ranks - 1) / 256 * 256;
    w.timeout_ns = static_cast<std::uint64_t>(std::clamp(timeout_.count(), 0.0, 1e8) * 1e9);
    clear(r);
    backend::cuda::check(load_kernels(), "loading the kernels of collectives");
    // Ranks that share a GPU must find room on it at the same time, each with a kernel of its side queue as well, and leave most
    // multiprocessors to what their peers compute before they come: a kernel may need one for itself.
    int processors = 0;
    backend::cuda::check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, ranks_[r].ordinal), "asking for the device's properties");
    const auto sharing = std::count_if(ranks_.begin(), ranks_.end(), [&](const DeviceRank& other) { return other.ordinal == ranks_[r].ordinal; });
    blocks_ = std::clamp(sharing > 1 ? processors / static_cast<int>(4 * sharing) : processors, 1, blocks_);
  }
}

void CudaGroup::connect() {
  for (std::size_t r = 0; r < ranks_.size(); ++r) {
    const CurrentDevice current(ranks_[r].ordinal);
    World& w = worlds_[r];
    for (std::size_t s = 0; s < ranks_.size(); ++s) {
      if (r == s) continue;
      // In memory of its own a rank has a place for each of its peers.
      const auto place = [&](std::size_t reader, std::size_t giver) {
        const auto size = std::size_t{kBuffers} * kBlocks * w.region, slot = (giver + ranks_.size() - reader - 1) % ranks_.size();
        return peers_ ? staging_[reader] + slot * size : staging_[giver];
      };
      w.out[s] = place(s, r);
      w.in[s] = place(r, s);
      w.flags[s] = worlds_[s].flags[s];
      if (!peers_ || ranks_[r].ordinal == ranks_[s].ordinal) continue;
      const auto status = cudaDeviceEnablePeerAccess(ranks_[s].ordinal, 0);
      if (status == cudaErrorPeerAccessAlreadyEnabled)
        cudaGetLastError();
      else
        backend::cuda::check(status, fmt::format("letting {} read the memory of {}", ranks_[r].name, ranks_[s].name).c_str());
    }
  }
}

// Nothing runs.
void CudaGroup::clear(std::size_t rank) {
  World& w = worlds_[rank];
  backend::cuda::check(cudaMemset(w.local, 0, sizeof(Local)), "clearing the counters of collectives");
  if (peers_)
    backend::cuda::check(cudaMemset(w.flags[rank], 0, kFlags * sizeof(std::uint32_t)), "clearing the flags of collectives");
  else
    std::memset(w.flags[rank], 0, kFlags * sizeof(std::uint32_t));
  backend::cuda::check(cudaStreamSynchronize(nullptr), "clearing the flags of collectives");
  store(w.control->abort, 0);
  store(w.control->error, 0);
}

std::map<std::string, Communicator::Spent> CudaGroup::spent(int rank) const {
  const CurrentDevice current(ordinal(rank));
  Spent spent[kOps];
  backend::cuda::check(cudaStreamSynchronize(stream(rank)), "running");  // which the copy's default stream does not wait for
  backend::cuda::check(cudaMemcpy(spent, world(rank).local->spent, sizeof(spent), cudaMemcpyDeviceToHost), "reading the counters of collectives");
  std::map<std::string, Communicator::Spent> by_op;
  for (int op = 0; op < kOps; ++op)
    if (const auto& s = spent[op]; s.calls)
      by_op[kOpNames[op]] = {static_cast<std::int64_t>(s.calls), static_cast<double>(s.waiting) / 1e9, static_cast<double>(s.moving) / 1e9};
  return by_op;
}

void CudaGroup::release() {
  for (std::size_t r = 0; r < ranks_.size(); ++r) {
    World& w = worlds_[r];
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(ranks_[r].ordinal);
    peers_ ? cudaFree(staging_[r]) : cudaFreeHost(staging_[r]);
    cudaFree(w.local);
    cudaFreeHost(w.control);
    cudaSetDevice(before);
  }
}

void CudaGroup::wake() {
  for (const auto& w : worlds_) store(w.control->abort, 1);
  HostGroup::wake();
}

void CudaGroup::reset() {
  HostGroup::reset();
  if (std::none_of(worlds_.begin(), worlds_.end(), [](const World& w) { return load(w.control->abort) || load(w.control->error); })) return;
  for (const auto& w : worlds_) store(w.control->abort, 1);  // so that no kernel waits any longer
  for (std::size_t r = 0; r < ranks_.size(); ++r) {
    const CurrentDevice current(ranks_[r].ordinal);
    backend::cuda::check(cudaStreamSynchronize(stream(static_cast<int>(r))), "running");
  }
  for (std::size_t r = 0; r < ranks_.size(); ++r) {
    const CurrentDevice current(ranks_[r].ordinal);
    clear(r);
  }
}

void CudaGroup::check(int rank) {
  const auto error = load(world(rank).control->error);
  if (error == 0) return;
  const auto missing = static_cast<int>(error >> 8 & 0xff);
  const char* op = kOpNames[error >> 16];
  if (static_cast<Fault>(error & 0xff) == Fault::timeout)  // otherwise the abort is raised already
    abort_->raise(Abort::Kind::timeout, fmt::format("[{}] {} waited {:g} s for {}", op, name(rank), timeout_.count(), name(missing)));
  abort_->check();
  fail("[{}] {} stopped waiting for {}", op, name(rank), name(missing));
}

}  // namespace comfytp::comm::cuda
