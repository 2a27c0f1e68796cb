// latente tokenizer: trains a vocabulary, encodes and decodes text, describes a tokenizer.
#include "tokenizer/tokenizer.h"

#include <unistd.h>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <set>

#include "base/error.h"
#include "base/file.h"
#include "commands.h"
#include "session.h"
#include "tokenizer/train_bpe.h"
#include "train/corpus_reader.h"

namespace latente {
namespace {

// The documents of several files, one after another.
class FileDocuments {
 public:
  FileDocuments(const std::vector<std::string>& patterns, std::string separator)
      : separator_(std::move(separator)) {
    std::set<std::string> distinct;
    for (const std::string& pattern : patterns) {
      for (std::string& path : glob_files(pattern)) {
        if (!distinct.insert(path).second) continue;
        text_format(path);  // refuses unsuitable files before any work
        total_ += FileSource(path).size();
        paths_.push_back(std::move(path));
      }
    }
  }

  bool next(std::string& document) {
    RawDocument raw;
    while (true) {
      if (!file_) {
        if (at_ == paths_.size()) return false;
        open(paths_[at_]);
      }
      if (reader_->next(raw)) break;
      before_ += file_->size();
      ++at_;
      file_.reset();
    }
    document = document_text(std::move(raw), format_, paths_[at_]);
    return true;
  }

  double share_done() const {
    const int64_t done = before_ + (file_ ? file_->done() : 0);
    return total_ > 0 ? static_cast<double>(done) / static_cast<double>(total_) : 1.0;
  }

 private:
  void open(const std::string& path) {
    reader_.reset();
    unpacked_.reset();
    file_ = std::make_unique<FileSource>(path);
    if (is_compressed(path)) unpacked_ = zstd_source(*file_, path);
    format_ = text_format(path);
    reader_ = std::make_unique<DocumentReader>(unpacked_ ? *unpacked_ : *file_, format_, separator_);
  }

  std::string separator_;
  std::vector<std::string> paths_;
  size_t at_ = 0;
  int64_t total_ = 0, before_ = 0;
  std::unique_ptr<FileSource> file_;
  std::unique_ptr<ByteSource> unpacked_;
  std::unique_ptr<DocumentReader> reader_;
  TextFormat format_ = TextFormat::plain;
};

// A line on a terminal that is written over; nothing where standard error is a file.
class ProgressLine {
 public:
  ~ProgressLine() {
    if (shown_) std::fputs("\r\033[K", stderr);
  }
  template <class Text>
  void show(Text&& text) {
    const auto now = std::chrono::steady_clock::now();
    if (!terminal_ || now - last_ < std::chrono::milliseconds(200)) return;
    last_ = now;
    shown_ = true;
    std::fprintf(stderr, "\r\033[K%s", text().c_str());
    std::fflush(stderr);
  }

