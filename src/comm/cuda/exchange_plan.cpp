#include "comm/cuda/exchange_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/error.h"

namespace comfytp::comm::cuda {
namespace {

constexpr std::int64_t kOneShot = 512 << 10;  // bytes; below this a second wait costs more than every rank summing everything
constexpr std::int64_t kGoodShared = 8 << 10;  // bytes of a round of one block in the host's memory, where there are several
constexpr std::int64_t kOwn = 16 << 10;       // bytes of a copy that are worth a block
constexpr std::int64_t kLeast = 4096;         // bytes that are worth a block

using Order = std::vector<std::size_t>;

// The order in which all ranks count elements: as rank 0's input lies.
Order order_of(const TensorView& view) {
  Order order(view.shape.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return view.strides[a] > view.strides[b]; });
  return order;
}

// `words`: which sizes of words may be used; that of an element is always among them.
Strided strided(const TensorView& view, const Order& order, const std::vector<int>& words) {
  struct Dim {
    std::int64_t size, stride;
  };
  Strided v;
  v.data = static_cast<char*>(view.data);
  v.bytes = view.bytes();
  if (v.bytes == 0) return v;
  std::vector<Dim> dims;
  for (auto d : order) {
    if (view.shape[d] == 1) continue;
    const Dim dim{view.shape[d], view.strides[d]};
    if (!dims.empty() && dims.back().stride == dim.stride * dim.size)
      dims.back() = {dims.back().size * dim.size, dim.stride};
    else
      dims.push_back(dim);
  }
  if (dims.empty()) dims.push_back({1, 1});
  require(dims.size() <= kMaxDims, "[comm] expected at most {} dimensions that are not one run but got {} of shape {}", kMaxDims, dims.size(),
          to_string(view.shape));
  const bool dense = dims.size() == 1 && dims[0].stride == 1;
  const int element = size_of(view.dtype);
  const auto fits = [&](int word) {
    if (word <= element) return word == element;
    const auto many = word / element;
    if (reinterpret_cast<std::uintptr_t>(v.data) % static_cast<std::size_t>(word) != 0) return false;
    if (dense) return true;
    if (dims.back().stride != 1 || dims.back().size % many != 0) return false;
    return std::all_of(dims.begin(), dims.end() - 1, [&](const Dim& d) { return d.stride % many == 0; });
  };
  v.word = element;
  for (int word : words)
    if (word > v.word && fits(word)) v.word = word;
  const auto many = v.word / element;
  v.dims = static_cast<int>(dims.size());
  for (std::size_t d = 0; d < dims.size(); ++d) {
    const bool last = d + 1 == dims.size();
    const auto size = last ? (dims[d].size + many - 1) / many : dims[d].size;
    v.size[d] = static_cast<std::uint32_t>(size);
    v.stride[d] = last && many > 1 ? 1 : dims[d].stride / many;
  }
  require(v.bytes / v.word < std::numeric_limits<std::uint32_t>::max(), "[comm] expected a smaller tensor than {}", to_string(view.shape));
  return v;
}

const std::vector<int> kWords = {16, 8, 4, 2, 1}, kSums = {16};

// The part of v from byte `begin` on, a multiple of 16.
Strided slice(Strided v, std::int64_t begin, std::int64_t bytes) {
  v.begin = static_cast<std::uint32_t>(begin / v.word);
  v.bytes = bytes;
  return v;
}

std::int64_t ceil_16(std::int64_t bytes) { return (bytes + 15) / 16 * 16; }

// How segments of at most `longest` bytes are cut into chunks, and how many blocks those and the copy of `own` bytes within a rank are worth.
void cut(Exchange& x, std::int64_t longest, std::int64_t own, int blocks) {
  const auto parts = x.world.shared ? x.segments : x.kind == Kind::sum_twice ? 2 : 1;  // that a region holds: see place()
  const std::int64_t most = x.world.region / parts / 16 * 16, least = std::max<std::int64_t>(ceil_16(kLeast / x.segments), 512);
  const auto share = (longest + blocks - 1) / blocks;
  // Where there are several rounds giving and taking go on at the same time, and the host's memory is slow to write and to read.
  const std::int64_t good = x.world.shared ? std::min(most, kGoodShared) : most;
  const auto chunk = std::clamp(ceil_16(std::min(share, good)), std::min(least, most), most);
  x.chunk = static_cast<std::uint32_t>(chunk);
  x.blocks = static_cast<int>(std::clamp<std::int64_t>(std::max((longest + chunk - 1) / chunk, own / kOwn), 1, blocks));
  const auto round = chunk * x.blocks;
  x.rounds = static_cast<int>(std::max<std::int64_t>((longest + round - 1) / round, 1));
}

// What the rank does within its own memory, in words that suit both: `words` may be used.
void set_own(Exchange& x, const TensorView& from, const TensorView& to, const Order& order, const std::vector<int>& words) {
  const int word = std::min(strided(from, order, words).word, strided(to, order, words).word);
  x.own_from = strided(from, order, {word});
  x.own_to = strided(to, order, {word});
}

}  // namespace

