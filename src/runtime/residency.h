// What lies in the devices' memories: weights, one arena a device, and the kept results of each program's prompts.
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "runtime/compiled.h"
#include "runtime/weight_store.h"

namespace comfytp::runtime {

class Residency {
 public:
  /// At most `programs` programs keep prompts' results at a time.
  Residency(std::shared_ptr<Team> team, std::shared_ptr<const weights::Source> source, int programs);
  ~Residency();

  WeightStore& weights(std::size_t device) { return devices_[device].weights; }
  const WeightStore& weights(std::size_t device) const { return devices_[device].weights; }
  void* arena(std::size_t device) const { return devices_[device].arena; }
  /// Changes whenever anything may have moved on any device: then all record again, since what they record together they must run together.
  std::uint64_t generation() const;

  /// The program of that text if it is among those kept; it becomes the most recently used.
  std::shared_ptr<Compiled> find(const std::string& text);
  /// Makes a program the most recently used; the least recently used beyond the limit gives back its memory.
  void use(const std::shared_ptr<Compiled>& compiled);
  /// Allocates and loads what the program lacks. Returns the bytes read. When it throws, all that it loaded or allocated is
  /// released again.
  std::int64_t load(Compiled& compiled, const std::function<void(std::int64_t, std::int64_t)>& progress);
  bool loaded(const Compiled& compiled) const { return compiled.resident_since == epoch_; }
  void unload();
  /// All prompts' parts run again.
  void forget_prompts();
  /// Reads the loaded parts of these weights again. Returns the bytes read. When it throws, they are released.
  std::int64_t update(const std::set<std::string>& keys);

  std::vector<std::int64_t> weight_bytes() const, activation_bytes() const;

 private:
  struct DeviceMemory {
    explicit DeviceMemory(std::shared_ptr<const weights::Source> source) : weights(std::move(source)) {}
    WeightStore weights;
    void* arena = nullptr;
    std::int64_t arena_bytes = 0, prompt_bytes = 0;
    std::uint64_t moves = 0;  ///< of the arena and of prompts'
  };
  void load_on(std::size_t d, backend::Device& device, Compiled& compiled, const std::function<void(std::int64_t)>& loaded,
               std::vector<backend::WeightBuffer*>& fresh);
  void release_arena(std::size_t d, backend::Device& device);
  void release_prompts(std::size_t d, backend::Device& device, Compiled& compiled);

  std::shared_ptr<Team> team_;
  std::vector<DeviceMemory> devices_;
  std::list<std::shared_ptr<Compiled>> programs_;  // most recently used first
  std::size_t limit_;
  std::uint64_t epoch_ = 1;
};

}  // namespace comfytp::runtime
