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
LORADROP_FN int larger(int a, int b) { return a > b ? a : b; }

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
  int streams = 0;  // clusters that make h meanwhile; 0 where it is there already
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

// Where h is made meanwhile, lower groups: the first wave of tiles needs all rows of its groups.
LORADROP_FN int group_rows(const Gemm& g) { return g.streams > 0 ? kGroup / 2 : kGroup; }

// Cluster c of `clusters` takes the tiles c, c + clusters, ... A tile past the edge of the matrix
// can only be the lower one of a pair; its loads are zeros and its stores are clipped.
LORADROP_FN Tile tile(const Gemm& g, int index, int rank) {
  const int group = group_rows(g) / g.cluster, per_group = group * tile_columns(g);
  const int first = index / per_group * group;
  const int rows = smaller(group, tile_rows(g) - first);
  const int within = index % per_group;
  return {((first + within % rows) * g.cluster + rank) * kTileM, within / rows * g.tile_n};
}

LORADROP_FN int wide_chunks(const Gemm& g) { return ceil_div(g.k, kChunk); }
LORADROP_FN int thin_chunks(const Gemm& g) { return ceil_div(g.r, kChunk); }
LORADROP_FN int chunks(const Gemm& g) { return wide_chunks(g) + thin_chunks(g); }

// Of sixteen k, in the last chunk, 1, 2 or 4: what is beyond r, or beyond k, is zeros.
LORADROP_FN int last_steps(const Gemm& g) {
  const int of = g.r > 0 ? g.r : g.k, left = (of - 1) % kChunk + 1;
  return left <= 16 ? 1 : left <= 32 ? 2 : 4;
}

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

// ---- The making of h beside it (stream.cuh) ----------------------------------------------------

constexpr int kStreamMaxRank = 128;
constexpr int kStreamFirstThread = 128;  // the consumers' warps of gemm_ext
constexpr int kStreamThreads = 256;
constexpr int kStreamMaxSlots = 12;

// The row blocks that one streaming CTA makes.
struct RowBlocks {
  int first, end, step;
};

LORADROP_FN int row_blocks(const Gemm& g) { return ceil_div(g.m, kTileM); }

LORADROP_FN RowBlocks stream_blocks(const Gemm& g, int cta) {
  return {cta, row_blocks(g), g.streams * g.cluster};
}

struct StreamSlots {
  int count, bytes;
};

// The ranks of a tile of h: wgmma takes 16, 32, 64 or 128 here.
LORADROP_FN int stream_ranks(int r) { return r > 64 ? 128 : r > 32 ? 64 : r > 16 ? 32 : 16; }

// A slot has 128 x 64 of p, and 64 of k of a: rows of 128 bytes for the ranks, or 64 of k in boxes of
// 64 ranks. Beside each lie two barriers of 8 bytes.
LORADROP_FN StreamSlots stream_slots(int r, bool a_is_k_major, int shared_bytes) {
  const int ranks = a_is_k_major ? stream_ranks(r) : 64 * ceil_div(r, 64);
  const int bytes = (kTileM + ranks) * 128;
  return {smaller(kStreamMaxSlots, shared_bytes / (bytes + 16)), bytes};
}

// How long a CTA takes for 128 x 64 of p, in units of the chunk of 128 x 256 x 64 that another takes,
// 0.69 microseconds: measured on an H100 up to 32 ranks, beyond estimated.
constexpr double stream_time(int r, bool a_is_k_major) {
  const double more = a_is_k_major ? 0.0 : 0.06;
  return r <= 32 ? 0.26 + more : r <= 64 ? 0.34 + more : 0.6 + more;
}

// The clusters of `clusters` that the tiles can spare: the last wave is as long with them as without.
constexpr int spare_clusters(const Gemm& g, int clusters) {
  const int waves = ceil_div(tiles(g), clusters);
  return clusters - ceil_div(tiles(g), waves);
}

// How many clusters make h beside the tiles; 0 where it takes less to make it first, by all SMs, at
// 2.7 TB/s and 3 microseconds for one more launch. In the same units, for each chunk of k.
constexpr int streams(const Gemm& g, int clusters, bool a_is_k_major) {
  const int spare = spare_clusters(g, clusters);
  if (spare == 0 || g.r < 1 || g.r > kStreamMaxRank || g.cluster != 2) return 0;
  const int waves = ceil_div(tiles(g), clusters), made = smaller(2 * spare, row_blocks(g));
  const double tile = g.tile_n / 256.0, multiply = waves * tile;
  const double chunk = stream_time(g.r, a_is_k_major);
  const int first = smaller(kGroup / 2 * ceil_div(clusters - spare, kGroup / 4 * tile_columns(g)),
                            row_blocks(g));  // the row blocks of the first wave of tiles
  const double at_first = ceil_div(first, made) * chunk - tile;
  const double in_all = ceil_div(row_blocks(g), made) * chunk - multiply;
  const double waited = at_first > in_all ? at_first : in_all;
  const double beside = 0.013 * multiply + (waited > 0 ? waited : 0) + 3.0 / wide_chunks(g);
  const double before = row_blocks(g) * 0.009 + 4.5 / wide_chunks(g);
  return beside < before ? ceil_div(made, 2) : 0;
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
