// The instructions of Hopper that CUDA C++ has no name for, one function each.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#ifdef LORADROP_DEBUG
#include <cstdio>
#endif

namespace loradrop::ptx {

// Shared memory is addressed by 32-bit offsets in its own window.
__device__ inline std::uint32_t shared(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Clusters --------------------------------------------------------------------------------

__device__ inline std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The same offset in the shared memory of another CTA of the cluster.
__device__ inline std::uint32_t peer(std::uint32_t address, std::uint32_t rank) {
  std::uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Every thread of every CTA; not `.aligned`, since warps come here with their lanes apart.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

// Without a fence of all memory: where nothing but barriers was written, and barrier_init_fence called.
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

__device__ inline float load_peer(std::uint32_t address) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ inline void store_peer(std::uint32_t address, std::uint16_t value) {
  asm volatile("st.shared::cluster.u16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}

// ---- mbarriers -------------------------------------------------------------------------------

__device__ inline void barrier_init(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine and to the other CTAs of the cluster.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void arrive_and_expect(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ inline void arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Says that this warp has finished reading. Of no memory fence, which would cost more than a chunk:
// what was read, wgmma has already consumed.
__device__ inline void arrive_peer(std::uint32_t barrier, std::uint32_t rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(peer(barrier, rank))
               : "memory");
}

// Says that what this thread wrote, and what it knows of, may be read by the other CTA.
__device__ inline void publish_peer(std::uint32_t barrier, std::uint32_t rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   peer(barrier, rank))
               : "memory");
}

// `Cluster`: what the arriving threads of other CTAs wrote before is visible afterwards.
template <bool Cluster>
__device__ inline bool try_wait(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done;
  if constexpr (Cluster) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
  return done != 0;
}

#ifdef LORADROP_DEBUG
// A wait that lasts seconds is a deadlock: say where, and end the kernel.
__device__ __noinline__ inline void check_deadline(std::uint64_t start, std::uint32_t barrier,
                                            std::uint32_t parity) {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  if (now - start > 4'000'000'000ull) {
    printf("loradrop: block %d thread %d waits for parity %u of the barrier at %u: deadlock\n",
           static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x), parity, barrier);
    __trap();
  }
}
#endif

template <bool Cluster = false>
__device__ inline void wait(std::uint32_t barrier, std::uint32_t parity) {
#ifdef LORADROP_DEBUG
  std::uint64_t start;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  while (!try_wait<Cluster>(barrier, parity)) check_deadline(start, barrier, parity);
#else
  while (!try_wait<Cluster>(barrier, parity)) {
  }
#endif
}

// The threads of a group of warps only; barrier 0 is __syncthreads.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- The copy engine -------------------------------------------------------------------------

// Where a tensor map's box lands, and the barrier that counts its bytes; in other CTAs of a
// multicast, both are taken at the same offsets there.
struct Landing {
  std::uint32_t address, barrier;
};

__device__ inline void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ inline void load(const CUtensorMap& map, Landing to, int inner, int outer) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to.address),
      "l"(&map), "r"(inner), "r"(outer), "r"(to.barrier)
      : "memory");
}

__device__ inline void load_multicast(const CUtensorMap& map, Landing to, int inner, int outer,
                                      std::uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to.address),
      "l"(&map), "r"(inner), "r"(outer), "r"(to.barrier), "h"(ctas)
      : "memory");
}

__device__ inline void store(const CUtensorMap& map, std::uint32_t from, int inner, int outer) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
                   &map),
               "r"(inner), "r"(outer), "r"(from)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most `Pending` stores of this thread have still to read their shared memory.
template <int Pending>
__device__ inline void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// Ordinary writes to shared memory of this thread, before the copy engine reads them.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Ordinary accesses to global memory of this thread, and those of the copy engine, one after the other.
__device__ inline void fence_async_proxy_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Two numbers of two bytes, where other CTAs will read them.
__device__ inline void write_pair(void* to, std::uint32_t pair) {
  *static_cast<std::uint32_t*>(to) = pair;
}

// Says to all CTAs that what this thread and those it has met wrote may be read.
__device__ inline void publish(std::uint32_t* flag) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(1u) : "memory");
}

// Until another CTA has published.
__device__ inline void await(const std::uint32_t* flag) {
  std::uint32_t value;
#ifdef LORADROP_DEBUG
  std::uint64_t start;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
#endif
  while (true) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    if (value != 0) return;
#ifdef LORADROP_DEBUG
    check_deadline(start, 0, 0);
#endif
    __nanosleep(100);
  }
}

// Until the kernels that this one was launched to overlap have finished and their writes are
// visible. Returns at once in a launch without that attribute.
__device__ inline void wait_for_earlier_kernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---- Registers and matrices ------------------------------------------------------------------

template <int Count>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

template <int Count>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

__device__ inline void store_matrices(std::uint32_t address, const std::uint32_t (&value)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(value[0]), "r"(value[1]), "r"(value[2]), "r"(value[3])
               : "memory");
}

__device__ inline void load_matrices(std::uint32_t (&value)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
               : "r"(address)
               : "memory");
}

__device__ inline void load_matrices(std::uint32_t (&value)[2], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(value[0]), "=r"(value[1])
               : "r"(address)
               : "memory");
}

// c (16, 8) += a (16, 16)·b (16, 8), by one warp.
template <class T>
__device__ inline void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

#define LORADROP_MMA(T, NAME)                                                                    \
  template <>                                                                                    \
  __device__ inline void mma<T>(float (&c)[4], const std::uint32_t (&a)[4],                      \
                                const std::uint32_t (&b)[2]) {                                   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                          \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"          \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));            \
  }
LORADROP_MMA(__nv_bfloat16, "bf16")
LORADROP_MMA(__half, "f16")
#undef LORADROP_MMA

// ---- Numbers ---------------------------------------------------------------------------------

template <class T>
__device__ inline float widen(T value);
template <>
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
template <>
__device__ inline float widen(__half value) { return __half2float(value); }

template <class T>
__device__ inline T round_to(float value);
template <>
__device__ inline __nv_bfloat16 round_to(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ inline __half round_to(float value) { return __float2half_rn(value); }

// Two neighbours of a row, the lower column in the lower half.
template <class T>
__device__ inline float low_of(std::uint32_t pair) {
  const std::uint16_t bits = static_cast<std::uint16_t>(pair);
  return widen(*reinterpret_cast<const T*>(&bits));
}

template <class T>
__device__ inline float high_of(std::uint32_t pair) {
  return low_of<T>(pair >> 16);
}

template <class T>
__device__ inline std::uint32_t pack(float low, float high) {
  const T pair[2] = {round_to<T>(low), round_to<T>(high)};
  return static_cast<std::uint32_t>(*reinterpret_cast<const std::uint16_t*>(&pair[0])) |
         static_cast<std::uint32_t>(*reinterpret_cast<const std::uint16_t*>(&pair[1])) << 16;
}

}  // namespace loradrop::ptx
