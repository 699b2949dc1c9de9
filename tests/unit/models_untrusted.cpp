// A checkpoint from a stranger runs no code, has no file read that is not its own, and takes no more memory than its size justifies.
// open and its relatives, exec and dlopen are interposed, and operator new is counted.
// labels: no-sanitizer
#include "models_support.hpp"

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__GLIBC__)

namespace {

struct Watch {
  bool on = false;
  std::vector<std::string> opened;
  int programs = 0, libraries = 0;
} watch;

void note(const char* path) {
  if (!watch.on) return;
  watch.on = false;
  watch.opened.emplace_back(path);
  watch.on = true;
}

std::atomic<std::size_t> live{0}, peak{0};
void took(std::size_t n) {
  const std::size_t now = live.fetch_add(n) + n;
  if (now > peak.load()) peak.store(now);
}

}  // namespace

extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void __libc_free(void*);
std::size_t malloc_usable_size(void*);

static void* counted(void* p) {
  if (p != nullptr) took(malloc_usable_size(p));
  return p;
}
void* malloc(std::size_t n) { return counted(__libc_malloc(n)); }
void* calloc(std::size_t count, std::size_t n) { return counted(__libc_calloc(count, n)); }
void* realloc(void* p, std::size_t n) {
  if (p != nullptr) live.fetch_sub(malloc_usable_size(p));
  return counted(__libc_realloc(p, n));
}
void* memalign(std::size_t alignment, std::size_t n) { return counted(__libc_memalign(alignment, n)); }
void* aligned_alloc(std::size_t alignment, std::size_t n) { return memalign(alignment, n); }
int posix_memalign(void** p, std::size_t alignment, std::size_t n) {
  *p = memalign(alignment, n);
  return *p ? 0 : ENOMEM;
}
void free(void* p) {
  if (p != nullptr) live.fetch_sub(malloc_usable_size(p));
  __libc_free(p);
}

static int opened(int at, const char* path, int flags, std::va_list rest) {
  const unsigned mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(rest, unsigned) : 0;
  note(path);
  return static_cast<int>(syscall(SYS_openat, at, path, flags, mode));
}
#define M2LM_TEST_OPEN(name, ...)                   \
  {                                                 \
    std::va_list rest;                              \
    va_start(rest, flags);                          \
    const int file = opened(__VA_ARGS__, path, flags, rest); \
    va_end(rest);                                   \
    return file;                                    \
  }
int open(const char* path, int flags, ...) M2LM_TEST_OPEN(open, AT_FDCWD)
int open64(const char* path, int flags, ...) M2LM_TEST_OPEN(open64, AT_FDCWD)
int openat(int at, const char* path, int flags, ...) M2LM_TEST_OPEN(openat, at)
std::FILE* fopen(const char* path, const char* mode) {
  note(path);
  const int file = static_cast<int>(syscall(SYS_openat, AT_FDCWD, path, std::strchr(mode, 'w') ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY, 0666));
  return file < 0 ? nullptr : fdopen(file, mode);
}
int execve(const char*, char* const*, char* const*) noexcept {
  ++watch.programs;
  errno = EPERM;
  return -1;
}
int system(const char*) {
  ++watch.programs;
  return -1;
}
std::FILE* popen(const char*, const char*) {
  ++watch.programs;
  return nullptr;
}
void* dlopen(const char*, int) noexcept {
  ++watch.libraries;
  return nullptr;
}
}

namespace {

using namespace m2lm_test;
using m2lm::CheckpointError;
using m2lm::LoadOptions;

namespace t = m2lm::testing;
namespace fs = std::filesystem;

/// What a load opens, besides what says how much memory and how many processors there are. The exception's message, if any.
template <class M>
std::pair<std::vector<std::string>, std::string> files_of_load(const std::string& directory, const LoadOptions& options = {}) {
  const Cpu backend({.threads = 1});
  watch = {};
  watch.on = true;
  std::string message;
  try {
    (void)M::from_pretrained(directory, backend, options);
  } catch (const m2lm::Error& error) {
    message = error.what();
  }
  watch.on = false;
  std::vector<std::string> out;
  for (const std::string& path : watch.opened)
    if (!path.starts_with("/proc/") && !path.starts_with("/sys/fs/cgroup/")) out.push_back(path);
  return {out, message};
}

bool only_inside(const std::vector<std::string>& files, const std::string& directory) {
  return std::all_of(files.begin(), files.end(), [&](const std::string& path) {
    const std::string real = fs::weakly_canonical(path).string(), root = fs::canonical(directory).string();
    return real == root || real.starts_with(root + "/");
  });
}

}  // namespace

