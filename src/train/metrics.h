// Where a run's figures go: TensorBoard event files and JSON Lines. Both are complete after each call, so
// that a killed run loses nothing that was written. Errors name the file.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace latente {

using MetricValue = std::variant<int64_t, double, std::string>;

// The figures of one step, in the order in which they are to be read.
struct Metrics {
  int64_t step = 0;
  std::vector<std::pair<std::string, MetricValue>> values;

  void add(std::string name, MetricValue value) { values.emplace_back(std::move(name), std::move(value)); }
};

class MetricWriter {
 public:
  virtual ~MetricWriter() = default;
  virtual void write(const Metrics& metrics) = 0;
};

// A file that grows by whole records, each written by one call.
class AppendedFile {
 public:
  explicit AppendedFile(std::string path);  // created if missing
  ~AppendedFile();
  AppendedFile(const AppendedFile&) = delete;
  AppendedFile& operator=(const AppendedFile&) = delete;

  const std::string& path() const { return path_; }
  void append(std::string_view bytes);

 private:
  std::string path_;
  int fd_ = -1;
};

// One event file, events.out.tfevents.<time>.<host>.<process>.<number>, in a run's directory, which is
// created. `resumed_at`: TensorBoard then forgets what earlier files of the directory hold from that step on.
class TensorBoardWriter : public MetricWriter {
 public:
  explicit TensorBoardWriter(const std::string& directory, std::optional<int64_t> resumed_at = {});

  const std::string& path() const { return file_.path(); }

  void write(const Metrics& metrics) override;  // numbers as scalars, strings as text
  void scalar(int64_t step, const std::string& tag, double value);
  void text(int64_t step, const std::string& tag, const std::string& markdown);
  // Equal buckets from the least to the greatest value; values that are not finite are left out.
  void histogram(int64_t step, const std::string& tag, std::span<const float> values, int buckets = 64);

 private:
  AppendedFile file_;
};

// One JSON object a line: "step", the time in seconds since 1970 as "time", and the figures. NaN and
// infinities become the strings "nan", "inf" and "-inf", since JSON has no such numbers.
//
// An existing file is continued. A partial last line, which a killed process may have left, is removed; with
// `resumed_at`, so are the lines of that step and later ones.
class JsonlWriter : public MetricWriter {
 public:
  explicit JsonlWriter(std::string path, std::optional<int64_t> resumed_at = {});

  const std::string& path() const { return file_.path(); }
  void write(const Metrics& metrics) override;

 private:
  AppendedFile file_;
};

// The check value of a TFRecord: CRC-32C (Castagnoli), rotated and offset as that format does.
uint32_t crc32c(std::string_view bytes);
uint32_t masked_crc32c(std::string_view bytes);

}  // namespace latente
