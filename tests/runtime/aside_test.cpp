// What runs aside: simulated devices with two queues each, whose work runs in whatever order the queues allow.
#include <gtest/gtest.h>

#include <array>
#include <deque>
#include <random>
#include <set>
#include <thread>

#include "comm/communicator.h"
#include "graph/rewrites.h"
#include "harness.h"
#include "random_graph.h"
#include "runtime/compiled.h"
#include "runtime/executor.h"
#include "runtime/lowering.h"
#include "sharding/strategy.h"
#include "wrapped_device.h"

namespace comfytp::test {
namespace {

using graph::Builder;
using graph::ValueId;
using runtime::Launch;

struct Command {
  enum class Kind { run, meet, happen, await } kind;
  std::function<void()> run;
  const void* group = nullptr;  // of a meeting
  std::size_t event = 0;
};
using Queues = std::array<std::vector<Command>, 2>;  // the main and the side queue's

// Kernels run when the queues are worked off, not when they are called.
class Simulated final : public WrappedDevice {
 public:
  explicit Simulated(std::unique_ptr<backend::Device> device) : WrappedDevice(std::move(device)) {}

  void put(bool aside, Command command) { recording[aside].push_back(std::move(command)); }
  void fork() override {
    ++forks;
    put(false, {Command::Kind::happen, {}, nullptr, events_});
    put(true, {Command::Kind::await, {}, nullptr, events_++});
  }
  std::size_t mark() override {
    put(true, {Command::Kind::happen, {}, nullptr, events_});
    return events_++;
  }
  void join(std::size_t ticket) override {
    ++joins;
    put(false, {Command::Kind::await, {}, nullptr, ticket});
  }
  std::unique_ptr<backend::Kernel> compile(const graph::Node& node, std::span<const backend::Operand> in,
                                           std::span<const backend::Operand> out) override {
    return std::make_unique<QueuedKernel>(WrappedDevice::compile(node, in, out), *this);
  }
  std::unique_ptr<backend::Recording> record(const std::function<void()>& launches) override {
    recording = {};
    launches();
    ++recordings;
    if (!recording[0].empty() && recording[0].back().kind == Command::Kind::await) ++ends_in_a_join;
    return std::make_unique<Replay>(std::move(recording), *this);
  }

  Queues recording;
  std::array<std::deque<Command>, 2> queues;
  std::set<std::size_t> happened;
  int forks = 0, joins = 0, recordings = 0, ends_in_a_join = 0;

 private:
  struct QueuedKernel final : backend::Kernel {
    QueuedKernel(std::unique_ptr<backend::Kernel> k, Simulated& d) : kernel(std::move(k)), device(d) {}
    std::int64_t workspace_bytes() const override { return kernel->workspace_bytes(); }
    void run(std::span<const void* const> in, std::span<void* const> out, void* workspace) override {
      std::vector<const void*> from(in.begin(), in.end());
      std::vector<void*> to(out.begin(), out.end());
      device.put(false, {Command::Kind::run, [this, from, to, workspace] { kernel->run(from, to, workspace); }});
    }
    std::unique_ptr<backend::Kernel> kernel;
    Simulated& device;
  };
  struct Replay final : backend::Recording {
    Replay(Queues c, Simulated& d) : commands(std::move(c)), device(d) {}
    void replay() override {
      for (std::size_t q : {0, 1}) device.queues[q].insert(device.queues[q].end(), commands[q].begin(), commands[q].end());
    }
    Queues commands;
    Simulated& device;
  };
  std::size_t events_ = 0;
};

// Queues what a group of the host does.
class QueuedCommunicator final : public comm::Communicator {
 public:
  QueuedCommunicator(std::unique_ptr<comm::Communicator> end, const void* group, Simulated& device, bool aside)
      : end_(std::move(end)), group_(group), device_(device), aside_(aside) {}
  int rank() const override { return end_->rank(); }
  int size() const override { return end_->size(); }
  bool queues() const override { return true; }
  std::map<std::string, Spent> spent() const override { return {{"all_gather", {1, 0, 0}}}; }
  void all_reduce(const TensorView& in, const TensorView& out) override {
    meet([=, this] { end_->all_reduce(in, out); });
  }
  void reduce_scatter(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds) override {
    meet([=, this] { end_->reduce_scatter(in, out, dim, bounds); });
  }
  void all_gather(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds) override {
    meet([=, this] { end_->all_gather(in, out, dim, bounds); });
  }
  void halo_exchange(const TensorView& in, const TensorView& out, int dim, const std::vector<std::int64_t>& bounds,
                     const std::vector<std::int64_t>& lo, const std::vector<std::int64_t>& hi) override {
    meet([=, this] { end_->halo_exchange(in, out, dim, bounds, lo, hi); });
  }

