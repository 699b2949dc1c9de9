// A decode step allocates nothing: malloc and its relatives, and mmap, are interposed and counted.
// labels: no-sanitizer
#include "models_support.hpp"

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstdlib>

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__GLIBC__)

namespace {
std::atomic<long> allocations{0};
}  // namespace

// glibc's own functions under their second names; what is defined here takes the place of the first ones in the whole process,
// operator new and the shared libraries included.
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void __libc_free(void*);

void* malloc(std::size_t n) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_malloc(n);
}
void* calloc(std::size_t count, std::size_t n) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_calloc(count, n);
}
void* realloc(void* p, std::size_t n) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_realloc(p, n);
}
void* memalign(std::size_t alignment, std::size_t n) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_memalign(alignment, n);
}
void* aligned_alloc(std::size_t alignment, std::size_t n) { return memalign(alignment, n); }
int posix_memalign(void** p, std::size_t alignment, std::size_t n) {
  *p = memalign(alignment, n);
  return *p ? 0 : ENOMEM;
}
void free(void* p) { __libc_free(p); }
void* mmap(void* address, std::size_t length, int protection, int flags, int file, off_t offset) noexcept {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return reinterpret_cast<void*>(syscall(SYS_mmap, address, length, protection, flags, file, offset));
}
}

namespace {

using namespace m2lm_test;
using m2lm::GenerateOptions;

namespace t = m2lm::testing;

template <class F>
long allocations_of(F&& f) {
  const long before = allocations.load();
  f();
  return allocations.load() - before;
}

}  // namespace

TEST_CASE("the counters count") {
  // volatile: a compiler may leave out an allocation that nobody sees.
  void* volatile p = nullptr;
  CHECK(allocations_of([&] { p = std::malloc(100); }) == 1);
  CHECK(allocations_of([&] { p = std::realloc(p, 200000); }) >= 1);
  std::free(p);
  CHECK(allocations_of([&] { p = ::operator new(100); }) == 1);
  ::operator delete(p);
  CHECK(allocations_of([&] { p = ::operator new(100, std::align_val_t{64}); }) == 1);
  ::operator delete(p, std::align_val_t{64});
  CHECK(allocations_of([&] { p = mmap(nullptr, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }) == 1);
  REQUIRE(p != MAP_FAILED);
  munmap(p, 4096);
}

TEST_CASE("a decoder's second step allocates nothing: every level, format and number of threads") {
  const TemporaryDirectory directory;
  m2lm::LlamaConfig config = t::small_llama();
  config.hidden_size = 96;  // large enough for several threads to have something to do
  config.intermediate_size = 400;
  config.vocab_size = 600;
  t::write_synthetic_llama(directory.path(), config);
  const m2lm::Checkpoint checkpoint = m2lm::Checkpoint::open(directory.path());
  for (const int threads : {1, 2, 3})
    for (const IsaLevel level : isa_levels())
      for (const DType format : {DType::f32, DType::bf16}) {
        Cpu backend = cpu_at(level, threads);
        m2lm::Arena arena;
        m2lm::Context<Cpu> ctx{backend, arena};
        m2lm::LlamaDecoder<>::On<Cpu, in_f32> decoder(config);
        require_complete(load_parameters(decoder, checkpoint), directory.path());
        decoder.prepare(ctx, Precision{.weights = format}, {});
        auto cache = decoder.make_cache(ctx, format, 200);
        Tensor<float> h(Shape{1, config.hidden_size}), logits(Shape{1, config.vocab_size});
        const std::int32_t id = 5;
        const auto step = [&] {
          const m2lm::SequenceRows<Cpu> rows{&cache, 0, 1};
          decoder.embed_tokens.forward(ctx, std::span(&id, 1), h.view<2>());
          decoder.forward(ctx, h.view<2>(), std::span(&rows, 1));
          decoder.norm.forward(ctx, h.view<2>(), h.view<2>());
          decoder.head.forward(ctx, h.view<2>(), logits.view<2>());
        };
        step();  // the arena learns its size
        step();
        CAPTURE(threads);
        CAPTURE(static_cast<int>(level));
        for (int i = 2; i < 200; ++i) CHECK(allocations_of(step) == 0);
      }
}

TEST_CASE("an answer of 200 tokens allocates as often as one of 20") {
  const TemporaryDirectory directory;
  m2lm::LlamaConfig config = t::small_llama();
  config.max_position_embeddings = 512;
  t::write_synthetic_llama(directory.path(), config);
  for (const DType weights : {DType::f32, DType::bf16}) {
    const Lm model = Lm::from_pretrained(directory.path(), Cpu({.threads = 2}), {.precision = Precision{.weights = weights}});
    const auto prompt = model.prompt(some_ids(7, config.vocab_size));
    for (const double temperature : {0.0, 1.0}) {
      const auto count = [&](std::int64_t tokens) {
        auto session = model.session();
        const GenerateOptions options{.max_new_tokens = tokens, .temperature = temperature, .top_k = 40, .top_p = 0.9, .min_p = 0.01,
                                      .repetition_penalty = 1.1, .seed = 3, .ignore_eos = true};
        return allocations_of([&] { CHECK(session.generate(prompt, options).tokens.size() == static_cast<std::size_t>(tokens)); });
      };
      count(20);
      CHECK(count(200) == count(20));
    }
  }
}

TEST_CASE("nothing is allocated between the pieces of a streamed answer") {
  const Vlm model = Vlm::from_pretrained(golden("llava/with_tokenizer"), Cpu({.threads = 2}));
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    long at[256] = {};
    std::size_t pieces = 0;
    const auto note = [&](std::string_view) {
      if (pieces < std::size(at)) at[pieces++] = allocations.load();
    };
    auto session = model.session();
    auto prompt = model.prompt("<image>\nTell me.");
    prompt.attach<"image">(m2lm::load_image(golden("llava/with_tokenizer/picture.png")));
    session.generate(prompt, {.max_new_tokens = 150, .temperature = 1.2, .top_p = 0.95, .seed = seed, .stop = {"never written"}, .ignore_eos = true, .on_text = note});
    REQUIRE(pieces > 30);
    // The first pieces may find buffers that have not grown yet.
    for (std::size_t i = 3; i < pieces; ++i) CHECK_MESSAGE(at[i] == at[i - 1], "seed ", seed, ", piece ", i, ": ", at[i] - at[i - 1]);
  }
}

#else

TEST_CASE("allocations are counted with glibc only") { m2lm_test::skip("allocations", "the C library has no __libc_malloc"); }

#endif
