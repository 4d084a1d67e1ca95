// decode: y (m, n) = x (m, k)·Wᵀ + bias (n) + s·h Bᵀ with h (m, r) = x Aᵀ, for m <= 32, in one launch.
//
// Also h itself, rounded to the type of x, and Σ_t w_t ‖s·B·h_t‖² as one partial sum per CTA, which a
// second, tiny launch adds in their order. No float atomics: the same bits in every run.
//
// Plan. The time is that of reading W (n, k) once. Each CTA owns `rows` rows of W and streams them
// through a ring of shared memory, with the x that belongs to each chunk of 128 k. mma.m16n8k16 has
// W as its row operand and eight tokens as its columns. h is shared work: a CTA of a cluster of c
// walks its own c-th of K first and multiplies it by A too. It leaves its partial h in shared memory
// and goes on with W. Two chunks later it sums an equal part of h over all CTAs of the cluster, in
// the order of their ranks, and writes it, rounded, to each of them. When W ends, h is there, and
// s·h Bᵀ is a few mma on a slab of B that was loaded at the start.
//
// Warps. Eight consumers: warp w takes the sixteen k of step w % 4 of each box of 64, and every
// second block of sixteen rows, beginning at w / 4. A ninth warp issues the loads.
//
// Shared memory, with t tokens (8, 16 or 32) and r rounded up to 16:
//   ring       stages · 2 · 128 · (rows + t): W and x of a chunk, in boxes of 64 k
//   A          slots · 2 · 128 · r: A of the first chunks. As many slots as stages, but a few of a
//              wide r, which would leave the ring little room for W and is idle after the c-th of K.
//              A's chunk comes when the one that had its slot is read, so it needs no barriers but
//              those of the ring.
//   B          rows · 128 · ceil(r / 64)
//   h          128 · t · ceil(r / 64)
//   partial h  4 · r · t       sums  4 · rows · t
//
// Why each barrier:
//   filled[s], emptied[s]   as in gemm_ext, within one CTA
//   b_filled    the slab of B has landed
//   partial     each CTA of the cluster has left its partial h
//   complete    each CTA of the cluster has written its part of h to this one. By then it has also
//               read this one's partial h, so this CTA may end without a cluster barrier.
//   cluster     at the start only: barriers exist before a peer arrives at them. Not in a cluster of
//               one: a launch without clusters makes a barrier of the whole block of the wait, and
//               then consumers and producer would wait for each other.
//   named 1     the eight consumer warps, around what they share

#include "kernels.h"
#include "ptx.cuh"

namespace loradrop {
namespace {

constexpr int kConsumers = kConsumerWarps * 32;
constexpr int kThreads = kConsumers + 32;
constexpr int kMaxShared = 232448;
constexpr int kTilesPerWarp = kDecodeMaxRows / 32;  // blocks of 16 rows of W, and of A
constexpr int kMaxStages = 16;
constexpr int kWideRank = 64;    // from which A has
constexpr int kSlotsOfWide = 3;  // so many slots
constexpr int kExchangeDelay = 2;  // chunks of W between leaving a partial h and asking for others'

struct Layout {
  int rows, tokens, r16, boxes, stages, slots;

  LORADROP_FN Layout(int rows, int m, int r, int stages)
      : rows(rows), tokens(decode_tokens(m)), r16(decode_ranks(r)), boxes(ceil_div(r, kChunk)),
        stages(stages), slots(r16 < kWideRank ? stages : smaller(stages, kSlotsOfWide)) {}
  LORADROP_FN int half() const { return (rows + tokens) * kRowBytes; }
  LORADROP_FN int x() const { return rows * kRowBytes; }  // in a half
  LORADROP_FN int half_of_a() const { return r16 * kRowBytes; }
  LORADROP_FN int a() const { return stages * 2 * half(); }
  LORADROP_FN int b() const { return a() + slots * 2 * half_of_a(); }
  LORADROP_FN int h() const { return b() + boxes * rows * kRowBytes; }
  LORADROP_FN int partial() const { return h() + boxes * tokens * kRowBytes; }
  LORADROP_FN int sums() const { return partial() + r16 * tokens * 4; }
  LORADROP_FN int barriers() const { return sums() + rows * tokens * 4; }
  LORADROP_FN int bytes() const { return kAtomBytes + barriers() + (2 * stages + 3) * 8; }
};

struct Memory {
  Layout at;
  std::uint32_t base;
  std::uint8_t* generic;  // the same address, for ordinary loads and stores

