// Runs the kernels of csrc/ on the host, from their own source: a stand-in for cuda.h, cuda_runtime.h,
// ptx.cuh and wgmma.cuh, with the instructions as the PTX ISA describes them.
//
// Every thread is a fiber, and one of them runs at a time, chosen at random; as many clusters run at
// once as the device has SMs for, those with the lowest numbers first. What is
// asynchronous on the device is an event here, which happens at some later time: the bytes of a TMA
// load (eight rows at a time, apart for each CTA of a multicast, the last thing of all at one
// barrier), an arrival at another CTA's barrier, the reads of a TMA store, the end of the kernel that
// writes h. A wgmma reads its operands when it is issued or only when it is waited for. So a missing
// wait shows as a wrong value, and a deadlock as one.
//
// Not modelled: the memory model (all writes are seen at once; of fences and scopes only that they
// are asked for), what a register holds, and time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <type_traits>
#include <vector>

#include "smem_layout.h"

#define CHECK(condition)                                                      \
  if (!(condition)) {                                                         \
    std::printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                             \
  }

// ---- The names of CUDA C++ ---------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};

inline dim3 threadIdx, blockIdx, gridDim;  // of the thread that runs

struct __nv_bfloat16 {
  std::uint16_t bits;
};
using __half = __nv_bfloat16;  // the kernels treat both alike, so one is enough

