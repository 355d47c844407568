#include "emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "races.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the callee's registers on this stack, keeps its top in *save, and goes on with another one.
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.globl emulation_switch
emulation_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

extern "C" {  // Present under AddressSanitizer only.
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);
}

namespace emulation {
namespace {

constexpr size_t kStack = 256 << 10, kGuard = 4 << 10;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
  void* stack_top;
  uint3 index;
  int number;
  State state;
  int line;
  unsigned mask;
  Collective run;
  void* operands;
  std::vector<std::vector<Copy>> groups;  // of copies; the last one is still open
};

struct Block {
  std::vector<Fiber> fibers;
  int at_barrier = 0, done = 0;
};

Block block;
Fiber* current = nullptr;  // null while the scheduler runs
void* scheduler_stack;
const std::function<void()>* kernel;
std::string complaint;
std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, &std::free};

std::string where(const Fiber& fiber) {
  char text[128];
  std::snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u) near line %d", blockIdx.x,
                blockIdx.y, blockIdx.z, fiber.index.x, fiber.index.y, fiber.index.z, fiber.line);
  return text;
}

void give_way() { emulation_switch(&current->stack_top, scheduler_stack); }

void enter_fiber() {
  (*kernel)();
  current->state = State::kDone;
  ++block.done;
  give_way();
}

void release_barrier() {
  for (Fiber& fiber : block.fibers) {
    fiber.state = State::kReady;
  }
  block.at_barrier = 0;
  races::pass_barrier();
}

unsigned char* stacks(size_t count) {
  static unsigned char* memory = nullptr;
  static size_t mapped = 0;
  const size_t bytes = count * (kGuard + kStack);
  if (bytes > mapped) {
    if (memory != nullptr) munmap(memory, mapped);
    void* fresh = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fresh == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a block");
    memory = static_cast<unsigned char*>(fresh);
    mapped = bytes;
    for (size_t i = 0; i < count; ++i) {
      mprotect(memory + i * (kGuard + kStack), kGuard, PROT_NONE);
    }
  }
  races::ignore(memory, mapped);
  return memory;
}

void start_fibers() {
  const int count = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  unsigned char* memory = stacks(count);
  block.fibers.assign(count, {});
  block.at_barrier = block.done = 0;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = block.fibers[i];
    unsigned char* bottom = memory + i * (kGuard + kStack) + kGuard;
    // A fiber that ended left its redzones behind.
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(bottom, kStack);
    void** top = reinterpret_cast<void**>(bottom + kStack) - 1;
    *top = nullptr;  // the return address of enter_fiber, which never returns; aligned as by a call
    *--top = reinterpret_cast<void*>(&enter_fiber);
    top -= 6;
    std::fill_n(top, 6, nullptr);
    fiber.stack_top = top;
    const unsigned x = blockDim.x, y = blockDim.y;
    fiber.index = {i % x, i / x % y, i / (x * y)};
    fiber.number = i;
    fiber.state = State::kReady;
    fiber.groups.resize(1);
  }
}

void check_finished() {
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state != State::kDone && complaint.empty()) {
      const char* at = fiber.state == State::kAtBarrier ? "a barrier" : "an operation of its warp";
      complaint = std::string("deadlock: waits for ever at ") + at + ": " + where(fiber);
    }
  }
  if (!complaint.empty()) throw std::runtime_error(complaint);
}

void run_block(size_t shared_bytes) {
  std::memset(shared.get(), 0xff, shared_bytes);
  start_fibers();
  races::enter_block();
  for (bool any = true; any && complaint.empty();) {
    any = false;
    for (Fiber& fiber : block.fibers) {
      if (fiber.state != State::kReady || !complaint.empty()) continue;
      any = true;
      current = &fiber;
      threadIdx = fiber.index;
      races::resume(fiber.number);
      emulation_switch(&scheduler_stack, fiber.stack_top);
      current = nullptr;
    }
  }
  races::resume(-1);
  check_finished();
}

}  // namespace

void launch(const std::function<void()>& thread, Dim3 grid, Dim3 threads, size_t shared_bytes) {
  const size_t count = size_t{threads.x} * threads.y * threads.z;
  if (count == 0 || count > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > kSharedLimit) {
    throw std::runtime_error("launch configuration that no GPU accepts");
  }
  kernel = &thread;
  complaint.clear();
  gridDim = {grid.x, grid.y, grid.z};
  blockDim = {threads.x, threads.y, threads.z};
  // Exactly as large as asked for, so that AddressSanitizer guards its end.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<size_t>(shared_bytes, 1)) != 0) throw std::bad_alloc();
  shared.reset(static_cast<unsigned char*>(memory));
  races::enter_launch();
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(shared_bytes);
}

void fail(const char* text) {
  complaint = std::string(text) + ": " + where(*current);
  give_way();
  std::abort();  // a failed fiber never goes on
}

void barrier(int line) {
  current->line = line;
  if (block.done > 0) fail("barrier after threads of the block have exited");
  for (const Fiber& other : block.fibers) {
    if (other.state == State::kAtBarrier && other.line != line) {
      fail("threads of a block wait at different barriers");
    }
  }
  current->state = State::kAtBarrier;
  if (++block.at_barrier == static_cast<int>(block.fibers.size())) {
    release_barrier();
  } else {
    give_way();
  }
}

void collective(Collective run, void* operands, unsigned mask, int line, bool orders_memory) {
  Fiber* warp = current - lane();
  const int lanes = std::min<int>(kWarp, block.fibers.data() + block.fibers.size() - warp);
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  current->line = line;
  if (!(mask >> lane() & 1)) fail("lane is not in the mask of its own operation");
  current->state = State::kInWarp;
  current->mask = mask;
  current->run = run;
  current->operands = operands;
  void* all[kWarp] = {};
  for (int i = 0; i < lanes; ++i) {
    if (!(mask >> i & 1)) continue;
    if (warp[i].state != State::kInWarp) return give_way();
    all[i] = warp[i].operands;
  }
  for (int i = 0; i < lanes; ++i) {
    if (!(mask >> i & 1)) continue;
    if (warp[i].mask != mask || warp[i].run != run || warp[i].line != line) {
      fail("lanes of a mask wait at different operations");
    }
    warp[i].state = State::kReady;
  }
  run(all, mask);
  if (orders_memory && mask == ~0u) races::pass_warp_barrier(current->number / kWarp);
}

int lane() { return current->number % kWarp; }

unsigned char* dynamic_shared() { return shared.get(); }

void queue_copy(Copy copy) {
  const auto addresses =
      reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from);
  if (addresses % 16) fail("asynchronous copy of 16 bytes, address not a multiple of 16");
  current->groups.back().push_back(copy);
}

void commit_copies() { current->groups.emplace_back(); }

std::vector<Copy> due_copies(int groups_left) {
  std::vector<std::vector<Copy>>& groups = current->groups;
  std::vector<Copy> due;
  while (static_cast<int>(groups.size()) - 1 > groups_left) {
    due.insert(due.end(), groups.front().begin(), groups.front().end());
    groups.erase(groups.begin());
  }
  return due;
}

}  // namespace emulation