Exchange plan_exchange(const World& world, const std::vector<Request>& requests, int blocks) {
  const auto me = static_cast<std::size_t>(world.rank);
  const auto count = requests.size();
  const Request& mine = requests[me];
  const auto& bounds = mine.bounds;
  const Order order = order_of(requests[0].in);
  Exchange x;
  x.world = world;
  x.dtype = mine.in.dtype;
  x.op = static_cast<std::uint32_t>(std::find(kOpNames, kOpNames + kOps, mine.op) - kOpNames);
  std::int64_t longest = 0, own = 0;  // of all ranks

  if (mine.op == "all_reduce") {
    const auto total = mine.in.bytes();
    const Strided in = strided(mine.in, order, kWords);
    set_own(x, mine.in, mine.out, order, kSums);
    if (count <= 2 || total <= kOneShot) {
      x.kind = Kind::sum;
      x.give[0] = in;
      longest = total;
    } else {
      x.kind = Kind::sum_twice;
      x.segments = world.ranks;
      const Strided out = strided(mine.out, order, kWords);
      longest = ceil_16((total + world.ranks - 1) / world.ranks);
      for (std::size_t r = 0; r < count; ++r) {
        const auto begin = std::min(static_cast<std::int64_t>(r) * longest, total), bytes = std::min(longest, total - begin);
        x.give[r] = slice(in, begin, bytes);
        x.take[r] = slice(out, begin, bytes);
        if (r != me) continue;
        x.own_from = slice(x.own_from, begin, bytes);
        x.own_to = slice(x.own_to, begin, bytes);
      }
    }
  } else if (mine.op == "reduce_scatter") {
    x.kind = Kind::sum;
    x.segments = world.ranks;
    for (std::size_t r = 0; r < count; ++r) {
      const TensorView part = part_of(mine.in, mine.dim, bounds[r], bounds[r + 1]);
      longest = std::max(longest, part.bytes());
      if (r == me)
        set_own(x, part, mine.out, order, kSums);
      else
        x.give[r] = strided(part, order, kWords);
    }
  } else if (mine.op == "all_gather") {
    x.give[0] = strided(mine.in, order, kWords);
    for (std::size_t r = 0; r < count; ++r) {
      longest = std::max(longest, requests[r].in.bytes());
      const TensorView to = part_of(mine.out, mine.dim, bounds[r], bounds[r + 1]);
      if (r == me)
        set_own(x, mine.in, to, order, kWords);
      else
        x.take[r] = strided(to, order, kWords);
    }
  } else {
    x.segments = world.ranks;
    const auto common = [&](std::size_t from, std::size_t to) {
      return intersect({bounds[from], bounds[from + 1]}, {mine.need_lo[to], mine.need_hi[to]});
    };
    const auto have = [&](Interval i) { return part_of(mine.in, mine.dim, i.lo - bounds[me], i.hi - bounds[me]); };
    const auto want = [&](Interval i) { return part_of(mine.out, mine.dim, i.lo - mine.need_lo[me], i.hi - mine.need_lo[me]); };
    std::int64_t row = size_of(x.dtype);
    for (std::size_t d = 0; d < mine.in.shape.size(); ++d)
      if (static_cast<int>(d) != mine.dim) row *= mine.in.shape[d];
    for (std::size_t r = 0; r < count; ++r) {
      own = std::max(own, common(r, r).size() * row);
      for (std::size_t to = 0; to < count; ++to)
        if (to != r) longest = std::max(longest, common(r, to).size() * row);
      const Interval given = common(me, r), taken = common(r, me);
      if (r == me) {
        if (given.size()) set_own(x, have(given), want(given), order, kWords);
        continue;
      }
      if (given.size()) x.give[r] = strided(have(given), order, kWords);
      if (taken.size()) x.take[r] = strided(want(taken), order, kWords);
    }
  }
  cut(x, longest, own, blocks);
  const auto is_run = [](const Strided& v) { return v.bytes == 0 || (v.word == 16 && v.dims == 1 && v.bytes % 16 == 0); };
  x.runs = is_run(x.own_from) && is_run(x.own_to) && std::all_of(x.give, x.give + count, is_run) && std::all_of(x.take, x.take + count, is_run);
  return x;
}

}  // namespace comfytp::comm::cuda
