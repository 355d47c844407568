// What csrc/cuda/ptx.cuh declares, for the host; fragments are laid out as in the PTX manual.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace smi_fast {

inline unsigned char* dynamic_shared() { return emulation::dynamic_shared(); }

inline void copy_async_16(void* to, const void* from) {
  emulation::queue_copy({to, from});
  *static_cast<uint4*>(to) = {~0u, ~0u, ~0u, ~0u};
}

inline void wait_for_copies() {
  emulation::commit_copies();
  for (const emulation::Copy& copy : emulation::due_copies(0)) {
    *static_cast<uint4*>(copy.to) = *static_cast<const uint4*>(copy.from);
  }
}

struct MatrixRow {
  uint16_t elements[8];
  unsigned received[4];
};

inline void exchange_rows(unsigned (&to)[4], const void* row, emulation::Collective run, int line) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("matrix row that isn't aligned");
  const uint4 bytes = *static_cast<const uint4*>(row);
  MatrixRow mine;
  std::memcpy(mine.elements, &bytes, sizeof bytes);
  emulation::collective(run, &mine, ~0u, line, false);
  std::memcpy(to, mine.received, sizeof to);
}

// Register m of lane 4 r + q holds (r, 2 q) and (r, 2 q + 1) of matrix m, or of its transpose.
template <bool TRANSPOSED>
void spread_matrices(void* const (&lanes)[emulation::kWarp], unsigned) {
  const auto element = [&](int matrix, int row, int column) -> unsigned {
    return static_cast<MatrixRow*>(lanes[8 * matrix + row])->elements[column];
  };
  for (int lane = 0; lane < emulation::kWarp; ++lane) {
    const int r = lane / 4, c = 2 * (lane % 4);
    for (int m = 0; m < 4; ++m) {
      const unsigned low = TRANSPOSED ? element(m, c, r) : element(m, r, c);
      const unsigned high = TRANSPOSED ? element(m, c + 1, r) : element(m, r, c + 1);
      static_cast<MatrixRow*>(lanes[lane])->received[m] = low | high << 16;
    }
  }
}

inline void load_matrices(unsigned (&to)[4], const void* row, int line = __builtin_LINE()) {
  exchange_rows(to, row, spread_matrices<false>, line);
}

inline void load_matrices_transposed(unsigned (&to)[4], const void* row,
                                     int line = __builtin_LINE()) {
  exchange_rows(to, row, spread_matrices<true>, line);
}

struct Fragments {
  unsigned a[4], b[2];
  float d[4];
};

template <typename T>
float half_of(unsigned pair, int high) {
  const T value{static_cast<uint16_t>(high ? pair >> 16 : pair)};
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else {
    return __bfloat162float(value);
  }
}

// m16n8k16: with r = lane / 4 and c = 2 (lane % 4), registers a hold rows r and r + 8 of columns c
// and c + 8, b rows c and c + 8 of column r, and d rows r and r + 8 of column c, each with its
// successor.
template <typename T>
void multiply_fragments(void* const (&lanes)[emulation::kWarp], unsigned) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < emulation::kWarp; ++lane) {
    const auto* own = static_cast<Fragments*>(lanes[lane]);
    const int r = lane / 4, c = 2 * (lane % 4);
    for (int high = 0; high < 2; ++high) {
      for (int i = 0; i < 4; ++i) {
        a[r + 8 * (i % 2)][c + 8 * (i / 2) + high] = half_of<T>(own->a[i], high);
      }
      for (int i = 0; i < 2; ++i) b[r][c + 8 * i + high] = half_of<T>(own->b[i], high);
    }
  }
  for (int lane = 0; lane < emulation::kWarp; ++lane) {
    auto* own = static_cast<Fragments*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      own->d[i] += sum;
    }
  }
}

template <typename T>
void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                  int line = __builtin_LINE()) {
  Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  emulation::collective(multiply_fragments<T>, &mine, ~0u, line, false);
  std::memcpy(d, mine.d, sizeof mine.d);
}

template <typename T>
unsigned pack(float low, float high) {
  const auto bits = [](float value) -> unsigned {
    if constexpr (std::is_same_v<T, __half>) {
      return __float2half_rn(value).bits;
    } else {
      return __float2bfloat16_rn(value).bits;
    }
  };
  return bits(low) | bits(high) << 16;
}

}  // namespace smi_fast
