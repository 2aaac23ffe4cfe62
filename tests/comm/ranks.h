// Runs the ranks of a group as threads, on every kind of device that is here.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <ostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "backend/backend.h"
#include "base/error.h"
#include "comm/device_group.h"
#include "runtime/team.h"

namespace comfytp::test {

using Random = std::mt19937;
inline std::int64_t pick(Random& random, std::int64_t lo, std::int64_t hi) { return std::uniform_int_distribution<std::int64_t>(lo, hi)(random); }

/// The devices of a group and the way between them.
struct Members {
  std::vector<std::string> devices;
  comm::Route route = comm::Route::best;
  bool on_host() const { return devices[0].starts_with("cpu"); }
  int size() const { return static_cast<int>(devices.size()); }
};

/// "cpu:0", "cpu:1", …
inline std::vector<std::string> device_names(int count) {
  std::vector<std::string> names;
  for (int r = 0; r < count; ++r) names.push_back("cpu:" + std::to_string(r));
  return names;
}

inline Members on_host(int count) { return {device_names(count)}; }

/// All that collectives run on somewhere: ranks of the host, ranks that share a GPU, and GPUs.
inline std::vector<Members> cuda_groups() {
  using comm::Route;
  std::vector<Members> groups;
  for (auto route : {Route::peer, Route::staged})
    for (const auto& devices : std::vector<std::vector<std::string>>{
             {"cuda:0"}, {"cuda:0", "cuda:0"}, {"cuda:0", "cuda:0", "cuda:0"}, {"cuda:0", "cuda:1"}, {"cuda:0", "cuda:1", "cuda:2", "cuda:3"}})
      groups.push_back({devices, route});
  return groups;
}
inline std::vector<Members> all_groups() {
  std::vector<Members> groups;
  for (int n = 1; n <= 8; ++n) groups.push_back(on_host(n));
  for (auto& group : cuda_groups()) groups.push_back(std::move(group));
  return groups;
}

inline std::string label(const ::testing::TestParamInfo<Members>& info) {
  std::string name = info.param.on_host() ? "host" + std::to_string(info.param.size()) : info.param.route == comm::Route::peer ? "peer" : "staged";
  if (!info.param.on_host())
    for (const auto& device : info.param.devices) name += "_" + device.substr(5);
  return name;
}

inline void PrintTo(const Members& members, std::ostream* out) {
  for (const auto& device : members.devices) *out << device << ' ';
}

/// Why a device is not to be had; empty when it is.
inline const std::string& missing(const std::string& device) {
  static std::map<std::string, std::string> reasons;
  const auto [it, first] = reasons.try_emplace(device);
  if (!first) return it->second;
  try {
    backend::open_device(backend::parse_devices(device)[0], 0, 1)->attach();
  } catch (const Error& e) {
    it->second = e.what();
  }
  return it->second;
}

/// A view with memory of its own on the host: its dimensions lie in a random order, perhaps with gaps and not at the memory's beginning.
struct Tensor {
  std::vector<std::byte> memory;
  std::int64_t offset = 0;  ///< of the view, in bytes
  TensorView view;

  Tensor(Shape shape, DType dtype) : Tensor(std::move(shape), dtype, nullptr) {}
  Tensor(Shape shape, DType dtype, Random& random, bool plain = false) : Tensor(std::move(shape), dtype, plain ? nullptr : &random) {}
  Tensor(Tensor&&) = default;

  // Elements are named by their index in row-major order.
  std::byte* at(std::int64_t index) const {
    std::int64_t place = 0;
    const auto dense = row_major_strides(view.shape);
    for (std::size_t d = 0; d < view.shape.size(); ++d) place += index / dense[d] % view.shape[d] * view.strides[d];
    return static_cast<std::byte*>(view.data) + place * size_of(view.dtype);
  }
  std::vector<std::byte> element(std::int64_t index) const { return {at(index), at(index) + size_of(view.dtype)}; }
  float value(std::int64_t index) const { return static_cast<float>(load_element(at(index), view.dtype, 0)); }

  void fill(Random& random) {
    for (std::int64_t i = 0; i < view.numel(); ++i) {
      if (view.dtype == DType::f32 || view.dtype == DType::f16 || view.dtype == DType::bf16) {
        store_element(at(i), view.dtype, 0, std::normal_distribution<double>()(random));
      } else {
        for (int b = 0; b < size_of(view.dtype); ++b) at(i)[b] = static_cast<std::byte>(random());
      }
    }
  }

 private:
  Tensor(Shape shape, DType dtype, Random* random) {
    view.dtype = dtype;
    view.shape = std::move(shape);
    std::vector<std::size_t> order(view.shape.size());
    std::iota(order.begin(), order.end(), 0);
    if (random) std::shuffle(order.begin(), order.end(), *random);
    view.strides.resize(order.size());
    std::int64_t step = 1;
    for (std::size_t i = order.size(); i-- > 0;) {
      view.strides[order[i]] = step;
      step *= view.shape[order[i]] + (random ? pick(*random, 0, 1) : 0);
    }
    offset = random ? pick(*random, 0, 1) * size_of(dtype) : 0;
    memory.resize(static_cast<std::size_t>(std::max<std::int64_t>(step, 1) * size_of(dtype) + offset), std::byte{0x5a});
    view.data = memory.data() + offset;
  }
};

/// Tensors of a rank.
using Tensors = std::vector<Tensor*>;

/// The communicators of some devices, and a thread for each of them.
class Group {
 public:
  explicit Group(const Members& members, double timeout = 300) : on_host_(members.on_host()) {
    std::vector<comm::DeviceRank> ranks_of;
    if (on_host_) {
      for (const auto& name : members.devices) ranks_of.push_back({name});
      abort = std::make_shared<comm::Abort>();
    } else {
      std::vector<std::unique_ptr<backend::Device>> devices;
      for (int r = 0; r < members.size(); ++r)
        devices.push_back(backend::open_device(backend::parse_devices(members.devices[static_cast<std::size_t>(r)])[0], r, members.size()));
      team_ = std::make_unique<runtime::Team>(std::move(devices));
      abort = team_->abort();
      ranks_of.resize(members.devices.size());
      team_->run([&](std::size_t r, backend::Device& device) { ranks_of[r] = {device.spec().name(), device.spec().index, device.queue()}; });
    }
    ranks = comm::device_group(ranks_of, abort, std::chrono::duration<double>(timeout), members.route);
    places_.resize(ranks.size());
  }
  ~Group() {
    abort->raise(comm::Abort::Kind::cancelled, "the test is over");
    try {
      abort->reset();  // nothing runs any more
    } catch (const Error& e) {
      ADD_FAILURE() << e.what();
    }
    ranks.clear();  // before their queues
  }

