// latente batch: answers many prompts at once, JSON Lines in and out.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "base/file.h"
#include "commands.h"
#include "messages.h"
#include "session.h"

namespace latente {
namespace {

using Json = nlohmann::ordered_json;

struct BatchOptions {
  SessionOptions session;
  std::string in, out;
};

// A line of the input.
struct Asked {
  nlohmann::json id;
  std::string text;                   // a prompt, or
  std::vector<ChatMessage> messages;  // a conversation
  nlohmann::json settings;            // that differ from the command's
};

Asked read_asked(std::string_view line, size_t index) {
  const auto json = nlohmann::json::parse(line, nullptr, false);
  if (!json.is_object()) fail("expected a JSON object");
  static const std::set<std::string> settings = {"max_tokens", "temperature", "top_k", "top_p",
                                                 "min_p",      "seed",        "stop"};
  Asked asked;
  asked.id = index;
  asked.settings = nlohmann::json::object();
  for (const auto& [key, value] : json.items()) {
    if (key == "id") {
      if (!value.is_string() && !value.is_number_integer())
        fail("id: expected a text or a number, found {}", value.dump());
      asked.id = value;
    } else if (key == "prompt") {
      if (!value.is_string()) fail("prompt: expected a text, found {}", value.dump());
      asked.text = value.get<std::string>();
    } else if (key == "messages") {
      asked.messages = messages_from_json(value);
      if (asked.messages.empty()) fail("messages: expected at least one message");
    } else if (settings.contains(key)) {
      asked.settings[key] = value;
    } else {
      fail(
          "{}: no such setting; a line has id, prompt or messages, max_tokens, temperature, top_k, top_p, "
          "min_p, seed, "
          "stop",
          key);
    }
  }
  if (json.contains("prompt") == json.contains("messages")) fail("expected either prompt or messages");
  return asked;
}

std::vector<Asked> read_input(const std::string& path) {
  const std::string text = read_file(path == "-" ? "/dev/stdin" : path);
  std::vector<Asked> all;
  size_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == line.npos) continue;
    try {
      all.push_back(read_asked(line, all.size()));
    } catch (const std::exception& error) {
      fail("{}: line {}: {}", path, number, error.what());
    }
  }
  if (all.empty()) fail("{}: has no lines", path);
  return all;
}

const char* reason_of(Finish finish) {
  switch (finish) {
    case Finish::length:
      return "length";
    case Finish::context_full:
      return "context";
    case Finish::stop_token:
    case Finish::interrupted:  // by a stop string
    case Finish::complete:
      return "stop";
    case Finish::failed:
      break;
  }
  return "error";
}

std::string message_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& exception) {
    return exception.what();
  }
}

// The answers so far. A line is written whole; one that a kill cut short is dropped when it is opened again.
class Answers {
 public:
  Answers(const std::string& path, const std::vector<Asked>& asked) : path_(path) {
    if (path == "-")
      fail("--out: expected a file, so that the same command can go on where it was interrupted");
    fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    created_ = fd_ >= 0;
    if (!created_ && errno == EEXIST) fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd_ < 0) fail("{}: {}", path, std::strerror(errno));
    struct stat opened {
    }, named{};  // differ where another batch has just removed the file
    if (flock(fd_, LOCK_EX | LOCK_NB) != 0 || fstat(fd_, &opened) != 0 || stat(path.c_str(), &named) != 0 ||
        opened.st_ino != named.st_ino)
      fail("{}: another batch is writing here", path);
    const std::string text = read_file(path);
    size_t whole = 0;
    for (size_t number = 1, end; (end = text.find('\n', whole)) != text.npos; ++number, whole = end + 1) {
      const Json json = Json::parse(std::string_view(text).substr(whole, end - whole), nullptr, false);
      if (!json.is_object() || !json.contains("index") || !json["index"].is_number_unsigned() ||
          !json.contains("id"))
        fail("{}: line {}: is no answer of a batch; choose another --out", path, number);
      const size_t index = json["index"].get<size_t>();
      if (index >= asked.size() || asked[index].id != json["id"])
        fail("{}: line {}: answers other prompts; choose another --out", path, number);
      done_.insert(index);
    }
    if (ftruncate(fd_, static_cast<off_t>(whole)) != 0 || lseek(fd_, 0, SEEK_END) < 0)
      fail("{}: {}", path, std::strerror(errno));
  }
  ~Answers() {
    if (created_ && done_.empty()) unlink(path_.c_str());  // nothing came of it: the model did not load, say
    close(fd_);
  }
  Answers(const Answers&) = delete;
  Answers& operator=(const Answers&) = delete;

  const std::set<size_t>& done() const { return done_; }
  void add(size_t index, const Json& answer) {
    std::string line = answer.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
    for (std::string_view rest = line; !rest.empty();) {
      const ssize_t written = write(fd_, rest.data(), rest.size());
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail("{}: {}", path_, std::strerror(errno));
      rest.remove_prefix(static_cast<size_t>(written));
    }
    done_.insert(index);
  }

 private:
  std::string path_;
  int fd_ = -1;
  bool created_ = false;
  std::set<size_t> done_;
};

class Batch {
 public:
  explicit Batch(const BatchOptions& options)
      : options_(options),
        asked_(read_input(options.in)),
        answers_(options.out, asked_),
        session_(options.session) {}

