// The devices of an engine, and the one thread that each of them is spoken to from.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "backend/backend.h"
#include "comm/abort.h"

namespace comfytp::runtime {

class Team {
 public:
  /// Throws what a device's attach() throws.
  explicit Team(std::vector<std::unique_ptr<backend::Device>> devices);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  std::size_t size() const { return names_.size(); }
  const std::string& name(std::size_t device) const { return names_[device]; }
  const std::shared_ptr<comm::Abort>& abort() const { return abort_; }

  using Job = std::function<void(std::size_t index, backend::Device& device)>;
  /// Runs the job for all devices at once, each on its own thread, and waits for all. The first failure raises the abort, so that
  /// no device waits for one that failed, and is thrown with the device's name. `meanwhile` is called now and then on the
  /// calling thread. One call at a time; not from within a job. A device alone that can be spoken to from the calling thread is.
  void run(const Job& job, const std::function<void()>& meanwhile = {});
  /// The same for one of the devices.
  void run_on(std::size_t device, const Job& job);
  /// All devices run what they are given later (Device::call_queue).
  bool queues() const { return queues_; }
  /// Destroys an object on the device's thread, some time before its next job. Never waits.
  void discard(std::size_t device, std::shared_ptr<void> object);

 private:
  void work(std::size_t index);
  void sweep(std::size_t index);
  void attempt(const Job& job, std::size_t index);
  void run(const Job& job, std::size_t first, std::size_t last, const std::function<void()>& meanwhile);
  bool here(std::size_t device);
  void stop();

  std::vector<std::unique_ptr<backend::Device>> devices_;  // each dies on its own thread
  std::vector<std::string> names_;
  std::shared_ptr<comm::Abort> abort_ = std::make_shared<comm::Abort>();
  std::mutex calls_;  // held by a run()

  std::mutex mutex_;
  std::condition_variable work_, done_;
  const Job* job_ = nullptr;
  std::size_t first_ = 0, last_ = 0;  // of the devices that the job is for, last_ excluded
  std::uint64_t generation_ = 0;
  std::atomic<std::size_t> busy_ = 0;
  bool failed_ = false, stopping_ = false, queues_ = false;
  std::vector<std::vector<std::shared_ptr<void>>> discarded_;  // by device
  std::vector<std::thread> threads_;
};

}  // namespace comfytp::runtime
