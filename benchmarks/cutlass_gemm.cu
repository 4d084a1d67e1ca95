// out = p·q by the GEMM of CUTLASS's headers, a rival of csrc/gemm_ext_sm90.cu. bfloat16, Hopper.
//
//   p (M, K) row-major   q (K, N) row-major, or the transpose of a row-major W (N, K)   out (M, N)
//
// Sums in float32. The tile, the cluster and the split of the work are those of our own kernel:
// 128×256×64, two CTAs that share their part of q, one producer and two consumer warpgroups on a
// persistent grid.

#include <cuda_runtime.h>

#include <cstdint>

#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace {

namespace collective = cutlass::gemm::collective;
using Half = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using CtaTile = cute::Shape<cute::_128, cute::_256, cute::_64>;
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
constexpr int kAlignment = 8;  // elements: the 16 bytes that TMA asks for
constexpr int kSwizzle = 8;    // tiles are walked in strips this wide, so that they meet in L2

// No source matrix: the epilogue reads nothing, and writes by TMA.
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, CtaTile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, kAlignment, Half,
    RowMajor, kAlignment, cutlass::epilogue::TmaWarpSpecializedCooperative>::CollectiveOp;

// As many stages as fit beside what the epilogue keeps.
template <typename LayoutOfQ>
using Mainloop = typename collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Half, RowMajor, kAlignment, Half,
    LayoutOfQ, kAlignment, float, CtaTile, Cluster,
    collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;

template <typename LayoutOfQ>
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<cutlass::gemm::kernel::GemmUniversal<
    cute::Shape<int, int, int, int>, Mainloop<LayoutOfQ>, Epilogue>>;

struct Call {
  void* out;
  const void* p;
  const void* q;
  int m, n, k;
  std::int64_t p_stride, q_stride;  // elements from row to row; of q or of its transpose
  int device, sms;
};

template <typename LayoutOfQ>
typename Gemm<LayoutOfQ>::Arguments arguments(const Call& call) {
  typename Gemm<LayoutOfQ>::Arguments given{};
  given.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  given.problem_shape = {call.m, call.n, call.k, 1};
  given.mainloop.ptr_A = static_cast<const Half*>(call.p);
  given.mainloop.ptr_B = static_cast<const Half*>(call.q);
  // Of a stride all is fixed but the distance between rows, and between matrices of a batch of one.
  cute::get<0>(given.mainloop.dA) = call.p_stride;
  if constexpr (cute::is_same_v<LayoutOfQ, ColumnMajor>) {
    cute::get<0>(given.mainloop.dB) = call.q_stride;
  } else {
    cute::get<1>(given.mainloop.dB) = call.q_stride;
  }
  given.epilogue.thread.alpha = 1.0f;
  given.epilogue.thread.beta = 0.0f;
  given.epilogue.ptr_D = static_cast<Half*>(call.out);
  cute::get<0>(given.epilogue.dD) = call.n;
  given.hw_info.device_id = call.device;
  given.hw_info.sm_count = call.sms;
  given.scheduler.max_swizzle_size = kSwizzle;
  return given;
}

template <typename LayoutOfQ>
int run(const Call& call, void* workspace, cudaStream_t stream) {
  const auto given = arguments<LayoutOfQ>(call);
  cutlass::Status status = Gemm<LayoutOfQ>::can_implement(given);
  if (status == cutlass::Status::kSuccess) status = Gemm<LayoutOfQ>().run(given, workspace, stream);
  return static_cast<int>(status);
}

}  // namespace

// The bytes of workspace of `cutlass_gemm`. `transposed`: q is the transpose of a row-major matrix.
extern "C" int cutlass_gemm_workspace(int m, int n, int k, bool transposed) {
  const Call call{nullptr, nullptr, nullptr, m, n, k, k, transposed ? k : n, 0, 1};
  return static_cast<int>(
      transposed ? Gemm<ColumnMajor>::get_workspace_size(arguments<ColumnMajor>(call))
                 : Gemm<RowMajor>::get_workspace_size(arguments<RowMajor>(call)));
}

// 0 where it was launched, else a cutlass::Status. `sms` is how many the device has.
extern "C" int cutlass_gemm(void* out, const void* p, const void* q, void* workspace, int m, int n,
                            int k, std::int64_t p_stride, std::int64_t q_stride, bool transposed,
                            int device, int sms, cudaStream_t stream) {
  // This library has a runtime of its own, which knows no device in a thread new to it.
  if (cudaSetDevice(device) != cudaSuccess) {
    return static_cast<int>(cutlass::Status::kErrorInternal);
  }
  const Call call{out, p, q, m, n, k, p_stride, q_stride, device, sms};
  return transposed ? run<ColumnMajor>(call, workspace, stream)
                    : run<RowMajor>(call, workspace, stream);
}
