// Drives csrc/smem_layout.h on the host: what TMA writes is what wgmma, ldmatrix and the TMA store
// read. The hardware is modelled from the PTX ISA, independently of the formulas under test: the
// swizzle as a permutation of absolute addresses, the descriptor by its canonical layouts, fragments
// by their tables. Run by tests/test_tile_walk.py; says what is wrong and ends with 1.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "smem_layout.h"

using namespace loradrop;

#define CHECK(condition)                                                     \
  if (!(condition)) {                                                        \
    std::printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                            \
  }

// ---- The hardware ----------------------------------------------------------------------------

// 128-byte swizzle: address bits 4 to 6 are exchanged with their sum, modulo 2, with bits 7 to 9.
std::uint32_t swizzled(std::uint32_t address) {
  const std::uint32_t from = (address / 128) % 8, unit = (address / 16) % 8;
  return address - unit * 16 + (unit ^ from) * 16;
}

struct Memory {
  std::vector<int> element = std::vector<int>(232448 / 2, -1);

  int& at(std::uint32_t address) { return element.at(address / 2); }
};

// A box of `rows` rows of 64 elements; element (row, column) is `value(row, column)`.
template <class Value>
void tma_write(Memory& memory, std::uint32_t to, int rows, Value value) {
  CHECK(to % 1024 == 0);
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < 64; ++column) {
      int& place = memory.at(swizzled(to + row * 128 + column * 2));
      CHECK(place == -1);
      place = value(row, column);
    }
  }
}

// Element (n, k) of the operand of one wgmma, k < 16. In units of 16 bytes the canonical layouts with
// the 128-byte swizzle are ((8, n/8), 2) : ((8, stride), 1) for K-major, and for N-major, with eight
// elements of n to a unit, ((8, n/64), (8, k/8)) : ((1, leading), (8, stride)).
int wgmma_read(Memory& memory, std::uint64_t descriptor, bool k_major, int n, int k) {
  const auto field = [&](int first) {
    return static_cast<std::uint32_t>((descriptor >> first) & 0x3FFF) * 16;
  };
  CHECK(descriptor >> 62 == 1);
  CHECK((descriptor >> 49 & 7) == 0);
  const std::uint32_t start = field(0), leading = field(16), stride = field(32);
  const std::uint32_t offset =
      k_major ? n % 8 * 128 + n / 8 * stride + k * 2
              : n % 64 * 2 + n / 64 * leading + k % 8 * 128 + k / 8 * stride;
  return memory.at(swizzled(start + offset));
}

// ---- gemm_ext --------------------------------------------------------------------------------

int id(int n, int k) { return n * 64 + k; }

// As the producers of a cluster load a chunk of q: each its share, to the same place.
void check_right(Major major, int tile_n, int cluster, std::uint32_t base) {
  Memory memory;
  for (int rank = 0; rank < cluster; ++rank) {
    const Share part = share({1, 1, 1, 1, tile_n, cluster}, rank);
    const int step = major == Major::kK ? part.count : kBoxN;
    for (int c = part.first; c < part.first + part.count; c += step) {
      if (major == Major::kK) {
        tma_write(memory, base + share_offset(c), step,
                  [&](int row, int column) { return id(c + row, column); });
      } else {
        tma_write(memory, base + share_offset(c), 64,
                  [&](int row, int column) { return id(c + column, row); });
      }
    }
  }
  for (int step = 0; step < kChunk / kStepK; ++step) {
    const std::uint64_t right = advanced(descriptor(base, major), major, step);
    for (int n = 0; n < tile_n; ++n) {
      for (int k = 0; k < kStepK; ++k) {
        CHECK(wgmma_read(memory, right, major == Major::kK, n, k) == id(n, kStepK * step + k));
      }
    }
  }
}

void check_left(std::uint32_t base) {
  Memory memory;
  tma_write(memory, base, kTileM, id);
  for (int group = 0; group < 2; ++group) {
    for (int step = 0; step < kChunk / kStepK; ++step) {
      const std::uint64_t left =
          advanced(descriptor(base + 64 * group * kRowBytes, Major::kK), Major::kK, step);
      for (int m = 0; m < 64; ++m) {
        for (int k = 0; k < kStepK; ++k) {
          CHECK(wgmma_read(memory, left, true, m, k) == id(64 * group + m, kStepK * step + k));
        }
      }
    }
  }
}

// Accumulators through stmatrix into a staging buffer, and out by the TMA store.
void check_staging(std::uint32_t base) {
  Memory memory;
  for (int warp = 0; warp < 4; ++warp) {
    for (int pair = 0; pair < 4; ++pair) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        for (int lane = 0; lane < 32; ++lane) {
          // Register 2·half + (lower rows) of the packed four; it holds two accumulators.
          const int half = matrix / 2, lower = matrix % 2, j = 2 * pair + half;
          const int row = 16 * warp + lane / 4 + 8 * lower, column = 8 * j + 2 * (lane % 4);
          // stmatrix: row `lane / 4` of matrix `matrix` goes to the address of lane 8·matrix + row.
          const std::uint32_t address =
              base + staging_offset(warp, 8 * matrix + lane / 4, pair) + lane % 4 * 4;
          for (int i = 0; i < 2; ++i) {
            CHECK(memory.at(address + 2 * i) == -1);
            memory.at(address + 2 * i) = id(row, column + i);
          }
        }
      }
    }
  }
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) {
      CHECK(memory.at(swizzled(base + row * 128 + column * 2)) == id(row, column));
    }
  }
}

// ---- decode ----------------------------------------------------------------------------------

// ldmatrix gives lane t, of matrix i, row t / 4 and columns 2·(t % 4) and the next. mma.m16n8k16
// wants a0 to a3 = (rows t/4, t/4 + 8) x (k 2·(t % 4), the same + 8) and b0, b1 = (column t/4) x (k).
void check_mma_operands(std::uint32_t base) {
  Memory memory;
  tma_write(memory, base, 128, id);
  for (int row = 0; row < 128; row += 8) {
    for (int step = 0; step < kChunk / kStepK; ++step) {
      for (int t = 0; t < 32; ++t) {
        for (int i = 0; i < 2; ++i) {
          for (int matrix = 0; matrix < 4 && row % 16 == 0; ++matrix) {
            const int from = 8 * matrix + t / 4;
            const int got = memory.at(base + row_operand_offset(row, step, from) + t % 4 * 4 + 2 * i);
            const int k = kStepK * step + 8 * (matrix / 2) + 2 * (t % 4) + i;
            CHECK(got == id(row + t / 4 + 8 * (matrix % 2), k));
          }
          for (int matrix = 0; matrix < 2; ++matrix) {
            const int from = 8 * matrix + t / 4;
            const int got =
                memory.at(base + column_operand_offset(row, step, from) + t % 4 * 4 + 2 * i);
            CHECK(got == id(row + t / 4, kStepK * step + 8 * matrix + 2 * (t % 4) + i));
          }
        }
      }
    }
  }
  for (int row = 0; row < 128; ++row) {
    for (int column = 0; column < 64; ++column) {
      CHECK(memory.at(base + element_offset(row, column)) == id(row, column));
    }
  }
}

int main() {
  for (std::uint32_t base : {0u, 1024u, 3u * 49152u + 16384u}) {
    for (int tile_n : {128, 256}) {
      for (int cluster : {1, 2}) {
        check_right(Major::kK, tile_n, cluster, base);
        check_right(Major::kN, tile_n, cluster, base);
      }
    }
    check_left(base);
    check_staging(base);
    check_mma_operands(base);
  }
  return 0;
}