  __device__ std::uint32_t half(int slot, int which) const {
    return base + (2 * slot + which) * at.half();
  }
  __device__ std::uint32_t half_of_a(int slot, int which) const {
    return base + at.a() + (2 * slot + which) * at.half_of_a();
  }
  __device__ std::uint32_t filled(int slot) const { return base + at.barriers() + 8 * slot; }
  __device__ std::uint32_t emptied(int slot) const { return filled(at.stages) + 8 * slot; }
  __device__ std::uint32_t b_filled() const { return emptied(at.stages); }
  __device__ std::uint32_t partial_left() const { return b_filled() + 8; }
  __device__ std::uint32_t h_complete() const { return b_filled() + 16; }
  __device__ float* partial() const { return reinterpret_cast<float*>(generic + at.partial()); }
  __device__ float* sums() const { return reinterpret_cast<float*>(generic + at.sums()); }
};

// Where the accumulator i of a lane lies in its block of sixteen rows and eight tokens.
__device__ inline int block_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
__device__ inline int block_token(int lane, int i) { return 2 * (lane % 4) + i % 2; }

__device__ void produce(const DecodeArguments& args, const Memory& memory, DecodeWalk walk) {
  const Layout& at = memory.at;
  const int row = blockIdx.x * at.rows, lag = at.stages - at.slots;
  const int steps = walk.own > at.slots ? larger(walk.chunks, walk.own + lag) : walk.chunks;
  const std::uint32_t always = 2 * at.half(), with_a = always + 2 * at.half_of_a();
  Ring ring;
  for (int step = 0; step < steps; ++step, ring.advance(at.stages)) {
    ptx::wait(memory.emptied(ring.slot), ring.emptied());  // chunk step - stages is read
    if (step < walk.chunks) {
      const std::uint32_t barrier = memory.filled(ring.slot);
      ptx::arrive_and_expect(barrier, step < walk.own ? with_a : always);
      for (int which = 0; which < 2; ++which) {
        const std::uint32_t to = memory.half(ring.slot, which);
        const int k = walk.chunk(step) * kDecodeChunk + which * kChunk;
        ptx::load(args.w, {to, barrier}, k, row);
        ptx::load(args.x, {to + at.x(), barrier}, k, 0);
      }
    }
    // A of the first slots at once, none until the ring is full, then each when its slot is read.
    const int of_a = step < at.slots ? step : step < at.stages ? walk.own : step - lag;
    if (of_a < walk.own) {
      for (int which = 0; which < 2; ++which) {
        ptx::load(args.a,
                  {memory.half_of_a(of_a % at.slots, which), memory.filled(of_a % at.stages)},
                  walk.chunk(of_a) * kDecodeChunk + which * kChunk, 0);
      }
    }
    if (step == 0) {  // after the first of W, which is waited for first
      ptx::arrive_and_expect(memory.b_filled(), at.boxes * at.rows * kRowBytes);
      for (int box = 0; box < at.boxes; ++box) {
        ptx::load(args.b, {memory.base + at.b() + box * at.rows * kRowBytes, memory.b_filled()},
                  box * kChunk, row);
      }
    }
  }
}

template <int Groups>
using Accumulators = float[kTilesPerWarp][Groups][4];

// acc += (rows of W or A)·(tokens), for this warp's sixteen k of a box and its blocks of rows.
template <class T, int Groups>
__device__ inline void multiply(Accumulators<Groups>& acc, const std::uint32_t (&tokens)[Groups][2],
                                std::uint32_t box, int rows, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < kTilesPerWarp; ++i) {
    const int row = 16 * (warp / 4 + 2 * i);
    if (row < rows) {
      std::uint32_t left[4];
      ptx::load_matrices(left, box + row_operand_offset(row, warp % 4, lane));
#pragma unroll
      for (int g = 0; g < Groups; ++g) ptx::mma<T>(acc[i][g], left, tokens[g]);
    }
  }
}

// to (rows, tokens) = the sum over the four warps that share blocks of rows, in a fixed order.
template <int Groups>
__device__ inline void add_up(float* to, const Accumulators<Groups>& acc, int rows, int warp,
                              int lane) {
  for (int turn = 0; turn < 4; ++turn) {
    if (warp % 4 == turn) {
#pragma unroll
      for (int i = 0; i < kTilesPerWarp; ++i) {
        const int row = 16 * (warp / 4 + 2 * i);
        if (row >= rows) continue;
#pragma unroll
        for (int g = 0; g < Groups; ++g) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float& sum =
                to[(row + block_row(lane, c)) * 8 * Groups + 8 * g + block_token(lane, c)];
            sum = turn == 0 ? acc[i][g][c] : sum + acc[i][g][c];
          }
        }
      }
    }
    ptx::sync_threads(1, kConsumers);
  }
}

