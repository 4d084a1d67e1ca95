// wgmma: 64 x N x 16 by the four warps of a warpgroup, both operands in shared memory, float32
// accumulators in registers.
#pragma once

#include <type_traits>

#include "ptx.cuh"
#include "smem_layout.h"

namespace loradrop {

// Before the first wgmma, and wherever other instructions have touched the accumulators.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most `Pending` committed groups still run.
template <int Pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// The compiler does not know that a wgmma still writes its registers after the instruction, nor that
// wgmma_fence and wgmma_wait are about them. No use of them moves across this.
template <int Count>
__device__ inline void pin(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The operands of the accumulators, eight at a time.
#define LORADROP_F8(d, i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),    \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LORADROP_F64(d, i)                                                                       \
  LORADROP_F8(d, i), LORADROP_F8(d, i + 8), LORADROP_F8(d, i + 16), LORADROP_F8(d, i + 24),      \
      LORADROP_F8(d, i + 32), LORADROP_F8(d, i + 40), LORADROP_F8(d, i + 48),                    \
      LORADROP_F8(d, i + 56)
#define LORADROP_F32(d, i)                                                                       \
  LORADROP_F8(d, i), LORADROP_F8(d, i + 8), LORADROP_F8(d, i + 16), LORADROP_F8(d, i + 24)
#define LORADROP_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LORADROP_R16 LORADROP_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LORADROP_R32                                                                             \
  LORADROP_R16                                                                                   \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LORADROP_R64                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "   \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "   \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "   \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define LORADROP_R128                                                                            \
  LORADROP_R64                                                                                   \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "   \
  "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "   \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// scale-d is a predicate (0 starts a new sum); both operands keep their sign; A is K-major.
#define LORADROP_WGMMA16(TYPE)                                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"                                      \
               "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE " {" LORADROP_R8      \
               "}, %8, %9, p, 1, 1, 0, %11;\n}"                                                  \
               : LORADROP_F8(d, 0)                                                               \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(TransB))
#define LORADROP_WGMMA32(TYPE)                                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"                                      \
               "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE " {" LORADROP_R16     \
               "}, %16, %17, p, 1, 1, 0, %19;\n}"                                                \
               : LORADROP_F8(d, 0), LORADROP_F8(d, 8)                                            \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(TransB))
#define LORADROP_WGMMA64(TYPE)                                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                      \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" LORADROP_R32     \
               "}, %32, %33, p, 1, 1, 0, %35;\n}"                                                \
               : LORADROP_F32(d, 0)                                                              \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(TransB))
#define LORADROP_WGMMA128(TYPE)                                                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                      \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" LORADROP_R64    \
               "}, %64, %65, p, 1, 1, 0, %67;\n}"                                                \
               : LORADROP_F64(d, 0)                                                              \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(TransB))
#define LORADROP_WGMMA256(TYPE)                                                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                     \
               "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" LORADROP_R128   \
               "}, %128, %129, p, 1, 1, 0, %131;\n}"                                             \
               : LORADROP_F64(d, 0), LORADROP_F64(d, 64)                                         \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(TransB))

#define LORADROP_OVERLOAD(N)                                                                     \
  template <class T, int TransB>                                                                 \
  __device__ inline void wgmma(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, bool add) {  \
    if constexpr (std::is_same_v<T, __half>) {                                                   \
      LORADROP_WGMMA##N("f16");                                                                  \
    } else {                                                                                     \
      LORADROP_WGMMA##N("bf16");                                                                 \
    }                                                                                            \
  }
LORADROP_OVERLOAD(16)
LORADROP_OVERLOAD(32)
LORADROP_OVERLOAD(64)
LORADROP_OVERLOAD(128)
LORADROP_OVERLOAD(256)

#undef LORADROP_OVERLOAD
#undef LORADROP_WGMMA16
#undef LORADROP_WGMMA32
#undef LORADROP_WGMMA64
#undef LORADROP_WGMMA128
#undef LORADROP_WGMMA256
#undef LORADROP_R128
#undef LORADROP_R64
#undef LORADROP_R32
#undef LORADROP_R16
#undef LORADROP_R8
#undef LORADROP_F32
#undef LORADROP_F64
#undef LORADROP_F8

}  // namespace loradrop
