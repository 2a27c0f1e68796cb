#include "base/file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <random>

#include "base/error.h"

namespace latente {
namespace {

namespace fs = std::filesystem;

class FileTest : public testing::Test {
 protected:
  FileTest() {
    std::string pattern = (fs::temp_directory_path() / "latente-file-XXXXXX").string();
    directory_ = ::mkdtemp(pattern.data());
  }
  ~FileTest() override { fs::remove_all(directory_); }

  std::string at(const std::string& name) const { return (fs::path(directory_) / name).string(); }
  void put(const std::string& name, const std::string& text) const { std::ofstream(at(name)) << text; }
  std::string get(const std::string& name) const { return read_file(at(name)); }
  std::vector<std::string> names() const { return list_directory(directory_); }

  std::string directory_;
};

template <class F>
std::string message_of(F f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

void expect_has(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), text.npos) << text << "\nlacks: " << part;
}

// Runs f in a child, which must exit with 0.
template <class F>
void in_child(F f) {
  pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    bool good = false;
    try {
      good = f();
    } catch (...) {
    }
    ::_exit(good ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
}

TEST_F(FileTest, MapsBytes) {
  std::string text(100'000, 'x');
  text[99'999] = 'y';
  put("a", text);
  MappedFile file(at("a"));
  EXPECT_EQ(file.text(), text);
  EXPECT_EQ(file.size(), 100'000);
  for (auto advice :
       {MappedFile::Advice::sequential, MappedFile::Advice::will_need, MappedFile::Advice::normal})
    file.advise(advice);
  file.advise(MappedFile::Advice::dont_need, 5000, 10);
  file.advise(MappedFile::Advice::random, 1 << 30, 10);

  MappedFile moved(std::move(file));
  EXPECT_EQ(moved.text(), text);
  EXPECT_TRUE(file.bytes().empty());
  put("b", "other");
  moved = MappedFile(at("b"));
  EXPECT_EQ(moved.text(), "other");
  put("empty", "");
  EXPECT_TRUE(MappedFile(at("empty")).bytes().empty());
}

TEST_F(FileTest, MappingSurvivesReplacement) {
  put("a", "old");
  MappedFile file(at("a"));
  write_file_atomically(at("a"), "new text");
  EXPECT_EQ(file.text(), "old");
  EXPECT_EQ(get("a"), "new text");
}

TEST_F(FileTest, ErrorsNamePathAndReason) {
  for (const std::string& text :
       {message_of([&] { MappedFile file(at("none")); }), message_of([&] { read_file(at("none")); }),
        message_of([&] { FileWriter writer(at("none/file")); })}) {
    expect_has(text, at("none"));
  }
  expect_has(message_of([&] { MappedFile file(at("none")); }), "No such file or directory");
  expect_has(message_of([&] { MappedFile file(directory_); }), "found a directory");
  expect_has(message_of([&] { read_file(directory_); }), "found a directory");
  ASSERT_EQ(::mkfifo(at("pipe").c_str(), 0600), 0);
  expect_has(message_of([&] { MappedFile file(at("pipe")); }), "regular file");
  put("long", "12345");
  EXPECT_EQ(read_file(at("long"), 5), "12345");
  expect_has(message_of([&] { read_file(at("long"), 4); }), "expected at most 4 bytes, found 5");
  expect_has(message_of([&] { list_directory(at("none")); }), at("none"));
}

TEST_F(FileTest, ReadsPipesAndFilesWithoutSize) {
  EXPECT_FALSE(read_file("/proc/self/status").empty());
  EXPECT_THROW(read_file("/dev/zero", 100'000), Error);
}

TEST_F(FileTest, WriterShowsNothingBeforeCommit) {
  put("a", "old");
  {
    FileWriter writer(at("a"));
    writer.write("half");
    EXPECT_EQ(get("a"), "old");
    EXPECT_EQ(names().size(), 2u);
  }
  EXPECT_EQ(get("a"), "old");
  EXPECT_EQ(names(), std::vector<std::string>{"a"});

  FileWriter writer(at("a"));
  std::string_view text = "0123456789";
  writer.write_at(4, std::as_bytes(std::span(text.data() + 4, 6)));
  writer.write_at(0, std::as_bytes(std::span(text.data(), 4)));
  writer.write("end");
  FileWriter moved(std::move(writer));
  moved.commit();
  EXPECT_EQ(get("a"), "0123456789end");
  EXPECT_EQ(names(), std::vector<std::string>{"a"});
}

TEST_F(FileTest, CallbackErrorLeavesTheOldFile) {
  put("a", "old");
  EXPECT_THROW(write_file_atomically(at("a"),
                                     [](FileWriter& writer) {
                                       writer.write("new");
                                       throw std::runtime_error("stop");
                                     }),
               std::runtime_error);
  EXPECT_EQ(get("a"), "old");
  EXPECT_EQ(names(), std::vector<std::string>{"a"});
}

TEST_F(FileTest, KeepsPermissionsAndHonoursUmask) {
  put("a", "old");
  ::chmod(at("a").c_str(), 0640);
  write_file_atomically(at("a"), "new");
  struct stat info {};
  ASSERT_EQ(::stat(at("a").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0640u);
  mode_t old = ::umask(027);
  write_file_atomically(at("fresh"), "new");
  ::umask(old);
  ASSERT_EQ(::stat(at("fresh").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0640u);
}

// A limit on the size of files makes the system take only a part of a write, and then none, as a full disk
// does.
TEST_F(FileTest, ShortWriteIsAnErrorAndLeavesTheOldFile) {
  put("a", "old");
  in_child([&] {
    ::signal(SIGXFSZ, SIG_IGN);
    rlimit limit{10'000, 10'000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    std::string text = message_of([&] { write_file_atomically(at("a"), std::string(50'000, 'x')); });
    return text.find("a: cannot write: File too large") != text.npos;
  });
  EXPECT_EQ(get("a"), "old");
  EXPECT_EQ(names(), std::vector<std::string>{"a"});
}

TEST_F(FileTest, FullDiskIsAnError) {
  std::string text = message_of([&] {
    FileWriter writer(at("x"));
    writer.reserve(int64_t{1} << 60);
  });
  EXPECT_TRUE(text.find("cannot reserve") != text.npos || text == "no error") << text;
  // /dev/full takes no byte.
  int full = ::open("/dev/full", O_WRONLY);
  if (full < 0) GTEST_SKIP() << "no /dev/full";
  ::close(full);
  fs::create_directory(at("d"));
  FileWriter writer(at("d/file"));
  fs::path partial;
  for (const std::string& name : list_directory(at("d"))) partial = fs::path(at("d")) / name;
  in_child([&] {
    // The descriptor of the partial file now leads to a full disk.
    for (int fd = 3; fd < 64; ++fd) {
      std::error_code error;
      if (fs::read_symlink("/proc/self/fd/" + std::to_string(fd), error) != fs::canonical(partial)) continue;
      ::dup2(::open("/dev/full", O_WRONLY), fd);
      return message_of([&] { writer.write("text"); }).find("No space left on device") != std::string::npos;
    }
    return false;
  });
}

TEST_F(FileTest, StalePartialsAreRemovedAndLiveOnesKept) {
  put("a.partial-0123456789abcdef", "left by a dead writer");
  put("b.partial-0123456789abcdef", "of another target");
  put("a.partial-results", "the user's");
  fs::create_directories(at("d.partial-00000000000000ff/sub"));
  FileWriter alive(at("a"));
  FileWriter second(at("a"));
  EXPECT_EQ(names().size(), 5u);
  second.write("second");
  second.commit();
  alive.write("first");
  alive.commit();
  EXPECT_EQ(get("a"), "first");
  EXPECT_EQ(names(), (std::vector<std::string>{"a", "a.partial-results", "b.partial-0123456789abcdef",
                                               "d.partial-00000000000000ff"}));
  recover_directory(directory_);
  EXPECT_EQ(names(), (std::vector<std::string>{"a", "a.partial-results"}));
}

TEST_F(FileTest, DirectoryAppearsWhole) {
  for (auto replace : {DirectoryWriter::Replace::exchange, DirectoryWriter::Replace::by_two_renames}) {
    for (std::string text : {"first", "second"}) {
      DirectoryWriter writer(at("d/"));
      fs::create_directory(writer.partial() + "/sub");
      std::ofstream(writer.partial() + "/sub/file") << text;
      std::ofstream(writer.partial() + "/" + text) << text;
      if (text == "first") {
        EXPECT_FALSE(fs::exists(at("d")));
      }
      if (text == "second") {
        EXPECT_EQ(get("d/sub/file"), "first");
      }
      writer.commit(replace);
      EXPECT_EQ(get("d/sub/file"), text);
      EXPECT_EQ(list_directory(at("d")).size(), 2u);
      EXPECT_EQ(names(), std::vector<std::string>{"d"});
    }
    remove_directory(at("d"));
    EXPECT_TRUE(names().empty());
  }
  {
    DirectoryWriter abandoned(at("d"));
    std::ofstream(abandoned.partial() + "/file") << "x";
  }
  EXPECT_TRUE(names().empty());
  put("file", "x");
  expect_has(message_of([&] { DirectoryWriter writer(at("file")); }), "found a file");
  expect_has(message_of([&] { remove_directory(at("none")); }), at("none"));
}

TEST_F(FileTest, DirectoryBehindLinkOrDot) {
  fs::create_directory(at("real"));
  fs::create_directory_symlink("real", at("link"));
  auto write = [](const std::string& target, const std::string& text) {
    DirectoryWriter writer(target);
    std::ofstream(writer.partial() + "/file") << text;
    writer.commit();
  };
  write(at("link"), "through the link");
  EXPECT_TRUE(fs::is_symlink(at("link")));
  EXPECT_EQ(get("real/file"), "through the link");
  write(at("real/."), "dot");
  EXPECT_EQ(get("real/file"), "dot");
}

TEST_F(FileTest, InterruptedReplacementIsUndoneOrFinished) {
  // Between the two renames: the old directory stands aside, nothing has its name.
  fs::create_directory(at("d.replaced-0123456789abcdef"));
  put("d.replaced-0123456789abcdef/file", "old");
  EXPECT_EQ(replaced_name("d.replaced-0123456789abcdef"), "d");
  EXPECT_EQ(replaced_name("d.replaced-0123456789abcdeX"), "");
  { DirectoryWriter writer(at("d")); }
  EXPECT_EQ(get("d/file"), "old");
  EXPECT_EQ(names(), std::vector<std::string>{"d"});
  // After both: the old one is no longer needed.
  fs::create_directory(at("d.replaced-0123456789abcdef"));
  put("d.replaced-0123456789abcdef/file", "older");
  { DirectoryWriter writer(at("d")); }
  EXPECT_EQ(get("d/file"), "old");
  EXPECT_EQ(names(), std::vector<std::string>{"d"});
}

// A child replaces a directory and a file again and again and is killed at a random moment: both are always
// there, and always whole.
TEST_F(FileTest, SurvivesKill) {
  uint32_t seed = std::random_device{}();
  std::printf("seed %u\n", seed);
  std::mt19937 generator(seed);
  auto save = [&](int round) {
    std::string text(20'000, static_cast<char>('a' + round % 26));
    write_file_atomically(at("file"), text);
    DirectoryWriter writer(at("d"));
    for (const char* name : {"/x", "/y", "/z"}) write_file_atomically(writer.partial() + name, text);
    writer.commit();
  };
  save(0);
  for (int kill = 0; kill < 40; ++kill) {
    pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      for (int round = kill;; ++round) save(round);
    }
    ::usleep(generator() % 15'000);
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    for (const char* name : {"file", "d/x", "d/y", "d/z"}) {
      std::string text = get(name);
      ASSERT_EQ(text.size(), 20'000u) << name;
      ASSERT_EQ(std::count(text.begin(), text.end(), text[0]), 20'000) << name;
    }
    ASSERT_EQ(get("d/x"), get("d/z"));
  }
  save(1);
  EXPECT_EQ(names(), (std::vector<std::string>{"d", "file"}));
}

TEST_F(FileTest, Globs) {
  for (const char* name : {"b.txt", "a.txt", "c.jsonl", "d[1].txt"}) put(name, "x");
  fs::create_directory(at("e.txt"));
  EXPECT_EQ(glob_files(at("[ab].txt")), (std::vector<std::string>{at("a.txt"), at("b.txt")}));
  EXPECT_EQ(glob_files(at("{c.jsonl,a.txt,a.*}")), (std::vector<std::string>{at("a.txt"), at("c.jsonl")}));
  EXPECT_EQ(glob_files(at("*.txt")).size(), 3u);
  EXPECT_EQ(glob_files(at("d[1].txt")), std::vector<std::string>{at("d[1].txt")});
  expect_has(message_of([&] { glob_files(at("*.zst")); }), "no file matches");
  expect_has(message_of([&] { glob_files(at("e.txt")); }), "found a directory");
}

}  // namespace
}  // namespace latente