  /// Calls `body` once a rank, each on its thread; returns what each threw.
  using Body = std::function<void(comm::Communicator& communicator, backend::Device* device)>;
  std::vector<std::exception_ptr> on_ranks(const Body& body) {
    std::vector<std::exception_ptr> errors(ranks.size());
    const auto attempt = [&](std::size_t r, backend::Device* device) {
      try {
        body(*ranks[r], device);
      } catch (...) {
        errors[r] = std::current_exception();
      }
    };
    if (team_) {
      team_->run([&](std::size_t r, backend::Device& device) { attempt(r, &device); });
      return errors;
    }
    std::vector<std::thread> threads;
    for (std::size_t r = 0; r < ranks.size(); ++r) threads.emplace_back([&, r] { attempt(r, nullptr); });
    for (auto& t : threads) t.join();
    return errors;
  }
  /// The same; throws what the first of them threw.
  void run(const Body& body) {
    for (const auto& e : on_ranks(body))
      if (e) std::rethrow_exception(e);
  }

  /// Puts the tensors where the ranks compute and gives their views there, by rank. Nothing may run.
  std::vector<std::vector<TensorView>> put(const std::vector<Tensors>& tensors) {
    std::vector<std::vector<TensorView>> views(ranks.size());
    run([&](comm::Communicator& c, backend::Device* device) {
      const auto r = static_cast<std::size_t>(c.rank());
      for (auto* t : tensors[r]) {
        views[r].push_back(t->view);
        if (!device) continue;
        const graph::Type type{DType::u8, {static_cast<std::int64_t>(t->memory.size())}};
        void* memory = device->allocate(type.bytes());
        places_[r].push_back({t, memory, type});
        device->read(TensorView::dense(t->memory.data(), DType::u8, type.shape), memory, type, {0});
        views[r].back().data = static_cast<char*>(memory) + t->offset;
        views[r].back().host = false;
      }
      if (device) device->synchronize();
    });
    return views;
  }
  /// Brings all tensors back to the host; `keep`: they also stay where they are.
  void get(bool keep = false) {
    run([&](comm::Communicator& c, backend::Device* device) {
      auto& places = places_[static_cast<std::size_t>(c.rank())];
      for (auto& p : places) device->write(p.memory, p.type, {0}, TensorView::dense(p.tensor->memory.data(), DType::u8, p.type.shape));
      if (device) device->synchronize();
      if (keep) return;
      for (auto& p : places) device->release(p.memory, p.type.bytes());
      places.clear();
    });
  }

  /// Calls `body` on every rank with its tensors where it computes, and brings them back. Returns what each rank threw.
  using Call = std::function<void(comm::Communicator& communicator, const std::vector<TensorView>& views)>;
  std::vector<std::exception_ptr> try_call(const std::vector<Tensors>& tensors, const Call& body) {
    const auto views = put(tensors);
    const auto errors = on_ranks([&](comm::Communicator& c, backend::Device* device) {
      body(c, views[static_cast<std::size_t>(c.rank())]);
      if (device) device->synchronize();
      c.check();
    });
    get();
    return errors;
  }
  void call(const std::vector<Tensors>& tensors, const Call& body) {
    for (const auto& e : try_call(tensors, body))
      if (e) std::rethrow_exception(e);
  }

  std::shared_ptr<comm::Abort> abort;
  std::vector<std::unique_ptr<comm::Communicator>> ranks;

 private:
  struct Place {
    Tensor* tensor;
    void* memory;
    graph::Type type;
  };
  const bool on_host_;
  std::unique_ptr<runtime::Team> team_;
  std::vector<std::vector<Place>> places_;  // by rank
};

/// Skips where a device is missing, or GPUs cannot read each other's memory.
class OnGroup : public ::testing::TestWithParam<Members> {
 protected:
  void SetUp() override {
    if (GetParam().on_host()) return;
    for (const auto& device : GetParam().devices)
      if (!missing(device).empty()) GTEST_SKIP() << missing(device);
    try {
      Group group(GetParam());
    } catch (const Error& e) {
      if (std::string(e.what()).find("read each other's memory") != std::string::npos) GTEST_SKIP() << e.what();
      throw;
    }
  }
};

/// [i] of every list of tensors, by rank.
template <typename... Lists>
std::vector<Tensors> by_rank(std::vector<Tensor>& first, Lists&... more) {
  std::vector<Tensors> tensors;
  for (std::size_t r = 0; r < first.size(); ++r) tensors.push_back({&first[r], &more[r]...});
  return tensors;
}

}  // namespace comfytp::test
