#include "base/memory.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace latente {
namespace {

TEST(Bytes, AreReadAsPeopleWriteThem) {
  EXPECT_EQ(parse_bytes("x", "0"), 0);
  EXPECT_EQ(parse_bytes("x", "4096"), 4096);
  EXPECT_EQ(parse_bytes("x", "17B"), 17);
  EXPECT_EQ(parse_bytes("x", "3k"), 3072);
  EXPECT_EQ(parse_bytes("x", "512M"), 512 << 20);
  EXPECT_EQ(parse_bytes("x", "24G"), int64_t{24} << 30);
  EXPECT_EQ(parse_bytes("x", "1.5GiB"), int64_t{3} << 29);
  EXPECT_EQ(parse_bytes("x", "1.5 gib"), int64_t{3} << 29);
  EXPECT_EQ(parse_bytes("x", "24GB"), 24'000'000'000);
  EXPECT_EQ(parse_bytes("x", "2T"), int64_t{2} << 40);
  EXPECT_EQ(parse_bytes("x", "1PB"), 1'000'000'000'000'000);
}

TEST(Bytes, OfAnyAmountAreReadBackAsTheyAreShown) {
  for (int64_t bytes = 1; bytes < int64_t{1} << 50; bytes *= 4)
    EXPECT_EQ(parse_bytes("x", bytes_text(static_cast<double>(bytes))), bytes);
}

TEST(Bytes, OfNoMeaningAreRefused) {
  for (const char* text : {"",       "G",    "-1G",  "+1G",    "1e9",
                           "1.5.5G", "1X",   "1GG",  "1KBB",   "1i",
                           "1iB",    "1BB",  "-0",   "KiB",    " ",
                           "1ib2",   "1kmg", "nan",  "inf",    "0x10",
                           " 1G",    "1G ",  "1,5G", "20000P", "99999999999999999999"}) {
    try {
      parse_bytes("--memory", text);
      ADD_FAILURE() << text << " was read";
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()).find("--memory: "), 0) << error.what();
    }
  }
}

}  // namespace
}  // namespace latente
