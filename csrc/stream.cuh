// Making h beside the product that will use it: h (m, r) = scale·p (m, k)·a (k, r).
//
// Reading p once more takes the whole machine a quarter of the time that the product takes, but it
// takes memory, not matrix units; and the last wave of tiles leaves a few SMs without work. So the
// first clusters of gemm_ext's grid stream p through shared memory, all the way along k for 128 rows
// at a time, and say so row block by row block. The others begin with their tiles at once, and wait
// only before the thin chunks at a tile's end. The streaming CTAs wait for nobody and have the lowest
// numbers, so they run before those that wait for them.
//
// One thread loads: 128 x 64 of p and 64 of k of a, into as many slots as there is room for. Two
// warpgroups own 64 rows each and all ranks, by wgmma m64nNk16.
#pragma once

#include "kernels.h"
#include "wgmma.cuh"

namespace loradrop {

// Where the slots of a streaming CTA lie, in the memory that gemm_ext has anyway.
struct StreamMemory {
  std::uint32_t base;
  StreamSlots slots;

  __device__ std::uint32_t p(int slot) const { return base + slot * slots.bytes; }
  __device__ std::uint32_t a(int slot) const { return p(slot) + kTileM * kRowBytes; }
  __device__ std::uint32_t filled(int slot) const { return p(slots.count) + 8 * slot; }
  __device__ std::uint32_t emptied(int slot) const { return filled(slots.count) + 8 * slot; }
};

__device__ inline void produce_h(const GemmArguments& args, StreamMemory memory, RowBlocks blocks) {
  const int count = wide_chunks(args.shape), r = args.shape.r;
  Ring ring;
  for (int block = blocks.first; block < blocks.end; block += blocks.step) {
    for (int i = 0; i < count; ++i, ring.advance(memory.slots.count)) {
      const std::uint32_t barrier = memory.filled(ring.slot);
      ptx::wait(memory.emptied(ring.slot), ring.emptied());
      ptx::arrive_and_expect(barrier, memory.slots.bytes);
      ptx::load(args.p, {memory.p(ring.slot), barrier}, i * kChunk, block * kTileM);
      if (args.a_is_k_major) {
        ptx::load(args.a, {memory.a(ring.slot), barrier}, i * kChunk, 0);
      } else {
        for (int box = 0; box < ceil_div(r, kBoxN); ++box) {
          ptx::load(args.a, {memory.a(ring.slot) + box * kBoxBytes, barrier}, box * kBoxN,
                    i * kChunk);
        }
      }
    }
  }
}

// The rows of `block` that this warpgroup owns, and N ranks: all of k. In as many sums as there are
// registers for, which one step after another adds to: alone, each would wait for the one before.
template <class T, int N, Major AMajor>
__device__ inline void make_block(const GemmArguments& args, StreamMemory memory, Ring& ring,
                                  int block) {
  constexpr int kSteps = kChunk / kStepK, kSums = N <= 32 ? 2 : 1;
  const int thread = static_cast<int>(threadIdx.x) - kStreamFirstThread, lane = thread % 32;
  const int group = __shfl_sync(0xFFFFFFFFu, thread / 128, 0), count = wide_chunks(args.shape);
  float sums[kSums][N / 2];
  int before = -1;
  const auto let_go = [&] {
    if (before >= 0 && lane == 0) ptx::arrive(memory.emptied(before));
  };
#pragma unroll
  for (int i = 0; i < kSums; ++i) pin(sums[i]);
  for (int i = 0; i < count; ++i) {
    ptx::wait(memory.filled(ring.slot), ring.filled());
    const std::uint64_t left =
        descriptor(memory.p(ring.slot) + 64 * group * kRowBytes, Major::kK);
    const std::uint64_t right = descriptor(memory.a(ring.slot), AMajor);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma<T, AMajor == Major::kN>(sums[step % kSums], advanced(left, Major::kK, step),
                                    advanced(right, AMajor, step), i > 0 || step >= kSums);
    }
    wgmma_commit();
    wgmma_wait<1>();
    let_go();
    before = ring.slot;
    ring.advance(memory.slots.count);
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kSums; ++i) pin(sums[i]);
  let_go();
  float(&acc)[N / 2] = sums[0];
#pragma unroll
  for (int i = 1; i < kSums; ++i) {
#pragma unroll
    for (int j = 0; j < N / 2; ++j) acc[j] += sums[i][j];
  }
  const int columns = 8 * ceil_div(args.shape.r, 8);
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const int column = 8 * j + 2 * (lane % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = block * kTileM + 16 * (thread / 32) + lane / 4 + 8 * half;
      if (column < columns && row < args.shape.m) {
        ptx::write_pair(static_cast<T*>(args.h_made) + row * args.h_stride + column,
                        ptx::pack<T>(args.h_scale * acc[4 * j + 2 * half],
                                     args.h_scale * acc[4 * j + 2 * half + 1]));
      }
    }
  }
  ptx::fence_async_proxy_global();  // the copy engine will read what ordinary stores have written
  ptx::sync_threads(1, kStreamThreads);
  if (thread == 0) ptx::publish(args.ready + block);
}

template <class T, Major AMajor>
__device__ inline void make_blocks(const GemmArguments& args, StreamMemory memory,
                                   RowBlocks blocks) {
  const int ranks = stream_ranks(args.shape.r);
  Ring ring;
  for (int block = blocks.first; block < blocks.end; block += blocks.step) {
    if (ranks == 16) {
      make_block<T, 16, AMajor>(args, memory, ring, block);
    } else if (ranks == 32) {
      make_block<T, 32, AMajor>(args, memory, ring, block);
    } else if (ranks == 64) {
      make_block<T, 64, AMajor>(args, memory, ring, block);
    } else {
      make_block<T, 128, AMajor>(args, memory, ring, block);
    }
  }
}

template <class T>
__device__ inline void consume_h(const GemmArguments& args, StreamMemory memory,
                                 RowBlocks blocks) {
  if (args.a_is_k_major != 0) {
    make_blocks<T, Major::kK>(args, memory, blocks);
  } else {
    make_blocks<T, Major::kN>(args, memory, blocks);
  }
}

}  // namespace loradrop
