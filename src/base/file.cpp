#include "base/file.h"

#include <fcntl.h>
#include <glob.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <utility>

#include "base/error.h"

namespace latente {

namespace fs = std::filesystem;

namespace {

constexpr std::string_view partial_mark = ".partial-";
constexpr std::string_view replaced_mark = ".replaced-";
constexpr size_t tag_digits = 16;

[[noreturn]] void fail_system(const char* what, const std::string& path, int error = errno) {
  fail("{}: cannot {}: {}", path, what, std::strerror(error));
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

int open_retrying(const std::string& path, int flags, mode_t mode = 0) {
  int fd;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

std::string parent_of(const std::string& path) {
  std::string parent = fs::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

// A path that ends in the directory's own name: no trailing slash, no "." or "..", and no symbolic link,
// since rename would act on the link.
std::string named_path(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  std::string last = fs::path(path).filename().string();
  std::error_code error;
  if (last == "." || last == ".." || fs::is_symlink(path, error)) return fs::weakly_canonical(path).string();
  return path;
}

std::string tagged(const std::string& path, std::string_view mark) {
  static thread_local std::mt19937_64 generator(std::random_device{}() ^ static_cast<uint64_t>(::getpid())
                                                                             << 32);
  static thread_local pid_t owner = ::getpid();
  if (owner != ::getpid()) {  // a forked child must not repeat its parent's names
    owner = ::getpid();
    generator.seed(std::random_device{}() ^ static_cast<uint64_t>(owner) << 32);
  }
  return fmt::format("{}{}{:016x}", path, mark, generator());
}

// "x" of "x<mark>0123456789abcdef", otherwise empty.
std::string_view untagged(std::string_view name, std::string_view mark) {
  if (name.size() <= mark.size() + tag_digits) return {};
  std::string_view tag = name.substr(name.size() - tag_digits);
  if (tag.find_first_not_of("0123456789abcdef") != tag.npos) return {};
  std::string_view rest = name.substr(0, name.size() - tag_digits);
  return rest.ends_with(mark) ? rest.substr(0, rest.size() - mark.size()) : std::string_view{};
}

void sync_path(const std::string& path, bool directory) {
  Descriptor fd(open_retrying(path, O_RDONLY | (directory ? O_DIRECTORY : 0)));
  if (!fd) fail_system("open for syncing", path);
  // EINVAL: a file system that does not sync directories.
  if (::fsync(fd.get()) != 0 && errno != EINVAL) fail_system("sync", path);
}

void sync_tree(const std::string& directory) {
  std::error_code error;
  for (fs::recursive_directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    fs::file_status status = it->symlink_status();
    if (fs::is_directory(status) || fs::is_regular_file(status))
      sync_path(it->path().string(), fs::is_directory(status));
  }
  if (error) fail("{}: cannot list: {}", directory, error.message());
  sync_path(directory, true);
}

// Locks a partial that was just created; false when a cleaner took it for a dead one and removed it first.
bool claim(int fd, const std::string& path) {
  struct stat mine {};
  struct stat named {};
  // A file system without locks answers with an error: then nobody cleans either.
  if (::flock(fd, LOCK_EX) != 0 && errno == EINTR) return false;
  return ::fstat(fd, &mine) == 0 && ::lstat(path.c_str(), &named) == 0 && mine.st_ino == named.st_ino &&
         mine.st_dev == named.st_dev;
}

void remove_if_dead(const std::string& path) {
  Descriptor fd(open_retrying(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK));
  if (!fd || ::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) return;
  std::error_code ignored;
  fs::remove_all(path, ignored);
}

}  // namespace

MappedFile::MappedFile(std::string path) : path_(std::move(path)) {
  Descriptor fd(open_retrying(path_, O_RDONLY | O_NONBLOCK));
  if (!fd) fail_system("open", path_);
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) fail_system("examine", path_);
  if (S_ISDIR(info.st_mode)) fail("{}: expected a file, found a directory", path_);
  if (!S_ISREG(info.st_mode)) fail("{}: expected a regular file that can be mapped", path_);
  size_ = static_cast<size_t>(info.st_size);
  device_ = info.st_dev;
  inode_ = info.st_ino;
  if (size_ == 0) return;
  void* memory = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (memory == MAP_FAILED) fail_system("map", path_);
  data_ = static_cast<const std::byte*>(memory);
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      device_(other.device_),
      inode_(other.inode_),
      keeps_pages_(other.keeps_pages_.load()) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(device_, other.device_);
  std::swap(inode_, other.inode_);
  keeps_pages_ = other.keeps_pages_.exchange(keeps_pages_);
  return *this;
}

void MappedFile::advise(Advice advice, size_t offset, size_t length) const {
  if (!data_ || offset >= size_) return;
  if (advice == Advice::dont_need && keeps_pages_) return;
  size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  size_t begin = offset / page * page;
  size_t end = length > size_ - offset ? size_ : offset + length;
  constexpr int flags[] = {MADV_NORMAL, MADV_SEQUENTIAL, MADV_RANDOM, MADV_WILLNEED, MADV_DONTNEED};
  ::madvise(const_cast<std::byte*>(data_) + begin, end - begin, flags[static_cast<int>(advice)]);
}

FileReader::FileReader(const MappedFile& file) : path_(file.path_) {
  Descriptor fd(open_retrying(path_, O_RDONLY | O_DIRECT));
  direct_ = static_cast<bool>(fd);
  if (!fd) fd = Descriptor(open_retrying(path_, O_RDONLY));
  if (!fd) fail_system("open", path_);
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) fail_system("examine", path_);
  if (info.st_dev != file.device_ || info.st_ino != file.inode_)
    fail("{}: expected the file that was opened before, found another", path_);
  fd_ = fd.release();
}

FileReader::~FileReader() { ::close(fd_); }

// Both ends on blocks, but for the end of the file: at least `needed` bytes. False where the file system
// takes no such reads after all.
bool FileReader::read_blocks(int64_t offset, std::span<std::byte> to, size_t needed) const {
  size_t done = 0;
  while (done < needed) {
    ssize_t got = ::pread(fd_, to.data() + done, to.size() - done, offset + static_cast<int64_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EINVAL) {
      ::fcntl(fd_, F_SETFL, ::fcntl(fd_, F_GETFL) & ~O_DIRECT);
      direct_ = false;
      return false;
    }
    if (got < 0) fail_system("read", path_);
    done += static_cast<size_t>(got);
    if (got == 0) fail("{}: expected {} bytes from byte {} on, found {}", path_, needed, offset, done);
  }
  return true;
}

void FileReader::read_through_cache(int64_t offset, std::span<std::byte> to) const {
  for (size_t done = 0; done < to.size();) {
    ssize_t got = ::pread(fd_, to.data() + done, to.size() - done, offset + static_cast<int64_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail_system("read", path_);
    if (got == 0) fail("{}: expected {} bytes from byte {} on, found {}", path_, to.size(), offset, done);
    done += static_cast<size_t>(got);
  }
  ::posix_fadvise(fd_, offset, static_cast<off_t>(to.size()), POSIX_FADV_DONTNEED);
}

void FileReader::read(int64_t offset, std::span<std::byte> to) const {
  constexpr size_t unit = block, most = size_t{1} << 20;
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  // Where addresses and blocks disagree, and for the ends.
  thread_local std::unique_ptr<std::byte, Free> buffer;
  while (!to.empty()) {
    if (!direct_) return read_through_cache(offset, to);
    const size_t before = static_cast<size_t>(offset) % unit;
    size_t count = to.size() / unit * unit;
    if (before == 0 && count > 0 && reinterpret_cast<uintptr_t>(to.data()) % unit == 0) {
      if (!read_blocks(offset, to.first(count), count)) continue;
    } else {
      const bool agree = reinterpret_cast<uintptr_t>(to.data()) % unit == before;
      count = std::min(to.size(), (agree ? unit : most) - before);
      if (!buffer) buffer.reset(static_cast<std::byte*>(std::aligned_alloc(unit, most)));
      if (!buffer) fail("out of memory: could not allocate {} bytes", most);
      const size_t whole = (before + count + unit - 1) / unit * unit;
      if (!read_blocks(offset - static_cast<int64_t>(before), {buffer.get(), whole}, before + count))
        continue;
      std::memcpy(to.data(), buffer.get() + before, count);
    }
    to = to.subspan(count);
    offset += static_cast<int64_t>(count);
  }
}

std::string read_file(const std::string& path, int64_t max_bytes) {
  Descriptor fd(open_retrying(path, O_RDONLY));
  if (!fd) fail_system("open", path);
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) fail_system("examine", path);
  if (S_ISDIR(info.st_mode)) fail("{}: expected a file, found a directory", path);
  if (info.st_size > max_bytes)
    fail("{}: expected at most {} bytes, found {}", path, max_bytes, info.st_size);

  std::string text;
  size_t used = 0;
  text.resize(static_cast<size_t>(info.st_size) +
              1);  // one more, to meet the end of the file in the first pass
  while (true) {
    if (used == text.size()) text.resize(std::max<size_t>(text.size() * 2, 1 << 16));
    ssize_t got = ::read(fd.get(), text.data() + used, text.size() - used);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail_system("read", path);
    if (got == 0) break;
    used += static_cast<size_t>(got);
    if (static_cast<int64_t>(used) > max_bytes)
      fail("{}: expected at most {} bytes, found more", path, max_bytes);
  }
  text.resize(used);
  return text;
}

FileWriter::FileWriter(std::string path) : path_(std::move(path)) {
  recover_directory(parent_of(path_), fs::path(path_).filename().string());
  while (fd_ < 0) {
    std::string candidate = tagged(path_, partial_mark);
    Descriptor fd(open_retrying(candidate, O_WRONLY | O_CREAT | O_EXCL, 0666));
    if (!fd && errno == EEXIST) continue;
    if (!fd) fail_system("create", path_);
    if (!claim(fd.get(), candidate)) continue;
    partial_ = candidate;
    fd_ = fd.release();
  }
}

FileWriter::~FileWriter() {
  if (fd_ < 0) return;
  ::unlink(partial_.c_str());
  ::close(fd_);
}

FileWriter::FileWriter(FileWriter&& other) noexcept
    : path_(std::move(other.path_)),
      partial_(std::move(other.partial_)),
      fd_(std::exchange(other.fd_, -1)),
      end_(other.end_) {}

void FileWriter::reserve(int64_t bytes) {
  LATENTE_ASSERT(fd_ >= 0);
  if (bytes <= 0) return;
  int result;
  do {
    result = ::fallocate(fd_, FALLOC_FL_KEEP_SIZE, 0, bytes);
  } while (result != 0 && errno == EINTR);
  if (result != 0 && (errno == ENOSPC || errno == EDQUOT || errno == EFBIG))
    fail("{}: cannot reserve {} bytes: {}", path_, bytes, std::strerror(errno));
}

void FileWriter::write(std::string_view bytes) {
  write(std::as_bytes(std::span(bytes.data(), bytes.size())));
}

void FileWriter::write(std::span<const std::byte> bytes) { write_at(end_, bytes); }

void FileWriter::write_at(int64_t offset, std::span<const std::byte> bytes) {
  LATENTE_ASSERT(fd_ >= 0);
  while (!bytes.empty()) {
    // Linux moves at most 2 GiB a call anyway.
    ssize_t put = ::pwrite(fd_, bytes.data(), std::min<size_t>(bytes.size(), size_t{1} << 30), offset);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail_system("write", path_);
    if (put == 0) fail("{}: cannot write: the system took no byte", path_);
    bytes = bytes.subspan(static_cast<size_t>(put));
    offset += put;
  }
  end_ = std::max(end_, offset);
}

void FileWriter::commit() {
  LATENTE_ASSERT(fd_ >= 0);
  struct stat old {};
  if (::stat(path_.c_str(), &old) == 0) {
    if (S_ISDIR(old.st_mode)) fail("{}: expected a file to replace, found a directory", path_);
    (void)::fchmod(fd_, old.st_mode & 07777);
  }
  if (::fsync(fd_) != 0) fail_system("sync", path_);
  if (::rename(partial_.c_str(), path_.c_str()) != 0) fail_system("rename into place", path_);
  if (::close(std::exchange(fd_, -1)) != 0) fail_system("close", path_);
  sync_path(parent_of(path_), true);
}

void write_file_atomically(const std::string& path, std::string_view bytes) {
  FileWriter writer(path);
  writer.write(bytes);
  writer.commit();
}

void write_file_atomically(const std::string& path, const std::function<void(FileWriter&)>& write) {
  FileWriter writer(path);
  write(writer);
  writer.commit();
}

DirectoryWriter::DirectoryWriter(std::string target) : target_(named_path(std::move(target))) {
  struct stat old {};
  if (::stat(target_.c_str(), &old) == 0 && !S_ISDIR(old.st_mode))
    fail("{}: expected a directory to replace, found a file", target_);
  std::error_code error;
  fs::create_directories(parent_of(target_), error);
  if (error) fail("{}: cannot create: {}", parent_of(target_), error.message());
  recover_directory(parent_of(target_), fs::path(target_).filename().string());
  while (fd_ < 0) {
    std::string candidate = tagged(target_, partial_mark);
    if (::mkdir(candidate.c_str(), 0777) != 0) {
      if (errno == EEXIST) continue;
      fail_system("create", target_);
    }
    Descriptor fd(open_retrying(candidate, O_RDONLY | O_DIRECTORY));
    if (!fd && errno == ENOENT) continue;
    if (!fd) fail_system("open", candidate);
    if (!claim(fd.get(), candidate)) continue;
    partial_ = candidate;
    fd_ = fd.release();
  }
}

DirectoryWriter::~DirectoryWriter() {
  if (fd_ < 0) return;
  std::error_code ignored;
  fs::remove_all(partial_, ignored);
  ::close(fd_);
}

DirectoryWriter::DirectoryWriter(DirectoryWriter&& other) noexcept
    : target_(std::move(other.target_)),
      partial_(std::move(other.partial_)),
      fd_(std::exchange(other.fd_, -1)) {}

void DirectoryWriter::commit(Replace replace) {
  LATENTE_ASSERT(fd_ >= 0);
  std::string parent = parent_of(target_), old;
  sync_tree(partial_);
  if (::rename(partial_.c_str(), target_.c_str()) != 0) {
    if (errno != ENOTEMPTY && errno != EEXIST) fail_system("rename into place", target_);
    old = partial_;
    if (replace == Replace::by_two_renames ||
        ::renameat2(AT_FDCWD, partial_.c_str(), AT_FDCWD, target_.c_str(), RENAME_EXCHANGE) != 0) {
      old = tagged(target_, replaced_mark);
      if (::rename(target_.c_str(), old.c_str()) != 0) fail_system("replace", target_);
      if (::rename(partial_.c_str(), target_.c_str()) != 0) {
        int error = errno;
        ::rename(old.c_str(), target_.c_str());
        fail_system("rename into place", target_, error);
      }
    }
  }
  ::close(std::exchange(fd_, -1));
  sync_path(parent, true);
  if (old.empty()) return;
  std::error_code ignored;  // what stays behind is removed by the next writer
  fs::remove_all(old, ignored);
}

void remove_directory(const std::string& path) {
  std::string target = named_path(path);
  std::string partial = tagged(target, partial_mark);
  if (::rename(target.c_str(), partial.c_str()) != 0) fail_system("remove", target);
  sync_path(parent_of(target), true);
  std::error_code error;
  fs::remove_all(partial, error);
  // Another cleaner may have been faster.
  if (error && fs::exists(partial)) fail("{}: cannot remove: {}", target, error.message());
}

void recover_directory(const std::string& directory, std::string_view name) {
  std::error_code error;
  fs::directory_iterator it(directory, error), end;
  if (error) {
    if (error == std::errc::no_such_file_or_directory) fail("{}: no such directory", directory);
    return;  // unreadable: whatever is wrong shows when writing
  }
  std::vector<std::string> entries;
  for (; !error && it != end; it.increment(error)) entries.push_back(it->path().filename().string());
  for (const std::string& entry : entries) {
    std::string path = (fs::path(directory) / entry).string();
    std::string_view partial_of = untagged(entry, partial_mark), replaced = replaced_name(entry);
    if (!partial_of.empty() && (name.empty() || partial_of == name)) remove_if_dead(path);
    if (!replaced.empty() && (name.empty() || replaced == name)) {
      fs::path original = fs::path(directory) / replaced;
      // rename() refuses when the new directory is in place, and then the old one has had its day.
      if (::rename(path.c_str(), original.c_str()) != 0 && (errno == ENOTEMPTY || errno == EEXIST))
        fs::remove_all(path, error);
    }
  }
}

std::string_view replaced_name(std::string_view name) { return untagged(name, replaced_mark); }

std::string join_path(const std::string& directory, const std::string& name) {
  return (std::filesystem::path(directory) / name).string();
}

std::vector<std::string> list_directory(const std::string& path) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator it(path, error), end; !error && it != end; it.increment(error))
    names.push_back(it->path().filename().string());
  if (error) fail("{}: cannot list: {}", path, error.message());
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<std::string> glob_files(const std::string& pattern) {
  std::error_code error;
  if (fs::is_directory(pattern, error)) fail("{}: expected files, found a directory", pattern);
  if (fs::exists(pattern, error)) return {pattern};
  glob_t matches{};
  int result = ::glob(pattern.c_str(), GLOB_BRACE | GLOB_TILDE, nullptr, &matches);
  std::vector<std::string> paths;
  for (size_t i = 0; result == 0 && i < matches.gl_pathc; ++i) {
    std::string path = matches.gl_pathv[i];
    if (fs::is_regular_file(path, error)) paths.push_back(std::move(path));
  }
  ::globfree(&matches);
  if (result == GLOB_NOSPACE) fail("{}: out of memory while matching", pattern);
  if (paths.empty()) fail("{}: no file matches", pattern);
  std::sort(paths.begin(), paths.end());
  paths.erase(std::unique(paths.begin(), paths.end()), paths.end());
  return paths;
}

}  // namespace latente