// This CTA's part of h: summed over the cluster, rounded, and written to every CTA of it.
template <class T>
__device__ void exchange(const DecodeArguments& args, const Memory& memory, int rank, int cluster) {
  ptx::wait<true>(memory.partial_left(), 0);
  const Layout& at = memory.at;
  const int size = at.r16 * at.tokens, part = ceil_div(size, cluster);
  const int end = smaller(size, (rank + 1) * part);
  for (int e = rank * part + static_cast<int>(threadIdx.x); e < end; e += kConsumers) {
    float sum = 0.0f;
    for (int c = 0; c < cluster; ++c) {
      sum += ptx::load_peer(ptx::peer(memory.base + at.partial() + 4 * e, c));
    }
    const T value = ptx::round_to<T>(sum);
    const int j = e / at.tokens, token = e % at.tokens;
    const std::uint32_t offset =
        j / kChunk * at.tokens * kRowBytes + element_offset(token, j % kChunk);
    for (int c = 0; c < cluster; ++c) {
      ptx::store_peer(ptx::peer(memory.base + at.h() + offset, c),
                      *reinterpret_cast<const std::uint16_t*>(&value));
    }
    if (blockIdx.x < cluster && token < args.m && j < args.r) {  // one cluster tells the caller
      static_cast<T*>(args.h)[static_cast<long>(token) * args.r + j] = value;
    }
  }
  ptx::sync_threads(1, kConsumers);
  if (threadIdx.x < cluster) ptx::publish_peer(memory.h_complete(), threadIdx.x);
}

// y = sums + bias + s·h Bᵀ for this CTA's rows; returns this thread's part of Σ w ‖s·h Bᵀ‖².
template <class T, int Groups>
__device__ float finish(const DecodeArguments& args, const Memory& memory, int warp, int lane) {
  const Layout& at = memory.at;
  float squares = 0.0f;
  for (int block = warp; block < at.rows / 16 * Groups; block += kConsumerWarps) {
    const int row = 16 * (block / Groups), group = block % Groups;
    float delta[4] = {};
    for (int step = 0; step < at.r16 / kStepK; ++step) {
      const int box = step / 4;
      std::uint32_t left[4], right[2];
      ptx::load_matrices(left, memory.base + at.b() + box * at.rows * kRowBytes +
                                   row_operand_offset(row, step % 4, lane));
      ptx::load_matrices(right, memory.base + at.h() + box * at.tokens * kRowBytes +
                                    column_operand_offset(8 * group, step % 4, lane));
      ptx::mma<T>(delta, left, right);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int own = row + block_row(lane, c), n = blockIdx.x * at.rows + own;
      const int token = 8 * group + block_token(lane, c);
      if (n >= args.n || token >= args.m) continue;
      const float scaled = args.scale * delta[c];
      float value = memory.sums()[own * at.tokens + token] + scaled;
      if (args.bias != nullptr) value += ptx::widen(static_cast<const T*>(args.bias)[n]);
      static_cast<T*>(args.y)[static_cast<long>(token) * args.n + n] = ptx::round_to<T>(value);
      const float weight = args.weights == nullptr ? 1.0f : args.weights[token];
      if (weight > 0.0f) squares += weight * scaled * scaled;  // select: 0 times NaN is not 0
    }
  }
  return squares;
}

