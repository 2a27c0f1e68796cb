// The HTTP server: a thread or a few for all sockets, a coroutine for each connection (Boost.Beast), and
// threads in which requests are handled, so that one that takes long to read holds up nobody's reply.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "serve/http.h"

namespace latente {

// What became of a request.
struct HttpRecord {
  std::string peer, method, target;
  int status = 0;  // 0 = the client had gone before there was one
  double seconds = 0;
  int64_t bytes = 0;      // of the reply's body
  bool complete = false;  // the reply was sent to its end
  HttpReply::Tokens tokens;
};

struct HttpOptions {
  std::string host = "127.0.0.1";
  int port = 8080;   // 0 = any that is free
  int threads = 1;   // for sockets
  int handlers = 2;  // threads that the HttpHandler is called from
  int64_t header_bytes = 16 << 10, body_bytes = 16 << 20;
  int64_t connections = 1024;            // beyond them a connection is answered with 503 and closed
  double idle_seconds = 75;              // for the next request's header to arrive
  double receive_seconds = 30;           // for its body
  double send_seconds = 30;              // for the client to take a piece of the reply
  double request_seconds = 600;          // then a reply is Abandoned::too_long
  double drain_seconds = 30;             // for replies under way to end when the server is to stop
  std::string cors;                      // origin that browsers may call from; * = any, empty = none
  std::string tls_certificate, tls_key;  // PEM files; without them no TLS
  std::function<void(const HttpRecord&)> on_done;  // after each request; from several threads
};

class HttpServer {
 public:
  // Binds and listens. Error: the address is taken or unknown, a TLS file cannot be read.
  HttpServer(const HttpOptions& options, HttpHandler handler);
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  int port() const;  // that was bound
  int64_t connections() const;
  // Begins to accept, in threads of its own. On SIGINT and SIGTERM, `on_signal` is called and the server
  // drains; on a second one it stops at once.
  void start(std::function<void()> on_signal = {});
  // Accepts no more, closes idle connections, and ends when all replies have, or after drain_seconds.
  void drain();
  bool draining() const;
  // Until it has ended.
  void wait();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace latente
