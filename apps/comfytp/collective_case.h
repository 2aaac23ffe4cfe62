// One collective of one size: what it is called with, and what it must give.
#pragma once

#include <string>
#include <vector>

#include "comm/device_group.h"
#include "host_tensor.h"
#include "runtime/team.h"

namespace comfytp::cli {

class CollectiveCase {
 public:
  /// Rounds the bytes down to whole elements. Throws Error for an op or a dtype that is none.
  CollectiveCase(std::string name, DType type, std::int64_t size, int count);

  Shape in_shape(int rank) const;
  Shape out_shape(int rank) const;
  void call(comm::Communicator& end, const TensorView& in, const TensorView& out) const;
  /// What the host computes for it.
  void compute(const std::vector<TensorView>& in, int rank, const TensorView& out) const;
  /// As the runtime counts it (runtime/collectives.h): the most that a rank sends or receives.
  std::int64_t traffic_bytes() const;

  std::string op;
  DType dtype;
  std::int64_t bytes;
  int ranks;

 private:
  std::vector<std::int64_t> bounds_, need_lo_, need_hi_;
};

/// Its tensors on the host: seeded inputs, and outputs that begin as something else.
class CaseTensors {
 public:
  explicit CaseTensors(const CollectiveCase& what);
  /// The outputs are bit for bit what the host computes.
  bool right();
  std::vector<HostTensor> in, out;

 private:
  const CollectiveCase& what_;
};

/// A rank's tensors where its device computes. Called on the device's thread; memory that suffices is kept.
class DeviceBuffers {
 public:
  void put(backend::Device& device, const TensorView& host_in, const TensorView& host_out);
  void get(backend::Device& device, const TensorView& host_out) const;
  void release(backend::Device& device);
  TensorView in, out;

 private:
  struct Memory {
    void* data = nullptr;
    std::int64_t bytes = 0;
  };
  static TensorView place(backend::Device& device, Memory& memory, const TensorView& host);
  Memory in_memory_, out_memory_;
};

}  // namespace comfytp::cli