template <class T, int Groups>
__device__ void consume(const DecodeArguments& args, const Memory& memory, DecodeWalk walk,
                        int rank, int cluster) {
  const Layout& at = memory.at;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Accumulators<Groups> acc = {}, partial_h = {};
  Ring ring, ring_of_a;
  for (int step = 0;; ++step) {
    if (step == walk.own) {
      add_up<Groups>(memory.partial(), partial_h, at.r16, warp, lane);
      if (threadIdx.x < cluster) ptx::publish_peer(memory.partial_left(), threadIdx.x);
    }
    if (step == smaller(walk.own + kExchangeDelay, walk.chunks)) {
      exchange<T>(args, memory, rank, cluster);
    }
    if (step == walk.chunks) break;
    ptx::wait(memory.filled(ring.slot), ring.filled());
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const std::uint32_t half = memory.half(ring.slot, which);
      std::uint32_t tokens[Groups][2];
#pragma unroll
      for (int g = 0; g < Groups; ++g) {
        ptx::load_matrices(tokens[g], half + at.x() + column_operand_offset(8 * g, warp % 4, lane));
      }
      multiply<T, Groups>(acc, tokens, half, at.rows, warp, lane);
      if (step < walk.own) {
        const std::uint32_t a = memory.half_of_a(ring_of_a.slot, which);
        multiply<T, Groups>(partial_h, tokens, a, at.r16, warp, lane);
      }
    }
    __syncwarp();
    if (lane == 0) ptx::arrive(memory.emptied(ring.slot));
    ring.advance(at.stages);
    ring_of_a.advance(at.slots);
  }
  add_up<Groups>(memory.sums(), acc, at.rows, warp, lane);
  ptx::wait(memory.b_filled(), 0);
  ptx::wait<true>(memory.h_complete(), 0);
  float squares = finish<T, Groups>(args, memory, warp, lane);
  if (args.planes == nullptr) return;
  for (int distance = 16; distance > 0; distance /= 2) {
    squares += __shfl_xor_sync(0xFFFFFFFFu, squares, distance);
  }
  if (lane == 0) memory.partial()[warp] = squares;  // free: the whole cluster has read it
  ptx::sync_threads(1, kConsumers);
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int w = 0; w < kConsumerWarps; ++w) sum += memory.partial()[w];
    args.planes[blockIdx.x] = sum;
  }
}

template <class T, int Groups>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeArguments args, int cluster) {
  extern __shared__ std::uint8_t raw[];
  const std::uint32_t skip = -ptx::shared(raw) & (kAtomBytes - 1u);
  const Memory memory{Layout(args.rows, args.m, args.r, args.stages), ptx::shared(raw) + skip,
                      raw + skip};
  const int rank = static_cast<int>(ptx::cluster_rank());
  const DecodeWalk walk = decode_walk(args.k, cluster, rank);
  if (threadIdx.x == 0) {
    ptx::prefetch(args.w);
    ptx::prefetch(args.x);
    ptx::prefetch(args.a);
    ptx::prefetch(args.b);
    for (int slot = 0; slot < args.stages; ++slot) {
      ptx::barrier_init(memory.filled(slot), 1);
      ptx::barrier_init(memory.emptied(slot), releases(1));
    }
    ptx::barrier_init(memory.b_filled(), 1);
    ptx::barrier_init(memory.partial_left(), cluster);
    ptx::barrier_init(memory.h_complete(), cluster);
    ptx::barrier_init_fence();
  }
  __syncthreads();
  if (cluster > 1) ptx::cluster_arrive_relaxed();
  if (threadIdx.x == kConsumers) produce(args, memory, walk);  // W need not wait for the others
  if (cluster > 1) ptx::cluster_wait();
  if (threadIdx.x < kConsumers) consume<T, Groups>(args, memory, walk, rank, cluster);
}

