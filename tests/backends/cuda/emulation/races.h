// Finds pairs of accesses by two GPU threads, one of them a write, that no barrier keeps in order,
// whatever order the fibers happened to run in.
//
// GCC's -fsanitize=thread inserts a call before every access to memory; these calls end here
// instead of in ThreadSanitizer, whose own rules know neither blocks nor warps. Accesses of one
// block are ordered by __syncthreads(), those of one warp by __syncwarp() too, those of two blocks
// by nothing but the end of the launch.
#pragma once

#include <cstddef>

namespace emulation::races {

void enter_launch();
void enter_block();
void resume(int thread);  // of the block; -1 outside of kernels, where nothing is checked
void pass_barrier();
void pass_warp_barrier(int warp);
void ignore(const void* memory, size_t bytes);  // stacks: a thread's own

}  // namespace emulation::races
