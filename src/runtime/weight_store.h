// The weights of one device: every part that some program reads, once.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "backend/backend.h"
#include "weights/source.h"

namespace comfytp::runtime {

/// Used by the device's worker alone.
class WeightStore {
 public:
  explicit WeightStore(std::shared_ptr<const weights::Source> source) : source_(std::move(source)) {}

  /// The part that a weight node names (attributes key, full, offset, shape). Parts with equal boxes are one buffer; one that
  /// must stay row-major is another than one that a kernel may pack. Throws Error naming source and key when there is no such
  /// tensor or its shape is another than `full` but for dimensions of size 1.
  backend::WeightBuffer* find(const graph::Attrs& node, bool packable);

  /// Allocates and reads those of `buffers` that are not loaded, each straight from the source to where the device wants it. Many lie in one
  /// piece of memory, since a GPU hands out multiples of 2 MiB; it is given back when none of them is loaded any more.
  /// `loaded` gets the bytes of each and may throw to stop.
  /// What was loaded is appended to `fresh`, also when it throws. What no kernel has wanted in a format by now stays row-major, here and
  /// so on every device: also what this one only fetches.
  void load(backend::Device& device, const std::vector<backend::WeightBuffer*>& buffers, const std::function<void(std::int64_t)>& loaded,
            std::vector<backend::WeightBuffer*>& fresh);
  /// The loaded buffers of these keys.
  std::vector<backend::WeightBuffer*> loaded(const std::set<std::string>& keys);
  /// Reads loaded buffers again. `loaded` as in load().
  void reload(backend::Device& device, const std::vector<backend::WeightBuffer*>& buffers, const std::function<void(std::int64_t)>& loaded);
  void release(backend::Device& device, const std::vector<backend::WeightBuffer*>& buffers);
  /// Releases all.
  void unload(backend::Device& device);
  /// Changes whenever the address of a loaded weight may have changed.
  std::uint64_t generation() const { return generation_; }
  /// Of what is loaded now, without what lies between: less than 256 bytes each.
  std::int64_t bytes() const { return bytes_; }

 private:
  struct Slab {
    void* data = nullptr;
    std::int64_t bytes = 0;
    int loaded = 0;  ///< of its buffers
  };
  struct Entry {
    backend::WeightBuffer buffer;
    Box box;  ///< of the source's tensor
    std::shared_ptr<Slab> slab;   ///< where it lies; without data when that was given back, null before it was ever loaded
    std::int64_t offset = 0;
  };

  void read(backend::WeightWriter& writer, backend::WeightBuffer& buffer) const;
  void allocate(backend::Device& device, const std::vector<Entry*>& entries);
  void give_back(backend::Device& device, Slab& slab);

  using Key = std::tuple<std::string, graph::Ints, graph::Ints, bool>;  // key, offset, shape, packable

  std::shared_ptr<const weights::Source> source_;
  std::map<Key, Entry> entries_;
  std::map<const backend::WeightBuffer*, Entry*> entry_of_;
  std::int64_t bytes_ = 0;
  std::uint64_t generation_ = 1;
};

}  // namespace comfytp::runtime
