// Files: mapped reading, and writing that never leaves half a file or half a directory under its final name.
// Everything here throws Error naming the path and the system's reason.
//
// A write goes to NAME.partial-<16 hex digits> beside its target, which the writer keeps locked (flock). It
// is synced and renamed at commit(). The next writer of the same target removes partials whose lock is free:
// their writer is dead.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace latente {

// A read-only mapping of a regular file. Replacing the file by rename leaves the mapping as it was;
// truncating the file in place while it is mapped kills the process that reads it, as with any mapping.
class MappedFile {
 public:
  enum class Advice { normal, sequential, random, will_need, dont_need };

  MappedFile() = default;
  explicit MappedFile(std::string path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }
  int64_t size() const { return static_cast<int64_t>(size_); }

  // A hint for the pages of [offset, offset + length); never fails.
  void advise(Advice advice, size_t offset = 0, size_t length = std::numeric_limits<size_t>::max()) const;
  // From now on dont_need is not passed on: what moves into other pages behind these addresses
  // (base/large_pages.h) would be lost by it.
  void keep_pages() const { keeps_pages_ = true; }

 private:
  friend class FileReader;
  std::string path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
  uint64_t device_ = 0, inode_ = 0;
  mutable std::atomic<bool> keeps_pages_{false};
};

// Reads pieces of a mapped file into memory of the caller's, past the page cache where the file system can
// (O_DIRECT): nothing is read twice, nobody else's pages have to go, and the processor copies at most the
// ends. Elsewhere it reads through the cache and gives the pages back. read() may be called from several
// threads at once.
class FileReader {
 public:
  // Error when the name stands for another file by now.
  explicit FileReader(const MappedFile& file);
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  // Fastest where the address and the offset agree modulo `block`. Error when the file ends before `to` does.
  void read(int64_t offset, std::span<std::byte> to) const;
  static constexpr int64_t block = 4096;

 private:
  bool read_blocks(int64_t offset, std::span<std::byte> to, size_t needed) const;
  void read_through_cache(int64_t offset, std::span<std::byte> to) const;

  std::string path_;
  int fd_ = -1;
  mutable std::atomic<bool> direct_{false};
};

// The whole file, which may be a pipe. Error above max_bytes.
std::string read_file(const std::string& path, int64_t max_bytes = std::numeric_limits<int64_t>::max());

// A file under construction; without commit() the target stays as it was.
class FileWriter {
 public:
  explicit FileWriter(std::string path);
  ~FileWriter();
  FileWriter(FileWriter&& other) noexcept;
  FileWriter& operator=(FileWriter&&) = delete;

  const std::string& path() const { return path_; }
  // Claims disk space in advance, so that a full disk is an Error here; a no-op where the file system cannot.
  void reserve(int64_t bytes);
  // Appends.
  void write(std::string_view bytes);
  void write(std::span<const std::byte> bytes);
  // Writes at an absolute position; appending continues after the furthest byte written.
  void write_at(int64_t offset, std::span<const std::byte> bytes);
  // Syncs the file, gives it its name and syncs the directory. An existing target keeps its permissions.
  void commit();

 private:
  std::string path_, partial_;
  int fd_ = -1;
  int64_t end_ = 0;
};

void write_file_atomically(const std::string& path, std::string_view bytes);
void write_file_atomically(const std::string& path, const std::function<void(FileWriter&)>& write);

// A directory under construction: files go into partial(), and commit() makes all of them appear under the
// target's name at once. An existing target is exchanged in one step; on a file system without exchange it is
// renamed to NAME.replaced-<16 hex digits> for a moment, which recover_directories() turns back.
class DirectoryWriter {
 public:
  explicit DirectoryWriter(std::string target);
  ~DirectoryWriter();
  DirectoryWriter(DirectoryWriter&& other) noexcept;
  DirectoryWriter& operator=(DirectoryWriter&&) = delete;

  const std::string& target() const { return target_; }
  const std::string& partial() const { return partial_; }
  enum class Replace { exchange, by_two_renames };
  void commit(Replace replace = Replace::exchange);

 private:
  std::string target_, partial_;
  int fd_ = -1;
};

// Removes a directory such that its name never stands for a half-empty one.
void remove_directory(const std::string& path);

// Removes the partials of dead writers in `directory`, and finishes or undoes interrupted replacements. With
// a name, only those of that target.
void recover_directory(const std::string& directory, std::string_view name = {});

// The base name when `name` is one that an interrupted replacement left ("x" of
// "x.replaced-0123456789abcdef"), otherwise empty.
std::string_view replaced_name(std::string_view name);

std::string join_path(const std::string& directory, const std::string& name);

// Names (not paths) of a directory's entries, sorted.
std::vector<std::string> list_directory(const std::string& path);

// Paths of the regular files that match a shell pattern (*, ?, [..], {a,b}, ~), sorted. A path that exists is
// itself, whatever its characters. Error when nothing matches.
std::vector<std::string> glob_files(const std::string& pattern);

}  // namespace latente
