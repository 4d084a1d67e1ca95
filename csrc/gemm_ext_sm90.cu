// gemm_ext: out (m, n) = p (m, k)·q (k, n) + bias (n) + s·h (m, r)·l (r, n), for Hopper.
//
//   forward    y  = x Wᵀ + b + s·h Bᵀ        p = x    q = Wᵀ   h = h    l = Bᵀ
//   backward   dx = dy W     + s·(dy B) A    p = dy   q = W    h = dyB  l = A
//
// bfloat16 or float16 in and out, float32 sums. Both q and l may lie either way round.
//
// Tile plan. A persistent CTA takes tiles of 128 x 256, or 128 x 128 where that takes less time, in
// the order of `tile_walk.h`. Per tile it walks ceil(k/64) chunks of (p, q) and then ceil(r/64) of
// (h, l) into the same accumulators: the delta is nothing but the last chunks. Boxes past an edge are
// filled with zeros by TMA, which also pads r to 64, and stores are clipped.
//
// Warps. Warpgroup 0 gives its registers away and one of its threads issues all loads. Warpgroups 1
// and 2 own 64 rows each: wgmma m64n256k16, 128 accumulators a thread. 128·40 + 256·232 = 64512
// registers of 65536.
//
// Clusters. Two CTAs one above the other need the same q: each loads half of it and multicasts it to
// both. That saves a third of the traffic from L2.
//
// Shared memory, bytes, 128 x 256 (128 x 128):
//   ring        4 · (16384 + 32768) = 196608    (6 · (16384 + 16384) = 196608)
//   staging     2 warpgroups · 2 · 8192 = 32768
//               kStageWhole: a ring of 3, and all of a tile in 2 warpgroups · 4 · 8192 = 65536, so
//               that a tile's stores drain under the next one; no device has timed it yet
//   barriers    2 · stages · 8, and up to 1023 to align the ring to the swizzle's 1024
//
// Why each barrier:
//   filled[s]   the bytes of slot s have landed. One arrival, by the CTA's own producer with the
//               number of bytes, those of the peer's multicast included; bytes that land before
//               that arrival are counted too, the phase cannot end without it.
//   emptied[s]  every consumer warp of every CTA of the cluster has finished reading slot s. The
//               peer's consumers are among them because this producer writes into the peer's slot.
//   named 1, 2  the warps of a warpgroup around its staging buffers: free to write; written.
//   cluster     at the start, barriers exist before a peer's bytes or arrivals reach them; at the
//               end, no CTA leaves while its peer may still write or arrive there.

#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "stream.cuh"
#include "wgmma.cuh"

namespace loradrop {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kThreads = 384;
constexpr int kGroupThreads = 128;
constexpr int kPBytes = kTileM * kRowBytes;
constexpr int kStagingBytes = 64 * kRowBytes;

constexpr bool kStageWhole = false;

constexpr int q_bytes(int tile_n) { return tile_n * kRowBytes; }
constexpr int slot_bytes(int tile_n) { return kPBytes + q_bytes(tile_n); }
constexpr int slots(int tile_n) { return tile_n == 128 ? 6 : kStageWhole ? 3 : 4; }
constexpr int buffers(int tile_n) { return kStageWhole ? tile_n / 64 : 2; }  // of a warpgroup
constexpr int shared_bytes(int tile_n) {
  return kAtomBytes + slots(tile_n) * (slot_bytes(tile_n) + 16) +
         2 * buffers(tile_n) * kStagingBytes;
}

template <int TileN>
struct Memory {
  static constexpr int kSlots = slots(TileN);
  std::uint32_t base;