// The planes in their order, in float64.
__global__ void add_planes(const float* planes, int count, float* sqnorm) {
  __shared__ double part[256];
  double sum = 0.0;
  for (int i = threadIdx.x; i < count; i += 256) sum += planes[i];
  part[threadIdx.x] = sum;
  __syncthreads();
  for (int width = 128; width > 0; width /= 2) {
    if (threadIdx.x < width) part[threadIdx.x] += part[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x == 0) *sqnorm = static_cast<float>(part[0]);
}

// A launch of `ctas` CTAs. Its attribute is `size`, the size of a cluster.
cudaLaunchConfig_t configuration(int ctas, int cluster, int bytes, cudaLaunchAttribute* size) {
  size->id = cudaLaunchAttributeClusterDimension;
  size->val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.attrs = size;
  config.numAttrs = 1;
  return config;
}

template <class T, int Groups>
cudaError_t launch(const DecodeArguments& args, const DecodeLaunch& how, cudaStream_t stream) {
  const auto kernel = decode_kernel<T, Groups>;
  const int bytes = decode_shared_bytes(args.rows, args.m, args.r, args.stages);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute size = {};
  cudaLaunchConfig_t config = configuration(how.ctas, how.cluster, bytes, &size);
  config.stream = stream;
  if (how.cluster == 1) config.numAttrs = 0;
  error = cudaLaunchKernelEx(&config, kernel, args, how.cluster);
  if (error != cudaSuccess || args.planes == nullptr) return error;
  add_planes<<<1, 256, 0, stream>>>(args.planes, how.ctas, how.sqnorm);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const DecodeArguments& args, const DecodeLaunch& how, cudaStream_t stream) {
  const int tokens = decode_tokens(args.m);
  return tokens == 8    ? launch<T, 1>(args, how, stream)
         : tokens == 16 ? launch<T, 2>(args, how, stream)
                        : launch<T, 4>(args, how, stream);
}

}  // namespace

int decode_shared_bytes(int rows, int m, int r, int stages) {
  return Layout(rows, m, r, stages).bytes();
}

int decode_stages(int rows, int m, int r) {
  int stages = kMaxStages;
  while (Layout(rows, m, r, stages).bytes() > kMaxShared) --stages;
  return stages;
}

// Of any of the six kernels: with every ring that decode_stages gives, an SM holds one CTA.
cudaError_t decode_residents(int cluster, int* count) {
  const auto kernel = decode_kernel<__nv_bfloat16, 1>;
  *count = 0;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute size = {};
  const cudaLaunchConfig_t config = configuration(cluster, cluster, kMaxShared, &size);
  error = cudaOccupancyMaxActiveClusters(count, kernel, &config);
  if (error != cudaErrorInvalidClusterSize) return error;
  cudaGetLastError();  // no error of a later call: such clusters cannot be placed
  *count = 0;
  return cudaSuccess;
}

cudaError_t launch_decode(const DecodeArguments& args, const DecodeLaunch& how,
                          cudaStream_t stream) {
  return how.type == Type::kBFloat16 ? launch<__nv_bfloat16>(args, how, stream)
                                     : launch<__half>(args, how, stream);
}

}  // namespace loradrop
