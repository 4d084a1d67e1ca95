// What decode cannot be faster than, for benchmarks: W streamed through shared memory and used for
// nothing, and two cluster barriers with no work between them. Neither computes anything.

#include "kernels.h"
#include "ptx.cuh"

namespace loradrop {
namespace {

// One warp loads, one warp frees the slots again. Barriers as in decode_sm90.cu.
__global__ void __launch_bounds__(64, 1)
    stream_kernel(const __grid_constant__ CUtensorMap w, int k, int rows, int stages) {
  extern __shared__ std::uint8_t raw[];
  const std::uint32_t base = (ptx::shared(raw) + kAtomBytes - 1) & ~(kAtomBytes - 1u);
  const std::uint32_t half = rows * kRowBytes, barriers = base + stages * 2 * half;
  const int chunks = ceil_div(k, kDecodeChunk);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < 2 * stages; ++slot) ptx::barrier_init(barriers + 8 * slot, 1);
    ptx::barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x % 32 != 0) return;
  Ring ring;
  for (int step = 0; step < chunks; ++step, ring.advance(stages)) {
    const std::uint32_t filled = barriers + 8 * ring.slot, emptied = filled + 8 * stages;
    if (threadIdx.x == 0) {
      ptx::wait(emptied, ring.emptied());
      ptx::arrive_and_expect(filled, 2 * half);
      for (int which = 0; which < 2; ++which) {
        ptx::load(w, {base + (2 * ring.slot + which) * half, filled},
                  step * kDecodeChunk + which * kChunk, blockIdx.x * rows);
      }
    } else {
      ptx::wait(filled, ring.filled());
      ptx::arrive(emptied);
    }
  }
}

__global__ void __launch_bounds__(288, 1) cluster_barriers_kernel() {
  for (int i = 0; i < 2; ++i) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  }
}

}  // namespace

cudaError_t launch_stream(const CUtensorMap& w, int k, int rows, int stages, int ctas,
                          cudaStream_t stream) {
  const int bytes = kAtomBytes + stages * (2 * rows * kRowBytes + 16);
  const cudaError_t error =
      cudaFuncSetAttribute(stream_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  stream_kernel<<<ctas, 64, bytes, stream>>>(w, k, rows, stages);
  return cudaGetLastError();
}

cudaError_t launch_cluster_barriers(int cluster, int ctas, cudaStream_t stream) {
  cudaLaunchAttribute size = {};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(288);
  config.stream = stream;
  config.attrs = &size;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, cluster_barriers_kernel);
}

}  // namespace loradrop
