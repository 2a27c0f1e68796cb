#include "base/directory_lock.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <optional>
#include <thread>
#include <vector>

#include "base/error.h"

namespace latente {
namespace {

namespace fs = std::filesystem;

class DirectoryLockTest : public testing::Test {
 protected:
  DirectoryLockTest() {
    std::string pattern = (fs::temp_directory_path() / "latente-lock-XXXXXX").string();
    directory_ = ::mkdtemp(pattern.data());
  }
  ~DirectoryLockTest() override { fs::remove_all(directory_); }

  std::string at(const std::string& name) const { return directory_ + "/" + name; }
  static std::string error_of(const std::string& directory) {
    try {
      DirectoryLock lock(directory);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }
  static std::string taken(const std::string& directory, pid_t by) {
    return fmt::format("{}: another process works in this directory (pid {})", directory, by);
  }

  std::string directory_;
};

TEST_F(DirectoryLockTest, KeepsASecondOneOut) {
  std::string run = at("a/run");
  {
    DirectoryLock lock(run);
    EXPECT_EQ(error_of(run), taken(run, ::getpid()));
    EXPECT_EQ(error_of(run + "/../run"), taken(run + "/../run", ::getpid()));
    EXPECT_EQ(error_of(at("a/other")), "no error");
    EXPECT_TRUE(fs::exists(run + "/lock"));
  }
  EXPECT_EQ(error_of(run), "no error");
}

TEST_F(DirectoryLockTest, LeavesOnlyWhatOthersMade) {
  { DirectoryLock lock(at("fresh")); }
  EXPECT_FALSE(fs::exists(at("fresh")));
  {
    DirectoryLock lock(at("used"));
    std::ofstream(at("used/file")) << "x";
  }
  EXPECT_FALSE(fs::exists(at("used/lock")));
  EXPECT_TRUE(fs::exists(at("used/file")));
  fs::create_directory(at("empty"));
  { DirectoryLock lock(at("empty")); }
  EXPECT_TRUE(fs::is_empty(at("empty")));
}

TEST_F(DirectoryLockTest, IsFreeOnceTheHolderIsKilled) {
  std::string run = at("run");
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    std::optional<DirectoryLock> lock;
    try {
      lock.emplace(run);
    } catch (...) {
      ::_exit(1);
    }
    if (::write(ready[1], "x", 1) == 1) ::pause();
    ::_exit(1);
  }
  ::close(ready[1]);
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  ::close(ready[0]);
  EXPECT_EQ(error_of(run), taken(run, child));
  ::kill(child, SIGKILL);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  EXPECT_TRUE(fs::exists(run + "/lock"));
  EXPECT_EQ(error_of(run), "no error");
}

// Holders come and go, each removing its file and directory, while others try.
TEST_F(DirectoryLockTest, NeverHasTwoHolders) {
  std::atomic<int> holders = 0, most = 0, times = 0;
  auto hold_often = [&] {
    for (int i = 0; i < 2000; ++i) {
      try {
        DirectoryLock lock(at("run"));
        int now = ++holders;
        if (now > 1) most = now;
        ++times;
        std::this_thread::yield();
        --holders;
      } catch (const Error&) {
      }
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back(hold_often);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(most, 0);
  EXPECT_GT(times, 0);
}

TEST_F(DirectoryLockTest, NamesWhatCannotBe) {
  std::ofstream(at("file")) << "x";
  EXPECT_NE(error_of(at("file")).find(at("file")), std::string::npos) << error_of(at("file"));
  EXPECT_NE(error_of(at("file/run")).find("cannot create"), std::string::npos) << error_of(at("file/run"));
  fs::create_directories(at("run/lock"));
  EXPECT_NE(error_of(at("run")).find("run/lock: cannot open"), std::string::npos) << error_of(at("run"));
}

}  // namespace
}  // namespace latente