  // The kernel's dynamic shared memory begins at the same address in every CTA of a cluster, so the
  // offsets of a multicast agree after this rounding too.
  __device__ explicit Memory(const void* raw)
      : base((ptx::shared(raw) + kAtomBytes - 1) & ~(kAtomBytes - 1u)) {}
  __device__ std::uint32_t p(int slot) const { return base + slot * slot_bytes(TileN); }
  __device__ std::uint32_t q(int slot) const { return p(slot) + kPBytes; }
  __device__ std::uint32_t staging(int buffer) const {
    return base + kSlots * slot_bytes(TileN) + buffer * kStagingBytes;
  }
  __device__ std::uint32_t filled(int slot) const {
    return staging(2 * buffers(TileN)) + 8 * slot;
  }
  __device__ std::uint32_t emptied(int slot) const { return filled(kSlots) + 8 * slot; }
};

// ---- The producer ----------------------------------------------------------------------------

// This CTA's share of a chunk of q or l (`right`), to all CTAs of the cluster.
__device__ inline void load_share(const CUtensorMap& right, Major major, std::uint32_t slot,
                                  std::uint32_t barrier, int column, Share share, int k,
                                  int cluster) {
  const std::uint16_t ctas = static_cast<std::uint16_t>((1 << cluster) - 1);
  const int step = major == Major::kK ? share.count : kBoxN;
  for (int c = share.first; c < share.first + share.count; c += step) {
    const ptx::Landing to{slot + share_offset(c), barrier};
    const int inner = major == Major::kK ? k : column + c;
    const int outer = major == Major::kK ? column + c : k;
    if (cluster > 1) {
      ptx::load_multicast(right, to, inner, outer, ctas);
    } else {
      ptx::load(right, to, inner, outer);
    }
  }
}

template <int TileN, Major QMajor>
__device__ void produce(const GemmArguments& args, Memory<TileN> memory, int rank) {
  const Gemm& shape = args.shape;
  const Share part = share(shape, rank);
  const Major l_major = args.l_is_k_major ? Major::kK : Major::kN;
  const int clusters = gridDim.x / shape.cluster - shape.streams, count = chunks(shape);
  bool early = true;  // the kernel that writes h may still run
  if (shape.r == 0) {
    ptx::wait_for_earlier_kernels();
    early = false;
  }
  Ring ring;
  const int last = static_cast<int>(tiles(shape));
  for (int index = blockIdx.x / shape.cluster - shape.streams; index < last; index += clusters) {
    const Tile at = tile(shape, index, rank);
    for (int i = 0; i < count; ++i, ring.advance(slots(TileN))) {
      const Chunk now = chunk(shape, i);
      if (now.thin && early) {
        // Also orders the stores: each comes after its tile's thin chunks, so none reaches memory
        // that an earlier kernel still reads.
        ptx::wait_for_earlier_kernels();
        early = false;
      }
      if (now.thin && now.k == 0 && shape.streams > 0 && at.m < shape.m) {
        ptx::await(args.ready + at.m / kTileM);
        ptx::fence_async_proxy_global();
      }
      const std::uint32_t barrier = memory.filled(ring.slot);
      ptx::wait(memory.emptied(ring.slot), ring.emptied());
      ptx::arrive_and_expect(barrier, slot_bytes(TileN));
      ptx::load(now.thin ? args.h : args.p, {memory.p(ring.slot), barrier}, now.k, at.m);
      load_share(now.thin ? args.l : args.q, now.thin ? l_major : QMajor, memory.q(ring.slot),
                 barrier, at.n, part, now.k, shape.cluster);
    }
  }
}

// ---- The consumers ---------------------------------------------------------------------------

// Each warp lets go of the slot, in every CTA whose producer writes into it here.
template <int TileN>
__device__ inline void release(Memory<TileN> memory, int slot, int cluster) {
  const int lane = threadIdx.x % 32;
  if (lane < cluster) ptx::arrive_peer(memory.emptied(slot), lane);
}

// acc += `Steps` times sixteen k of the chunk in `slot`.
template <class T, int TileN, Major RightMajor, int Steps>
__device__ inline void multiply_chunk(float (&acc)[TileN / 2], Memory<TileN> memory, int slot,
                                      std::uint32_t p_offset, bool add) {
  const std::uint64_t left = descriptor(memory.p(slot) + p_offset, Major::kK);
  const std::uint64_t right = descriptor(memory.q(slot), RightMajor);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Steps; ++step) {
    wgmma<T, RightMajor == Major::kN>(acc, advanced(left, Major::kK, step),
                                      advanced(right, RightMajor, step), add || step > 0);
  }
  wgmma_commit();
}

