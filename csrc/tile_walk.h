// Which tile, which chunk, which ring slot: every index of the kernels in this folder.
//
// Pure functions of plain integers, compiled by nvcc for the device and by any C++17 compiler for
// tests/tile_walk_check.cpp, which drives them over awkward sizes against the definition. An index
// or a phase that is wrong is found there, on a machine without a GPU.
#pragma once

#ifdef __CUDACC__
#define LORADROP_FN __host__ __device__ constexpr
#else
#define LORADROP_FN constexpr
#endif

namespace loradrop {

// In 32 bits where both are: sizes end 1024 below 2^31 (bindings.cpp), so a + b does not overflow.
template <class A, class B>
LORADROP_FN int ceil_div(A a, B b) { return static_cast<int>((a + b - 1) / b); }
LORADROP_FN int smaller(int a, int b) { return a < b ? a : b; }

// ---- gemm_ext: out (m, n) = p (m, k)·q (k, n) + s·h (m, r)·l (r, n) ---------------------------

constexpr int kTileM = 128;         // rows of a CTA's tile: 64 for each of two consumer warpgroups
constexpr int kChunk = 64;          // of k or r: 128 bytes, one row of the 128-byte swizzle
constexpr int kGroup = 16;          // rows of tiles that are walked together, to meet again in L2
constexpr int kConsumerWarps = 8;
constexpr int kMaxCluster = 2;

struct Gemm {
  int m, n, k, r;
  int tile_n;   // 128 or 256
  int cluster;  // CTAs that share a tile of q: 1 or 2, one above the other
};

struct Tile {
  int m, n;  // its first row and column
};

struct Chunk {
  bool thin;  // of (h, l) rather than of (p, q)
  int k;      // its first column in p or h
};

struct Share {
  int first, count;  // columns of the tile of q or l that one CTA loads for the whole cluster
};

// Tiles are counted in those of a cluster, (128·cluster) x tile_n.
LORADROP_FN int tile_rows(const Gemm& g) { return ceil_div(g.m, kTileM * g.cluster); }
LORADROP_FN int tile_columns(const Gemm& g) { return ceil_div(g.n, g.tile_n); }
LORADROP_FN long tiles(const Gemm& g) { return static_cast<long>(tile_rows(g)) * tile_columns(g); }

// Kernels count them in 32 bits, in which divisions are short.
constexpr long kMaxTiles = 1L << 30;

// Cluster c of `clusters` takes the tiles c, c + clusters, ... A tile past the edge of the matrix
// can only be the lower one of a pair; its loads are zeros and its stores are clipped.
LORADROP_FN Tile tile(const Gemm& g, int index, int rank) {
  const int group = kGroup / g.cluster, per_group = group * tile_columns(g);
  const int first = index / per_group * group;
  const int rows = smaller(group, tile_rows(g) - first);
  const int within = index % per_group;
  return {((first + within % rows) * g.cluster + rank) * kTileM, within / rows * g.tile_n};
}

LORADROP_FN int wide_chunks(const Gemm& g) { return ceil_div(g.k, kChunk); }
LORADROP_FN int thin_chunks(const Gemm& g) { return ceil_div(g.r, kChunk); }
LORADROP_FN int chunks(const Gemm& g) { return wide_chunks(g) + thin_chunks(g); }

// The delta is nothing but the last chunks of every tile.
LORADROP_FN Chunk chunk(const Gemm& g, int index) {
  const int wide = wide_chunks(g);
  return index < wide ? Chunk{false, index * kChunk} : Chunk{true, (index - wide) * kChunk};
}

LORADROP_FN Share share(const Gemm& g, int rank) {
  const int count = g.tile_n / g.cluster;
  return {rank * count, count};
}

// ---- The ring: slots that a producer fills and consumers empty, in the same order --------------

// Every slot has two mbarriers. Round by round, each completes one phase; a wait names the parity of
// the phase whose completion it needs. Consumers wait for this round's fill, the producer for the
// release of the round before, which in round 0 has parity 1 and counts as complete.
struct Ring {
  int slot = 0;
  unsigned round = 0;  // its parity

