// Where the ranks of a group meet that are CUDA devices of this process, and the memories through which they exchange.
#pragma once

#include <map>

#include "comm/cuda/exchange.h"
#include "comm/device_group.h"
#include "comm/host_group.h"

namespace comfytp::comm::cuda {

/// Makes a device the current one for as long as it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int ordinal);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
};

class CudaGroup final : public HostGroup {
 public:
  /// `peers`: staging lies in the devices' own memory; otherwise in the host's, page-locked.
  CudaGroup(const std::vector<DeviceRank>& ranks, std::shared_ptr<Abort> abort, std::chrono::duration<double> timeout, bool peers);
  ~CudaGroup() override;

  bool peers() const { return peers_; }
  int blocks() const { return blocks_; }
  const World& world(int rank) const { return worlds_[static_cast<std::size_t>(rank)]; }
  int ordinal(int rank) const { return ranks_[static_cast<std::size_t>(rank)].ordinal; }
  cudaStream_t stream(int rank) const { return static_cast<cudaStream_t>(ranks_[static_cast<std::size_t>(rank)].queue); }
  /// Raises the abort and throws when this rank's device has given up.
  void check(int rank);
  /// As Communicator::spent().
  std::map<std::string, Communicator::Spent> spent(int rank) const;

  void wake() override;
  /// Waits for the devices when one of them has given up; they count from zero again then.
  void reset() override;

 private:
  void allocate();
  void connect();
  void clear(std::size_t rank);
  void release();

  const std::vector<DeviceRank> ranks_;
  const std::shared_ptr<Abort> abort_;
  const std::chrono::duration<double> timeout_;
  const bool peers_;
  int blocks_ = kBlocks;
  std::vector<World> worlds_;
  std::vector<char*> staging_;  // kStaging bytes of every rank's, and its flags
};

}  // namespace comfytp::comm::cuda
