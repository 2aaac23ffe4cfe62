// Runs the ranks of a group as threads.
#pragma once

#include <exception>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "comm/communicator.h"

namespace comfytp::test {

/// "cpu:0", "cpu:1", …
inline std::vector<std::string> device_names(int count) {
  std::vector<std::string> names;
  for (int r = 0; r < count; ++r) names.push_back("cpu:" + std::to_string(r));
  return names;
}

/// Calls `body` once a rank, each on a thread of its own; returns what each threw.
inline std::vector<std::exception_ptr> on_ranks(const std::vector<std::unique_ptr<comm::Communicator>>& ranks,
                                                const std::function<void(comm::Communicator&)>& body) {
  std::vector<std::exception_ptr> errors(ranks.size());
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < ranks.size(); ++r)
    threads.emplace_back([&, r] {
      try {
        body(*ranks[r]);
      } catch (...) {
        errors[r] = std::current_exception();
      }
    });
  for (auto& t : threads) t.join();
  return errors;
}

}  // namespace comfytp::test
