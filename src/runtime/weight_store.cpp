#include "runtime/weight_store.h"

#include <algorithm>
#include <iterator>

#include "base/error.h"
#include "runtime/memory_plan.h"

namespace comfytp::runtime {
namespace {

constexpr std::int64_t kSlab = std::int64_t{256} << 20;  // bytes; a larger weight has one of its own

// The box [offset, offset + shape) of `full` as a box of `actual`, which differs from `full` in dimensions of size 1 only.
Box source_box(const graph::Attrs& node, const Shape& actual, const std::string& source) {
  const auto &full = node.ints("full"), &offset = node.ints("offset"), &shape = node.ints("shape");
  Box moving;
  Shape expected;
  for (std::size_t d = 0; d < full.size(); ++d) {
    if (full[d] == 1) continue;
    moving.push_back({offset[d], offset[d] + shape[d]});
    expected.push_back(full[d]);
  }
  Shape given = actual;
  std::erase(given, 1);
  require(given == expected, "[weights] expected '{}' in {} to be of shape {} but got {}", node.text("key"), source, to_string(full),
          to_string(actual));
  Box box;
  auto next = moving.begin();
  for (auto size : actual) box.push_back(size == 1 ? Interval{0, 1} : *next++);
  return box;
}

}  // namespace

backend::WeightBuffer* WeightStore::find(const graph::Attrs& node, bool packable) {
  const Key key{node.text("key"), node.ints("offset"), node.ints("shape"), packable};
  const auto [it, fresh] = entries_.try_emplace(key);
  Entry& entry = it->second;
  if (!fresh) return &entry.buffer;
  try {
    const auto& info = source_->info(node.text("key"));
    entry.box = source_box(node, info.shape, source_->name());
    entry.buffer.key = node.text("key");
    entry.buffer.shape = node.ints("shape");
    entry.buffer.stored = info.dtype;
    entry.buffer.packable = packable;
  } catch (...) {
    entries_.erase(it);
    throw;
  }
  entry_of_[&entry.buffer] = &entry;
  return &entry.buffer;
}

void WeightStore::load(backend::Device& device, const std::vector<backend::WeightBuffer*>& buffers,
                       const std::function<void(std::int64_t)>& loaded, std::vector<backend::WeightBuffer*>& fresh) {
  const auto writer = device.weight_writer();
  std::vector<Entry*> wanted, homeless;
  for (auto* buffer : buffers)
    if (!buffer->data && buffer->bytes() > 0) wanted.push_back(entry_of_.at(buffer));
  std::copy_if(wanted.begin(), wanted.end(), std::back_inserter(homeless), [](const Entry* entry) { return !entry->slab || !entry->slab->data; });
  try {
    allocate(device, homeless);
    for (auto* entry : wanted) {
      entry->buffer.data = static_cast<char*>(entry->slab->data) + entry->offset;
      ++entry->slab->loaded;
      bytes_ += entry->buffer.bytes();
      ++generation_;
      fresh.push_back(&entry->buffer);
      read(*writer, entry->buffer);
      loaded(entry->buffer.bytes());
    }
    writer->finish();
  } catch (...) {
    for (auto* entry : homeless)
      if (entry->slab && entry->slab->loaded == 0) give_back(device, *entry->slab);
    throw;
  }
  for (auto& [key, entry] : entries_)
    if (!entry.buffer.format) entry.buffer.packable = false;
}

// A place for each, in slabs as large as what lies in them.
void WeightStore::allocate(backend::Device& device, const std::vector<Entry*>& entries) {
  for (auto next = entries.begin(); next != entries.end();) {
    const auto slab = std::make_shared<Slab>();
    const auto first = next;
    for (; next != entries.end(); ++next) {
      const auto bytes = aligned(slab->bytes) + (*next)->buffer.bytes();
      if (next != first && bytes > kSlab) break;
      (*next)->offset = bytes - (*next)->buffer.bytes();
      slab->bytes = bytes;
    }
    slab->data = device.allocate(slab->bytes);
    std::for_each(first, next, [&](Entry* entry) { entry->slab = slab; });
  }
}

void WeightStore::read(backend::WeightWriter& writer, backend::WeightBuffer& buffer) const {
  const Entry* entry = entry_of_.at(&buffer);
  writer.write(buffer, [this, entry](void* host) { source_->read(entry->buffer.key, entry->box, host); });
}

std::vector<backend::WeightBuffer*> WeightStore::loaded(const std::set<std::string>& keys) {
  std::vector<backend::WeightBuffer*> found;
  for (auto& [key, entry] : entries_)
    if (entry.buffer.data && keys.contains(entry.buffer.key)) found.push_back(&entry.buffer);
  return found;
}

void WeightStore::reload(backend::Device& device, const std::vector<backend::WeightBuffer*>& buffers,
                         const std::function<void(std::int64_t)>& loaded) {
  const auto writer = device.weight_writer();
  for (auto* buffer : buffers) {
    read(*writer, *buffer);
    loaded(buffer->bytes());
  }
  writer->finish();
}

void WeightStore::release(backend::Device& device, const std::vector<backend::WeightBuffer*>& buffers) {
  for (auto* buffer : buffers) {
    if (!buffer->data) continue;
    buffer->data = nullptr;
    bytes_ -= buffer->bytes();
    ++generation_;
    auto& slab = *entry_of_.at(buffer)->slab;
    if (--slab.loaded == 0) give_back(device, slab);
  }
}

void WeightStore::give_back(backend::Device& device, Slab& slab) {
  if (!slab.data) return;
  device.release(slab.data, slab.bytes);
  slab.data = nullptr;
}

void WeightStore::unload(backend::Device& device) {
  std::vector<backend::WeightBuffer*> all;
  for (auto& [key, entry] : entries_) all.push_back(&entry.buffer);
  release(device, all);
}

}  // namespace comfytp::runtime