 private:
  void meet(std::function<void()> run) { device_.put(aside_, {Command::Kind::meet, std::move(run), group_}); }
  std::unique_ptr<comm::Communicator> end_;
  const void* group_;
  Simulated& device_;
  const bool aside_;
};

// Which of the queues that can go on does: the side queues as late as may be, as early, or by chance.
enum class Schedule { late, early, random };

class Machine {
 public:
  Machine(const Graph& graph, const std::string& mesh)
      : graph_(graph), weights_(std::make_shared<TestWeights>(graph, DType::f32)) {
    watch_.like_a_gpu = true;
    const Graph normalised = graph::normalise(graph);
    const auto parsed = sharding::Mesh::parse(mesh);
    const auto partition = sharding::partition(normalised, parsed, sharding::decide(normalised, parsed).assignment, sharding::Placement::gathered);
    for (std::size_t d = 0; d < partition.devices.size(); ++d) {
      devices.push_back(std::make_unique<Simulated>(std::make_unique<ReferenceDevice>(backend::DeviceSpec{"cpu", static_cast<int>(d), 0}, watch_)));
      stores_.emplace_back(weights_);
      programs.push_back(runtime::lower(partition.devices[d], *devices[d], stores_[d]));
      auto& program = programs[d];
      std::erase_if(program.outputs, [&](const auto& b) { return !partition.outputs.at(b.name)[d].writes; });
      for (auto& binding : program.outputs) binding.box = partition.outputs.at(binding.name)[d].box;
    }
    for (std::size_t d = 0; d < devices.size(); ++d) connect(d);
    std::vector<backend::WeightBuffer*> fresh;
    for (std::size_t d = 0; d < devices.size(); ++d) {
      stores_[d].load(*devices[d], programs[d].weights, [](std::int64_t) {}, fresh);
      memories_.push_back({devices[d]->allocate(programs[d].arena_bytes), devices[d]->allocate(programs[d].prologue_bytes), 1});
      executors_.emplace_back(programs[d]);
      executors_[d].bind(memories_[d]);
      executors_[d].record(*devices[d]);
    }
  }
  ~Machine() {
    executors_.clear();
    for (std::size_t d = 0; d < devices.size(); ++d) {
      devices[d]->release(memories_[d].arena, programs[d].arena_bytes);
      devices[d]->release(memories_[d].prologue, programs[d].prologue_bytes);
      stores_[d].unload(*devices[d]);
    }
    programs.clear();
  }

  double error(std::uint64_t seed, Schedule schedule) {
    const HostInputs inputs(graph_, seed);
    HostOutputs outputs(graph_);
    for (const bool prologue : {true, false}) {
      for (std::size_t d = 0; d < devices.size(); ++d)
        prologue ? executors_[d].run_prologue(*devices[d], inputs.views, *abort_) : executors_[d].run_step(*devices[d], inputs.views, *abort_);
      work_off(seed, schedule);
    }
    for (std::size_t d = 0; d < devices.size(); ++d) executors_[d].write_outputs(*devices[d], outputs.views);
    return error_of(oracle(graph_, *weights_, inputs), outputs);
  }

  std::vector<std::unique_ptr<Simulated>> devices;
  std::deque<runtime::Program> programs;

 private:
  void connect(std::size_t d) {
    for (auto* launches : {&programs[d].prologue, &programs[d].step})
      for (auto& launch : *launches) {
        if (!launch.collective) continue;
        const auto& attrs = launch.collective->node->attrs;
        const auto& members = attrs.ints("group");
        auto& group = groups_[{members, launch.aside}];
        if (group.empty()) {
          auto ends = comm::host_group(std::vector<std::string>(members.size(), "cpu"), abort_, std::chrono::minutes(1));
          for (std::size_t r = 0; r < members.size(); ++r)
            group.push_back(
                std::make_unique<QueuedCommunicator>(std::move(ends[r]), &group, *devices[static_cast<std::size_t>(members[r])], launch.aside));
        }
        launch.collective->communicator = group.at(static_cast<std::size_t>(attrs.integer("rank"))).get();
      }
  }

  // Does the next of a queue, if that can be done.
  bool go_on(Simulated& device, bool aside) {
    auto& queue = device.queues[aside];
    if (queue.empty()) return false;
    const Command next = queue.front();
    if (next.kind == Command::Kind::await && !device.happened.count(next.event)) return false;
    if (next.kind == Command::Kind::meet) return meet(next.group, aside);
    queue.pop_front();
    if (next.kind == Command::Kind::happen) device.happened.insert(next.event);
    if (next.run) next.run();
    return true;
  }

