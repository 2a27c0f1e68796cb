#include "base/directory_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "base/error.h"

namespace latente {
namespace {

bool is_named(int fd, const std::string& path) {
  struct stat mine {};
  struct stat named {};
  return ::fstat(fd, &mine) == 0 && ::lstat(path.c_str(), &named) == 0 && mine.st_ino == named.st_ino &&
         mine.st_dev == named.st_dev;
}

// " (pid 123)", or nothing when the holder has not written it yet.
std::string holder(int fd) {
  char text[32];
  ssize_t got = ::pread(fd, text, sizeof text, 0);
  std::string digits(text, got > 0 ? static_cast<size_t>(got) : 0);
  digits.resize(std::min(digits.size(), digits.find_first_not_of("0123456789")));
  return digits.empty() ? "" : " (pid " + digits + ")";
}

}  // namespace

DirectoryLock::DirectoryLock(std::string directory)
    : directory_(std::move(directory)), path_(directory_ + "/lock") {
  while (!try_once()) {
  }
}

// False when the holder before removed the file or the directory meanwhile.
bool DirectoryLock::try_once() {
  std::error_code error;
  made_ |= std::filesystem::create_directories(directory_, error);
  if (error) fail("{}: cannot create: {}", directory_, error.message());
  int fd = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
  if (fd < 0) {
    if (errno == EINTR || errno == ENOENT) return false;
    fail("{}: cannot open: {}", path_, std::strerror(errno));
  }
  int status;
  do {
    status = ::flock(fd, LOCK_EX | LOCK_NB);
  } while (status != 0 && errno == EINTR);
  if (status != 0 && errno == EWOULDBLOCK) {
    std::string who = holder(fd);
    ::close(fd);
    fail("{}: another process works in this directory{}", directory_, who);
  }
  if (!is_named(fd, path_)) {
    ::close(fd);
    return false;
  }
  fd_ = fd;
  std::string pid = std::to_string(::getpid()) + "\n";
  // Only a courtesy to whoever comes next: a full disk is no reason to stop.
  [[maybe_unused]] bool written = ::ftruncate(fd, 0) == 0 && ::pwrite(fd, pid.data(), pid.size(), 0) > 0;
  return true;
}

DirectoryLock::~DirectoryLock() {
  ::unlink(path_.c_str());
  if (made_) ::rmdir(directory_.c_str());  // refuses while anything is inside
  ::close(fd_);
}

}  // namespace latente
