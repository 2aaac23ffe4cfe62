// Hand-made files and what the tests ask of errors.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "weights/safetensors.h"

namespace comfytp::weights {

/// A folder of its own for each test, gone with it.
class Folder {
 public:
  Folder() {
    static int count = 0;
    path_ = std::filesystem::temp_directory_path() / fmt::format("comfytp_weights_{}_{}", getpid(), count++);
    std::filesystem::create_directories(path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }

  std::filesystem::path write(const std::string& name, const std::string& bytes) const {
    std::filesystem::create_directories((path_ / name).parent_path());
    std::ofstream(path_ / name, std::ios::binary) << bytes;
    return path_ / name;
  }
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(path_)) names.push_back(entry.path().filename().string());
    return names;
  }

 private:
  std::filesystem::path path_;
};

/// A header's length as the format writes it.
inline std::string length_bytes(std::uint64_t length) {
  std::string bytes(8, '\0');
  for (int i = 0; i < 8; ++i) bytes[static_cast<std::size_t>(i)] = static_cast<char>(length >> (8 * i));
  return bytes;
}

/// A safetensors file of this header and `data` bytes 0, 1, 2, ….
inline std::string file_of(const std::string& header, std::size_t data) {
  std::string bytes = length_bytes(header.size()) + header;
  for (std::size_t i = 0; i < data; ++i) bytes += static_cast<char>(i);
  return bytes;
}

/// One tensor "key" of four bytes.
inline std::string file_with(const std::string& key) {
  return file_of(R"({")" + key + R"(":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 4);
}

/// Expects that `call` throws an Error of one line in which all of `parts` stand.
template <typename Call>
void expect_error(Call&& call, const std::vector<std::string>& parts) {
  try {
    call();
    ADD_FAILURE() << "expected an Error but there was none";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(message.find('\n'), message.npos) << message;
    for (const auto& part : parts) EXPECT_NE(message.find(part), message.npos) << "expected '" << part << "' in: " << message;
  }
}

}  // namespace comfytp::weights
