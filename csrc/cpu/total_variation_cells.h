// The differences of neighbouring pixels that count, as rectangles of pixels.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace smi_fast {

// The offset of a pixel's neighbour.
struct Neighbour {
  int64_t down, right;
};

// The four kinds of difference: to the right, down, and along the two diagonals.
constexpr int kKinds = 4;
constexpr Neighbour kNeighbours[kKinds] = {{0, 1}, {1, 0}, {1, 1}, {1, -1}};

struct Rectangle {
  int64_t top, left, bottom, right;

  bool operator==(const Rectangle&) const = default;

  bool empty() const { return top >= bottom || left >= right; }

  // The pixels whose neighbour lies in this rectangle.
  Rectangle seen_from(const Neighbour& neighbour) const {
    return {top - neighbour.down, left - neighbour.right, bottom - neighbour.down,
            right - neighbour.right};
  }

  Rectangle within(const Rectangle& other) const {
    return {std::max(top, other.top), std::max(left, other.left), std::min(bottom, other.bottom),
            std::min(right, other.right)};
  }
};

// A plane of pixels, divided into cells. Those of the last row may be lower than the others.
struct Grid {
  int64_t height, width, cell_height, cell_width;
  // Stored, because divisions are slow.
  int64_t rows = (height + cell_height - 1) / cell_height, columns = width / cell_width;

  int64_t elements(const Neighbour& neighbour) const {
    return neighbour.down * width + neighbour.right;
  }
  Rectangle plane() const { return {0, 0, height, width}; }
  Rectangle cell(int64_t row, int64_t column) const {
    const int64_t top = row * cell_height, left = column * cell_width;
    return {top, left, std::min(top + cell_height, height), left + cell_width};
  }
  Rectangle cell(int64_t index) const { return cell(index / columns, index % columns); }
  // The pixels that have all four neighbours.
  Rectangle inside() const { return {0, 1, height - 1, width - 1}; }
};

// Kept cells of a grid.
struct Cells {
  const int64_t* indices;  // [count], the active cells of one task
  int64_t count;
  const uint8_t* is_active;  // [cells of the grid], 1 if active, else 0
};

// A pixel of a cell that isn't active may have its neighbour in the active cell `index`. Calls
// visit with rectangles that cover each such pixel once.
template <typename Visit>
inline void for_each_border(const Grid& grid, const Cells& cells, int64_t index,
                            const Neighbour& neighbour, const Visit& visit) {
  const int64_t row = index / grid.columns, column = index % grid.columns;
  const Rectangle looking = grid.cell(row, column).seen_from(neighbour);
  for (int64_t up = 0; up <= neighbour.down; ++up) {
    for (int64_t left = 0; left <= std::abs(neighbour.right); ++left) {
      const int64_t r = row - up * neighbour.down, c = column - left * neighbour.right;
      if (r < 0 || r >= grid.rows || c < 0 || c >= grid.columns) continue;
      if (cells.is_active[r * grid.columns + c]) continue;
      const Rectangle pixels = grid.cell(r, c).within(looking);
      if (!pixels.empty()) visit(pixels);
    }
  }
}

}  // namespace smi_fast