 private:
  const bool terminal_ = isatty(STDERR_FILENO) == 1;
  bool shown_ = false;
  std::chrono::steady_clock::time_point last_{};
};

std::string megabytes(int64_t bytes) { return fmt::format("{:.1f} MB", static_cast<double>(bytes) / 1e6); }

struct TrainFiles {
  std::vector<std::string> files;
  std::string separator = "<|endoftext|>", out;
  BpeTrainOptions bpe;
};

void train(const TrainFiles& options) {
  const auto start = std::chrono::steady_clock::now();
  FileDocuments documents(options.files, options.separator);
  std::error_code error;
  std::filesystem::create_directories(options.out, error);  // not only when the work is done
  if (error) fail("{}: cannot make the directory: {}", options.out, error.message());
  TrainedBpe trained;
  {
    ProgressLine line;
    trained =
        train_bpe([&](std::string& document) { return documents.next(document); }, options.bpe,
                  [&](const BpeTrainProgress& at) {
                    line.show([&] {
                      if (at.stage == BpeTrainProgress::Stage::counting) {
                        return fmt::format("reading {:3.0f} %  {} documents, {}",
                                           documents.share_done() * 100, at.documents, megabytes(at.bytes));
                      }
                      return fmt::format("merging  {} of {} tokens, {} distinct words", at.vocab_size,
                                         options.bpe.vocab_size, at.words);
                    });
                  });
  }
  trained.save(options.out);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  fmt::print("{}: {} tokens from {} documents, {}, {} distinct words, in {:.1f} s\n", options.out,
             trained.tokens.size(), trained.documents, megabytes(trained.bytes), trained.words,
             seconds.count());
  if (static_cast<int>(trained.tokens.size()) < options.bpe.vocab_size) {
    fmt::print("fewer than the {} asked for: no other pair occurs {} times\n", options.bpe.vocab_size,
               options.bpe.min_frequency);
  }
}

struct EncodeCommand {
  std::string tokenizer, text, file;
  bool pieces = false, plain = false, no_special = false;
};

std::string input(const std::string& text, const std::string& file) {
  if (!file.empty() && file != "-") return read_file(file);
  return text.empty() ? read_file("/dev/stdin") : text;
}

// On one line: control characters, line ends and what is not UTF-8 escaped.
std::string visible(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const size_t valid = std::min(find_invalid_utf8(text), text.size());
    for (const char c : text.substr(0, valid)) {
      const auto byte = static_cast<unsigned char>(c);
      if (c == '\n') {
        out += "\\n";
      } else if (c == '\t') {
        out += "\\t";
      } else if (byte < 0x20 || byte == 0x7F) {
        out += fmt::format("\\x{:02x}", byte);
      } else {
        out += c;
      }
    }
    text.remove_prefix(valid);
    if (text.empty()) break;
    out += fmt::format("\\x{:02x}", static_cast<unsigned char>(text[0]));
    text.remove_prefix(1);
  }
  return out;
}

void encode(const EncodeCommand& options) {
  const Tokenizer tokenizer = load_tokenizer(options.tokenizer);
  const std::vector<int32_t> ids =
      tokenizer.encode(input(options.text, options.file),
                       {.add_special = !options.no_special, .parse_special = !options.plain});
  for (size_t i = 0; i < ids.size(); ++i) {
    if (options.pieces) {
      fmt::print("{:7} '{}'\n", ids[i], visible(tokenizer.token_bytes(ids[i])));
    } else {
      fmt::print("{}{}", i > 0 ? " " : "", ids[i]);
    }
  }
  if (!options.pieces) fmt::print("\n");
}

struct DecodeCommand {
  std::string tokenizer;
  std::vector<std::string> ids;
  bool skip_special = false;
};

// Numbers between spaces, commas or brackets.
void read_ids(std::string_view text, std::vector<int32_t>& out) {
  constexpr std::string_view between = " \t\r\n,[]";
  for (size_t at = 0; (at = text.find_first_not_of(between, at)) != text.npos;) {
    const std::string_view word =
        text.substr(at, std::min(text.find_first_of(between, at), text.size()) - at);
    int32_t id = 0;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), id);
    if (error != std::errc() || end != word.data() + word.size() || id < 0)
      fail("token ids: expected numbers from 0, found '{}'", word.substr(0, 40));
    out.push_back(id);
    at += word.size();
  }
}

void decode(const DecodeCommand& options) {
  const Tokenizer tokenizer = load_tokenizer(options.tokenizer);
  std::vector<int32_t> ids;
  for (const std::string& text : options.ids) read_ids(text, ids);
  if (options.ids.empty()) read_ids(read_file("/dev/stdin"), ids);
  for (const int32_t id : ids) tokenizer.token_text(id);  // names an id that is not in the vocabulary
  const std::string text = tokenizer.decode(ids, options.skip_special);
  std::fwrite(text.data(), 1, text.size(), stdout);
  if (isatty(STDOUT_FILENO) == 1) fmt::print("\n");
}

struct InfoCommand {
  std::string tokenizer, separator = "<|endoftext|>";
  std::vector<std::string> text;
};

void print_token(const char* name, const Tokenizer& tokenizer, std::optional<int32_t> id) {
  if (id) fmt::print("{:<15}{} '{}'\n", name, *id, visible(tokenizer.token_text(*id)));
}

void measure(const Tokenizer& tokenizer, const InfoCommand& options) {
  FileDocuments documents(options.text, options.separator);
  int64_t bytes = 0, tokens = 0, words = 0;
  std::set<int32_t> used;
  std::string document;
  std::chrono::duration<double> seconds{};
  while (documents.next(document)) {
    const auto start = std::chrono::steady_clock::now();
    const std::vector<int32_t> ids = tokenizer.encode(document, {.add_special = false});
    seconds += std::chrono::steady_clock::now() - start;
    used.insert(ids.begin(), ids.end());
    bytes += static_cast<int64_t>(document.size());
    tokens += static_cast<int64_t>(ids.size());
    bool inside = false;
    for (const char c : document) {
      const bool space = c == ' ' || c == '\n' || c == '\t' || c == '\r';
      words += !space && !inside;
      inside = !space;
    }
  }
  if (tokens == 0) fail("text: expected some, found none");
  const auto ratio = [](int64_t a, int64_t b) {
    return static_cast<double>(a) / static_cast<double>(std::max<int64_t>(b, 1));
  };
  fmt::print("text           {}, {} tokens: {:.3f} bytes a token, {:.3f} tokens a word; {} tokens occur\n",
             megabytes(bytes), tokens, ratio(bytes, tokens), ratio(tokens, words), used.size());
  fmt::print("speed          {:.1f} MB/s on one core\n", static_cast<double>(bytes) / 1e6 / seconds.count());
}