// acc += the next `count` chunks of the ring, at least one. One group of wgmma stays in flight, so a
// slot is let go one chunk late. The last chunk has `steps` times sixteen k, 1, 2 or 4, and
// `meanwhile` is done while it runs.
template <class T, int TileN, Major RightMajor, class Meanwhile>
__device__ inline void multiply(float (&acc)[TileN / 2], Memory<TileN> memory, Ring& ring,
                                int count, int steps, bool add, std::uint32_t p_offset, int cluster,
                                const Meanwhile& meanwhile) {
  constexpr int kSteps = kChunk / kStepK;
  int before = -1;
  const auto one_later = [&] {
    wgmma_wait<1>();
    if (before >= 0) release(memory, before, cluster);
    before = ring.slot;
    ring.advance(slots(TileN));
  };
  pin(acc);
  for (int i = 0; i < count - 1; ++i) {
    ptx::wait(memory.filled(ring.slot), ring.filled());
    multiply_chunk<T, TileN, RightMajor, kSteps>(acc, memory, ring.slot, p_offset, add || i > 0);
    one_later();
  }
  // Not in the loop: there the compiler would put fences between wgmmas that may be left out.
  ptx::wait(memory.filled(ring.slot), ring.filled());
  const bool more = add || count > 1;
  if (steps == 1) {
    multiply_chunk<T, TileN, RightMajor, 1>(acc, memory, ring.slot, p_offset, more);
  } else if (steps == 2) {
    multiply_chunk<T, TileN, RightMajor, 2>(acc, memory, ring.slot, p_offset, more);
  } else {
    multiply_chunk<T, TileN, RightMajor, kSteps>(acc, memory, ring.slot, p_offset, more);
  }
  one_later();
  meanwhile();
  wgmma_wait<0>();
  pin(acc);
  release(memory, before, cluster);
}

// A thread's accumulators lie in pairs of columns, one pair of every eight columns. So does its bias.
template <int TileN>
using Pairs = std::uint32_t[TileN / 8];

template <int TileN>
__device__ inline void load_bias(Pairs<TileN>& bias, const GemmArguments& args, int first) {
  const auto* from = static_cast<const std::uint32_t*>(args.bias) + first / 2 + threadIdx.x % 4;
  const int left = args.bias == nullptr ? 0 : args.shape.n - first;  // a multiple of 8
#pragma unroll
  for (int j = 0; j < TileN / 8; ++j) bias[j] = 8 * j < left ? from[4 * j] : 0u;
}

// out = scale·acc + bias, 64 columns at a time through the staging buffers; `Plain`: out = acc.
template <class T, int TileN, bool Plain>
__device__ inline void store_tile(const float (&acc)[TileN / 2], const Pairs<TileN>& bias,
                                  const GemmArguments& args, Memory<TileN> memory, Tile at,
                                  int group, float scale) {
  constexpr int kBlocks = TileN / 64, kBuffers = buffers(TileN);
  const int thread = threadIdx.x % kGroupThreads, warp = thread / 32, lane = thread % 32;
  const auto buffer_of = [&](int block) {
    return memory.staging(kBuffers * group + block % kBuffers);
  };
  const auto send = [&](int block) {
    ptx::store(args.out, buffer_of(block), at.n + 64 * block, at.m + 64 * group);
  };
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const std::uint32_t buffer = buffer_of(block);
    if (!kStageWhole || block == 0) {
      if (thread == 0) ptx::wait_stores_read<kStageWhole ? 0 : 1>();
      ptx::sync_threads(1 + group, kGroupThreads);
    }
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      std::uint32_t packed[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = 8 * block + 2 * pair + half;
        const float* sums = acc + 4 * j;
        if constexpr (Plain) {
          packed[2 * half] = ptx::pack<T>(sums[0], sums[1]);
          packed[2 * half + 1] = ptx::pack<T>(sums[2], sums[3]);
        } else {
          const float low = ptx::low_of<T>(bias[j]), high = ptx::high_of<T>(bias[j]);
          packed[2 * half] = ptx::pack<T>(fmaf(sums[0], scale, low), fmaf(sums[1], scale, high));
          packed[2 * half + 1] =
              ptx::pack<T>(fmaf(sums[2], scale, low), fmaf(sums[3], scale, high));
        }
      }
      ptx::store_matrices(buffer + staging_offset(warp, lane, pair), packed);
    }
    if (kStageWhole && block + 1 < kBlocks) continue;
    ptx::fence_async_proxy();
    ptx::sync_threads(1 + group, kGroupThreads);
    if (thread == 0) {
      for (int ready = kStageWhole ? 0 : block; ready <= block; ++ready) send(ready);
    }
  }
}

