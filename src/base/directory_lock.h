// A directory that one process works in at a time.
#pragma once

#include <string>

namespace latente {

// Holds DIRECTORY/lock (flock, the holder's pid inside) as long as it lives; the system frees it when the
// process ends in whatever way. Made directories and files go again with it where nothing else came in. On a
// file system without locks nothing is kept out.
class DirectoryLock {
 public:
  // Makes the directory where there is none. Error at once, naming the holder, when another DirectoryLock, of
  // this or another process, holds it.
  explicit DirectoryLock(std::string directory);
  ~DirectoryLock();
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;

 private:
  bool try_once();

  std::string directory_, path_;
  int fd_ = -1;
  bool made_ = false;  // the directory
};

}  // namespace latente