  bool meet(const void* group, bool aside) {
    std::vector<Simulated*> here;
    for (const auto& device : devices)
      if (const auto& queue = device->queues[aside]; !queue.empty() && queue.front().group == group) here.push_back(device.get());
    const auto found = std::find_if(groups_.begin(), groups_.end(), [&](const auto& g) { return &g.second == group; });
    if (here.size() < found->second.size()) return false;
    std::vector<std::thread> ranks;
    for (auto* device : here) {
      ranks.emplace_back(device->queues[aside].front().run);
      device->queues[aside].pop_front();
    }
    for (auto& rank : ranks) rank.join();
    return true;
  }

  void work_off(std::uint64_t seed, Schedule schedule) {
    std::mt19937_64 random(seed);
    for (;;) {
      std::vector<std::pair<std::size_t, bool>> order;
      for (const bool aside : {schedule == Schedule::early, schedule != Schedule::early})
        for (std::size_t d = 0; d < devices.size(); ++d) order.emplace_back(d, aside);
      if (schedule == Schedule::random) std::shuffle(order.begin(), order.end(), random);
      if (!std::any_of(order.begin(), order.end(), [&](const auto& at) { return go_on(*devices[at.first], at.second); })) break;
    }
    for (auto& device : devices) {
      EXPECT_TRUE(device->queues[0].empty() && device->queues[1].empty()) << "they wait for each other";
      device->happened.clear();
    }
  }

