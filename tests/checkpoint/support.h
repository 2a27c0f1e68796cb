// What the checkpoint tests share: a temporary directory, error messages, hand-made safetensors bytes.
#pragma once

#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "tensor/view.h"

namespace latente {

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string pattern = (std::filesystem::temp_directory_path() / "latente-checkpoint-XXXXXX").string();
    if (!::mkdtemp(pattern.data())) throw std::runtime_error("no temporary directory");
    path_ = pattern;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  const std::string& path() const { return path_; }
  std::string at(const std::string& name) const { return path_ + "/" + name; }
  void put(const std::string& name, const std::string& bytes) const {
    std::filesystem::create_directories(std::filesystem::path(at(name)).parent_path());
    std::ofstream(at(name), std::ios::binary) << bytes;
  }

 private:
  std::string path_;
};

template <class F>
std::string message_of(F f) {
  try {
    f();
  } catch (const Error& error) {
    std::string text = error.what();
    EXPECT_EQ(text.find('\n'), text.npos) << "more than one line: " << text;
    return text;
  }
  return "no error";
}

inline void expect_has(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), text.npos) << text << "\nlacks: " << part;
}

// A file with this header, written out of hand rather than by the writer under test.
inline std::string safetensors_bytes(const std::string& header, const std::string& data = {}) {
  uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

inline std::string bytes_of(const void* data, size_t size) { return {static_cast<const char*>(data), size}; }

template <class T>
std::string bytes_of(const std::vector<T>& values) {
  return bytes_of(values.data(), values.size() * sizeof(T));
}

template <class T>
View view_of(std::vector<T>& values, Shape shape) {
  LATENTE_ASSERT(shape.count() == static_cast<int64_t>(values.size()));
  return View(values.data(), shape, dtype_of<T>);
}

inline std::mt19937 seeded() {
  uint32_t seed = std::random_device{}();
  std::printf("seed %u\n", seed);
  return std::mt19937(seed);
}

inline std::vector<float> random_floats(std::mt19937& generator, int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

}  // namespace latente