template <class T, int TileN, Major QMajor>
__device__ void consume(const GemmArguments& args, Memory<TileN> memory, int rank) {
  const Gemm& shape = args.shape;
  // From lane 0, so that the compiler knows it to be the same in a warp: descriptors that depend on it
  // are then built in uniform registers, where wgmma wants them.
  const int group = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kGroupThreads, 0) - 1;
  const int clusters = gridDim.x / shape.cluster - shape.streams;
  const std::uint32_t p_offset = 64 * group * kRowBytes;
  const int thin = thin_chunks(shape);
  // The thin chunks are more of the same, unless something has to change between: the scale of the
  // sums, or which way round the right factor lies.
  const float scale = thin > 0 ? args.scale : 1.0f;
  const bool turned = args.l_is_k_major != (QMajor == Major::kK);
  const int apart = thin > 0 && (turned || scale != 1.0f) ? thin : 0;
  const int steps = last_steps(shape);
  const int together = chunks(shape) - apart, last = static_cast<int>(tiles(shape));
  const bool plain = args.bias == nullptr && scale == 1.0f;
  Ring ring;
  for (int index = blockIdx.x / shape.cluster - shape.streams; index < last; index += clusters) {
    float acc[TileN / 2];
    Pairs<TileN> bias;
    Tile at;
    const auto prepare_store = [&] {
      at = tile(shape, index, rank);
      if (!plain) load_bias<TileN>(bias, args, at.n);
    };
    multiply<T, TileN, QMajor>(acc, memory, ring, together, apart == 0 ? steps : kChunk / kStepK, false,
                                p_offset, shape.cluster, [&] {
      if (apart == 0) prepare_store();
    });
    if (apart > 0) {
      // acc/s + h·l, times s in the end: h and l stay as they are, and none of them overflows.
      if (scale != 1.0f) {
        const float inverse = 1.0f / scale;
#pragma unroll
        for (int i = 0; i < TileN / 2; ++i) acc[i] *= inverse;
      }
      constexpr Major kOther = QMajor == Major::kK ? Major::kN : Major::kK;
      if (turned) {
        multiply<T, TileN, kOther>(acc, memory, ring, apart, steps, true, p_offset, shape.cluster,
                                   prepare_store);
      } else {
        multiply<T, TileN, QMajor>(acc, memory, ring, apart, steps, true, p_offset, shape.cluster,
                                   prepare_store);
      }
    }
    if (plain) {
      store_tile<T, TileN, true>(acc, bias, args, memory, at, group, scale);
    } else {
      store_tile<T, TileN, false>(acc, bias, args, memory, at, group, scale);
    }
  }
  if (threadIdx.x % kGroupThreads == 0) ptx::wait_stores_read<0>();
}

