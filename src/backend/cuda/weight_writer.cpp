#include "backend/cuda/weight_writer.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "backend/cuda/staging.h"

namespace comfytp::backend::cuda {
namespace {

constexpr std::int64_t kLeast = std::int64_t{16} << 20;
constexpr std::size_t kReaders = 4;  // one thread reads a mapped file at a fraction of what the bus takes

class Writer final : public WeightWriter {
 public:
  explicit Writer(Context& context) : context_(context) {
    for (std::size_t i = 0; i < kReaders; ++i) readers_.emplace_back([this] { read(); });
  }
  ~Writer() override {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
      jobs_.clear();
    }
    changed_.notify_all();
    for (auto& reader : readers_) reader.join();
    cudaStreamSynchronize(context_.stream);
    cudaFree(plain_);
  }

  void write(WeightBuffer& buffer, const std::function<void(void*)>& fill) override {
    if (!buffer.format) buffer.packable = false;  // a kernel that is made later finds it as it is now
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return jobs_.size() < kReaders || failure_; });
    if (failure_) std::rethrow_exception(failure_);
    jobs_.push_back({&buffer, fill});
    ++unfinished_;
    lock.unlock();
    changed_.notify_all();
  }
  void finish() override {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return unfinished_ == 0 || failure_; });
    if (failure_) std::rethrow_exception(failure_);
    lock.unlock();
    check(cudaStreamSynchronize(context_.stream), "copying weights to the device");
  }

 private:
  struct Job {
    WeightBuffer* buffer;
    std::function<void(void*)> fill;
  };

  void read() {
    PinnedBuffer staging;
    cudaEvent_t taken = nullptr;
    try {
      check(cudaSetDevice(context_.ordinal), "choosing the device");
      check(cudaEventCreateWithFlags(&taken, cudaEventDisableTiming), "making an event");
      while (true) {
        Job job;
        {
          std::unique_lock lock(mutex_);
          changed_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
          if (stopping_) break;
          job = std::move(jobs_.front());
          jobs_.pop_front();
        }
        changed_.notify_all();
        check(cudaEventSynchronize(taken), "waiting for a copy");
        void* host = staging.reserve(std::max(job.buffer->bytes(), kLeast));
        job.fill(host);
        std::lock_guard lock(mutex_);  // no other copy may come between a weight's and its packing
        send(*job.buffer, host);
        check(cudaEventRecord(taken, context_.stream), "recording an event");
        --unfinished_;
        changed_.notify_all();
      }
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      jobs_.clear();
      changed_.notify_all();
    }
    if (taken) {
      cudaEventSynchronize(taken);
      cudaEventDestroy(taken);
    }
  }

  void send(WeightBuffer& buffer, const void* host) {
    const auto bytes = static_cast<std::size_t>(buffer.bytes());
    if (!buffer.format)
      return check(cudaMemcpyAsync(buffer.data, host, bytes, cudaMemcpyHostToDevice, context_.stream), "copying a weight to the device");
    if (bytes > plain_bytes_) {
      check(cudaStreamSynchronize(context_.stream), "copying weights to the device");
      cudaFree(plain_);
      plain_ = nullptr;
      plain_bytes_ = 0;
      check(cudaMalloc(&plain_, bytes), "memory to rearrange a weight in");
      plain_bytes_ = bytes;
    }
    check(cudaMemcpyAsync(plain_, host, bytes, cudaMemcpyHostToDevice, context_.stream), "copying a weight to the device");
    buffer.format->pack(plain_, buffer.data);
  }

  Context& context_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  std::size_t unfinished_ = 0;
  bool stopping_ = false;
  std::exception_ptr failure_;
  void* plain_ = nullptr;
  std::size_t plain_bytes_ = 0;
  std::vector<std::thread> readers_;
};

}  // namespace

std::unique_ptr<WeightWriter> make_weight_writer(Context& context) { return std::make_unique<Writer>(context); }

}  // namespace comfytp::backend::cuda