  LORADROP_FN unsigned filled() const { return round; }
  LORADROP_FN unsigned emptied() const { return round ^ 1u; }
  LORADROP_FN void advance(int slots) {
    if (++slot == slots) {
      slot = 0;
      round ^= 1u;
    }
  }
};

// A slot is free for a multicast when the consumers of every CTA that receives it have let go.
LORADROP_FN int releases(int cluster) { return cluster * kConsumerWarps; }

// The time of g, but for a factor: its waves, times the columns of a tile. Those of a tile of 128
// count 6 % more, since it loads as much of p for half the work.
constexpr long gemm_time(const Gemm& g, int sms) {
  const int clusters = sms < g.cluster ? 1 : sms / g.cluster;
  return static_cast<long>(ceil_div(tiles(g), clusters)) * g.tile_n * (g.tile_n == 128 ? 106 : 100);
}

// g with the tile_n and the cluster that take least time, where they are left open (0). A pair that
// takes as long as single CTAs do is better: it halves the traffic of q.
constexpr Gemm cut(const Gemm& g, int sms) {
  Gemm best = {};
  for (int tile_n = 256; tile_n >= 128; tile_n /= 2) {
    for (int cluster = 2; cluster >= 1; --cluster) {
      if (g.tile_n != 0 && g.tile_n != tile_n) continue;
      if (g.cluster != 0 ? g.cluster != cluster : cluster == 2 && g.m <= kTileM) continue;
      const Gemm now = {g.m, g.n, g.k, g.r, tile_n, cluster};
      if (best.cluster == 0 || gemm_time(now, sms) < gemm_time(best, sms)) best = now;
    }
  }
  return best;
}

// ---- decode: a slab of rows of W per CTA, and 1/cluster of h -----------------------------------

constexpr int kDecodeChunk = 128;  // of K: two boxes of 64
constexpr int kDecodeMaxRows = 128;

// Rows of W that a CTA keeps, where `slots` CTAs run at once: as few waves as possible, all as high.
LORADROP_FN int decode_rows(int n, int slots) {
  const long waves = ceil_div(n, static_cast<long>(kDecodeMaxRows) * slots);
  return 16 * ceil_div(n, 16 * waves * slots);
}

// The mma works on eight columns of tokens and sixteen rows of A at a time.
LORADROP_FN int decode_tokens(int m) { return m <= 8 ? 8 : m <= 16 ? 16 : 32; }
LORADROP_FN int decode_ranks(int r) { return 16 * ceil_div(r, 16); }

// The grid: whole clusters, so that the last CTAs may have no row of W but do their part of h.
LORADROP_FN int decode_ctas(int n, int rows, int cluster) {
  return ceil_div(n, static_cast<long>(rows) * cluster) * cluster;
}

// How many clusters of 1, 2, 4 and 8 CTAs a device holds at once. A cluster lies within a GPC, and
// GPCs differ in their SMs, so clusters of 8 may fill fewer of them than clusters of 2 do.
struct Occupancy {
  int clusters[4];

  constexpr int of(int cluster) const {
    return clusters[cluster == 8 ? 3 : cluster == 4 ? 2 : cluster == 2 ? 1 : 0];
  }
};

struct DecodePlan {
  int rows, cluster, ctas;  // no CTA: the device holds no such cluster
};

// The rows of W and of A that one SM streams, wave after wave.
constexpr int decode_load(const DecodePlan& plan, int r, const Occupancy& occupancy) {
  const int waves = ceil_div(plan.ctas, plan.cluster * occupancy.of(plan.cluster));
  return waves * (plan.rows + decode_ranks(r) / plan.cluster);
}

// The plan for clusters of `cluster`. For 0 that of 8, 4 or 2 whose SMs have least to stream: 8 share
// the work on h among most, smaller ones may reach more SMs, and so save a wave or a block of rows.
constexpr DecodePlan decode_plan(int n, int r, const Occupancy& occupancy, int cluster) {
  DecodePlan best = {};
  for (int size = 8; size >= 1; size /= 2) {
    const int slots = size * occupancy.of(size);
    if (slots == 0 || (cluster == 0 ? size == 1 : size != cluster)) continue;
    const int rows = decode_rows(n, slots);
    const DecodePlan plan = {rows, size, decode_ctas(n, rows, size)};
    if (best.ctas == 0 || decode_load(plan, r, occupancy) < decode_load(best, r, occupancy)) {
      best = plan;
    }
  }
  return best;
}

// A CTA walks all chunks of K once, from the first one of its own share and around. So its part of h
// is complete early, and the exchange of h passes while W streams.
struct DecodeWalk {
  int first;  // the chunk of step 0
  int own;    // steps 0 to own − 1 contribute to h
  int chunks;

  LORADROP_FN int chunk(int step) const {
    return first + step < chunks ? first + step : first + step - chunks;
  }
};

LORADROP_FN DecodeWalk decode_walk(int k, int cluster, int rank) {
  const int chunks = ceil_div(k, kDecodeChunk);
  const int share = ceil_div(chunks, cluster);
  const int first = smaller(rank * share, chunks);
  return {first == chunks ? 0 : first, smaller(share, chunks - first), chunks};
}

}  // namespace loradrop
