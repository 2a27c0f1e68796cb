// What needs no model: who may ask for what, and when.
#include "serve/api.h"

#include <gtest/gtest.h>

namespace latente {
namespace {

struct Answered {
  int status = 0;
  HttpHeaders headers;
  Json body;
  std::string header(const std::string& name) const {
    for (const auto& [key, value] : headers) {
      if (key == name) return value;
    }
    return "";
  }
};

Answered ask(Api& api, const HttpRequest& request) {
  const auto reply = std::make_shared<HttpReply>();
  api.handle(request, reply);
  const HttpReply::Taken taken = reply->take();
  EXPECT_TRUE(taken.ended);
  return {taken.head.status, taken.head.headers, Json::parse(taken.data, nullptr, false)};
}

HttpRequest get(const std::string& path) {
  HttpRequest request;
  request.method = "GET";
  request.path = path;
  return request;
}

TEST(Api, SaysThatItIsLoading) {
  Metrics metrics;
  Api api({}, metrics);
  EXPECT_FALSE(api.is_ready());
  const Answered health = ask(api, get("/health"));
  EXPECT_EQ(health.status, 503);
  EXPECT_EQ(health.header("Retry-After"), "1");
  EXPECT_EQ(health.body["error"]["code"], "loading");
  EXPECT_EQ(ask(api, get("/v1/models")).status, 503);
  EXPECT_EQ(ask(api, get("/metrics")).status, 200);
  EXPECT_EQ(ask(api, get("/nothing")).status, 404);
  EXPECT_EQ(ask(api, get("/tokenize")).status, 405);
}

TEST(Api, WantsAKey) {
  Metrics metrics;
  ApiOptions options;
  options.keys = {"one", "another"};
  Api api(options, metrics);
  for (const auto& [header, status] : std::vector<std::pair<std::string, int>>{{"", 401},
                                                                               {"Bearer", 401},
                                                                               {"Bearer ", 401},
                                                                               {"Bearer on", 401},
                                                                               {"Bearer onee", 401},
                                                                               {"Basic one", 401},
                                                                               {"Bearer oneone", 401},
                                                                               {"Bearer one", 503},
                                                                               {"bearer one", 503},
                                                                               {"Bearer another", 503}}) {
    HttpRequest request = get("/v1/models");
    request.authorization = header;
    EXPECT_EQ(ask(api, request).status, status) << header;
  }
  EXPECT_EQ(ask(api, get("/v1/models")).header("WWW-Authenticate"), "Bearer");
  EXPECT_EQ(ask(api, get("/health")).status, 503);
}

TEST(Api, KeepsOtherOriginsOut) {
  Metrics metrics;
  Api closed({}, metrics);
  ApiOptions options;
  options.cors = "https://a.org";
  Api open(options, metrics);
  options.cors = "*";
  Api any(options, metrics);
  HttpRequest request = get("/metrics");
  request.host = "localhost:80";
  for (const auto& [origin, expected] :
       std::vector<std::pair<std::string, std::vector<int>>>{{"", {200, 200, 200}},
                                                             {"http://localhost:80", {200, 200, 200}},
                                                             {"http://localhost:81", {403, 403, 200}},
                                                             {"https://a.org", {403, 200, 200}},
                                                             {"null", {403, 403, 200}}}) {
    request.origin = origin;
    EXPECT_EQ(
        (std::vector<int>{ask(closed, request).status, ask(open, request).status, ask(any, request).status}),
        expected)
        << origin;
  }
  request.method = "OPTIONS";
  EXPECT_EQ(ask(open, request).status, 204);
  request.origin = "";
  EXPECT_EQ(ask(closed, request).status, 405);
}

TEST(Api, CountsOnlyPathsThatExist) {
  EXPECT_EQ(Api::known_path("/health?x=1"), "/health");
  EXPECT_EQ(Api::known_path("/v1/models/abc"), "/v1/models");
  EXPECT_EQ(Api::known_path("/made/up"), "other");
}

}  // namespace
}  // namespace latente