  const Graph graph_;
  Watch watch_;
  const std::shared_ptr<TestWeights> weights_;
  const std::shared_ptr<comm::Abort> abort_ = std::make_shared<comm::Abort>();
  std::deque<runtime::WeightStore> stores_;
  std::map<std::pair<std::vector<std::int64_t>, bool>, std::vector<std::unique_ptr<comm::Communicator>>> groups_;
  std::vector<runtime::Memories> memories_;
  std::deque<runtime::Executor> executors_;
};

// Blocks of self-attention and feed-forward over the tokens of an image.
Graph attention_blocks(int count) {
  Graph g;
  Builder b(g, DType::f32);
  const std::int64_t c = 8, heads = 2;
  auto image = b.conv2d(b.input("x", {1, 4, 8, 6}, DType::f32), b.weight("in", {c, 4, 1, 1}), -1, 1, 0, "in");
  auto x = b.transpose(b.merge_dims(image, 2, 2), {0, 2, 1});
  for (int i = 0; i < count; ++i) {
    const auto name = [&](const std::string& part) { return fmt::format("{}.{}", i, part); };
    const auto vec = [&](const std::string& part, std::int64_t size) { return b.weight(name(part), {size}); };
    const auto n = b.layer_norm(x, vec("norm.weight", c), vec("norm.bias", c), 1e-5, name("norm"));
    const auto project = [&](const std::string& part) {
      const auto v = b.linear(n, b.weight(name(part), {c, c}), name(part));
      return b.transpose(b.split_dim(v, 2, {heads, c / heads}), {0, 2, 1, 3});
    };
    const auto normed = [&](const std::string& part) {
      return b.layer_norm(project(part), vec(part + ".norm.weight", c / heads), vec(part + ".norm.bias", c / heads), 1e-5, name(part + ".norm"));
    };
    const auto q = normed("q"), k = normed("k"), v = project("v");
    const auto o = b.merge_dims(b.transpose(b.attention(q, k, v, 0.5, name("attention")), {0, 2, 1, 3}), 2, 2);
    x = b.add(x, b.linear(o, b.weight(name("out"), {c, c}), name("out")));
    const auto wide = b.unary("gelu", b.linear(x, b.weight(name("ff1"), {2 * c, c}), name("ff1")));
    x = b.add(x, b.linear(wide, b.weight(name("ff2"), {c, 2 * c}), name("ff2")));
  }
  image = b.split_dim(b.transpose(x, {0, 2, 1}), 2, {8, 6});
  g.add_output("output", b.conv2d(image, b.weight("out", {4, c, 1, 1}), -1, 1, 0, "out"));
  graph::verify(g);
  return g;
}

// Large feed-forwards, which `tensor` cuts, and then many small linears that stay whole: unequal ranks fetch unequal bytes.
Graph large_and_small() {
  Graph g;
  Builder b(g, DType::f32);
  const std::int64_t c = 8;
  auto x = b.transpose(b.merge_dims(b.conv2d(b.input("x", {1, 4, 8, 6}, DType::f32), b.weight("in", {c, 4, 1, 1}), -1, 1, 0, "in"), 2, 2), {0, 2, 1});
  const auto block = [&](const std::string& name, std::int64_t hidden, int whole) {
    const auto n = b.layer_norm(x, b.weight(name + ".norm.weight", {c}), b.weight(name + ".norm.bias", {c}), 1e-5, name + ".norm");
    const auto wide = b.unary("gelu", b.linear(n, b.weight(name + ".ff1", {hidden, c}), name + ".ff1"));
    x = b.add(x, b.linear(wide, b.weight(name + ".ff2", {c, hidden}), name + ".ff2"));
    for (int i = 0; i < whole; ++i) {
      const auto linear = fmt::format("{}.{}", name, i);
      x = b.add(x, b.linear(n, b.weight(linear, {c, c}), linear));
    }
  };
  for (int i = 0; i < 5; ++i) block(fmt::format("large {}", i), 4096, 0);
  for (int i = 0; i < 40; ++i) block(fmt::format("small {}", i), 16, 3);
  g.add_output("output", b.conv2d(b.split_dim(b.transpose(x, {0, 2, 1}), 2, {8, 6}), b.weight("out", {4, c, 1, 1}), -1, 1, 0, "out"));
  graph::verify(g);
  return g;
}

class Aside : public testing::TestWithParam<const char*> {};

// Whenever it runs, what runs aside finds what it reads and writes what is read: memory is used by others before and behind it only.
TEST_P(Aside, AnyTimeForItGivesTheSame) {
  for (const Graph& g : {small_unet(), attention_blocks(3)}) {
    Machine machine(g, GetParam());
    for (const auto schedule : {Schedule::late, Schedule::early}) EXPECT_LT(machine.error(0, schedule), 1e-5);
    for (std::uint64_t seed = 0; seed < 4; ++seed) EXPECT_LT(machine.error(seed, Schedule::random), 1e-5) << seed;
  }
  for (std::uint64_t graph = 0; graph < 6; ++graph) {
    Machine machine(random_graph(graph), GetParam());
    for (const auto schedule : {Schedule::late, Schedule::early, Schedule::random}) EXPECT_LT(machine.error(graph, schedule), 1e-5) << graph;
  }
}

// Ranks meet in the collectives of a group one by one: another order on one of them, or another queue, is a deadlock.
TEST_P(Aside, DevicesOfAGroupHaveOneOrderOfItsCollectives) {
  for (const Graph& g : {small_unet(), large_and_small()}) {
    Machine machine(g, GetParam());
    std::map<std::vector<std::int64_t>, std::map<std::size_t, std::vector<std::string>>> orders;  // by group and device
    for (std::size_t d = 0; d < machine.programs.size(); ++d)
      for (const auto* launches : {&machine.programs[d].prologue, &machine.programs[d].step})
        for (const auto& launch : *launches)
          if (launch.collective)
            orders[launch.collective->node->attrs.ints("group")][d].push_back((launch.aside ? "aside " : "") + launch.label);
    EXPECT_FALSE(orders.empty());
    for (const auto& [group, by_device] : orders)
      for (const auto& [device, order] : by_device) EXPECT_EQ(order, by_device.begin()->second) << device;
    EXPECT_LT(machine.error(0, Schedule::late), 1e-4);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Aside,
                         testing::Values("patch=2", "patch=3", "patch=5", "patch=2:1", "tensor=2", "batch=2", "patch=2,tensor=2", "patch=2,tensor=2:1",
                                         "tensor=3", "patch=2,tensor=5:4"));

TEST(Fetches, ThatNobodyWaitsForAreWaitedForAtTheEnd) {
  Machine machine(attention_blocks(2), "patch=2");
  auto& program = machine.programs[0];
  for (auto& launch : program.step) launch.after.clear();
  runtime::Executor executor(program);
  executor.bind({});
  executor.record(*machine.devices[0]);
  EXPECT_GE(machine.devices[0]->ends_in_a_join, 1);
}

TEST(Fetches, AreCountedApartFromWhatStandsInTheQueue) {
  Machine machine(small_unet(), "patch=2");
  std::set<std::string> found;
  for (const auto& [what, spent] : runtime::Executor(machine.programs[0]).spent()) found.insert(what);
  EXPECT_EQ(found, (std::set<std::string>{"all_gather", "fetch_weight"}));
}

}  // namespace
}  // namespace comfytp::test