TEST_CASE("a load opens the files of its directory only, runs no program and loads no library") {
  for (const char* name : {"llava/with_tokenizer", "llama/gqa_linear_tied_sharded"}) {
    const TemporaryDirectory directory;
    copy_directory(golden(name), directory);
    const auto [files, message] = fs::exists(directory / "tokenizer.model") ? files_of_load<Vlm>(directory.path()) : files_of_load<Lm>(directory.path());
    CHECK(message.empty());
    CHECK(files.size() >= 3);
    CHECK(only_inside(files, directory.path()));
    CHECK(watch.programs == 0);
    CHECK(watch.libraries == 0);
  }
}

TEST_CASE("an index that leads out of its directory is refused, and what it names is not opened") {
  for (const char* shard : {"../outside.safetensors", "/tmp/outside.safetensors", "below/outside.safetensors", "..\\outside.safetensors", "..", "", ".", "./model-00001-of-00003.safetensors"}) {
    CAPTURE(std::string(shard));
    const TemporaryDirectory parent;
    const std::string directory = parent / "checkpoint";
    fs::copy(golden("llama/gqa_linear_tied_sharded"), directory);
    fs::copy_file(directory + "/model-00001-of-00003.safetensors", parent / "outside.safetensors");
    std::string index = m2lm::read_file(directory + "/model.safetensors.index.json");
    const std::size_t at = index.find("model-00001-of-00003.safetensors");
    REQUIRE(at != std::string::npos);
    index.replace(at, std::strlen("model-00001-of-00003.safetensors"), shard[0] == '.' && shard[2] == '\\' ? "..\\\\outside.safetensors" : shard);
    fs::permissions(directory + "/model.safetensors.index.json", fs::perms::owner_all);
    m2lm::write_file(directory + "/model.safetensors.index.json", index);
    const auto [files, message] = files_of_load<Lm>(directory);
    CHECK(has(message, "model.safetensors.index.json"));
    CHECK(has(message, "of this directory"));
    CHECK(only_inside(files, directory));
  }
}

TEST_CASE("links that lead out of the directory are refused for every file, unless they are trusted") {
  const TemporaryDirectory parent;
  const std::string directory = parent / "checkpoint", elsewhere = parent / "elsewhere";
  for (const fs::directory_entry& entry : fs::directory_iterator(golden("llava/with_tokenizer"))) {
    const std::string name = entry.path().filename().string();
    CAPTURE(name);
    for (const std::string& d : {directory, elsewhere}) {
      fs::remove_all(d);
      fs::copy(golden("llava/with_tokenizer"), d);
    }
    fs::remove(directory + "/" + name);
    for (const std::string& target : {elsewhere + "/" + name, "../elsewhere/" + name}) {
      fs::remove(directory + "/" + name);
      fs::create_symlink(target, directory + "/" + name);
      const auto [files, message] = files_of_load<Vlm>(directory);
      CHECK(has(message, name + " -> "));
      CHECK(has(message, "elsewhere"));
      CHECK(has(message, "LoadOptions::follow_links"));
      CHECK(std::none_of(files.begin(), files.end(), [&](const std::string& path) { return path.ends_with(name); }));
      CHECK(files_of_load<Vlm>(directory, {.follow_links = true}).second.empty());
    }
  }
  // A link that stays inside, and the cache of the Hugging Face hub, whose snapshots are links to blobs.
  fs::remove_all(directory);
  fs::copy(golden("llava/with_tokenizer"), directory);
  fs::rename(directory + "/model.safetensors", directory + "/weights");
  fs::create_symlink("weights", directory + "/model.safetensors");
  CHECK(files_of_load<Vlm>(directory).second.empty());
  const std::string snapshot = parent / "hub/snapshots/abc", blobs = parent / "hub/blobs";
  fs::create_directories(snapshot);
  fs::copy(golden("llava/with_tokenizer"), blobs);
  for (const fs::directory_entry& entry : fs::directory_iterator(blobs)) fs::create_symlink("../../blobs/" + entry.path().filename().string(), snapshot + "/" + entry.path().filename().string());
  CHECK(files_of_load<Vlm>(snapshot).second.empty());
  fs::remove(snapshot + "/tokenizer.model");
  fs::create_symlink("../../../elsewhere/tokenizer.model", snapshot + "/tokenizer.model");
  CHECK(has(files_of_load<Vlm>(snapshot).second, "tokenizer.model -> "));
}

TEST_CASE("pipes and devices in the place of files are refused, not waited for") {
  const TemporaryDirectory directory;
  t::write_synthetic_llama(directory.path());
  REQUIRE(mkfifo((directory / "tokenizer_config.json").c_str(), 0600) == 0);
  CHECK(has(files_of_load<Lm>(directory.path()).second, "tokenizer_config.json (no regular file)"));
  fs::remove(directory / "tokenizer_config.json");
  fs::create_symlink("/dev/zero", directory / "generation_config.json");
  CHECK(has(files_of_load<Lm>(directory.path()).second, "generation_config.json -> /dev/zero"));
}

