// loradrop._C: checks what it is given, launches, and raises with the reason. Pointers, sizes, strides
// and the stream come as integers, so that one build serves any version of torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels.h"
#include "tensor_map.h"

namespace py = pybind11;

namespace loradrop {
namespace {

constexpr std::int64_t kMaxSize = std::numeric_limits<int>::max() - 1024;

// (pointer, rows, columns, stride of rows, stride of columns), strides in elements of two bytes.
struct Matrix {
  std::int64_t pointer, rows, columns, row_stride, column_stride;

  explicit Matrix(const std::array<std::int64_t, 5>& v)
      : pointer(v[0]), rows(v[1]), columns(v[2]), row_stride(v[3]), column_stride(v[4]) {}
  Matrix transposed() const {
    return Matrix({pointer, columns, rows, column_stride, row_stride});
  }
  bool row_major() const { return column_stride == 1; }
  // A single row has no stride that matters.
  std::int64_t stride() const { return rows == 1 ? (columns + 7) / 8 * 8 : row_stride; }
};

using Numbers = std::array<std::int64_t, 5>;
using Reason = std::optional<std::string>;

std::string shape(const Matrix& a) {
  return "(" + std::to_string(a.rows) + ", " + std::to_string(a.columns) + ")";
}

// Why the copy engine cannot read or write `a` by its rows.
Reason why_not_rows(const std::string& name, const Matrix& a) {
  if (a.rows < 1 || a.columns < 1 || a.rows > kMaxSize || a.columns > kMaxSize) {
    return name + " has the shape " + shape(a) + ", which is empty or beyond 2^31";
  }
  if (!a.row_major()) {
    return name + " has the column stride " + std::to_string(a.column_stride) +
           " where 1 is needed";
  }
  if (a.stride() < a.columns || a.stride() % 8 != 0) {
    return name + " has the row stride " + std::to_string(a.stride()) +
           " where a multiple of 8 elements is needed";
  }
  if (a.pointer == 0 || a.pointer % 16 != 0) return name + " does not begin at a multiple of 16 bytes";
  return {};
}

// Either way round.
Reason why_not_right(const std::string& name, const Matrix& a) {
  return why_not_rows(name, a.row_major() ? a : a.transposed());
}

Reason differ(const std::string& names, std::int64_t a, std::int64_t b) {
  if (a == b) return {};
  return "the sizes " + std::to_string(a) + " and " + std::to_string(b) + " of " + names + " differ";
}

std::optional<Type> type_of(const std::string& name) {
  if (name == "bfloat16") return Type::kBFloat16;
  if (name == "float16") return Type::kHalf;
  return {};
}

Reason why_not_type(const std::string& dtype) {
  if (type_of(dtype)) return {};
  return "the dtype is " + dtype + ", and the kernels take bfloat16 and float16";
}

// The rescaling of the sums by 1/s and s must stay far from the ends of float32.
Reason why_not_scaling(double scaling) {
  const double size = std::abs(scaling);
  if (size >= 0x1p-32 && size <= 0x1p32) return {};
  return "the scaling " + std::to_string(scaling) + " is outside 2^-32 to 2^32";
}

Reason why_not_cluster(int cluster) {
  if (cluster == 1 || cluster == 2 || cluster == 4 || cluster == 8) return {};
  return "cluster=" + std::to_string(cluster) + " where 1, 2, 4 or 8 is needed";
}

template <class... Reasons>
Reason first(const Reasons&... reasons) {
  Reason found;
  ((found = found ? found : reasons), ...);
  return found;
}

// Why gemm_ext cannot serve these operands; h and l together, or neither.
Reason why_not_gemm(const std::string& dtype, const Numbers& p_, const Numbers& q_,
                    const std::optional<Numbers>& h_, const std::optional<Numbers>& l_) {
  const Matrix p(p_), q(q_);
  Reason reason = first(why_not_type(dtype), why_not_rows("p", p), why_not_right("q", q),
                        differ("p's columns and q's rows", p.columns, q.rows));
  if (!reason && q.columns % 8 != 0) {
    reason = "q has " + std::to_string(q.columns) + " columns where a multiple of 8 is needed";
  }
  if (!reason && tiles({static_cast<int>(p.rows), static_cast<int>(q.columns), 1, 0, 128, 1}) >
                     kMaxTiles) {
    reason = "out has " + std::to_string(p.rows) + " x " + std::to_string(q.columns) +
             " elements where at most 2^30 tiles of 128 x 128 are counted";
  }
  if (!reason && h_.has_value() != l_.has_value()) reason = "h and l come together or not at all";
  if (reason || !h_) return reason;
  const Matrix h(*h_), l(*l_);
  return first(why_not_rows("h", h), why_not_right("l", l),
               differ("p's and h's rows", p.rows, h.rows),
               differ("h's columns and l's rows", h.columns, l.rows),
               differ("q's and l's columns", q.columns, l.columns));
}

Reason why_not_decode(const std::string& dtype, const Numbers& x_, const Numbers& w_,
                      const Numbers& a_, const Numbers& b_, int cluster) {
  const Matrix x(x_), w(w_), a(a_), b(b_);
  Reason reason = first(why_not_type(dtype), why_not_rows("x", x), why_not_rows("weight", w),
                        why_not_rows("A", a), why_not_rows("B", b),
                        differ("x's and weight's columns", x.columns, w.columns),
                        differ("x's and A's columns", x.columns, a.columns),
                        differ("weight's and B's rows", w.rows, b.rows),
                        differ("A's rows and B's columns", a.rows, b.columns));
  if (reason) return reason;
  if (x.rows > 32) return "x has " + std::to_string(x.rows) + " rows, and decode takes up to 32";
  if (a.rows > 128) return "the rank is " + std::to_string(a.rows) + ", and decode takes up to 128";
  return why_not_cluster(cluster);
}

void demand(const Reason& reason) {
  if (reason) throw std::invalid_argument(*reason);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // do not leave it for the next call, which is not at fault
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "the device cannot be asked");
  return value;
}

// Makes `device` current while it lives.
class On {
 public:
  explicit On(int device) : device_(device) {
    check(cudaGetDevice(&before_), "no CUDA device");
    if (before_ != device) check(cudaSetDevice(device), "the device cannot be chosen");
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
    if (major != 9 || minor != 0) {
      restore();
      throw std::runtime_error("the device has compute capability " + std::to_string(major) + "." +
                               std::to_string(minor) + ", and the kernels are built for 9.0 only");
    }
  }
  ~On() { restore(); }
  On(const On&) = delete;

