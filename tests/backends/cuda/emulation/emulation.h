// Runs CUDA kernels on the host, one fiber per GPU thread, so that sanitizers and float64
// references can judge them on a machine without a GPU.
//
// The headers of this directory stand in for the toolkit's of the same names: put it on the include
// path and compile a .cu as C++. Blocks run one after another and every fiber on one OS thread, so
// a run repeats exactly. A fiber gives way only where a CUDA thread has to wait: at a barrier or at
// an operation of its warp. What no GPU would do right ends the launch with a std::runtime_error.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#ifndef __x86_64__
#error "the switch between fibers is written for x86-64"
#endif

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kSharedLimit = 227 * 1024;  // of a block of sm_90 and sm_100

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// What the lanes of a warp do together, given the operands of each lane that the mask names.
using Collective = void (*)(void* const (&operands)[kWarp], unsigned mask);

// Runs one fiber per thread of the grid; shared memory starts as NaN in each block.
void launch(const std::function<void()>& thread, Dim3 grid, Dim3 block, size_t shared_bytes);

// Ends the launch with this complaint about the calling thread.
[[noreturn]] void fail(const char* complaint);

// __syncthreads() at a line of the source; threads that wait at different lines diverged.
void barrier(int line);

// The last lane of the mask to arrive runs the operation for all; `orders_memory` is __syncwarp().
void collective(Collective run, void* operands, unsigned mask, int line, bool orders_memory);

int lane();
unsigned char* dynamic_shared();

// Copies that a thread has started but not waited for. Data arrive at the wait for their group, the
// latest legal moment; code that the sanitizers see moves them.
struct Copy {
  void* to;
  const void* from;
};
void queue_copy(Copy copy);
void commit_copies();
std::vector<Copy> due_copies(int groups_left);

}  // namespace emulation