inline float to_float(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline std::uint16_t to_bits(float value) {  // to nearest, ties to even
  std::uint32_t wide;
  std::memcpy(&wide, &value, 4);
  if (value != value) return 0x7FC0;
  return static_cast<std::uint16_t>((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
}

struct CUtensorMap {
  std::uint16_t* pointer;
  long rows, columns, stride;
  int box_rows;
};

// ---- The machine -------------------------------------------------------------------------------

namespace emulator {

constexpr std::uint32_t kWindow = 1u << 24;  // between the shared memories of CTAs that run at once
constexpr std::uint32_t kFirst = 1040;       // dynamic shared memory begins at no round number
constexpr std::size_t kStack = 1 << 16;

struct Barrier {
  long expected = 0, pending = 0, bytes = 0, completed = 0;
  bool known = false;  // to the copy engine and to other CTAs
  bool slow = false;
  bool plain = false, published = false;  // by arrivals from the cluster

  void settle() {
    if (pending == 0 && bytes == 0) {
      pending = expected;
      ++completed;
    }
  }
};

struct Rendezvous {
  int arrived = 0;
  long generation = 0;
};

struct Cluster {
  Rendezvous barrier;
  int first, size;  // its CTAs, of those that run
};

struct Cta {
  std::vector<std::uint8_t> memory = std::vector<std::uint8_t>(kFirst + 232448, 0xFF);  // NaN
  std::map<std::uint32_t, Barrier> barriers;
  std::map<int, Rendezvous> named;
  int block = 0, alive = 0;
  int registers = 0;  // that no thread has
};

struct Warp {
  std::uint32_t words[2][32][8] = {};
  Rendezvous meeting;
};

struct Wgmma {
  float* d;
  int n;
  std::uint64_t a, b;
  bool add, n_major;
};

// Who may touch the accumulators: ordinary code, nobody, as the compiler knows, or wgmma.
enum class Sums { kOrdinary, kPinned, kFenced };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  Cta* cta = nullptr;
  Warp* warp = nullptr;
  Cluster* cluster = nullptr;
  int rank = 0;               // in the cluster
  int window = 0;             // of its shared memory
  int arrivals = 0;           // at barriers of the cluster, on their way
  std::vector<bool> stores;   // in their order: whether each has read its shared memory
  long cluster_phase = 0;
  bool done = false, unfenced = false, arrived = false;
  // Of what other CTAs wrote to global memory: whether it knows, and the copy engine with it.
  bool acquired = false, fenced = false;
  bool unfenced_global = false;  // whether the copy engine may not know what it wrote there itself
  std::deque<std::vector<Wgmma>> groups{1};  // the last one is not committed
  Sums sums = Sums::kOrdinary;
  std::function<bool()> ready;               // empty: it can run
};

struct Machine {
  std::mt19937 random{0};
  std::vector<Cta> ctas;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::function<void()>> events;
  std::vector<std::function<void()>> late;  // the same, in no hurry: stores, and the kernel before
  std::vector<std::function<void()>> slow;  // and what takes longest: the loads of one barrier
  std::size_t slow_barrier = 0;  // which one, in the order of their making
  std::vector<Cluster> clusters;
  std::set<const void*> written;  // in this launch, by ordinary stores to global memory
  ucontext_t scheduler;
  Fiber* now = nullptr;
  dim3 block;
  std::function<void()> body;
  // The kernel before this one: what it does at its end, and whether it has ended.
  std::function<void()> before;
  bool before_ended = true;
  int sms = 4;
};

inline Machine machine;

inline Fiber& here() { return *machine.now; }

inline std::uint8_t* dynamic_memory() { return here().cta->memory.data() + kFirst; }

// Lets others run, at least until `ready`.
inline void block(std::function<bool()> ready) {
  Fiber& me = here();
  me.ready = std::move(ready);
  swapcontext(&me.context, &machine.scheduler);
}

inline void meet(Rendezvous& at, int threads) {
  const long generation = at.generation;
  if (++at.arrived == threads) {
    at.arrived = 0;
    ++at.generation;
  }
  block([&at, generation] { return at.generation > generation; });
}

// What every lane of the warp has brought.
inline const std::uint32_t (*exchange(const std::uint32_t* mine, int count))[8] {
  Warp& warp = *here().warp;
  auto& words = warp.words[warp.meeting.generation % 2];
  std::memcpy(words[here().thread.x % 32], mine, 4 * count);
  meet(warp.meeting, 32);
  return words;
}

inline Cta& cta_of(std::uint32_t address) { return machine.ctas.at(address / kWindow); }

// An asynchronous event finds the CTA still there.
inline std::uint8_t* at(std::uint32_t address) {
  Cta& cta = cta_of(address);
  CHECK(cta.alive > 0);
  return &cta.memory.at(address % kWindow);
}

template <class T>
T read(std::uint32_t address) {
  T value;
  std::memcpy(&value, at(address), sizeof(T));
  return value;
}

template <class T>
void write(std::uint32_t address, T value) {
  std::memcpy(at(address), &value, sizeof(T));
}

inline Barrier& barrier(std::uint32_t address) {
  Cta& cta = cta_of(address);
  CHECK(cta.alive > 0);
  const auto found = cta.barriers.find(address % kWindow);
  CHECK(found != cta.barriers.end());
  return found->second;
}

inline void arrive(std::uint32_t address) {
  Barrier& b = barrier(address);
  CHECK(b.pending > 0);
  --b.pending;
  b.settle();
}

inline void count_bytes(std::uint32_t address, long bytes) {
  Barrier& b = barrier(address);
  b.bytes += bytes;
  CHECK(std::abs(b.bytes) < 1 << 20);  // the range of a barrier's tx-count
  b.settle();
}

inline std::uint32_t swizzled(std::uint32_t address) { return address ^ (address >> 3 & 0x70); }

inline bool happen(std::vector<std::function<void()>>& events) {
  if (events.empty()) return false;
  std::swap(events[machine.random() % events.size()], events.back());
  const auto event = std::move(events.back());
  events.pop_back();
  event();
  return true;
}

inline void enter() {
  machine.body();
  Fiber& me = here();
  me.done = true;
  --me.cta->alive;
  swapcontext(&me.context, &machine.scheduler);
}

// The CTAs first_block to first_block + size − 1, in clusters of `cluster`.
inline void run_ctas(int first_block, int size, int cluster) {
  Machine& m = machine;
  const int threads = m.block.x;
  m.ctas = std::vector<Cta>(size);
  m.warps = std::vector<Warp>(size * threads / 32);
  m.fibers.clear();
  m.clusters.clear();
  for (int i = 0; i < size; i += cluster) m.clusters.push_back({.first = i, .size = cluster});
  for (int i = 0; i < size * threads; ++i) {
    m.fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *m.fibers.back();
    fiber.window = i / threads;
    fiber.cluster = &m.clusters[fiber.window / cluster];
    fiber.rank = fiber.window % cluster;
    fiber.thread = dim3(i % threads);
    fiber.cta = &m.ctas[fiber.window];
    fiber.cta->block = first_block + fiber.window;
    fiber.cta->alive = threads;
    fiber.warp = &m.warps[i / 32];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  // Stores may be fast or take for ever, and one CTA be faster than the others, by far.
  const unsigned lateness = m.random() % 2 == 0 ? 16 : 100000;
  const std::size_t favoured = m.random() % 2 == 0 ? m.random() % size : size;
  m.slow_barrier = m.random() % 10;
  // One CTA may also begin later than the others.
  const int held = m.random() % (2 * size);
  long turn = 0, release = m.random() % 65536;
  int left = size * threads;
  for (; left > 0; ++turn) {
    if (m.random() % 4 == 0) happen(m.events);
    if (m.random() % lateness == 0) happen(m.late);
    if (m.random() % 32768 == 0) happen(m.slow);
    // From a random thread on, the first that can run.
    std::size_t start = m.random() % m.fibers.size();
    if (favoured < m.ctas.size() && m.random() % 64 != 0) start = favoured * threads;
    Fiber* next = nullptr;
    for (std::size_t i = 0; i < m.fibers.size() && next == nullptr; ++i) {
      Fiber& fiber = *m.fibers[(start + i) % m.fibers.size()];
      if (fiber.window == held && turn < release) continue;
      if (!fiber.done && (!fiber.ready || fiber.ready())) next = &fiber;
    }
    if (next == nullptr) {
      if (happen(m.events)) continue;
      if (turn < release) {
        release = turn;
        continue;
      }
      CHECK(happen(m.slow) || happen(m.late));  // otherwise: a deadlock
      continue;
    }
    next->ready = nullptr;
    m.now = next;
    threadIdx = next->thread;
    blockIdx = dim3(next->cta->block);
    swapcontext(&m.scheduler, &next->context);
    if (next->done) --left;
  }
  // Nothing is still on its way to a CTA that has left.
  CHECK(m.events.empty() && m.late.empty() && m.slow.empty());
}

inline void run(dim3 grid, dim3 block, int cluster, std::function<void()> body) {
  Machine& m = machine;
  gridDim = grid;
  m.block = block;
  m.body = std::move(body);
  CHECK(grid.x % cluster == 0);
  m.written.clear();
  const unsigned together = std::max(m.sms / cluster, 1) * cluster;
  for (unsigned first = 0; first < grid.x; first += together) {
    if (!m.before_ended && m.before && first == 0) {
      m.late.push_back([] {
        machine.before();
        machine.before_ended = true;
      });
    }
    run_ctas(first, std::min(together, grid.x - first), cluster);
  }
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::meet(emulator::here().cta->named[0], emulator::machine.block.x);
}
inline void __syncwarp() { emulator::meet(emulator::here().warp->meeting, 32); }
inline int __shfl_sync(unsigned, int value, int lane) {
  const std::uint32_t word = static_cast<std::uint32_t>(value);
  return static_cast<int>(emulator::exchange(&word, 1)[lane][0]);
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  std::uint32_t word;
  std::memcpy(&word, &value, 4);
  const auto words = emulator::exchange(&word, 1);
  std::memcpy(&value, words[(emulator::here().thread.x % 32) ^ mask], 4);
  return value;
}

// ---- Launches ----------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorLaunchOutOfResources, cudaErrorInvalidClusterSize };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
using cudaStream_t = void*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  CHECK(bytes <= 232448);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel, const cudaLaunchConfig_t* config) {
  const int cluster = config->attrs[0].val.clusterDim.x;
  if (cluster > emulator::machine.sms) return cudaErrorInvalidClusterSize;
  *count = emulator::machine.sms / cluster;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  CHECK(config->dynamicSmemBytes <= 232448);
  int cluster = 1;
  bool overlap = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& given = config->attrs[i];
    if (given.id == cudaLaunchAttributeClusterDimension) {
      cluster = given.val.clusterDim.x;
      CHECK(cluster > 1);  // see cluster_is_implicit
    } else {
      overlap = given.val.programmaticStreamSerializationAllowed != 0;
    }
  }
  if (!overlap) emulator::machine.before_ended = true;
  emulator::run(config->gridDim, config->blockDim, cluster, [=] { kernel(arguments...); });
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

// ---- ptx.cuh -----------------------------------------------------------------------------------

namespace loradrop::ptx {

using emulator::here;
using emulator::machine;

inline std::uint32_t shared(const void* pointer) {
  const std::ptrdiff_t offset = static_cast<const std::uint8_t*>(pointer) - here().cta->memory.data();
  return static_cast<std::uint32_t>(offset) + here().window * emulator::kWindow;
}

inline std::uint32_t cluster_rank() { return here().rank; }
inline std::uint32_t peer(std::uint32_t address, std::uint32_t rank) {
  return address % emulator::kWindow + (here().cluster->first + rank) * emulator::kWindow;
}

// A launch without clusters has no barrier of clusters: ptxas makes nothing of the arrival there,
// and a barrier of the whole block of the wait. Whether an explicit cluster of one is such a launch
// is not documented, so nobody may launch one.
inline bool cluster_is_implicit() { return here().cluster->size == 1; }

inline void cluster_arrive() {
  if (cluster_is_implicit()) return;
  emulator::Rendezvous& barrier = here().cluster->barrier;
  here().cluster_phase = barrier.generation;
  if (++barrier.arrived == here().cluster->size * static_cast<int>(machine.block.x)) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}
inline void cluster_arrive_relaxed() {
  CHECK(!here().arrived);  // its arrivals at other CTAs would not be ordered
  cluster_arrive();
}
inline void cluster_wait() {  // the barrier also orders what each thread did before it
  if (cluster_is_implicit()) __syncthreads();
  const long phase = here().cluster_phase;
  const emulator::Cluster* cluster = here().cluster;
  emulator::block([cluster, phase] {
    if (cluster->size > 1 && cluster->barrier.generation <= phase) return false;
    for (const auto& fiber : machine.fibers) {
      if (fiber->cluster == cluster && fiber->arrivals > 0) return false;
    }
    return true;
  });
}

inline float load_peer(std::uint32_t address) { return emulator::read<float>(address); }
inline void store_peer(std::uint32_t address, std::uint16_t value) {
  emulator::write(address, value);
}

inline void barrier_init(std::uint32_t barrier, int arrivals) {
  auto& barriers = emulator::cta_of(barrier).barriers;
  const bool slow = barriers.size() == machine.slow_barrier;
  barriers[barrier % emulator::kWindow] = {
      .expected = arrivals, .pending = arrivals, .slow = slow};
}
inline void barrier_init_fence() {
  for (auto& [address, barrier] : here().cta->barriers) barrier.known = true;
}
inline void arrive_and_expect(std::uint32_t barrier, std::uint32_t bytes) {
  emulator::count_bytes(barrier, bytes);
  emulator::arrive(barrier);
}
inline void arrive(std::uint32_t barrier) { emulator::arrive(barrier); }
inline void arrive_later(std::uint32_t barrier, bool emulator::Barrier::* how) {
  emulator::Fiber* issuer = &here();
  ++issuer->arrivals;
  issuer->arrived = true;
  machine.events.push_back([=] {
    CHECK(emulator::barrier(barrier).known);
    emulator::barrier(barrier).*how = true;
    emulator::arrive(barrier);
    --issuer->arrivals;
  });
}
inline void arrive_peer(std::uint32_t barrier, std::uint32_t rank) {
  arrive_later(peer(barrier, rank), &emulator::Barrier::plain);
}
inline void publish_peer(std::uint32_t barrier, std::uint32_t rank) {
  arrive_later(peer(barrier, rank), &emulator::Barrier::published);
}

template <bool Cluster = false>
inline void wait(std::uint32_t barrier, std::uint32_t parity) {
  emulator::Barrier& b = emulator::barrier(barrier);
  emulator::block([&b, parity] { return (b.completed & 1) != static_cast<long>(parity); });
  // What a peer publishes is seen by a wait of the cluster's scope, and such a wait sees nothing else.
  CHECK(Cluster ? !b.plain : !b.published);
}

inline void sync_threads(int barrier, int threads) {
  CHECK(!here().unfenced && !here().unfenced_global);
  emulator::meet(here().cta->named[barrier], threads);
}

struct Landing {
  std::uint32_t address, barrier;
};

inline void prefetch(const CUtensorMap&) {}

// A box lands in pieces of eight rows, in any order, and each brings its own bytes.
inline void land(const CUtensorMap& map, Landing to, int inner, int outer, int first) {
  const int end = std::min(first + 8, map.box_rows);
  for (int row = first; row < end; ++row) {
    for (int column = 0; column < 64; ++column) {
      const bool inside = outer + row < map.rows && inner + column < map.columns;
      emulator::write<std::uint16_t>(
          emulator::swizzled(to.address + row * 128 + column * 2),
          inside ? map.pointer[(outer + row) * map.stride + inner + column] : 0);
    }
  }
  CHECK(emulator::barrier(to.barrier).known);
  emulator::count_bytes(to.barrier, (first - end) * 128L);
}

inline void load(const CUtensorMap& map, Landing to, int inner, int outer) {
  CHECK(to.address % 1024 == 0);
  const bool made = machine.written.count(map.pointer + outer * map.stride + inner) > 0;
  CHECK(!made || here().fenced);
  for (int first = 0; first < map.box_rows; first += 8) {
    auto& when = emulator::barrier(to.barrier).slow ? machine.slow : machine.events;
    when.push_back([=] { land(map, to, inner, outer, first); });
  }
}

inline void load_multicast(const CUtensorMap& map, Landing to, int inner, int outer,
                           std::uint16_t ctas) {
  for (int rank = 0; rank < here().cluster->size; ++rank) {
    if (!(ctas >> rank & 1)) continue;
    load(map, {peer(to.address, rank), peer(to.barrier, rank)}, inner, outer);
  }
}

inline void store(const CUtensorMap& map, std::uint32_t from, int inner, int outer) {
  emulator::Fiber* issuer = &here();
  issuer->stores.push_back(false);
  machine.late.push_back([=, number = issuer->stores.size() - 1] {
    CHECK(machine.before_ended);  // an earlier kernel may still read what is overwritten
    for (int row = 0; row < map.box_rows && outer + row < map.rows; ++row) {
      for (int column = 0; column < 64 && inner + column < map.columns; ++column) {
        map.pointer[(outer + row) * map.stride + inner + column] =
            emulator::read<std::uint16_t>(emulator::swizzled(from + row * 128 + column * 2));
      }
    }
    issuer->stores[number] = true;
  });
}

template <int Pending>
inline void wait_stores_read() {
  emulator::Fiber* me = &here();
  emulator::block([me] {  // all but the last ones, not just any
    for (std::size_t i = 0; i + Pending < me->stores.size(); ++i) {
      if (!me->stores[i]) return false;
    }
    return true;
  });
}

inline void fence_async_proxy() { here().unfenced = false; }
inline void fence_async_proxy_global() {
  here().unfenced_global = false;
  here().fenced = here().acquired;
}
inline void write_pair(void* to, std::uint32_t pair) {
  std::memcpy(to, &pair, 4);
  machine.written.insert(to);
  here().unfenced_global = true;
}
inline void publish(std::uint32_t* flag) { *flag = 1; }
inline void await(const std::uint32_t* flag) {
  emulator::block([flag] { return *flag != 0; });
  here().acquired = true;
  here().fenced = false;
}
inline void wait_for_earlier_kernels() {
  emulator::block([] { return machine.before_ended; });
}

// A thread begins with its share of the 65536 registers, in eights.
inline int first_registers() { return 65536 / static_cast<int>(machine.block.x) / 8 * 8; }
template <int Count>
inline void give_registers() {
  here().cta->registers += first_registers() - Count;
}
template <int Count>
inline void take_registers() {
  emulator::Cta* cta = here().cta;
  emulator::block([cta] { return cta->registers >= Count - first_registers(); });
  cta->registers -= Count - first_registers();
}

inline void store_matrices(std::uint32_t address, const std::uint32_t (&value)[4]) {
  CHECK(here().sums != emulator::Sums::kFenced);  // the values come from accumulators
  here().sums = emulator::Sums::kOrdinary;
  const auto words = emulator::exchange(&address, 1);
  const int lane = here().thread.x % 32;
  for (int i = 0; i < 4; ++i) {
    emulator::write(words[8 * i + lane / 4][0] + lane % 4 * 4, value[i]);
  }
  here().unfenced = true;
}

template <int Count>
inline void load_matrices(std::uint32_t (&value)[Count], std::uint32_t address) {
  const auto words = emulator::exchange(&address, 1);
  const int lane = here().thread.x % 32;
  for (int i = 0; i < Count; ++i) {
    value[i] = emulator::read<std::uint32_t>(words[8 * i + lane / 4][0] + lane % 4 * 4);
  }
}

inline float half_of(std::uint32_t word, int i) {
  return to_float(static_cast<std::uint16_t>(word >> 16 * i));
}

template <class T>
inline void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  const std::uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto words = emulator::exchange(mine, 6);
  const int lane = here().thread.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2;  // the lane of its group of four that holds this k
      c[i] += half_of(words[4 * row + from][i / 2 + k / 8 * 2], k % 2) *
              half_of(words[4 * column + from][4 + k / 8], k % 2);
    }
  }
}

template <class T>
inline float widen(T value) { return to_float(value.bits); }
template <class T>
inline float low_of(std::uint32_t pair) { return half_of(pair, 0); }
template <class T>
inline float high_of(std::uint32_t pair) { return half_of(pair, 1); }
template <class T>
inline T round_to(float value) { return {to_bits(value)}; }
template <class T>
inline std::uint32_t pack(float low, float high) {
  return to_bits(low) | static_cast<std::uint32_t>(to_bits(high)) << 16;
}

}  // namespace loradrop::ptx