template <class T, int TileN, Major QMajor>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_ext_kernel(const __grid_constant__ GemmArguments args) {
  extern __shared__ std::uint8_t raw[];
  const Memory<TileN> memory(raw);
  const bool k_major = args.a_is_k_major != 0;
  const StreamMemory streamed{
      memory.base, stream_slots(args.shape.r, k_major, shared_bytes(TileN) - kAtomBytes)};
  const int rank = static_cast<int>(ptx::cluster_rank());
  const bool streams = static_cast<int>(blockIdx.x) < args.shape.streams * args.shape.cluster;
  const RowBlocks blocks = stream_blocks(args.shape, blockIdx.x);
  if (threadIdx.x == 0) {
    ptx::prefetch(args.p);
    if (streams) {
      ptx::prefetch(args.a);
      for (int slot = 0; slot < streamed.slots.count; ++slot) {
        ptx::barrier_init(streamed.filled(slot), 1);
        ptx::barrier_init(streamed.emptied(slot), releases(1));
      }
    } else {
      ptx::prefetch(args.q);
      if (args.shape.r > 0) {
        ptx::prefetch(args.h);
        ptx::prefetch(args.l);
      }
      ptx::prefetch(args.out);
      for (int slot = 0; slot < slots(TileN); ++slot) {
        ptx::barrier_init(memory.filled(slot), 1);
        ptx::barrier_init(memory.emptied(slot), releases(args.shape.cluster));
      }
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  if (threadIdx.x < kGroupThreads) {
    ptx::give_registers<40>();
    if (threadIdx.x == 0) {
      if (streams) {
        produce_h(args, streamed, blocks);
      } else {
        produce<TileN, QMajor>(args, memory, rank);
      }
    }
  } else {
    ptx::take_registers<232>();
    if (streams) {
      consume_h<T>(args, streamed, blocks);
    } else {
      consume<T, TileN, QMajor>(args, memory, rank);
    }
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// How many clusters of this kernel run at once: where others use the SMs too, fewer than these would
// hold, and a cluster that waits for another to end would double the time. Asked once a device.
template <auto Kernel>
cudaError_t resident_clusters(const cudaLaunchConfig_t& config, int cluster, int device,
                              int* count) {
  static std::atomic<int> known[kMaxCluster][kMaxDevices];
  std::atomic<int>& here = known[cluster - 1][device % kMaxDevices];
  *count = here.load();
  if (*count > 0) return cudaSuccess;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(count, Kernel, &config);
  if (error == cudaSuccess) here.store(*count);
  return error;
}

// What a launch in clusters needs: `config` points into `attributes`.
struct Launch {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  cudaError_t error;

  template <class Kernel>
  Launch(Kernel kernel, int cluster, int bytes) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.gridDim = dim3(cluster);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    config.attrs = attributes;
    config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;
};

template <class T, int TileN, Major QMajor>
cudaError_t launch(const GemmArguments& args, const GemmLaunch& how, cudaStream_t stream) {
  constexpr auto kernel = gemm_ext_kernel<T, TileN, QMajor>;
  const int cluster = args.shape.cluster;
  Launch launch(kernel, cluster, shared_bytes(TileN));
  auto& [attributes, config, error] = launch;
  if (error != cudaSuccess) return error;
  int clusters = 0;
  error = resident_clusters<kernel>(config, cluster, how.device, &clusters);
  if (error != cudaSuccess) return error;
  if (clusters <= args.shape.streams) return cudaErrorLaunchOutOfResources;
  config.stream = stream;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = how.overlap;
  const long wanted = tiles(args.shape) + args.shape.streams;
  config.gridDim = dim3(static_cast<unsigned>(std::min<long>(clusters, wanted)) * cluster);
  if (args.shape.streams > 0) {
    const std::size_t flags = sizeof(std::uint32_t) * row_blocks(args.shape);
    error = cudaMemsetAsync(args.ready, 0, flags, stream);
    if (error != cudaSuccess) return error;
  }
  config.attrs = attributes + (cluster > 1 ? 0 : 1);  // single CTAs are launched without clusters
  config.numAttrs = (cluster > 1 ? 1 : 0) + (how.overlap ? 1 : 0);
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <class T, int TileN>
cudaError_t launch(const GemmArguments& args, const GemmLaunch& how, cudaStream_t stream) {
  return how.q_major == Major::kK ? launch<T, TileN, Major::kK>(args, how, stream)
                                  : launch<T, TileN, Major::kN>(args, how, stream);
}

template <class T>
cudaError_t launch(const GemmArguments& args, const GemmLaunch& how, cudaStream_t stream) {
  return args.shape.tile_n == 256 ? launch<T, 256>(args, how, stream)
                                  : launch<T, 128>(args, how, stream);
}

}  // namespace

int gemm_shared_bytes(int tile_n) { return shared_bytes(tile_n); }

cudaError_t gemm_residents(int cluster, int device, int* count) {
  constexpr auto kernel = gemm_ext_kernel<__nv_bfloat16, 256, Major::kK>;
  Launch launch(kernel, cluster, shared_bytes(256));
  return launch.error != cudaSuccess ? launch.error
                                     : resident_clusters<kernel>(launch.config, cluster, device, count);
}

cudaError_t launch_gemm_ext(const GemmArguments& args, const GemmLaunch& how, cudaStream_t stream) {
  return how.type == Type::kBFloat16 ? launch<__nv_bfloat16>(args, how, stream)
                                     : launch<__half>(args, how, stream);
}

}  // namespace loradrop