TEST_CASE("small files take little memory, whatever they promise") {
  // Most bytes at once, in a load of the directory or file. A value of JSON is 16 bytes, its container up to 100: so often a byte counts.
  const auto bytes_for = [](auto&& read) {
    const std::size_t before = live.load();
    peak.store(before);
    std::string said;
    try {
      read();
    } catch (const m2lm::Error& error) {
      said = error.what();
    }
    return std::pair(peak.load() - before, said);
  };
  constexpr std::size_t small = 24 << 20;  // sentencepiece's own tables, the unicode tables, buffers
  const auto tokenizer_with = [&](const char* file, const std::string& text, const char* base = "llava/with_tokenizer") {
    const TemporaryDirectory directory;
    copy_directory(golden(base), directory);
    directory.write(file, text);
    return bytes_for([&] { (void)m2lm::Tokenizer::from_directory(directory.path()); });
  };
  const auto [plain, nothing] = tokenizer_with("unused", "");
  CHECK(plain < small);
  CHECK(nothing.empty());
  for (const char* id : {"16777216", "1000000", "70000"}) {
    const auto [added, message] = tokenizer_with("added_tokens.json", std::string("{\"<far>\": ") + id + "}");
    CAPTURE(id);
    CHECK(added < small);
    CHECK(has(message, "added_tokens.json"));
    CHECK(has(message, id));
    const auto [decoder, other] = tokenizer_with("tokenizer_config.json", std::string("{\"added_tokens_decoder\": {\"") + id + "\": {\"content\": \"<far>\"}}}");
    CHECK(decoder < small);
    CHECK(has(other, "tokenizer_config.json"));
    std::string json = m2lm::read_file(golden("bpe/qwen2/tokenizer.json"));
    json.insert(json.find("\"vocab\":{") + 9, std::string("\"far\":") + id + ",");
    const auto [vocab, third] = tokenizer_with("tokenizer.json", json, "bpe/qwen2");
    CHECK(vocab < small);
    CHECK(has(third, "tokenizer.json"));
  }
  CHECK(tokenizer_with("added_tokens.json", "{\"<near>\": 60000}").second.empty());
  // Many added tokens: not quadratic.
  std::string many = "{";
  for (int i = 0; i < 100000; ++i) many += (i ? ",\"t" : "\"t") + std::to_string(i) + "\":" + std::to_string(400 + i);
  const auto [taken, said] = tokenizer_with("added_tokens.json", many + "}");
  CHECK(said.empty());
  CHECK(taken < small + 100 * many.size());

  const auto picture = [&](std::string bytes) {
    return bytes_for([&] { m2lm::decode_image(std::as_bytes(std::span(bytes.data(), bytes.size())), "picture"); });
  };
  std::string png = m2lm::read_file(golden("images/rgb_64x64.png"));
  png.replace(16, 8, std::string("\0\0\x40\0\0\0\x3f\xff", 8));
  std::string jpeg = m2lm::read_file(golden("images/photo420_61x45.jpg"));
  const std::size_t frame = jpeg.find("\xff\xc0");
  REQUIRE(frame != std::string::npos);
  jpeg.replace(frame + 5, 4, std::string("\x3f\xff\x40\0", 4));
  std::string gif("GIF89a\xff\x3f\xff\x3f\x80\x00\x00\xff\xff\xff\x00\x00\x00", 19);
  gif += std::string(",\0\0\0\0\1\0\1\0\0\2\2D\1\0;", 16);
  std::string bmp("BM\0\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\0\x40\0\0\0\x3f\0\0\1\0\x18\0", 30);
  bmp += std::string(200, '\0');
  for (const std::string& bytes : {png, jpeg, gif, bmp}) {
    const auto [most, refusal] = picture(bytes);
    CAPTURE(bytes.substr(0, 4));
    CHECK(most < small);
    CHECK(has(refusal, "cannot be in"));
  }

  const TemporaryDirectory directory;
  t::write_synthetic_llama(directory.path());
  change_text(directory, "config.json", "\"vocab_size\": 96", "\"vocab_size\": 1048576");
  change_text(directory, "config.json", "\"max_position_embeddings\": 256", "\"max_position_embeddings\": 1073741824");
  const auto [load, misfit] = bytes_for([&] { (void)Lm::from_pretrained(directory.path(), Cpu({.threads = 1})); });
  CHECK(load < small);
  CHECK(has(misfit, "does not fit"));
}

#else

TEST_CASE("files and memory are watched with glibc only") { m2lm_test::skip("untrusted checkpoints", "the C library has no __libc_malloc"); }

#endif