// ---- wgmma.cuh ---------------------------------------------------------------------------------

namespace loradrop {

inline float wgmma_element(std::uint64_t descriptor, bool n_major, int n, int k) {
  const auto field = [&](int first) {
    return static_cast<std::uint32_t>((descriptor >> first) & 0x3FFF) * 16;
  };
  CHECK(descriptor >> 62 == 1);
  const std::uint32_t offset =
      n_major ? n % 64 * 2 + n / 64 * field(16) + k % 8 * 128 + k / 8 * field(32)
              : n % 8 * 128 + n / 8 * field(32) + k * 2;
  const std::uint32_t own = emulator::here().window * emulator::kWindow;
  return to_float(emulator::read<std::uint16_t>(emulator::swizzled(field(0) + offset) + own));
}

// This thread's part: two rows of its warp's sixteen, and two of every eight columns.
inline void perform(const emulator::Wgmma& op) {
  const int thread = emulator::here().thread.x % 128, lane = thread % 32;
  for (int k = 0; k < 16; ++k) {
    float left[2];
    for (int i = 0; i < 2; ++i) {
      left[i] = wgmma_element(op.a, false, 16 * (thread / 32) + lane / 4 + 8 * i, k);
    }
    for (int j = 0; j < op.n / 8; ++j) {
      for (int i = 0; i < 4; ++i) {
        float& d = op.d[4 * j + i];
        if (k == 0 && !op.add) d = 0.0f;
        d += left[i / 2] * wgmma_element(op.b, op.n_major, 8 * j + 2 * (lane % 4) + i % 2, k);
      }
    }
  }
}

inline void wgmma_fence() {
  emulator::Sums& sums = emulator::here().sums;
  if (sums == emulator::Sums::kPinned) sums = emulator::Sums::kFenced;
}
inline void wgmma_commit() { emulator::here().groups.emplace_back(); }

template <int Pending>
inline void wgmma_wait() {
  auto& groups = emulator::here().groups;
  while (groups.size() > 1 + Pending) {
    for (const emulator::Wgmma& op : groups.front()) perform(op);
    groups.pop_front();
  }
  __syncwarp();  // `.sync.aligned`: no lane goes on before all have come
}

template <class T, int TransB, int Count>
inline void wgmma(float (&d)[Count], std::uint64_t a, std::uint64_t b, bool add) {
  CHECK(emulator::here().sums == emulator::Sums::kFenced);
  auto& groups = emulator::here().groups;
  const emulator::Wgmma op{d, 2 * Count, a, b, add, TransB != 0};
  // In order: at once only where none before it is still to come.
  const bool first = groups.size() == 1 && groups.back().empty();
  if (first && emulator::machine.random() % 2 == 0) {
    perform(op);
  } else {
    groups.back().push_back(op);
  }
}

template <int Count>
inline void pin(float (&)[Count]) {
  const auto& groups = emulator::here().groups;
  CHECK(groups.size() == 1 && groups.back().empty());  // else a wgmma still writes them
  emulator::here().sums = emulator::Sums::kPinned;
}

}  // namespace loradrop
