#include "runtime/memory_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace comfytp::runtime {

std::int64_t assign_offsets(std::vector<Buffer>& buffers) {
  std::vector<std::size_t> by_size(buffers.size());
  std::iota(by_size.begin(), by_size.end(), 0);
  std::stable_sort(by_size.begin(), by_size.end(), [&](std::size_t a, std::size_t b) { return buffers[a].bytes > buffers[b].bytes; });
  std::vector<const Buffer*> placed;  // by offset
  std::int64_t total = 0;
  for (std::size_t i : by_size) {
    Buffer& buffer = buffers[i];
    const auto size = aligned(buffer.bytes);
    if (size == 0) continue;
    std::int64_t end = 0, best = -1, tightest = std::numeric_limits<std::int64_t>::max();
    for (const Buffer* other : placed) {
      if (other->last < buffer.first || buffer.last < other->first) continue;
      const auto gap = other->offset - end;
      if (gap >= size && gap < tightest) {
        best = end;
        tightest = gap;
      }
      end = std::max(end, other->offset + aligned(other->bytes));
    }
    buffer.offset = best >= 0 ? best : end;
    total = std::max(total, buffer.offset + size);
    const auto at = std::upper_bound(placed.begin(), placed.end(), buffer.offset, [](std::int64_t o, const Buffer* b) { return o < b->offset; });
    placed.insert(at, &buffer);
  }
  return total;
}

}  // namespace comfytp::runtime