void info(const InfoCommand& options) {
  const Tokenizer tokenizer = load_tokenizer(options.tokenizer);
  int special = 0, count = 0;
  size_t longest = 0;
  for (int id = 0; id < tokenizer.vocab_size(); ++id) {
    if (!tokenizer.has(id)) continue;
    ++count;
    special += tokenizer.is_special(id);
    if (!tokenizer.is_special(id)) longest = std::max(longest, tokenizer.token_bytes(id).size());
  }
  fmt::print("tokens         {}, {} of them special; ids up to {}\n", count, special,
             tokenizer.vocab_size() - 1);
  fmt::print("longest        {} bytes\n", longest);
  print_token("begin of text", tokenizer, tokenizer.bos_id());
  print_token("end of text", tokenizer, tokenizer.eos_id());
  print_token("padding", tokenizer, tokenizer.pad_id());
  print_token("unknown", tokenizer, tokenizer.unk_id());
  fmt::print("adds begin     {}\n", tokenizer.adds_bos() ? "yes" : "no");
  fmt::print("chat template  {}\n", tokenizer.chat_template().empty() ? "no" : "yes");
  if (!options.text.empty()) measure(tokenizer, options);
}

CLI::App* add_command(CLI::App& group, const char* name, const char* description) {
  CLI::App* command = group.add_subcommand(name, description);
  command->get_formatter()->column_width(34);
  return command;
}

constexpr const char* separator_help = "Line of plain text that ends a document; '' = a file is a document";
constexpr const char* tokenizer_help = "tokenizer.json, tiktoken.model, a directory that has one, or a GGUF file";

void add_train_command(CLI::App& group) {
  auto options = std::make_shared<TrainFiles>();
  CLI::App* command = add_command(group, "train", "Train a byte-level BPE vocabulary from text");
  command
      ->add_option("files", options->files,
                   "Plain text, or .jsonl with a field \"text\"; also .zst; paths or patterns")
      ->required();
  command->add_option("-o,--out", options->out, "Directory for tokenizer.json and tokenizer_config.json")
      ->required();
  command->add_option("-n,--vocab-size", options->bpe.vocab_size, "Tokens, with special tokens and bytes")
      ->capture_default_str();
  command
      ->add_option("--special", options->bpe.special_tokens,
                   "Special tokens; the first begins and ends texts unless --bos and --eos name others")
      ->capture_default_str();
  command->add_option("--bos", options->bpe.bos, "Special token that begins a text");
  command->add_option("--eos", options->bpe.eos, "Special token that ends a text");
  command
      ->add_option("--pre-tokenizer", options->bpe.pre_tokenizer,
                   "How text is cut into words: deepseek-v3, gpt2, llama3")
      ->capture_default_str();
  command
      ->add_option("--min-frequency", options->bpe.min_frequency,
                   "Times that a pair must occur to become a token")
      ->capture_default_str();
  command->add_option("--separator", options->separator, separator_help)->capture_default_str();
  command->add_option("-t,--threads", options->bpe.threads, "0 = one a core")
      ->capture_default_str()
      ->check(CLI::Range(0, 1024));
  command->callback([options] { train(*options); });
}

void add_encode_command(CLI::App& group) {
  auto options = std::make_shared<EncodeCommand>();
  CLI::App* command = add_command(group, "encode", "Print the token ids of a text");
  command->add_option("tokenizer", options->tokenizer, tokenizer_help)->required();
  CLI::Option* text = command->add_option("text", options->text, "Text; standard input if left out");
  command->add_option("-f,--file", options->file, "Read the text from a file")->excludes(text);
  command->add_flag("-p,--pieces", options->pieces, "A line for each token, with its text");
  command->add_flag("--plain", options->plain, "Take special tokens in the text for ordinary text");
  command->add_flag("--no-special", options->no_special, "Add no begin or end of text");
  command->callback([options] { encode(*options); });
}

void add_decode_command(CLI::App& group) {
  auto options = std::make_shared<DecodeCommand>();
  CLI::App* command = add_command(group, "decode", "Print the text of token ids");
  command->add_option("tokenizer", options->tokenizer, tokenizer_help)->required();
  command->add_option("ids", options->ids, "Token ids; standard input if left out");
  command->add_flag("--skip-special", options->skip_special, "Leave special tokens out");
  command->callback([options] { decode(*options); });
}

void add_info_command(CLI::App& group) {
  auto options = std::make_shared<InfoCommand>();
  CLI::App* command = add_command(group, "info", "Describe a tokenizer; measure it on text");
  command->add_option("tokenizer", options->tokenizer, tokenizer_help)->required();
  command->add_option("--text", options->text, "Files (as for train) to measure compression and speed on");
  command->add_option("--separator", options->separator, separator_help)->capture_default_str();
  command->callback([options] { info(*options); });
}

}  // namespace

void add_tokenizer(CLI::App& app) {
  CLI::App* group = app.add_subcommand("tokenizer", "Train a tokenizer, encode and decode text");
  group->require_subcommand(1);
  add_train_command(*group);
  add_encode_command(*group);
  add_decode_command(*group);
  add_info_command(*group);
}

}  // namespace latente
