#include "serve/http.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "serve/metrics.h"

namespace latente {
namespace {

TEST(HttpReply, IsWholeOnce) {
  HttpReply reply;
  int woken = 0;
  reply.wake_by([&] { ++woken; });
  EXPECT_FALSE(reply.take().begun);
  reply.respond({404, "text/plain"}, "no");
  reply.respond({200, "text/plain"}, "yes");
  reply.write("more");
  EXPECT_EQ(woken, 1);
  const HttpReply::Taken taken = reply.take();
  EXPECT_TRUE(taken.begun && taken.ended && !taken.streamed);
  EXPECT_EQ(taken.head.status, 404);
  EXPECT_EQ(taken.data, "no");
}

TEST(HttpReply, StreamsInPieces) {
  HttpReply reply;
  reply.begin({200, "text/event-stream"});
  reply.write("a");
  reply.write("b");
  HttpReply::Taken taken = reply.take();
  EXPECT_TRUE(taken.begun && taken.streamed && !taken.ended);
  EXPECT_EQ(taken.data, "ab");
  EXPECT_EQ(reply.take().data, "");
  reply.write("c");
  reply.end();
  reply.write("d");
  taken = reply.take();
  EXPECT_EQ(taken.data, "c");
  EXPECT_TRUE(taken.ended);
}

// Waking costs more than a piece: many of them are one, until somebody has looked.
TEST(HttpReply, WakesForWhatIsFlushed) {
  HttpReply reply;
  int woken = 0;
  reply.wake_by([&] { ++woken; });
  reply.begin({200, "text/event-stream"});
  reply.write("a");
  reply.write("b");
  EXPECT_EQ(woken, 0);
  reply.flush();
  reply.flush();
  EXPECT_EQ(woken, 1);
  EXPECT_EQ(reply.take().data, "ab");
  reply.write("c");
  reply.flush();
  EXPECT_EQ(woken, 2);
  EXPECT_EQ(reply.take().data, "c");
  reply.end();
  EXPECT_EQ(woken, 3);
}

TEST(HttpReply, SaysOnceThatItIsAbandoned) {
  HttpReply reply;
  std::vector<Abandoned> reasons;
  reply.abandon(Abandoned::too_long);
  reply.on_abandoned([&](Abandoned reason) { reasons.push_back(reason); });
  reply.abandon(Abandoned::too_long);
  reply.abandon(Abandoned::gone);
  reply.abandon(Abandoned::gone);
  EXPECT_EQ(reasons, (std::vector{Abandoned::too_long, Abandoned::gone}));
}

TEST(ErrorBody, IsOpenAIs) {
  const auto json = nlohmann::json::parse(error_body(429, "wait \xff", "n", "queue_full"));
  EXPECT_EQ(json["error"]["type"], "rate_limit_error");
  EXPECT_EQ(json["error"]["message"], "wait \xef\xbf\xbd");
  EXPECT_EQ(json["error"]["param"], "n");
  EXPECT_EQ(json["error"]["code"], "queue_full");
  EXPECT_TRUE(nlohmann::json::parse(error_body(400, "x"))["error"]["param"].is_null());
}

TEST(Metrics, HistogramsAddUp) {
  Histogram histogram;
  for (double seconds : {0.0005, 0.0006, 0.3, 1000.0}) histogram.observe(seconds);
  std::string text;
  histogram.write(text, "x", "Help.");
  EXPECT_NE(text.find("# TYPE x histogram\n"), text.npos);
  EXPECT_NE(text.find("x_bucket{le=\"0.0005\"} 1\n"), text.npos);
  EXPECT_NE(text.find("x_bucket{le=\"0.001\"} 2\n"), text.npos);
  EXPECT_NE(text.find("x_bucket{le=\"60\"} 3\n"), text.npos);
  EXPECT_NE(text.find("x_bucket{le=\"+Inf\"} 4\n"), text.npos);
  EXPECT_NE(text.find("x_sum 1000.3011\nx_count 4\n"), text.npos);
}

}  // namespace
}  // namespace latente
