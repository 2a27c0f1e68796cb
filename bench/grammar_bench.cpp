// Time of token masks under grammars: bench_grammar TOKENIZER DOCUMENTS.jsonl [NAME=GBNF_FILE...]. A line of
// the first file: {"name": ..., "schema": a JSON schema or "json", "documents": [texts]}; a grammar file has
// its texts in GBNF_FILE.txt, one a line. The documents, cut into tokens as the tokenizer cuts them, are read
// token by token; before each, its mask is found. Prints microseconds a mask: first with nothing known yet
// ("cold"), then again with a new matcher of the same grammar ("warm": only what depends on the tops of
// stacks is known), then with the same matcher ("again").
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/error.h"
#include "base/file.h"
#include "grammar/gbnf.h"
#include "grammar/json_schema.h"
#include "grammar/matcher.h"
#include "tokenizer/tokenizer.h"

namespace {

using namespace latente;
// CPU time of this thread in microseconds, so that others on the same core count little.
double now() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e6 + static_cast<double>(time.tv_nsec) / 1e3;
}
double micros(double from) { return now() - from; }

struct Texts {
  std::string name;
  grammar::Grammar grammar;
  std::vector<std::string> documents;
};

void print(const char* what, std::vector<double> times) {
  std::sort(times.begin(), times.end());
  double sum = 0;
  for (double time : times) sum += time;
  const auto at = [&](double share) {
    return times[static_cast<size_t>(share * static_cast<double>(times.size() - 1))];
  };
  std::printf("  %-6s masks %5zu  mean %8.1f  p50 %8.1f  p90 %8.1f  p99 %8.1f  max %8.1f us\n", what,
              times.size(), sum / static_cast<double>(times.size()), at(0.5), at(0.9), at(0.99),
              times.back());
}

void read(const Texts& texts, const Tokenizer& tokenizer,
          const std::shared_ptr<const grammar::Vocabulary>& vocabulary) {
  auto start = now();
  const auto automaton = std::make_shared<const grammar::Automaton>(texts.grammar);
  std::printf("%s: compiled in %.0f us, %zu states\n", texts.name.c_str(), micros(start),
              automaton->states());
  const auto compiled = std::make_shared<const grammar::TokenGrammar>(automaton, vocabulary);
  std::vector<uint64_t> mask(vocabulary->words());
  EncodeOptions plain;
  plain.add_special = false;
  grammar::Matcher first(compiled), second(compiled);
  for (const char* round : {"cold", "warm", "again"}) {
    const grammar::Matcher& begin = round[0] == 'c' ? first : second;
    std::vector<double> times, accepts;
    for (const std::string& document : texts.documents) {
      grammar::Matcher matcher = begin;
      for (int32_t token : tokenizer.encode(document, plain)) {
        start = now();
        matcher.admitted(mask);
        times.push_back(micros(start));
        if ((mask[static_cast<size_t>(token) / 64] >> (token % 64) & 1) == 0)
          fail("{}: {} is not admitted in {}", texts.name, tokenizer.token_text(token), document);
        start = now();
        matcher.accept(token);
        accepts.push_back(micros(start));
      }
    }
    print(round, times);
    if (round[0] == 'a') print("accept", accepts);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: bench_grammar TOKENIZER DOCUMENTS.jsonl [NAME=GBNF_FILE...]\n");
    return 1;
  }
  try {
    const Tokenizer tokenizer = Tokenizer::load(argv[1]);
    std::vector<std::string> bytes(static_cast<size_t>(tokenizer.vocab_size()));
    for (size_t i = 0; i < bytes.size(); ++i) {
      const auto id = static_cast<int32_t>(i);
      if (tokenizer.has(id) && !tokenizer.is_special(id)) bytes[i] = tokenizer.token_bytes(id);
    }
    std::vector<int32_t> stops;
    if (tokenizer.eos_id()) stops.push_back(*tokenizer.eos_id());
    const auto start = now();
    const auto vocabulary = std::make_shared<const grammar::Vocabulary>(bytes, stops);
    std::printf("vocabulary: %zu tokens, %zu nodes, longest %zu bytes, made in %.1f ms\n", vocabulary->size(),
                vocabulary->nodes().size(), vocabulary->longest(), micros(start) / 1000);
    std::istringstream lines(read_file(argv[2]));
    for (std::string line; std::getline(lines, line);) {
      const auto json = nlohmann::ordered_json::parse(line);
      const auto& schema = json["schema"];
      read({json["name"],
            schema == "json" ? grammar::json_object_grammar() : grammar::parse_json_schema(schema.dump()),
            json["documents"]},
           tokenizer, vocabulary);
    }
    for (int i = 3; i < argc; ++i) {
      const std::string argument = argv[i], path = argument.substr(argument.find('=') + 1);
      Texts texts{argument.substr(0, argument.find('=')), grammar::parse_gbnf(read_file(path), path), {}};
      std::istringstream documents(read_file(path + ".txt"));
      for (std::string line; std::getline(documents, line);) texts.documents.push_back(line);
      read(texts, tokenizer, vocabulary);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_grammar: %s\n", error.what());
    return 1;
  }
  return 0;
}
