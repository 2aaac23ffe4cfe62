#include "runtime/team.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <new>

#include "base/error.h"
#include "base/thread.h"

namespace comfytp::runtime {

using comm::Abort;

Team::Team(std::vector<std::unique_ptr<backend::Device>> devices) : devices_(std::move(devices)) {
  for (const auto& device : devices_) names_.push_back(device->spec().name());
  discarded_.resize(size());
  for (std::size_t i = 0; i < size(); ++i) threads_.emplace_back([this, i] { work(i); });
  try {
    run([](std::size_t, backend::Device& device) { device.attach(); });
  } catch (...) {
    stop();
    throw;
  }
  queues_ = std::all_of(devices_.begin(), devices_.end(), [](const auto& device) { return device->call_queue() != nullptr; });
}

Team::~Team() { stop(); }

void Team::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Team::work(std::size_t index) {
  name_thread(names_[index]);
  std::uint64_t seen = 0;
  for (;;) {
    const Job* job = nullptr;
    {
      std::unique_lock lock(mutex_);
      work_.wait(lock, [&] { return stopping_ || (generation_ != seen && first_ <= index && index < last_); });
      if (!stopping_) job = job_;
      seen = generation_;
    }
    if (!job) {
      sweep(index);
      devices_[index].reset();
      return;
    }
    attempt(*job, index);
    {
      std::lock_guard lock(mutex_);
      if (--busy_ > 0) continue;
    }
    done_.notify_one();
  }
}

void Team::discard(std::size_t device, std::shared_ptr<void> object) {
  std::lock_guard lock(mutex_);
  discarded_[device].push_back(std::move(object));
}

void Team::sweep(std::size_t index) {
  std::vector<std::shared_ptr<void>> objects;  // destroyed behind the lock
  std::lock_guard lock(mutex_);
  objects.swap(discarded_[index]);
}

void Team::attempt(const Job& job, std::size_t index) {
  auto kind = Abort::Kind::error;
  std::string reason;
  try {
    sweep(index);
    return job(index, *devices_[index]);
  } catch (const Cancelled& e) {
    kind = Abort::Kind::cancelled;
    reason = e.what();
  } catch (const Timeout& e) {
    kind = Abort::Kind::timeout;
    reason = e.what();
  } catch (const OutOfMemory& e) {
    kind = Abort::Kind::out_of_memory;
    reason = names_[index] + ": " + e.what();
  } catch (const DeviceFailure& e) {
    kind = Abort::Kind::device;
    reason = names_[index] + ": " + e.what();
  } catch (const std::bad_alloc&) {
    kind = Abort::Kind::out_of_memory;
    reason = names_[index] + ": the system has no more memory";
  } catch (const std::exception& e) {
    reason = names_[index] + ": " + e.what();
  } catch (...) {
    reason = names_[index] + ": unknown failure";
  }
  abort_->raise(kind, reason);
  std::lock_guard lock(mutex_);
  failed_ = true;
}

bool Team::here(std::size_t device) {
  auto* queue = devices_[device]->call_queue();
  return queue && queue->here();
}

void Team::run(const Job& job, const std::function<void()>& meanwhile) {
  std::lock_guard call(calls_);
  run(job, 0, size(), meanwhile);
}

void Team::run_on(std::size_t device, const Job& job) {
  std::lock_guard call(calls_);
  run(job, device, device + 1, {});
}

void Team::run(const Job& job, std::size_t first, std::size_t last, const std::function<void()>& meanwhile) {
  if (last - first == 1 && !meanwhile && here(first)) {  // two threads that wake each other would cost more than what most jobs do
    failed_ = false;
    attempt(job, first);
    if (failed_) abort_->check();
    return;
  }
  std::unique_lock lock(mutex_);
  job_ = &job;
  first_ = first;
  last_ = last;
  busy_ = last - first;
  failed_ = false;
  ++generation_;
  work_.notify_all();
  const auto all_done = [&] { return busy_ == 0; };
  std::exception_ptr thrown;
  while (meanwhile && !thrown && !done_.wait_for(lock, std::chrono::milliseconds(100), all_done)) {
    lock.unlock();
    try {
      meanwhile();
    } catch (...) {
      thrown = std::current_exception();
      abort_->raise(Abort::Kind::cancelled, "cancelled by the caller's callback");
    }
    lock.lock();
  }
  if (queues_) {  // done in less time than it takes to be woken, where nothing is waited for
    lock.unlock();
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
    while (busy_ > 0 && std::chrono::steady_clock::now() < until) std::this_thread::yield();
    lock.lock();
  }
  done_.wait(lock, all_done);
  const bool failed = failed_;
  lock.unlock();
  if (thrown) std::rethrow_exception(thrown);
  if (failed) abort_->check();
}

}  // namespace comfytp::runtime
