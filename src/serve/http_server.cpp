#include "serve/http_server.h"

#include <poll.h>

#include <atomic>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/ssl.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <boost/beast/ssl.hpp>
#include <chrono>
#include <set>
#include <thread>
#include <type_traits>

#include "base/error.h"

namespace latente {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using tcp = asio::ip::tcp;
using Clock = std::chrono::steady_clock;
using boost::system::error_code;

constexpr int64_t most_turned_away = 64;  // at a time

// How soon a client that went away is noticed while nothing is sent to it.
constexpr auto look_out = std::chrono::milliseconds(250);

Clock::duration seconds(double count) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(count));
}

double since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

auto result_in(error_code& error) { return asio::redirect_error(asio::use_awaitable, error); }

// Whether the other side has closed its end, whatever it sent before.
bool hung_up(int socket) {
  pollfd look{socket, POLLRDHUP, 0};
  return poll(&look, 1, 0) > 0 && (look.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

int status_of(const error_code& error) {
  if (error == http::error::header_limit || error == http::error::buffer_overflow) return 431;
  if (error == http::error::body_limit) return 413;
  return 400;
}

std::string message_of(const error_code& error, const HttpOptions& options) {
  if (status_of(error) == 431) return fmt::format("the header is longer than {} bytes", options.header_bytes);
  if (status_of(error) == 413) return fmt::format("the body is longer than {} bytes", options.body_bytes);
  return "the request is no valid HTTP: " + error.message();
}

HttpRequest asked_by(http::request<http::string_body>& request) {
  const auto text = [](auto view) { return std::string(view.data(), view.size()); };
  HttpRequest asked;
  asked.method = request.method() == http::verb::head ? "GET" : text(request.method_string());
  asked.path = text(request.target());
  asked.path.resize(std::min(asked.path.find('?'), asked.path.size()));
  asked.authorization = text(request[http::field::authorization]);
  asked.origin = text(request[http::field::origin]);
  asked.host = text(request[http::field::host]);
  asked.body = std::move(request.body());
  return asked;
}

}  // namespace

struct HttpServer::Impl {
  // What the server knows of an open connection; touched on its strand, but for the set itself.
  struct Connection {
    tcp::socket* socket;
    asio::any_io_executor executor;
    bool idle = true;  // between requests
  };
  // One that is in the set as long as this lives.
  class Enlisted {
   public:
    Enlisted(Impl& server, beast::tcp_stream& stream)
        : server_(server),
          connection_(std::make_shared<Connection>(Connection{&stream.socket(), stream.get_executor()})) {
      const std::lock_guard lock(server_.mutex);
      server_.connections.insert(connection_);
    }
    ~Enlisted() {
      const std::lock_guard lock(server_.mutex);
      server_.connections.erase(connection_);
    }
    Enlisted(const Enlisted&) = delete;
    Enlisted& operator=(const Enlisted&) = delete;
    Connection& operator*() const { return *connection_; }

   private:
    Impl& server_;
    std::shared_ptr<Connection> connection_;
  };

  struct Sent {
    bool complete = false, streamed = false;
    int status = 0;
    int64_t bytes = 0;
    HttpReply::Tokens tokens;
  };

  HttpOptions options;
  HttpHandler handler;
  std::mutex mutex;
  std::set<std::shared_ptr<Connection>> connections;
  // Behind what it ends with: conversations under way that it takes along strike themselves off.
  asio::io_context io;
  asio::ssl::context tls{asio::ssl::context::tls_server};
  // Accepting, signals and draining happen on one strand.
  asio::strand<asio::io_context::executor_type> control{io.get_executor()};
  tcp::acceptor acceptor{control};
  asio::signal_set signals{control};
  asio::steady_timer deadline{control};
  std::function<void()> on_signal;
  std::vector<std::thread> threads;
  std::unique_ptr<asio::thread_pool> handlers;
  std::atomic<bool> draining = false;
  std::atomic<int64_t> open = 0, turned_away = 0;

  bool secure() const { return !options.tls_certificate.empty(); }

  void listen() {
    error_code error;
    const asio::ip::address address = asio::ip::make_address(options.host, error);
    if (error) fail("--host: expected an address such as 127.0.0.1 or ::, found {}", options.host);
    const tcp::endpoint endpoint(address, static_cast<uint16_t>(options.port));
    acceptor.open(endpoint.protocol());
    acceptor.set_option(tcp::acceptor::reuse_address(true));
    if (acceptor.bind(endpoint, error); !error)
      acceptor.listen(asio::socket_base::max_listen_connections, error);
    if (error) fail("{}:{}: cannot listen: {}", options.host, options.port, error.message());
  }

  void read_certificate() {
    error_code error;
    tls.use_certificate_chain_file(options.tls_certificate, error);
    if (error) fail("{}: expected a certificate in PEM: {}", options.tls_certificate, error.message());
    tls.use_private_key_file(options.tls_key, asio::ssl::context::pem, error);
    if (error) fail("{}: expected the certificate's key in PEM: {}", options.tls_key, error.message());
    tls.set_options(asio::ssl::context::no_tlsv1 | asio::ssl::context::no_tlsv1_1);
  }

  // -- Accepting

  asio::awaitable<void> accept() {
    while (acceptor.is_open()) {
      error_code error;
      auto strand = asio::make_strand(io);
      tcp::socket socket = co_await acceptor.async_accept(strand, result_in(error));
      if (error == asio::error::operation_aborted) break;
      if (error) {  // such as too many open files: others may close theirs
        asio::steady_timer pause(control, std::chrono::milliseconds(50));
        co_await pause.async_wait(result_in(error));
        continue;
      }
      socket.set_option(tcp::no_delay(true), error);
      beast::tcp_stream stream(std::move(socket));
      if (open >= options.connections) {
        // Of very many not even that is said: they cost a descriptor each until they have heard it.
        if (turned_away >= most_turned_away) continue;
        ++turned_away;
        asio::co_spawn(strand, turn_away(std::move(stream)),
                       [this](const std::exception_ptr&) { --turned_away; });
        continue;
      }
      ++open;
      asio::co_spawn(strand, serve(std::move(stream)), [this](const std::exception_ptr&) { --open; });
    }
  }

  asio::awaitable<void> turn_away(beast::tcp_stream stream) {
    error_code error;
    stream.expires_after(std::chrono::seconds(1));
    const HttpReply::Head head{503, "application/json", {{"Retry-After", "1"}}};
    std::string body = error_body(503, "too many connections");
    co_await write_whole(stream, 11, false, false, head, std::move(body), error);
    co_await hear_out(stream);
  }

  asio::awaitable<void> serve(beast::tcp_stream stream) {
    error_code error;
    const tcp::endpoint remote = stream.socket().remote_endpoint(error);
    const std::string peer = remote.address().to_string(error);
    if (!secure()) {
      // Most of what is written finds room at once (answer()).
      stream.socket().non_blocking(true, error);
      const Enlisted entry(*this, stream);
      co_await converse(stream, *entry, peer);
      stream.socket().shutdown(tcp::socket::shutdown_both, error);
      co_return;
    }
    beast::ssl_stream<beast::tcp_stream> encrypted(std::move(stream), tls);
    beast::tcp_stream& socket = beast::get_lowest_layer(encrypted);
    const Enlisted entry(*this, socket);
    socket.expires_after(seconds(options.receive_seconds));
    co_await encrypted.async_handshake(asio::ssl::stream_base::server, result_in(error));
    if (error) co_return;
    co_await converse(encrypted, *entry, peer);
    // Without a word of parting, a client may take the end for an attack.
    socket.expires_after(std::chrono::seconds(1));
    co_await encrypted.async_shutdown(result_in(error));
  }

  // -- One connection

  template <class Stream>
  asio::awaitable<void> converse(Stream& stream, Connection& connection, const std::string& peer) {
    beast::flat_buffer buffer;
    while (!draining && co_await one_request(stream, buffer, connection, peer)) {
    }
    connection.idle = false;
  }

  // Reads a request and writes its reply. Returns whether the connection goes on.
  template <class Stream>
  asio::awaitable<bool> one_request(Stream& stream, beast::flat_buffer& buffer, Connection& connection,
                                    const std::string& peer) {
    auto& socket = beast::get_lowest_layer(stream);
    error_code error;
    http::request_parser<http::string_body> parser;
    parser.header_limit(static_cast<uint32_t>(options.header_bytes));
    parser.body_limit(static_cast<uint64_t>(options.body_bytes));
    connection.idle = true;
    socket.expires_after(seconds(options.idle_seconds));
    co_await http::async_read_header(stream, buffer, parser, result_in(error));
    connection.idle = false;
    const Clock::time_point begin = Clock::now();
    if (!error && parser.get()[http::field::expect] == "100-continue" && !parser.is_done()) {
      static constexpr std::string_view go_on = "HTTP/1.1 100 Continue\r\n\r\n";
      co_await asio::async_write(stream, asio::buffer(go_on), result_in(error));
    }
    if (!error) {
      socket.expires_after(seconds(options.receive_seconds));
      co_await http::async_read(stream, buffer, parser, result_in(error));
    }
    if (error == http::error::end_of_stream || !socket.socket().is_open()) co_return false;
    const auto version = parser.get().version();
    if (error) {
      if (error.category() != http::make_error_code(http::error::bad_version).category()) co_return false;
      const int status = status_of(error);
      Sent sent;
      sent.status = status;
      record(peer, parser.get().method_string(), parser.get().target(), begin, sent);
      error_code ignored;
      socket.expires_after(seconds(options.send_seconds));
      // g++ 12 destroys temporaries that are made inside of such calls twice.
      const HttpReply::Head head{status, "application/json"};
      std::string body = error_body(status, message_of(error, options));
      co_await write_whole(stream, 11, false, false, head, std::move(body), ignored);
      co_await hear_out(stream);
      co_return false;
    }

    auto request = parser.release();
    const bool keep_alive = request.keep_alive();
    const bool head_only = request.method() == http::verb::head;
    const std::string target(request.target().data(), request.target().size());

    asio::steady_timer timer(stream.get_executor());
    const auto reply = std::make_shared<HttpReply>();
    Sent sent;
    {
      // The reply may outlive this frame; then there is nothing to wake.
      const auto alive = std::make_shared<asio::steady_timer*>(&timer);
      const std::weak_ptr<asio::steady_timer*> watched = alive;
      reply->wake_by([watched, executor = stream.get_executor()] {
        asio::post(executor, [watched] {
          if (const auto waiting = watched.lock()) (*waiting)->cancel();
        });
      });
      asio::post(*handlers, [this, reply, asked = asked_by(request)]() mutable {
        try {
          handler(std::move(asked), reply);
        } catch (const std::exception& exception) {
          reply->respond({500, "application/json"}, error_body(500, exception.what()));
        }
      });
      sent = co_await answer(stream, *reply, timer, version, keep_alive, head_only);
    }
    record(peer, request.method_string(), target, begin, sent);
    const bool goes_on = sent.complete && keep_alive && (version >= 11 || !sent.streamed);
    co_return goes_on;
  }

  template <class Stream>
  asio::awaitable<Sent> answer(Stream& stream, HttpReply& reply, asio::steady_timer& timer, unsigned version,
                               bool keep_alive, bool head_only) {
    auto& socket = beast::get_lowest_layer(stream);
    const Clock::time_point begin = Clock::now();
    Clock::time_point looked = begin;
    Sent sent;
    error_code error;
    for (;;) {
      HttpReply::Taken taken = reply.take();
      sent.tokens = taken.tokens;
      sent.bytes += static_cast<int64_t>(taken.data.size());
      if (taken.begun && !taken.streamed) {
        socket.expires_after(seconds(options.send_seconds));
        sent.status = taken.head.status;
        co_await write_whole(stream, version, keep_alive && !draining, head_only, taken.head,
                             std::move(taken.data), error);
        sent.complete = !error;
        co_return sent;
      }
      std::string out;
      if (taken.begun && !sent.streamed) {
        sent.streamed = true;
        sent.status = taken.head.status;
        socket.expires_after(seconds(options.send_seconds));
        co_await write_head(stream, version, keep_alive && !draining, taken.head, error);
      }
      // Without chunks (HTTP/1.0) the end is where the connection closes.
      const bool chunked = version >= 11;
      if (!taken.data.empty())
        out = chunked ? fmt::format("{:x}\r\n{}\r\n", taken.data.size(), taken.data) : std::move(taken.data);
      if (taken.ended && chunked) out += "0\r\n\r\n";
      if (!error && !out.empty()) {
        size_t written = 0;
        if constexpr (std::is_same_v<Stream, beast::tcp_stream>) {
          written = stream.socket().write_some(asio::buffer(out), error);
          if (error == asio::error::would_block) error = {};
        }
        if (!error && written < out.size()) {
          socket.expires_after(seconds(options.send_seconds));
          co_await asio::async_write(stream, asio::buffer(out) + written, result_in(error));
        }
      }
      if (!error && taken.ended) {
        sent.complete = true;
        co_return sent;
      }
      if (!error && out.empty()) {
        timer.expires_after(look_out);
        co_await timer.async_wait(result_in(error));
        error = {};
      }
      if (Clock::now() - looked >= look_out) {
        looked = Clock::now();
        if (hung_up(socket.socket().native_handle())) error = asio::error::connection_reset;
        if (since(begin) > options.request_seconds) reply.abandon(Abandoned::too_long);
      }
      if (error) {
        reply.abandon(Abandoned::gone);
        co_return sent;
      }
    }
  }

  template <class Message>
  void fill(Message& message, unsigned version, bool keep_alive, const HttpReply::Head& head) {
    message.version(version);
    message.result(static_cast<unsigned>(head.status));
    message.set(http::field::server, "latente");
    if (!head.content_type.empty()) message.set(http::field::content_type, head.content_type);
    for (const auto& [name, value] : head.headers) message.set(name, value);
    if (!options.cors.empty()) message.set(http::field::access_control_allow_origin, options.cors);
    message.keep_alive(keep_alive);
  }

  template <class Stream>
  asio::awaitable<void> write_whole(Stream& stream, unsigned version, bool keep_alive, bool head_only,
                                    HttpReply::Head head, std::string body, error_code& error) {
    http::response<http::string_body> response;
    fill(response, version, keep_alive, head);
    response.body() = std::move(body);
    if (head.status != 204) response.content_length(response.body().size());
    if (head_only) {
      http::response_serializer<http::string_body> serializer(response);
      co_await http::async_write_header(stream, serializer, result_in(error));
    } else {
      co_await http::async_write(stream, response, result_in(error));
    }
  }

  template <class Stream>
  asio::awaitable<void> write_head(Stream& stream, unsigned version, bool keep_alive,
                                   const HttpReply::Head& head, error_code& error) {
    http::response<http::empty_body> response;
    fill(response, version, keep_alive && version >= 11, head);
    response.set(http::field::cache_control, "no-cache");
    if (version >= 11) response.chunked(true);
    http::response_serializer<http::empty_body> serializer(response);
    co_await http::async_write_header(stream, serializer, result_in(error));
  }

  // What the client was still sending is read for a moment: closing at once would make it lose the reply.
  template <class Stream>
  asio::awaitable<void> hear_out(Stream& stream) {
    auto& socket = beast::get_lowest_layer(stream);
    error_code error;
    socket.socket().shutdown(tcp::socket::shutdown_send, error);
    socket.expires_after(std::chrono::seconds(1));
    char dropped[4096];
    for (int64_t bytes = 0; !error && bytes < 4 << 20;)
      bytes += static_cast<int64_t>(
          co_await socket.async_read_some(asio::buffer(dropped, sizeof dropped), result_in(error)));
  }

  template <class Method, class Target>
  void record(const std::string& peer, const Method& method, const Target& target, Clock::time_point begin,
              const Sent& sent) const {
    if (!options.on_done) return;
    options.on_done({peer, std::string(method.data(), method.size()),
                     std::string(target.data(), target.size()), sent.status, since(begin), sent.bytes,
                     sent.complete, sent.tokens});
  }

  // -- The end

  void wait_for_signal() {
    signals.async_wait([this](const error_code& error, int) {
      if (error) return;
      if (draining) {
        io.stop();
        return;
      }
      if (on_signal) on_signal();
      drain();
      wait_for_signal();
    });
  }

  void drain() {
    if (draining.exchange(true)) return;
    asio::post(control, [this] {
      error_code ignored;
      acceptor.close(ignored);
      deadline.expires_after(seconds(options.drain_seconds));
      deadline.async_wait([this](const error_code& error) {
        if (!error) io.stop();
      });
      close_idle();
    });
  }

  // Until none is open: one may have become idle, or been accepted, just now.
  void close_idle() {
    {
      const std::lock_guard lock(mutex);
      for (const auto& connection : connections) {
        asio::post(connection->executor, [this, connection] {
          const std::lock_guard hold(mutex);
          if (!connections.contains(connection) || !connection->idle) return;
          error_code ignored;
          connection->socket->cancel(ignored);
        });
      }
    }
    if (open == 0) {
      deadline.cancel();
      signals.cancel();
      return;
    }
    auto again = std::make_shared<asio::steady_timer>(control, std::chrono::milliseconds(20));
    again->async_wait([this, again](const error_code& error) {
      if (!error) close_idle();
    });
  }
};

HttpServer::HttpServer(const HttpOptions& options, HttpHandler handler) : impl_(std::make_unique<Impl>()) {
  impl_->options = options;
  impl_->handler = std::move(handler);
  if (impl_->secure()) impl_->read_certificate();
  impl_->listen();
}

HttpServer::~HttpServer() {
  impl_->io.stop();
  wait();
}

int HttpServer::port() const { return impl_->acceptor.local_endpoint().port(); }

int64_t HttpServer::connections() const { return impl_->open; }

void HttpServer::start(std::function<void()> on_signal) {
  impl_->on_signal = std::move(on_signal);
  impl_->signals.add(SIGINT);
  impl_->signals.add(SIGTERM);
  impl_->wait_for_signal();
  asio::co_spawn(impl_->control, impl_->accept(), asio::detached);
  impl_->handlers = std::make_unique<asio::thread_pool>(static_cast<size_t>(impl_->options.handlers));
  for (int i = 0; i < impl_->options.threads; ++i) impl_->threads.emplace_back([this] { impl_->io.run(); });
}

void HttpServer::drain() { impl_->drain(); }

bool HttpServer::draining() const { return impl_->draining; }

void HttpServer::wait() {
  for (std::thread& thread : impl_->threads) thread.join();
  impl_->threads.clear();
  // A request that was just being read comes too late.
  if (impl_->handlers) {
    impl_->handlers->stop();
    impl_->handlers->join();
  }
}

}  // namespace latente
