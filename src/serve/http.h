// HTTP/1.1 as the rest of the server sees it: a request arrives whole, its reply is filled from any thread,
// whole or piece by piece. No word of sockets here (http_server.h), or of models.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace latente {

struct HttpRequest {
  std::string method, path;   // the path without what follows ?
  std::string authorization;  // of the header, empty if there is none
  std::string origin, host;   // likewise
  std::string body;
};

using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

// Why a reply need not be finished, or must be soon.
enum class Abandoned : uint8_t { gone, too_long };

class HttpReply {
 public:
  struct Head {
    int status = 200;
    std::string content_type;
    HttpHeaders headers{};
  };
  // The whole reply. What comes after the end of a reply is dropped.
  void respond(Head head, std::string body);
  // A stream of pieces: begin, write as often as wanted, end. What is written leaves with the next flush or
  // the end: waking the connection costs more than most pieces do to make.
  void begin(Head head);
  void write(std::string_view piece);
  void flush();
  void end();
  bool begun() const;

  // Called at most once for each reason, from the connection's thread; at once if it has happened already.
  // The reply is not ended by it.
  void on_abandoned(std::function<void(Abandoned)> callback);

  // For the access log: how many tokens the request had and got.
  struct Tokens {
    int64_t prompt = 0, cached = 0, completion = 0;
  };
  void count(const Tokens& tokens);

  // -- The connection's side
  struct Taken {
    bool begun = false, streamed = false, ended = false;
    Head head;         // of the first time that it has begun
    std::string data;  // since the last call
    Tokens tokens;
  };
  // `wake` is called, from any thread, when there is something to take, and then not again before it has been
  // taken. Before the reply is handed on.
  void wake_by(std::function<void()> wake) { wake_ = std::move(wake); }
  Taken take();
  void abandon(Abandoned reason);

 private:
  void wake_once();

  mutable std::mutex mutex_;
  Taken state_;
  bool woken_ = false;  // and nothing has been taken since
  std::function<void()> wake_;
  std::function<void(Abandoned)> abandoned_;
  std::vector<Abandoned> reasons_;
};

// Answers a request, now or later; called from several threads. An exception is answered with 500.
using HttpHandler = std::function<void(HttpRequest, const std::shared_ptr<HttpReply>&)>;

// The body of an error as OpenAI's protocol has it.
std::string error_body(int status, const std::string& message, const std::string& param = {},
                       const std::string& code = {});

}  // namespace latente
