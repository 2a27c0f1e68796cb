#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>

#include "base/error.h"
#include "train/metrics.h"
#include "train/tensorboard.pb.h"

namespace latente {

namespace {

namespace fs = std::filesystem;
using tensorboard::Event;

constexpr int dtype_string = 7, data_class_tensor = 2, session_start = 1;

std::string event_file(const std::string& directory) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) fail("{}: cannot create the directory: {}", directory, error.message());
  char host[256] = "localhost";
  ::gethostname(host, sizeof host - 1);
  static std::atomic<int> made{0};
  const auto now =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch());
  return (fs::path(directory) / fmt::format("events.out.tfevents.{:010}.{}.{}.{}", now.count(), host,
                                            ::getpid(), made.fetch_add(1)))
      .string();
}

std::string fixed(auto value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

// A TFRecord: length, its check value, the bytes, their check value.
void append(AppendedFile& file, Event& event) {
  event.set_wall_time(
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count());
  const std::string bytes = event.SerializeAsString();
  const std::string length = fixed(uint64_t{bytes.size()});
  file.append(length + fixed(masked_crc32c(length)) + bytes + fixed(masked_crc32c(bytes)));
}

// Protocol buffers' strings must be UTF-8, and the reader refuses the file otherwise.
std::string as_utf8(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) >= 0x80) c = '?';
  }
  return text;
}

tensorboard::Value* add_value(Event& event, const std::string& tag) {
  tensorboard::Value* value = event.mutable_summary()->add_value();
  value->set_tag(as_utf8(tag));
  return value;
}

void add_text(Event& event, const std::string& tag, const std::string& markdown) {
  tensorboard::Value* value = add_value(event, tag);
  value->mutable_metadata()->mutable_plugin_data()->set_plugin_name("text");
  value->mutable_metadata()->set_data_class(data_class_tensor);
  value->mutable_tensor()->set_dtype(dtype_string);
  value->mutable_tensor()->mutable_tensor_shape()->add_dim()->set_size(1);
  value->mutable_tensor()->add_string_val(markdown);
}

}  // namespace

TensorBoardWriter::TensorBoardWriter(const std::string& directory, std::optional<int64_t> resumed_at)
    : file_(event_file(directory)) {
  Event event;
  event.set_file_version("brain.Event:2");
  append(file_, event);
  if (!resumed_at) return;
  event.Clear();
  event.set_step(*resumed_at);
  event.mutable_session_log()->set_status(session_start);
  append(file_, event);
}

void TensorBoardWriter::write(const Metrics& metrics) {
  Event event;
  event.set_step(metrics.step);
  for (const auto& [tag, value] : metrics.values) {
    if (const auto* words = std::get_if<std::string>(&value)) {
      add_text(event, tag, *words);
    } else if (const auto* integer = std::get_if<int64_t>(&value)) {
      add_value(event, tag)->set_simple_value(static_cast<float>(*integer));
    } else {
      add_value(event, tag)->set_simple_value(static_cast<float>(std::get<double>(value)));
    }
  }
  if (!metrics.values.empty()) append(file_, event);
}

void TensorBoardWriter::scalar(int64_t step, const std::string& tag, double value) {
  write({step, {{tag, value}}});
}

void TensorBoardWriter::text(int64_t step, const std::string& tag, const std::string& markdown) {
  write({step, {{tag, markdown}}});
}

void TensorBoardWriter::histogram(int64_t step, const std::string& tag, std::span<const float> values,
                                  int buckets) {
  LATENTE_ASSERT(buckets > 0);
  double low = INFINITY, high = -INFINITY, sum = 0, squares = 0;
  int64_t count = 0;
  for (const double value : values) {
    if (!std::isfinite(value)) continue;
    low = std::min(low, value);
    high = std::max(high, value);
    sum += value;
    squares += value * value;
    ++count;
  }
  if (count == 0) return;
  Event event;
  event.set_step(step);
  tensorboard::Histogram* histogram = add_value(event, tag)->mutable_histo();
  histogram->set_min(low);
  histogram->set_max(high);
  histogram->set_num(static_cast<double>(count));
  histogram->set_sum(sum);
  histogram->set_sum_squares(squares);
  const int used = high > low ? buckets : 1;
  std::vector<double> counts(static_cast<size_t>(used));
  for (const double value : values) {
    if (!std::isfinite(value)) continue;
    const double at = high > low ? (value - low) / (high - low) * used : 0;
    ++counts[static_cast<size_t>(std::min(static_cast<int>(at), used - 1))];
  }
  for (int i = 0; i < used; ++i) {
    histogram->add_bucket_limit(i + 1 == used ? high : low + (high - low) * (i + 1) / used);
    histogram->add_bucket(counts[static_cast<size_t>(i)]);
  }
  append(file_, event);
}

}  // namespace latente