  // False if some prompts could not be answered, or not yet.
  bool run() {
    const size_t before = answers_.done().size();
    if (before > 0) std::fprintf(stderr, "%zu of %zu are answered already\n", before, asked_.size());
    const CatchInterrupts guard;
    Engine& engine = session_.engine();
    const size_t ahead = 4 * static_cast<size_t>(options_.session.parallel);  // that wait in the engine
    size_t next = 0;
    start_ = shown_ = Clock::now();
    while (!interrupted()) {
      for (; next < asked_.size() && engine.running() + engine.waiting() < ahead; ++next) {
        if (!answers_.done().contains(next)) ask(next);
      }
      if (!engine.step() && next == asked_.size()) break;
      show(false);
    }
    show(true);
    if (answers_.done().size() < asked_.size())
      std::fprintf(stderr, "interrupted; the same command goes on with the other %zu\n",
                   asked_.size() - answers_.done().size());
    if (failed_ > 0)
      std::fprintf(stderr, "%zu could not be answered: see \"error\" in %s\n", failed_, options_.out.c_str());
    return failed_ == 0 && answers_.done().size() == asked_.size();
  }

 private:
  using Clock = std::chrono::steady_clock;

  void ask(size_t index) {
    const Asked& asked = asked_[index];
    try {
      Request request;
      request.options = session_.generation();
      std::vector<std::string> stops = options_.session.stop;
      request.options.sampling.seed += index;
      apply(asked.settings, request.options, stops);
      request.prompt =
          asked.messages.empty() ? session_.prompt_of(asked.text) : session_.prompt_of(asked.messages);
      auto reply = std::make_shared<ReplyText>(session_.tokenizer(), stops);
      request.on_token = [this, reply](GeneratedToken token) {
        ++written_;
        reply->push(token.id);
        return !reply->stopped();
      };
      request.on_finish = [this, reply, index](const GenerationStats& stats) {
        reply->finish();
        if (stats.error) {
          ++failed_;
          answers_.add(index,
                       {{"index", index}, {"id", asked_[index].id}, {"error", message_of(stats.error)}});
          return;
        }
        answers_.add(index, {{"index", index},
                             {"id", asked_[index].id},
                             {"text", reply->text()},
                             {"finish_reason", reason_of(stats.finish)},
                             {"prompt_tokens", stats.prompt_tokens},
                             {"cached_tokens", stats.reused_tokens},
                             {"completion_tokens", stats.generated_tokens}});
      };
      session_.engine().submit(std::move(request));
    } catch (const std::exception& error) {
      ++failed_;
      answers_.add(index, {{"index", index}, {"id", asked.id}, {"error", error.what()}});
    }
  }

  static void apply(const nlohmann::json& settings, GenerationOptions& options,
                    std::vector<std::string>& stops) {
    for (const auto& [key, value] : settings.items()) {
      auto number = [&, &key = key, &value = value](auto& target) {
        using T = std::remove_reference_t<decltype(target)>;
        const bool fits = std::is_floating_point_v<T> ? value.is_number()
                          : std::is_unsigned_v<T>     ? value.is_number_unsigned()
                                                      : value.is_number_integer();
        if (!fits) fail("{}: expected a number, found {}", key, value.dump());
        target = value.template get<T>();
      };
      SamplingOptions& sampling = options.sampling;
      if (key == "max_tokens") number(options.max_tokens);
      if (key == "temperature") number(sampling.temperature);
      if (key == "top_k") number(sampling.top_k);
      if (key == "top_p") number(sampling.top_p);
      if (key == "min_p") number(sampling.min_p);
      if (key == "seed") number(sampling.seed), options.repeatable = true;
      if (key != "stop") continue;
      stops.clear();
      for (const nlohmann::json& stop : value.is_array() ? value : nlohmann::json::array({value})) {
        if (!stop.is_string()) fail("stop: expected a text or several, found {}", value.dump());
        stops.push_back(stop.get<std::string>());
      }
    }
  }

  void show(bool end) {
    const auto now = Clock::now();
    static const bool terminal = isatty(STDERR_FILENO) == 1;
    const auto wait = terminal ? std::chrono::milliseconds(500) : std::chrono::seconds(10);
    if (!end && now - shown_ < wait) return;
    shown_ = now;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    const Engine& engine = session_.engine();
    std::fprintf(stderr, "%s%zu of %zu answered, %zu running, %lld tokens, %.1f tok/s%s",
                 terminal ? "\r\033[K" : "", answers_.done().size(), asked_.size(), engine.running(),
                 static_cast<long long>(written_),
                 seconds > 0 ? static_cast<double>(written_) / seconds : 0.0, terminal && !end ? "" : "\n");
  }

  BatchOptions options_;
  std::vector<Asked> asked_;
  Answers answers_;
  Session session_;
  Clock::time_point start_, shown_;
  int64_t written_ = 0;
  size_t failed_ = 0;
};

}  // namespace

void add_batch(CLI::App& app) {
  auto options = std::make_shared<BatchOptions>();
  CLI::App* command = app.add_subcommand("batch", "Answer many prompts at once, JSON Lines in and out");
  command->footer(
      "A line of the input is {\"prompt\": TEXT} or {\"messages\": [{\"role\": ..., \"content\": ...}]}, and "
      "may have id,\n"
      "max_tokens, temperature, top_k, top_p, min_p, seed and stop. Answers come as they are ready, with "
      "index (the\n"
      "line, from 0) and id. The same command again goes on where it was interrupted.");
  options->session.weights.copied = true;  // there is much to answer
  add_session_options(*command, options->session);
  command->add_option("-i,--in", options->in, "Prompts; - = standard input")->required();
  command->add_option("-o,--out", options->out, "Answers; those it has are not asked for again")->required();
  add_parallel_options(*command, options->session);
  command->callback([options] {
    if (!Batch(*options).run()) throw CLI::RuntimeError(1);
  });
}

}  // namespace latente
