// Where an element lies in shared memory: what TMA writes, and how wgmma, ldmatrix and stmatrix find
// it again. Pure functions, tested on the host by tests/smem_layout_check.cpp.
//
// Every tile is made of boxes whose rows are 128 bytes (64 elements) long, written by TMA with the
// 128-byte swizzle: the 16-byte unit of a row is exchanged with the row's number modulo 8. Boxes
// begin at multiples of 1024 bytes, so that the address bits that the hardware uses are those of the
// offset in the box.
//
//   K-major    a row of the box is a row of the (n, k) matrix:  64 k of one n
//   N-major    a row of the box is a row of the (k, n) matrix:  64 n of one k
#pragma once

#include <cstdint>

#include "tile_walk.h"

namespace loradrop {

constexpr int kRowBytes = 128;
constexpr int kAtomBytes = 8 * kRowBytes;                // the swizzle repeats after eight rows
constexpr int kBoxN = 64;                                // columns of an N-major box
constexpr int kBoxBytes = kChunk * kRowBytes;            // bytes of an N-major box, or of 64 rows
constexpr int kStepK = 16;                               // k of one wgmma or mma

enum class Major { kK, kN };

// The offset of the 16-byte unit `unit` in row `row` of a box.
LORADROP_FN std::uint32_t unit_offset(std::uint32_t row, std::uint32_t unit) {
  return row * kRowBytes + ((unit ^ (row & 7u)) << 4);
}

// The offset of one element of two bytes.
LORADROP_FN std::uint32_t element_offset(std::uint32_t row, std::uint32_t column) {
  return unit_offset(row, column / 8) + column % 8 * 2;
}

// Where the share of one CTA begins in the cluster's tile of q or l. In both layouts 64 columns are
// one box of 8 KiB or 64 rows of 128 bytes, so the formula is the same.
LORADROP_FN std::uint32_t share_offset(int first_column) {
  return static_cast<std::uint32_t>(first_column) * kRowBytes;
}

// The matrix descriptor of wgmma (PTX ISA, "Matrix descriptor"): address, leading and stride byte
// offset in units of 16 bytes, and the swizzle mode, 1 for 128 bytes.
//
//   K-major    stride: from eight rows to the next eight; leading: not used with a swizzle
//   N-major    stride: from eight k to the next eight; leading: from 64 n to the next box
LORADROP_FN std::uint64_t descriptor(std::uint32_t address, Major major) {
  const std::uint64_t leading = major == Major::kN ? kBoxBytes : 16;
  return static_cast<std::uint64_t>((address & 0x3FFFFu) >> 4) | (leading >> 4) << 16 |
         static_cast<std::uint64_t>(kAtomBytes >> 4) << 32 | std::uint64_t{1} << 62;
}

// The descriptor of the k of step `step`: along the row, or sixteen rows down. Shared memory ends
// below 2^18, so the address never carries into the next field.
LORADROP_FN std::uint64_t advanced(std::uint64_t descriptor, Major major, int step) {
  const int bytes = step * (major == Major::kK ? kStepK * 2 : kStepK * kRowBytes);
  return descriptor + static_cast<std::uint64_t>(bytes >> 4);
}

// The accumulator of wgmma.m64nNk16: thread `lane` of warp `warp` holds, in register 4·j + i, row
// 16·warp + lane/4 + 8·(i/2) and column 8·j + 2·(lane % 4) + i % 2. stmatrix.x4 stores registers
// 8·j to 8·j + 7, packed in pairs, as four 8 x 8 matrices: upper and lower rows of two column
// groups. This is the row address that it takes from each lane, in a box of 64 rows.
LORADROP_FN std::uint32_t staging_offset(int warp, int lane, int pair) {
  const int matrix = lane / 8;
  return unit_offset(16 * warp + 8 * (matrix & 1) + lane % 8, 2 * pair + (matrix >> 1));
}

// ldmatrix.x4 of a 16 x 16 block of a K-major box as the row operand of mma.m16n8k16: matrices in
// the order rows 0-7, rows 8-15, then the same for the upper eight k.
LORADROP_FN std::uint32_t row_operand_offset(int row, int step, int lane) {
  return unit_offset(row + lane % 16, 2 * step + lane / 16);
}

// ldmatrix.x2 of an 8 x 16 block as the column operand: lower eight k, then the upper eight.
LORADROP_FN std::uint32_t column_operand_offset(int row, int step, int lane) {
  return unit_offset(row + lane % 8, 2 * step + (lane / 8) % 2);
}

}  // namespace loradrop
