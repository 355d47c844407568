#include "races.h"

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>

#include "emulation.h"

// By the linker: the module's own, not those of the program that loads it.
extern "C" __attribute__((visibility("hidden"))) const char __bss_start[], _end[];

namespace emulation::races {
namespace {

constexpr size_t kPage = 4096;
constexpr int kSeveral = -1;

// When the threads of a block (or kSeveral) touched a byte.
struct Access {
  uint32_t block = 0;  // counts from 1 over a launch; 0: never
  int32_t thread = 0, warp = 0;
  uint32_t barriers = 0, warp_barriers = 0;
};

struct Byte {
  Access write, read;
  uint32_t block = 0;  // of shared memory: whose it is
};

using Page = std::array<Byte, kPage>;

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_number = 0;
Page* last_page = nullptr;
const char* ignored_begin = nullptr;
const char* ignored_end = nullptr;
int running = -1;
uint32_t block_number = 0, barriers = 0;
std::array<uint32_t, 32> warp_barriers;

Page& page(uintptr_t number) {
  if (last_page == nullptr || number != last_number) {
    std::unique_ptr<Page>& slot = pages[number];
    if (slot == nullptr) slot = std::make_unique<Page>();
    last_page = slot.get();
    last_number = number;
  }
  return *last_page;
}

// Whether everything that the record tells of happened before what this thread does now.
bool ordered(const Access& before) {
  if (before.block == 0) return true;
  if (before.block != block_number) return false;
  if (before.barriers < barriers || before.thread == running) return true;
  return before.warp == running / kWarp && before.warp_barriers < warp_barriers[before.warp];
}

Access now() {
  const int warp = running / kWarp;
  return {block_number, running, warp, barriers, warp_barriers[warp]};
}

// Dynamic shared memory, and static: variables of this module that start as zero.
bool is_shared(const char* address) {
  const char* dynamic = reinterpret_cast<const char*>(dynamic_shared());
  return (address >= dynamic && address < dynamic + kSharedLimit) ||
         (address >= __bss_start && address < _end);
}

void add_reader(Access& readers) {
  const Access reader = now();
  if (readers.block != 0 && readers.block != block_number) {
    readers.block = UINT32_MAX;  // several blocks: later than every barrier of any
  } else if (readers.block == 0 || readers.barriers < barriers) {
    readers = reader;
  } else {
    if (readers.thread != reader.thread) readers.thread = kSeveral;
    if (readers.warp != reader.warp) readers.warp = kSeveral;
    readers.warp_barriers = reader.warp_barriers;
  }
}

void access(const void* address, size_t bytes, bool write) {
  if (running < 0) return;
  const char* first = static_cast<const char*>(address);
  if (first >= ignored_begin && first < ignored_end) return;
  const bool shared = is_shared(first);
  const auto begin = reinterpret_cast<uintptr_t>(first);
  for (uintptr_t at = begin; at < begin + bytes; ++at) {
    Byte& byte = page(at / kPage)[at % kPage];
    if (shared && byte.block != block_number) byte = {.block = block_number};
    if (!ordered(byte.write)) fail(write ? "race: two writes" : "race: a read after a write");
    if (!write) {
      add_reader(byte.read);
    } else {
      if (!ordered(byte.read)) fail("race: a write after a read");
      byte.write = now();
      byte.read = {};
    }
  }
}

}  // namespace

void enter_launch() {
  pages.clear();
  last_page = nullptr;
  block_number = 0;
}

void enter_block() {
  ++block_number;
  barriers = 0;
  warp_barriers.fill(0);
}

void resume(int thread) { running = thread; }

void pass_barrier() { ++barriers; }

void pass_warp_barrier(int warp) { ++warp_barriers[warp]; }

void ignore(const void* memory, size_t bytes) {
  ignored_begin = static_cast<const char*>(memory);
  ignored_end = ignored_begin + bytes;
}

}  // namespace emulation::races

// What GCC calls; the names are its own.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Atomics belong to the launchers: kernels have none.
unsigned long __tsan_atomic64_load(const volatile unsigned long* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
unsigned long __tsan_atomic64_fetch_or(volatile unsigned long* p, unsigned long bits, int) {
  return __atomic_fetch_or(p, bits, __ATOMIC_SEQ_CST);
}
#define SIZED(bytes)                                                              \
  void __tsan_read##bytes(void* p) { emulation::races::access(p, bytes, false); } \
  void __tsan_write##bytes(void* p) { emulation::races::access(p, bytes, true); }
SIZED(1)
SIZED(2)
SIZED(4)
SIZED(8)
SIZED(16)
#undef SIZED
#define UNALIGNED(bytes)                                                                    \
  void __tsan_unaligned_read##bytes(void* p) { emulation::races::access(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { emulation::races::access(p, bytes, true); }
UNALIGNED(2)
UNALIGNED(4)
UNALIGNED(8)
UNALIGNED(16)
#undef UNALIGNED
void __tsan_read_range(void* p, unsigned long n) { emulation::races::access(p, n, false); }
void __tsan_write_range(void* p, unsigned long n) { emulation::races::access(p, n, true); }
}
