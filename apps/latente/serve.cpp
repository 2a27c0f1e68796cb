// latente serve: answers OpenAI's protocol over HTTP.
#include <fcntl.h>
#include <fmt/chrono.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "base/file.h"
#include "commands.h"
#include "model/figures.h"
#include "serve/api.h"
#include "serve/http_server.h"
#include "session.h"

namespace latente {
namespace {

struct ServeOptions {
  SessionOptions session;
  HttpOptions http;
  std::vector<std::string> keys;
  std::string key_file, alias, access_log = "-";
  int64_t queue = 256;
  int64_t max_tokens = 1 << 20;
  bool each_expert = false;
};

// A line of JSON a request, without prompts and replies. What cannot be written is lost: a full disk is no
// reason to refuse requests.
class AccessLog {
 public:
  explicit AccessLog(const std::string& path) {
    if (path == "-") fd_ = dup(STDOUT_FILENO);
    if (!path.empty() && path != "-")
      fd_ = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0640);
    if (!path.empty() && fd_ < 0) fail("--access-log {}: {}", path, std::strerror(errno));
  }
  ~AccessLog() {
    if (fd_ >= 0) close(fd_);
  }
  AccessLog(const AccessLog&) = delete;
  AccessLog& operator=(const AccessLog&) = delete;

  void write(const HttpRecord& record) const {
    if (fd_ < 0) return;
    const auto now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
    Json line = {{"time", fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(now))},
                 {"peer", record.peer},
                 {"method", record.method},
                 {"target", record.target.substr(0, 256)},
                 {"status", record.status},
                 {"complete", record.complete},
                 {"seconds", std::round(record.seconds * 1e6) / 1e6},
                 {"bytes", record.bytes}};
    if (record.tokens.prompt > 0) {
      line["prompt_tokens"] = record.tokens.prompt;
      line["cached_tokens"] = record.tokens.cached;
      line["completion_tokens"] = record.tokens.completion;
    }
    // One call: lines of several threads do not mix.
    const std::string text = line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
    [[maybe_unused]] const ssize_t written = ::write(fd_, text.data(), text.size());
  }

 private:
  int fd_ = -1;
};

std::vector<std::string> read_keys(const ServeOptions& options) {
  std::vector<std::string> keys;
  for (const std::string& key : options.keys) {
    if (!key.empty()) keys.push_back(key);
  }
  if (options.key_file.empty()) return keys;
  const std::string text = read_file(options.key_file, 1 << 20);
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find_first_of("\r\n", begin), text.size());
    if (end > begin && text[begin] != '#') keys.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  if (keys.empty()) fail("{}: has no keys (one a line)", options.key_file);
  return keys;
}

std::string name_of(const std::string& path) {
  std::filesystem::path clean = std::filesystem::weakly_canonical(path);
  return clean.extension() == ".gguf" ? clean.stem().string() : clean.filename().string();
}

// A connection is an open file, of which there may be 1,024 unless more are asked for.
void allow_connections() {
  rlimit files{};
  if (getrlimit(RLIMIT_NOFILE, &files) != 0) return;
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);  // as far as the system lets it
}

void serve(const ServeOptions& options) {
  // Who reads the log may end before the server does.
  std::signal(SIGPIPE, SIG_IGN);
  allow_connections();
  Metrics metrics;
  const AccessLog log(options.access_log);
  HttpOptions http = options.http;
  if (http.tls_certificate.empty() != http.tls_key.empty()) fail("--tls-cert and --tls-key go together");

  HttpServer* running = nullptr;
  ApiOptions how;
  how.keys = read_keys(options);
  how.cors = http.cors;
  how.limits.max_tokens = options.max_tokens;
  how.each_expert = options.each_expert;
  how.connections = [&running] { return running->connections(); };
  Api api(std::move(how), metrics);
  http.on_done = [&](const HttpRecord& record) {
    metrics.request(Api::known_path(record.target), record.status);
    log.write(record);
  };
  HttpServer server(http, [&api](HttpRequest request, const std::shared_ptr<HttpReply>& reply) {
    api.handle(std::move(request), reply);
  });
  running = &server;
  // Loading cannot be interrupted otherwise.
  server.start([&api] {
    if (!api.is_ready()) std::_Exit(1);
  });
  const std::string address =
      fmt::format("{}://{}:{}", http.tls_certificate.empty() ? "http" : "https",
                  http.host.find(':') == http.host.npos ? http.host : "[" + http.host + "]", server.port());
  std::fprintf(stderr, "listening on %s; loading %s\n", address.c_str(), options.session.model.c_str());

  SessionOptions session_options = options.session;
  session_options.count_experts = true;
  Session session(session_options);
  EngineLoop loop(session.engine(), options.session.parallel + options.queue);
  std::optional<ChatFormat> format;
  const Tokenizer& tokenizer = session.tokenizer();
  if (!tokenizer.chat_template().empty())
    format.emplace(tokenizer.chat_template(), tokenizer.bos_token(), tokenizer.eos_token());
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const Runner& runner = session.engine().runner();
  const CacheFigures cache = cache_figures(session.config());
  const ServedModel model = {options.alias.empty() ? name_of(options.session.model) : options.alias,
                             std::chrono::duration_cast<std::chrono::seconds>(now).count(),
                             runner.options().context,
                             session.config().num_hidden_layers,
                             runner.cache_bytes_per_token(),
                             runner.cache_bytes_per_token() * cache.mha / cache.own,
                             session.generation(),
                             &tokenizer,
                             format ? &*format : nullptr,
                             session.vocabulary(),
                             &loop};
  api.ready(model);
  std::fprintf(stderr, "ready: %s, %lld sequences of up to %lld tokens%s\n", model.name.c_str(),
               static_cast<long long>(options.session.parallel), static_cast<long long>(model.context),
               format ? "" : ", no chat template");
  server.wait();
}

}  // namespace

