// The page pool against a list of what it was told.
#include "infer/pages.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "base/random.h"

namespace latente {
namespace {

using Tokens = std::vector<int32_t>;

std::vector<int32_t> take(PagePool& pool, int64_t count) {
  std::vector<int32_t> pages;
  for (int64_t i = 0; i < count; ++i) pages.push_back(pool.take().value());
  return pages;
}

void release(PagePool& pool, const std::vector<int32_t>& pages) {
  for (int32_t page : pages) pool.release(page);
}

int64_t agreement(const Tokens& a, const Tokens& b) {
  return std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
}

TEST(PagePool, GivesEveryPageOnce) {
  PagePool pool(5, 4);
  std::vector<int32_t> pages = take(pool, 5);
  EXPECT_EQ(std::set<int32_t>(pages.begin(), pages.end()), (std::set<int32_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(pool.available(), 0);
  EXPECT_FALSE(pool.take().has_value());
  pool.release(pages[2]);
  EXPECT_EQ(pool.take(), pages[2]);
}

// Random sequences that share beginnings: what a match gives was computed from the same tokens, those that
// modules have read ahead included, and nothing much is missed.
TEST(PagePool, FindsTheLongestPrefix) {
  int64_t matched = 0, possible = 0;
  for (uint64_t seed = 1; seed <= 80; ++seed) {
    Random random(seed);
    const int64_t page_size = random.between(1, 6), ahead = random.between(0, 2);
    PagePool pool(4000, page_size, ahead);
    std::vector<std::pair<Tokens, int64_t>> known;  // and how many modules have run
    struct Page {
      Tokens tokens;  // with those after it
      int64_t modules;
    };
    std::vector<Page> content(4000);
    for (int round = 0; round < 60; ++round) {
      Tokens tokens;
      if (!known.empty() && random.chance(0.7)) tokens = known[random.below(known.size())].first;
      tokens.resize(random.below(tokens.size() + 1));
      for (int64_t i = random.between(1, 14); i > 0; --i)
        tokens.push_back(static_cast<int32_t>(random.below(3)));
      const int64_t length = static_cast<int64_t>(tokens.size());

      const int64_t modules = random.between(0, ahead);
      int64_t longest = 0;
      for (const auto& [other, theirs] : known) {
        if (theirs >= modules) longest = std::max(longest, agreement(tokens, other) - modules);
      }
      const PagePool::Match match = pool.match(tokens, modules);
      EXPECT_LE(match.positions, longest);
      if (ahead == 0) {
        EXPECT_EQ(match.positions, longest);
      }
      matched += match.positions, possible += longest;
      EXPECT_EQ(static_cast<int64_t>(match.pages.size()), match.positions / page_size);
      EXPECT_EQ(match.partial >= 0, match.positions % page_size != 0);
      std::vector<int32_t> all = match.pages;
      if (match.partial >= 0) all.push_back(match.partial);
      for (int64_t at = 0; at < match.positions; ++at) {
        const Page& page = content[static_cast<size_t>(all[static_cast<size_t>(at / page_size)])];
        ASSERT_GE(page.modules, modules);
        for (int64_t i = 0; i <= modules; ++i) {
          const size_t there = static_cast<size_t>(at % page_size + i), here = static_cast<size_t>(at + i);
          ASSERT_LT(there, page.tokens.size());
          ASSERT_LT(here, tokens.size());
          ASSERT_EQ(page.tokens[there], tokens[here]) << "seed " << seed << ", position " << at << " + " << i;
        }
      }

      // As a sequence would: shared pages, and own ones behind them.
      std::vector<int32_t> pages = match.pages;
      for (int32_t page : pages) pool.hold(page);
      while (static_cast<int64_t>(pages.size()) * page_size < length) {
        const int64_t at = static_cast<int64_t>(pages.size()) * page_size;
        pages.push_back(pool.take().value());
        content[static_cast<size_t>(pages.back())] = {
            Tokens(tokens.begin() + at, tokens.begin() + std::min(at + page_size + ahead, length)), modules};
      }
      pool.remember(tokens, pages, modules);
      known.emplace_back(tokens, modules);
      for (int32_t page : pages) pool.release(page);
      EXPECT_EQ(pool.available(), pool.pages());
    }
    EXPECT_GT(pool.remembered(), 0);
    EXPECT_EQ(take(pool, 4000).size(), 4000u);
    EXPECT_EQ(pool.remembered(), 0);
  }
  EXPECT_GT(matched, possible * 8 / 10);
}

TEST(PagePool, TheOneNotUsedForLongestGivesWay) {
  PagePool pool(4, 2);
  for (int32_t first : {10, 20}) {
    std::vector<int32_t> pages = take(pool, 2);
    pool.remember(Tokens{first, 1, 2, 3}, pages, 0);
    release(pool, pages);
  }
  EXPECT_EQ(pool.match(Tokens{10, 1, 2, 3}, 0).positions, 4);  // used again
  std::vector<int32_t> taken = take(pool, 1);
  EXPECT_EQ(pool.match(Tokens{20, 1, 2, 3}, 0).positions, 2);  // its end went first
  EXPECT_EQ(pool.match(Tokens{10, 1, 2, 3}, 0).positions, 4);
  std::vector<int32_t> more = take(pool, 3);
  EXPECT_EQ(pool.remembered(), 0);
  EXPECT_EQ(pool.match(Tokens{10, 1, 2, 3}, 0).positions, 0);
}

TEST(PagePool, PagesInUseStay) {
  PagePool pool(3, 2);
  std::vector<int32_t> pages = take(pool, 2);
  pool.remember(Tokens{1, 2, 3, 4}, pages, 0);
  EXPECT_EQ(pool.available(), 1);
  pool.release(pages[1]);
  EXPECT_EQ(pool.available(), 2);
  std::vector<int32_t> rest = take(pool, 2);
  EXPECT_EQ((std::set<int32_t>(rest.begin(), rest.end())), (std::set<int32_t>{2, pages[1]}));
  EXPECT_EQ(pool.match(Tokens{1, 2, 3, 4}, 0).positions, 2);
  EXPECT_FALSE(pool.take().has_value());
}

// A sequence with a copy of a known beginning: its end is remembered below the other's pages.
TEST(PagePool, IdlePagesAboveOnesInUseCanBeTaken) {
  PagePool pool(4, 2);
  std::vector<int32_t> first = take(pool, 1), second = take(pool, 2);
  pool.remember(Tokens{1, 2}, first, 0);
  release(pool, first);
  pool.remember(Tokens{1, 2, 3, 4}, second, 0);
  EXPECT_EQ(pool.available(), 2);
  std::vector<int32_t> rest = take(pool, 2);
  EXPECT_EQ((std::set<int32_t>(rest.begin(), rest.end())), (std::set<int32_t>{3, first[0]}));
  EXPECT_EQ(pool.remembered(), 0);
}

}  // namespace
}  // namespace latente