 private:
  // To set what is set would begin a context where there is none.
  void restore() {
    if (before_ != device_) cudaSetDevice(before_);
  }

  int device_, before_ = 0;
};

CUtensorMap map_of(const Matrix& a, int box_rows, Type type) {
  return tensor_map({a.pointer, a.rows, a.columns, a.stride(), box_rows, type});
}

// Of q or l, which is read in shares of `rows` columns where its memory is the transpose.
CUtensorMap map_of_right(const Matrix& a, int columns, Type type) {
  return a.row_major() ? map_of(a, kChunk, type) : map_of(a.transposed(), columns, type);
}

Major major_of(const Matrix& a) { return a.row_major() ? Major::kN : Major::kK; }

cudaStream_t stream_of(std::uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// How `device`, which is current, walks the tiles: its shape with tile_n, cluster and streams.
Gemm planned(int m, int n, int k, int r, int tile_n, int cluster, bool a_is_k_major, int device) {
  int pairs = 0;
  check(gemm_residents(2, device, &pairs), "the device cannot be asked for its clusters");
  const int sms = attribute(cudaDevAttrMultiProcessorCount, device);
  Gemm shape = cut({m, n, k, r, tile_n, cluster == 0 && pairs == 0 ? 1 : cluster}, sms);
  shape.streams = streams(shape, pairs, a_is_k_major);
  return shape;
}

// How many clusters would make h beside the tiles; 0 where it is better made before.
int gemm_streams(int m, int n, int k, int r, bool a_is_k_major, int device) {
  const On here(device);
  return planned(m, n, k, r, 0, 0, a_is_k_major, device).streams;
}

// Where a (k, r) is given, h = h_scale·p·a is made meanwhile, with one flag of `ready` for 128 rows.
void gemm_ext(int device, std::uintptr_t stream, const Numbers& out_, const Numbers& p_,
              const Numbers& q_, const std::optional<Numbers>& h_,
              const std::optional<Numbers>& l_, const std::optional<Numbers>& a_,
              std::uintptr_t bias, std::uintptr_t ready, const std::string& dtype, double scaling,
              double h_scale, bool overlap, int tile_n, int cluster) {
  demand(why_not_gemm(dtype, p_, q_, h_, l_));
  if (h_) demand(why_not_scaling(scaling));
  const Matrix out(out_), p(p_), q(q_);
  demand(first(why_not_rows("out", out), differ("out's and p's rows", out.rows, p.rows),
               differ("out's and q's columns", out.columns, q.columns)));
  if (a_) {
    const Matrix a(*a_);
    demand(first(why_not_right("a", a), differ("p's columns and a's rows", p.columns, a.rows),
                 differ("a's and h's columns", a.columns, h_ ? (*h_)[2] : 0)));
  }
  if (bias % 4 != 0) throw std::invalid_argument("bias does not begin at a multiple of 4 bytes");
  if ((tile_n != 0 && tile_n != 128 && tile_n != 256) || cluster < 0 || cluster > kMaxCluster) {
    throw std::invalid_argument("tile_n is 128 or 256 and cluster 1 or 2, or 0 to let it choose");
  }
  const On here(device);
  const Type type = *type_of(dtype);
  const int m = static_cast<int>(p.rows), n = static_cast<int>(q.columns);
  GemmArguments args = {};
  const int k = static_cast<int>(p.columns), r = h_ ? static_cast<int>((*h_)[2]) : 0;
  args.a_is_k_major = a_ && major_of(Matrix(*a_)) == Major::kK;
  args.shape = planned(m, n, k, r, tile_n, cluster, args.a_is_k_major != 0, device);
  if (!a_) args.shape.streams = 0;
  const int columns = share(args.shape, 0).count;
  args.p = map_of(p, kTileM, type);
  args.q = map_of_right(q, columns, type);
  args.out = map_of(out, 64, type);
  if (h_) {
    const Matrix h(*h_), l(*l_);
    args.h = map_of(h, kTileM, type);
    args.l = map_of_right(l, columns, type);
    args.l_is_k_major = major_of(l) == Major::kK;
  }
  if (a_) {
    const Matrix a(*a_), h(*h_);
    if (args.shape.streams == 0 || ready == 0 || h.stride() < (r + 7) / 8 * 8) {
      throw std::invalid_argument("h cannot be made beside this product: ask gemm_streams first");
    }
    args.a = map_of_right(a, stream_ranks(r), type);
    args.h_made = reinterpret_cast<void*>(h.pointer);
    args.h_stride = h.stride();
    args.h_scale = static_cast<float>(h_scale);
    args.ready = reinterpret_cast<std::uint32_t*>(ready);
  }
  args.bias = reinterpret_cast<const void*>(bias);
  args.scale = static_cast<float>(scaling);
  check(launch_gemm_ext(args, {type, major_of(q), device, overlap}, stream_of(stream)),
        "gemm_ext cannot be launched");
}

using Clusters = std::array<int, 4>;  // of 1, 2, 4 and 8 CTAs

Clusters decode_occupancy(int device) {
  const On here(device);
  Clusters clusters;
  for (int i = 0; i < 4; ++i) {
    check(decode_residents(1 << i, &clusters[i]), "the device cannot be asked for its clusters");
  }
  return clusters;
}

// Why a device that holds so many clusters at once cannot place one of `cluster` CTAs, or, for 0,
// none of 2, 4 or 8.
Reason why_not_placed(const Clusters& clusters, int cluster) {
  const Occupancy occupancy{{clusters[0], clusters[1], clusters[2], clusters[3]}};
  if (decode_plan(1, 1, occupancy, cluster).ctas > 0) return {};
  return "the device cannot place a cluster of " +
         (cluster == 0 ? std::string("2, 4 or 8") : std::to_string(cluster)) +
         " CTAs, each with an SM's shared memory";
}

// (rows of W a CTA, CTAs of a cluster, CTAs): the last is the number of planes that `decode` fills.
std::tuple<int, int, int> plan_decode(int n, int r, const Clusters& clusters, int cluster) {
  if (n < 1) {
    throw std::invalid_argument("a weight of " + std::to_string(n) + " rows has no plan");
  }
  if (cluster != 0) demand(why_not_cluster(cluster));
  demand(why_not_placed(clusters, cluster));
  const Occupancy occupancy{{clusters[0], clusters[1], clusters[2], clusters[3]}};
  const DecodePlan plan = decode_plan(n, r, occupancy, cluster);
  return {plan.rows, plan.cluster, plan.ctas};
}

void decode(int device, std::uintptr_t stream, const Numbers& x_, const Numbers& w_,
            const Numbers& a_, const Numbers& b_, std::uintptr_t y, std::uintptr_t h,
            std::uintptr_t bias, std::uintptr_t weights, std::uintptr_t planes,
            std::uintptr_t sqnorm, const std::string& dtype, double scaling, int rows,
            int cluster) {
  demand(why_not_decode(dtype, x_, w_, a_, b_, cluster));
  if (rows < 16 || rows > kDecodeMaxRows || rows % 16 != 0) {
    throw std::invalid_argument("rows=" + std::to_string(rows) + " is not what decode_plan gives");
  }
  if (y == 0 || h == 0 || (planes == 0) != (sqnorm == 0)) {
    throw std::invalid_argument("y, h, and planes together with sqnorm need memory");
  }
  const On here(device);
  const Type type = *type_of(dtype);
  const Matrix x(x_), w(w_), a(a_), b(b_);
  DecodeArguments args = {};
  args.m = static_cast<int>(x.rows);
  args.n = static_cast<int>(w.rows);
  args.k = static_cast<int>(x.columns);
  args.r = static_cast<int>(a.rows);
  args.rows = rows;
  args.stages = decode_stages(rows, args.m, args.r);
  args.x = map_of(x, decode_tokens(args.m), type);
  args.w = map_of(w, rows, type);
  args.a = map_of(a, decode_ranks(args.r), type);
  args.b = map_of(b, rows, type);
  args.bias = reinterpret_cast<const void*>(bias);
  args.y = reinterpret_cast<void*>(y);
  args.h = reinterpret_cast<void*>(h);
  args.weights = reinterpret_cast<const float*>(weights);
  args.planes = reinterpret_cast<float*>(planes);
  args.scale = static_cast<float>(scaling);
  const DecodeLaunch how = {type, cluster, decode_ctas(args.n, rows, cluster),
                            reinterpret_cast<float*>(sqnorm)};
  check(launch_decode(args, how, stream_of(stream)), "decode cannot be launched");
}

py::dict build_info() {
  py::dict info;
  info["arch"] = "sm_90a";
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." +
                 std::to_string(CUDART_VERSION % 1000 / 10);
#ifdef LORADROP_DEBUG
  info["debug"] = true;
#else
  info["debug"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace loradrop

PYBIND11_MODULE(_C, m) {
  using namespace loradrop;
  m.doc() = "The CUDA kernels of loradrop, for Hopper. loradrop/op/cuda.py is their Python face.";
  m.def("build_info", &build_info);
  m.def("why_not_gemm", &why_not_gemm, py::arg("dtype"), py::arg("p"), py::arg("q"), py::arg("h"),
        py::arg("l"));
  m.def("gemm_ext", &gemm_ext, py::arg("device"), py::arg("stream"), py::arg("out"), py::arg("p"),
        py::arg("q"), py::arg("h"), py::arg("l"), py::arg("a"), py::arg("bias"), py::arg("ready"),
        py::arg("dtype"), py::arg("scaling"), py::arg("h_scale"), py::arg("overlap"),
        py::arg("tile_n"), py::arg("cluster"));
  m.def("gemm_streams", &gemm_streams, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("r"),
        py::arg("a_is_k_major"), py::arg("device"));
  m.def("why_not_decode", &why_not_decode, py::arg("dtype"), py::arg("x"), py::arg("w"),
        py::arg("a"), py::arg("b"), py::arg("cluster"));
  m.def("decode_occupancy", &decode_occupancy, py::arg("device"));
  m.def("why_not_placed", &why_not_placed, py::arg("clusters"), py::arg("cluster"));
  m.def("decode_plan", &plan_decode, py::arg("n"), py::arg("r"), py::arg("clusters"),
        py::arg("cluster"));
  m.def("decode_stages", &decode_stages, py::arg("rows"), py::arg("m"), py::arg("r"));
  m.def("shared_bytes", [](int tile_n) { return gemm_shared_bytes(tile_n); }, py::arg("tile_n"));
  m.def("decode_shared_bytes", &decode_shared_bytes, py::arg("rows"), py::arg("m"), py::arg("r"),
        py::arg("stages"));
  m.def("decode", &decode, py::arg("device"), py::arg("stream"), py::arg("x"), py::arg("w"),
        py::arg("a"), py::arg("b"), py::arg("y"), py::arg("h"), py::arg("bias"),
        py::arg("weights"), py::arg("planes"), py::arg("sqnorm"), py::arg("dtype"),
        py::arg("scaling"), py::arg("rows"), py::arg("cluster"));
}
