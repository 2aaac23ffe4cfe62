#include "runtime/team.h"

#include <chrono>
#include <exception>

#include "base/error.h"
#include "base/thread.h"

namespace comfytp::runtime {

using comm::Abort;

Team::Team(std::vector<std::unique_ptr<backend::Device>> devices) {
  for (const auto& device : devices) names_.push_back(device->spec().name());
  discarded_.resize(devices.size());
  for (std::size_t i = 0; i < devices.size(); ++i)
    threads_.emplace_back([this, i, device = std::move(devices[i])]() mutable { work(i, std::move(device)); });
  try {
    run([](std::size_t, backend::Device& device) { device.attach(); });
  } catch (...) {
    stop();
    throw;
  }
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

void Team::work(std::size_t index, std::unique_ptr<backend::Device> device) {
  name_thread(names_[index]);
  std::uint64_t seen = 0;
  for (;;) {
    const Job* job = nullptr;
    {
      std::unique_lock lock(mutex_);
      work_.wait(lock, [&] { return stopping_ || generation_ != seen; });
      if (!stopping_) job = job_;
      seen = generation_;
    }
    sweep(index);
    if (!job) return;
    attempt(*job, index, *device);
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

void Team::attempt(const Job& job, std::size_t index, backend::Device& device) {
  auto kind = Abort::Kind::error;
  std::string reason;
  try {
    return job(index, device);
  } catch (const Cancelled& e) {
    kind = Abort::Kind::cancelled;
    reason = e.what();
  } catch (const Timeout& e) {
    kind = Abort::Kind::timeout;
    reason = e.what();
  } catch (const std::exception& e) {
    reason = names_[index] + ": " + e.what();
  } catch (...) {
    reason = names_[index] + ": unknown failure";
  }
  abort_->raise(kind, reason);
  std::lock_guard lock(mutex_);
  failed_ = true;
}

void Team::run(const Job& job, const std::function<void()>& meanwhile) {
  std::lock_guard call(calls_);
  std::unique_lock lock(mutex_);
  job_ = &job;
  busy_ = threads_.size();
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
  done_.wait(lock, all_done);
  const bool failed = failed_;
  lock.unlock();
  if (thrown) std::rethrow_exception(thrown);
  if (failed) abort_->check();
}

}  // namespace comfytp::runtime
