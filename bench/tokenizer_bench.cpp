// Speed of the tokenizer, one thread: bench_tokenizer TOKENIZER TEXT [SECONDS]. Prints MB per second of CPU
// time of encoding and of decoding: the best of the rounds that fit the time. bench/tokenizer_bench.py
// measures the Python package beside it.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "tokenizer/tokenizer.h"

namespace {

// Of this process, so that others on the same core count little.
double cpu_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

// Pieces of about 100 kB that end with a line.
std::vector<std::string_view> documents(std::string_view text) {
  std::vector<std::string_view> out;
  while (!text.empty()) {
    const size_t cut = text.find('\n', 100'000);
    const size_t size = cut == text.npos ? text.size() : cut + 1;
    out.push_back(text.substr(0, size));
    text.remove_prefix(size);
  }
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: bench_tokenizer TOKENIZER TEXT [SECONDS]\n");
    return 1;
  }
  try {
    const double loading = cpu_seconds();
    const latente::Tokenizer tokenizer = latente::Tokenizer::load(argv[1]);
    const double load_seconds = cpu_seconds() - loading;
    const std::string text = latente::read_file(argv[2]);
    const double limit = argc > 3 ? std::atof(argv[3]) : 5;
    const double megabytes = static_cast<double>(text.size()) / 1e6;
    double encode_seconds = 1e9, decode_seconds = 1e9;
    size_t tokens = 0;
    for (const double start = cpu_seconds(); cpu_seconds() - start < limit;) {
      std::vector<std::vector<int32_t>> ids;
      const double encoding = cpu_seconds();
      for (const std::string_view document : documents(text)) ids.push_back(tokenizer.encode(document));
      encode_seconds = std::min(encode_seconds, cpu_seconds() - encoding);
      tokens = 0;
      const double decoding = cpu_seconds();
      for (const auto& some : ids) {
        tokenizer.decode(some);
        tokens += some.size();
      }
      decode_seconds = std::min(decode_seconds, cpu_seconds() - decoding);
    }
    std::printf("load %.2f s, %zu tokens, encode %.2f MB/s, decode %.2f MB/s\n", load_seconds, tokens,
                megabytes / encode_seconds, megabytes / decode_seconds);
  } catch (const latente::Error& error) {
    std::fprintf(stderr, "bench_tokenizer: %s\n", error.what());
    return 1;
  }
  return 0;
}