void add_serve(CLI::App& app) {
  auto options = std::make_shared<ServeOptions>();
  CLI::App* command = app.add_subcommand("serve", "Answer OpenAI's protocol over HTTP");
  command->footer(
      "Each flag can be given as an environment variable, too: --ctx-size as LATENTE_CTX_SIZE.\n"
      "SIGTERM or Ctrl-C lets replies under way end; a second one does not.");
  HttpOptions& http = options->http;
  const auto seconds = [&](const char* name, double& value, const char* help) {
    command->add_option(name, value, help)
        ->capture_default_str()
        ->check(CLI::Range(0.1, 1e6))
        ->type_name("SECONDS");
  };
  add_model_options(*command, options->session);
  command->add_option("--host", http.host, "Address to listen on; 0.0.0.0 or :: = all of them")
      ->capture_default_str();
  command->add_option("--port", http.port, "0 = any that is free")
      ->capture_default_str()
      ->check(CLI::Range(0, 65535));
  command->add_option("--alias", options->alias,
                      "Name of the model for clients [that of the directory or file]");
  command->add_option("--api-key", options->keys, "A key that clients must have one of (may be repeated)")
      ->expected(1)
      ->take_all();
  command->add_option("--api-key-file", options->key_file, "More of them, one a line; # begins a comment")
      ->check(CLI::ExistingFile);
  add_parallel_options(*command, options->session);
  command->add_option("--queue", options->queue, "Sequences that wait at a time; more are refused (429)")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 20));
  command->add_option("-n,--max-tokens", options->max_tokens, "Tokens a reply can have at most")
      ->check(CLI::Range(1, 1 << 30));
  seconds("--request-seconds", http.request_seconds, "A reply that takes longer ends where it is");
  command->add_option("--connections", http.connections, "Open at a time")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  add_bytes_option(*command, "--max-header", http.header_bytes, "Bytes of a request's header at most [16K]");
  add_bytes_option(*command, "--max-body", http.body_bytes, "Bytes of a request's body at most [16M]");
  seconds("--idle-seconds", http.idle_seconds,
          "For a connection's next request to begin and its header to end");
  seconds("--receive-seconds", http.receive_seconds, "For a request's body to arrive");
  seconds("--send-seconds", http.send_seconds, "For a client to take a piece of a reply");
  seconds("--drain-seconds", http.drain_seconds, "For replies under way to end when the server is to stop");
  command->add_option("--io-threads", http.threads, "That read from and write to clients")
      ->capture_default_str()
      ->check(CLI::Range(1, 64));
  command
      ->add_option("--request-threads", http.handlers,
                   "That read prompts, templates and grammars of requests that came")
      ->capture_default_str()
      ->check(CLI::Range(1, 64));
  command->add_option("--cors", http.cors,
                      "Origin whose pages may call, such as https://example.org; * = any [none]");
  command->add_option("--tls-cert", http.tls_certificate, "Certificate chain in PEM: serve HTTPS")
      ->check(CLI::ExistingFile);
  command->add_option("--tls-key", http.tls_key, "Its key in PEM")->check(CLI::ExistingFile);
  command
      ->add_option("--access-log", options->access_log,
                   "File for a line of JSON a request; - = stdout, empty = none")
      ->capture_default_str();
  command->add_flag("--metrics-experts", options->each_expert,
                    "A counter in /metrics for each routed expert of each layer");
  add_sampling_options(*command, options->session);
  for (CLI::Option* option : command->get_options()) {
    if (option->get_positional() || option->get_lnames().empty() || option->get_lnames().front() == "help")
      continue;
    std::string name = "LATENTE_" + option->get_lnames().front();
    for (char& c : name) c = c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    option->envname(name);
  }
  command->callback([options] { serve(*options); });
}

}  // namespace latente
