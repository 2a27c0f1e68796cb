#include "base/options.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <random>

namespace latente {

enum class Colour { red, dark_blue };
template <>
struct EnumNames<Colour> {
  static constexpr std::pair<std::string_view, Colour> values[] = {{"red", Colour::red},
                                                                   {"dark-blue", Colour::dark_blue}};
};

namespace {

struct Inner {
  std::vector<std::string> files;
  std::vector<double> betas{0.9, 0.95};
  std::vector<int64_t> ids;
  int64_t seed = 1;
  FIELDS(files, betas, ids, seed)
  bool operator==(const Inner&) const = default;
};

struct Deep {
  Inner inner;
  bool on = false;
  FIELDS(inner, on)
  bool operator==(const Deep&) const = default;
};

struct Outer {
  bool verbose = false;
  int steps = 10;
  int64_t tokens = 0;
  double lr = 1e-3;
  std::string name = "run";
  Colour colour = Colour::red;
  std::optional<double> clip;
  std::optional<Colour> second;
  std::optional<Inner> extra;
  Inner data;
  Deep deep;
  FIELDS(verbose, steps, tokens, lr, name, colour, clip, second, extra, data, deep)
  bool operator==(const Outer&) const = default;
};

std::string error_of(const std::string& toml) {
  Outer options;
  try {
    parse_options(options, toml, "run.toml");
  } catch (const Error& error) {
    EXPECT_EQ(options, Outer{});
    return error.what();
  }
  return "no error";
}

std::string override_error(const std::string& assignment) {
  Outer options;
  try {
    override_option(options, assignment);
  } catch (const Error& error) {
    EXPECT_EQ(options, Outer{});
    return error.what();
  }
  return "no error";
}

TEST(Options, EveryTypeIsRead) {
  Outer options;
  parse_options(options, R"(
verbose = true
steps = -3
tokens = 9_000_000_000
lr = 2
name = "größe"
colour = "dark-blue"
clip = 1.5
second = "red"
extra.seed = 4
[data]
files = ["a", "b"]
betas = [1, 0.5]
ids = [1, 2e3]
[deep]
on = true
[deep.inner]
seed = 5
)",
                "run.toml");
  Outer expected;
  expected.verbose = true;
  expected.steps = -3;
  expected.tokens = 9000000000;
  expected.lr = 2;
  expected.name = "größe";
  expected.colour = Colour::dark_blue;
  expected.clip = 1.5;
  expected.second = Colour::red;
  expected.extra = Inner{};
  expected.extra->seed = 4;
  expected.data.files = {"a", "b"};
  expected.data.betas = {1, 0.5};
  expected.data.ids = {1, 2000};
  expected.deep.on = true;
  expected.deep.inner.seed = 5;
  EXPECT_EQ(options, expected);
}

TEST(Options, AnAbsentKeyKeepsItsDefault) {
  Outer options;
  options.name = "kept";
  parse_options(options, "", "run.toml");
  EXPECT_EQ(options.name, "kept");
  EXPECT_FALSE(options.clip.has_value());
}

TEST(Options, AnIntegerMayBeWrittenAsANumber) {
  Outer options;
  parse_options(options, "tokens = 1e9", "run.toml");
  EXPECT_EQ(options.tokens, 1000000000);
  EXPECT_EQ(error_of("tokens = 1.5"), "run.toml:1:10: tokens: expected an integer, found the number 1.5");
  EXPECT_EQ(error_of("tokens = 1e19"), "run.toml:1:10: tokens: expected an integer, found the number 1e+19");
}

TEST(Options, AnUnknownKeyNamesPlaceAndNearestKey) {
  EXPECT_EQ(error_of("verbose = true\nstep = 3"), "run.toml:2:1: unknown option step; did you mean steps?");
  EXPECT_EQ(error_of("[data]\n  file = []"),
            "run.toml:2:3: unknown option data.file; did you mean data.files?");
  EXPECT_EQ(error_of("seed = 3"), "run.toml:1:1: unknown option seed; did you mean data.seed?");
  EXPECT_EQ(error_of("deep.inner.sede = 3"),
            "run.toml:1:12: unknown option deep.inner.sede; did you mean deep.inner.seed?");
  EXPECT_EQ(error_of("[data]\nzzzzzz = 1"),
            "run.toml:2:1: unknown option data.zzzzzz; known: files, betas, ids, seed");
  EXPECT_EQ(error_of("[dtaa]\nseed = 1"), "run.toml:1:2: unknown option dtaa; did you mean data?");
  EXPECT_EQ(error_of("\"a\\nb\" = 1").find('\n'), std::string::npos);
}

TEST(Options, AWrongTypeNamesExpectedAndFound) {
  EXPECT_EQ(error_of("steps = \"many\""),
            "run.toml:1:9: steps: expected an integer, found the text \"many\"");
  EXPECT_EQ(error_of("lr = true"), "run.toml:1:6: lr: expected a number, found true");
  EXPECT_EQ(error_of("lr = nan"), "run.toml:1:6: lr: expected a finite number, found nan");
  EXPECT_EQ(error_of("verbose = 1"), "run.toml:1:11: verbose: expected true or false, found the integer 1");
  EXPECT_EQ(error_of("name = [1]"), "run.toml:1:8: name: expected text, found a list");
  EXPECT_EQ(error_of("data = 3"), "run.toml:1:8: data: expected a table, found the integer 3");
  EXPECT_EQ(error_of("[[data]]\nseed = 1"), "run.toml:1:1: data: expected a table, found a list");
  EXPECT_EQ(error_of("name = 1979-05-27"), "run.toml:1:8: name: expected text, found a date or time");
  EXPECT_EQ(error_of("data.files = \"a\""),
            "run.toml:1:14: data.files: expected a list of texts, found the text \"a\"");
  EXPECT_EQ(error_of("data.files = [\n  \"a\",\n  7]"),
            "run.toml:3:3: data.files[1]: expected text, found the integer 7");
  EXPECT_EQ(error_of("colour = \"green\""),
            "run.toml:1:10: colour: expected one of \"red\", \"dark-blue\", found the text \"green\"");
  EXPECT_EQ(error_of("steps = 3000000000"),
            "run.toml:1:9: steps: expected an integer in [-2147483648, 2147483647], found 3000000000");
  EXPECT_EQ(error_of("name = {}"), "run.toml:1:8: name: expected text, found a table");
}

TEST(Options, BadTomlNamesThePlace) {
  EXPECT_EQ(error_of("a = 1\nb = = 2").substr(0, 13), "run.toml:2:5:");
  EXPECT_EQ(error_of("lr = 1\nlr = 2").substr(0, 11), "run.toml:2:");
  EXPECT_EQ(error_of("name = \"\xff\"").substr(0, 11), "run.toml:1:");
  EXPECT_EQ(error_of(std::string("lr\0 = 1", 7)).substr(0, 11), "run.toml:1:");
  EXPECT_EQ(error_of("lr = 1\nname = 7\u00e9").substr(0, 11), "run.toml:2:");
  EXPECT_EQ(error_of("lr = 1\nname = 7\u2dff").substr(0, 11), "run.toml:2:");
}

TEST(Options, OverridesReachEveryType) {
  Outer options;
  override_option(options, "verbose=true");
  override_option(options, " steps = 7 ");
  override_option(options, "tokens=20e6");
  override_option(options, "lr=3e-4");
  override_option(options, "name=C:\\a = \"b\" # c");
  override_option(options, "colour=dark-blue");
  override_option(options, "clip=1");
  override_option(options, "extra.seed=3");
  override_option(options, "data.files=a.txt, b.txt");
  override_option(options, "data.betas=[0.5, 1]");
  override_option(options, "data.ids=4,5");
  override_option(options, "deep.inner.files=");
  EXPECT_TRUE(options.verbose);
  EXPECT_EQ(options.steps, 7);
  EXPECT_EQ(options.tokens, 20000000);
  EXPECT_EQ(options.lr, 3e-4);
  EXPECT_EQ(options.name, "C:\\a = \"b\" # c");
  EXPECT_EQ(options.colour, Colour::dark_blue);
  EXPECT_EQ(options.clip, 1);
  EXPECT_EQ(options.extra->seed, 3);
  EXPECT_EQ(options.data.files, (std::vector<std::string>{"a.txt", "b.txt"}));
  EXPECT_EQ(options.data.betas, (std::vector<double>{0.5, 1}));
  EXPECT_EQ(options.data.ids, (std::vector<int64_t>{4, 5}));
  override_option(options, "name=\"quo\\\"ted\"");
  EXPECT_EQ(options.name, "quo\"ted");
  override_option(options, "clip=");
  override_option(options, "extra=");
  override_option(options, "name=");
  EXPECT_FALSE(options.clip.has_value());
  EXPECT_FALSE(options.extra.has_value());
  EXPECT_EQ(options.name, "");
}

TEST(Options, BadOverridesSayWhatWasExpected) {
  EXPECT_EQ(override_error("lr"), "\"lr\": expected KEY=VALUE");
  EXPECT_EQ(override_error("lr=fast"), "lr: expected a number, found \"fast\"");
  EXPECT_EQ(override_error("lr=\"fast\""),
            "\"lr=\\\"fast\\\"\": lr: expected a number, found the text \"fast\"");
  EXPECT_EQ(override_error("steps="), "steps: expected an integer, found \"\"");
  EXPECT_EQ(override_error("lr=1\nsteps=2"), "lr: expected a number");
  EXPECT_EQ(override_error("dat.seed=1"), "unknown option dat; did you mean data?");
  EXPECT_EQ(override_error("seed=1"), "unknown option seed; did you mean data.seed?");
  EXPECT_EQ(override_error("data=1"), "data: expected one of its keys, such as data.files=VALUE");
  EXPECT_EQ(override_error("lr.x=1"), "lr: expected a number, found a key inside it");
  EXPECT_EQ(override_error("=1").substr(0, 17), "unknown option \"\"");
  EXPECT_NE(override_error("name=\xff"), "no error");
}

TEST(Options, WhatIsWrittenReadsBack) {
  std::random_device device;
  for (int round = 0; round < 200; ++round) {
    const uint64_t seed = device();
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    const auto number = [&] {
      const double value = std::bit_cast<double>(random());
      return std::isfinite(value) ? value : -0.0;
    };
    const auto text = [&] {
      std::string out;
      for (size_t i = random() % 8; i > 0; --i) out += static_cast<char>(random() % 128);
      return out + (random() % 2 ? "" : "é\"\\");
    };
    Outer options;
    options.verbose = random() % 2;
    options.steps = static_cast<int>(random());
    options.tokens = static_cast<int64_t>(random());
    options.lr = number();
    options.name = text();
    options.colour = random() % 2 ? Colour::red : Colour::dark_blue;
    if (random() % 2) options.clip = number();
    if (random() % 2)
      options.extra = Inner{{text(), text()}, {number(), 5}, {static_cast<int64_t>(random())}, 3};
    options.deep.inner.files = {text()};
    options.deep.inner.betas.clear();
    const std::string toml = write_options(options);
    Outer back;
    parse_options(back, toml, "written");
    ASSERT_EQ(back, options) << toml;
  }
}

TEST(Options, TheWrittenFormIsPlain) {
  EXPECT_EQ(write_options(Deep{}),
            "on = false\n\n[inner]\nfiles = []\nbetas = [0.9, 0.95]\nids = []\nseed = 1\n");
}

TEST(Options, AFileIsLoaded) {
  const std::string path = testing::TempDir() + "latente_options_test.toml";
  std::ofstream(path) << "lr = 0.5\n";
  EXPECT_EQ(load_options<Outer>(path).lr, 0.5);
  std::ofstream(path) << "lr = x\n";
  try {
    load_options<Outer>(path);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find(path + ":1:"), 0u) << error.what();
  }
  EXPECT_THROW(load_options<Outer>(path + ".missing"), Error);
}

}  // namespace
}  // namespace latente
