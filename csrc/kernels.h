// What bindings.cpp launches: plain structs and functions, no kernel code.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "smem_layout.h"
#include "tile_walk.h"

namespace loradrop {

enum class Type { kBFloat16, kHalf };

struct GemmArguments {
  CUtensorMap p, q, h, l, out;  // h and l are read only where shape.r > 0
  Gemm shape;
  const void* bias;      // (n,) in the type of out, or null
  float scale;           // of the thin product
  int l_is_k_major;
  // Where shape.streams > 0, h is made here: h_scale·p·a, rows h_stride apart, and ready[i] is set
  // when rows 128·i to 128·i + 127 are. `ready` begins with zeros.
  CUtensorMap a;
  void* h_made;
  long h_stride;
  std::uint32_t* ready;
  float h_scale;
  int a_is_k_major;
};

struct GemmLaunch {
  Type type;
  Major q_major;
  int device;
  bool overlap;  // the launch before this one writes h and nothing else that is read here
};

cudaError_t launch_gemm_ext(const GemmArguments&, const GemmLaunch&, cudaStream_t);

// How many clusters of `cluster` CTAs of gemm_ext the current device holds at once; 0 where it cannot
// place one.
cudaError_t gemm_residents(int cluster, int device, int* count);

// Bytes of shared memory of a launch; a Hopper SM grants 232448 to one block.
int gemm_shared_bytes(int tile_n);

struct DecodeArguments {
  CUtensorMap x, w, a, b;
  int m, n, k, r;
  int rows;              // of W a CTA
  int stages;
  const void* bias;      // (n,) in the type of y, or null
  void* y;               // (m, n)
  void* h;               // (m, r)
  const float* weights;  // (m,) or null
  float* planes;         // one sum of squares a CTA, or null where no norm is asked for
  float scale;
};

struct DecodeLaunch {
  Type type;
  int cluster, ctas;
  float* sqnorm;  // the planes' sum, in their order
};

cudaError_t launch_decode(const DecodeArguments&, const DecodeLaunch&, cudaStream_t);

// How many clusters of `cluster` CTAs of decode the current device holds at once; 0 where it cannot
// place one.
cudaError_t decode_residents(int cluster, int* count);

// How deep the ring of a decode launch is; less than 2 does not run.
int decode_stages(int rows, int m, int r);
int decode_shared_bytes(int rows, int m, int r, int stages);

}  // namespace loradrop
