// A program while it is made: launches over blocks of memory that get their places at the end.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "runtime/program.h"

namespace comfytp::runtime {

/// The prologue runs when the prompt has changed, before the step, which runs in every call.
enum class Phase { prologue, step };

/// Where a value lies: in a block of planned memory, or (block -1) in a weight.
struct Home {
  int block = -1;
  backend::WeightBuffer* weight = nullptr;
  std::int64_t offset = 0;  ///< bytes into the block
};

struct PendingLaunch {
  std::unique_ptr<backend::Kernel> kernel;
  std::optional<CollectiveCall> collective;
  std::vector<Home> in, out;
  std::vector<std::size_t> may_overwrite;  ///< inputs whose memory output 0 may take over
  bool aside = false;
  std::int64_t whole_bytes = 0;             ///< of a fetch, of the whole weight: the same on all devices however unequal their parts are
  std::vector<std::size_t> after;
  std::string label;
  Work work;
};

class Assembly {
 public:
  int add_block(std::int64_t bytes);
  /// From now on, and for good, the block `part`, with all values in it, lies in block `whole`, `offset` bytes behind its beginning; false where it
  /// lies in another block already.
  bool lay_within(int part, int whole, std::int64_t offset);
  /// `home` lies so many bytes behind `other`, and will wherever both are moved. Both are in blocks.
  bool lies_behind(const Home& home, const Home& other, std::int64_t bytes);
  std::int64_t bytes_of(int block) const { return blocks_[static_cast<std::size_t>(block)].bytes; }
  void add(Phase phase, PendingLaunch launch);
  void add_input(Binding binding, Home home);
  void add_output(Binding binding, Home home);

  /// Decides which blocks share memory and where each lies, and moves everything into `program`.
  void finish(Program& program);

 private:
  struct Block {
    std::int64_t bytes = 0;
    int first = -1, last = -1;   ///< times of its first and last use
    bool kept = false;           ///< made by the prologue, used by the step
  };
  int root(int block);
  std::int64_t offset_of(const Home& home) const;  // bytes into the root of its block
  Block& block(const Home& home) { return blocks_[static_cast<std::size_t>(root(home.block))]; }
  void hoist(std::vector<PendingLaunch>& launches);
  void await(std::vector<PendingLaunch>& launches, const std::vector<std::size_t>& chunks);
  void use(const Home& home, int time);
  void measure();
  void hold(const std::vector<PendingLaunch>& launches, int begin);
  void reuse(PendingLaunch& launch, int time);
  void place_blocks(Program& program);
  Place place(const Home& home);

  // Times: inputs of a phase are read just before its launches; outputs are written behind the last.
  int step_begins() const { return static_cast<int>(prologue_.size()) + 1; }
  int end() const { return step_begins() + static_cast<int>(step_.size()) + 1; }
  template <typename Visit>
  void each_launch(const Visit& visit) {
    for (std::size_t i = 0; i < prologue_.size(); ++i) visit(prologue_[i], static_cast<int>(i) + 1);
    for (std::size_t i = 0; i < step_.size(); ++i) visit(step_[i], step_begins() + static_cast<int>(i) + 1);
  }

  std::vector<PendingLaunch> prologue_, step_;
  std::vector<std::pair<Binding, Home>> inputs_, outputs_;
  std::vector<Block> blocks_;
  std::vector<int> merged_into_;        // another block of the same memory, or itself
  std::vector<std::int64_t> offsets_;   // of the block in that one
  std::vector<Place> places_;           // by block
  std::vector<Place> workspaces_;       // by time
};

}  // namespace comfytp::runtime
