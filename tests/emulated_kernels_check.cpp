// gemm_ext and decode from their own source, on the emulator, against their equations. The operands are
// small integers, so sums are exact and only the last rounding is left. Run by
// tests/test_emulated_kernels.py, which puts the sources beside the emulator.

#include "kernels.h"

using namespace loradrop;

namespace {

std::mt19937 numbers(1);
const std::uint16_t kNaN = 0x7FC0;

// A row-major matrix whose rows begin at multiples of 16 bytes, NaN between them.
struct Matrix {
  long rows, columns, stride;
  std::vector<std::uint16_t> data;

  Matrix(long rows, long columns, int size)
      : rows(rows), columns(columns), stride((columns + 7) / 8 * 8), data(rows * stride, kNaN) {
    for (long row = 0; row < rows; ++row) {
      for (long column = 0; column < columns && size > 0; ++column) {
        const int value = static_cast<int>(numbers() % (2 * size + 1)) - size;
        data[row * stride + column] = to_bits(static_cast<float>(value));
      }
    }
  }
  double at(long row, long column) const { return to_float(data[row * stride + column]); }
  CUtensorMap map(int box_rows) { return {data.data(), rows, columns, stride, box_rows}; }
};

// Equal after rounding to bfloat16; `units` in the last place where s makes the sums inexact.
bool agree(std::uint16_t found, double exact, int units) {
  const int expected = to_bits(static_cast<float>(exact));
  if (units == 0) return found == expected || (exact == 0.0 && (found & 0x7FFF) == 0);
  return std::abs(to_float(found) - exact) <= std::abs(exact) * units / 256 + 0.02;
}

struct Case {
  int m, n, k, r, tile_n, cluster;
  bool q_k_major, l_k_major, bias;
  float scale;
  bool overlap;
  int streams = 0;  // clusters that make h = 0.5·p·a; l's other way round is a's
};

void check_gemm(const Case& c, unsigned seed) {
  emulator::machine.random.seed(seed);
  const Gemm shape{c.m, c.n, c.k, c.r, c.tile_n, c.cluster, c.streams};
  Matrix p(c.m, c.k, 2), h(c.m, c.r > 0 ? c.r : 1, 2), out(c.m, c.n, 0), bias(1, c.n, 3);
  Matrix q(c.q_k_major ? c.n : c.k, c.q_k_major ? c.k : c.n, 2);
  const int r = c.r > 0 ? c.r : 1;
  Matrix l(c.l_k_major ? c.n : r, c.l_k_major ? r : c.n, 2);
  const int columns = share(shape, 0).count;
  GemmArguments args = {};
  args.p = p.map(kTileM);
  args.q = q.map(c.q_k_major ? columns : kChunk);
  args.h = h.map(kTileM);
  args.l = l.map(c.l_k_major ? columns : kChunk);
  args.out = out.map(64);
  args.shape = shape;
  args.bias = c.bias ? bias.data.data() : nullptr;
  args.scale = c.scale;
  args.l_is_k_major = c.l_k_major;
  const bool a_k_major = !c.l_k_major;
  Matrix a(a_k_major ? r : c.k, a_k_major ? c.k : r, 1);
  std::vector<std::uint32_t> ready(row_blocks(shape), 1u);  // an old call's
  if (c.streams > 0) {
    args.a = a.map(a_k_major ? stream_ranks(r) : kChunk);
    args.a_is_k_major = a_k_major;
    args.h_made = h.data.data();
    args.h_stride = h.stride;
    args.h_scale = 0.5f;
    args.ready = ready.data();
    std::fill(h.data.begin(), h.data.end(), kNaN);
  }
  const std::vector<std::uint16_t> true_h = h.data;
  if (c.overlap) {  // the kernel that writes h still runs
    std::fill(h.data.begin(), h.data.end(), kNaN);
    emulator::machine.before = [&] { h.data = true_h; };
    emulator::machine.before_ended = false;
  }
  const Major major = c.q_k_major ? Major::kK : Major::kN;
  const GemmLaunch how{Type::kBFloat16, major, 0, c.overlap};
  CHECK(launch_gemm_ext(args, how, nullptr) == cudaSuccess);
  CHECK(emulator::machine.before_ended);
  const double power = std::log2(std::abs(c.scale));
  const int units = c.r > 0 && power != std::round(power) ? 1 : 0;
  for (int row = 0; c.streams > 0 && row < c.m; ++row) {
    for (int j = 0; j < c.r; ++j) {
      double exact = 0.0;
      for (int k = 0; k < c.k; ++k) exact += p.at(row, k) * (a_k_major ? a.at(j, k) : a.at(k, j));
      CHECK(agree(h.data[row * h.stride + j], 0.5 * exact, 0));
    }
  }
  for (int row = 0; row < c.m; ++row) {
    for (int column = 0; column < c.n; ++column) {
      double wide = 0.0, thin = 0.0;
      for (int k = 0; k < c.k; ++k) {
        wide += p.at(row, k) * (c.q_k_major ? q.at(column, k) : q.at(k, column));
      }
      for (int k = 0; k < c.r; ++k) {
        thin += h.at(row, k) * (c.l_k_major ? l.at(column, k) : l.at(k, column));
      }
      const double exact = wide + (c.bias ? bias.at(0, column) : 0.0) + c.scale * thin;
      CHECK(agree(out.data[row * out.stride + column], exact, units));
    }
  }
}

void check_decode(int m, int n, int k, int r, int rows, int cluster, bool with_bias, bool norm,
                  unsigned seed) {
  emulator::machine.random.seed(seed);
  emulator::machine.before_ended = true;
  Matrix x(m, k, 1), w(n, k, 1), a(r, k, 1), b(n, r, 1), bias(1, n, 3);
  std::vector<std::uint16_t> y(m * n, kNaN), h(m * r, kNaN);
  std::vector<float> weights(m);
  for (int t = 0; t < m; ++t) weights[t] = static_cast<float>(t % 3) / 2;
  const int broken = norm && m > 3 ? 3 : m;  // a token of weight 0 may hold anything
  if (broken < m) std::fill_n(&x.data[broken * x.stride], k, kNaN);
  const int ctas = decode_ctas(n, rows, cluster);
  std::vector<float> planes(ctas, NAN);
  float sqnorm = NAN;
  DecodeArguments args = {};
  args.x = x.map(decode_tokens(m));
  args.w = w.map(rows);
  args.a = a.map(decode_ranks(r));
  args.b = b.map(rows);
  args.m = m;
  args.n = n;
  args.k = k;
  args.r = r;
  args.rows = rows;
  args.stages = smaller(r < 64 ? 3 : 5, decode_stages(rows, m, r));  // A has up to 3 slots
  args.bias = with_bias ? bias.data.data() : nullptr;
  args.y = y.data();
  args.h = h.data();
  args.weights = weights.data();
  args.planes = norm ? planes.data() : nullptr;
  args.scale = 0.5f;
  CHECK(launch_decode(args, {Type::kBFloat16, cluster, ctas, &sqnorm}, nullptr) == cudaSuccess);
  double squares = 0.0;
  for (int t = 0; t < m; ++t) {
    if (t == broken) continue;
    for (int j = 0; j < r; ++j) {
      double exact = 0.0;
      for (int i = 0; i < k; ++i) exact += x.at(t, i) * a.at(j, i);
      CHECK(agree(h[t * r + j], exact, 0));
    }
    for (int row = 0; row < n; ++row) {
      double wide = 0.0, thin = 0.0;
      for (int i = 0; i < k; ++i) wide += x.at(t, i) * w.at(row, i);
      for (int j = 0; j < r; ++j) thin += to_float(h[t * r + j]) * b.at(row, j);
      const double exact = wide + (with_bias ? bias.at(0, row) : 0.0) + 0.5 * thin;
      CHECK(agree(y[t * n + row], exact, 0));
      squares += weights[t] * 0.25 * thin * thin;
    }
  }
  if (norm) CHECK(std::abs(sqnorm - squares) <= 1e-5 * squares);
}

// On the emulator's four SMs.
void check_residents() {
  for (int cluster : {1, 2, 4, 8}) {
    int count = -1;
    CHECK(decode_residents(cluster, &count) == cudaSuccess && count == 4 / cluster);
  }
}

}  // namespace

// Arguments: the kernel, or "streams" for the cases of gemm_ext that make h, and the seed of the order
// in which things happen.
int main(int count, char** arguments) {
  CHECK(count == 3);
  const bool streams = std::strcmp(arguments[1], "streams") == 0;
  const bool gemm = streams || std::strcmp(arguments[1], "gemm_ext_sm90") == 0;
  unsigned seed = std::atoi(arguments[2]);
  const Case cases[] = {
      // m    n    k   r  tile_n cluster q_k  l_k  bias scale overlap
      {1, 8, 8, 1, 128, 1, true, true, false, 1.0f, false},
      {100, 136, 200, 17, 128, 2, true, true, true, 2.0f, false},
      {129, 264, 200, 70, 256, 2, true, true, true, 1.0f, true},
      {300, 392, 130, 8, 256, 2, false, false, false, 0.75f, true},
      {260, 264, 64, 130, 128, 1, false, true, true, -3.0f, false},
      {257, 264, 70, 5, 128, 2, true, false, false, 0.25f, true},
      {130, 392, 200, 0, 256, 1, false, false, true, 5.0f, false},
      {520, 136, 72, 64, 256, 2, false, true, true, 1.0f, false},
      {130, 272, 96, 8, 256, 2, true, true, false, 1.0f, false},
      {100, 136, 130, 0, 128, 1, true, true, true, 1.0f, true},
      {200, 136, 130, 16, 128, 2, true, true, false, 1.0f, false, 1},
      {390, 72, 70, 24, 128, 2, false, false, true, 2.0f, false, 1},
      {130, 72, 600, 72, 128, 2, true, true, false, 1.0f, false, 1},
      {130, 72, 130, 40, 256, 2, false, false, false, 1.0f, false, 1},
      {140, 72, 130, 5, 128, 2, true, true, true, 1.0f, false, 1},
      {140, 136, 70, 17, 128, 2, false, false, false, 0.5f, false, 1},
  };
  if (gemm) {
    for (const Case& c : cases) {
      if (streams == (c.streams > 0)) check_gemm(c, ++seed);
    }
    return 0;
  }
  check_residents();
  check_decode(1, 16, 8, 1, 16, 1, false, false, ++seed);
  check_decode(3, 40, 600, 8, 32, 1, true, true, ++seed);  // more chunks than slots
  check_decode(5, 100, 600, 8, 32, 2, true, true, ++seed);
  check_decode(12, 130, 1000, 17, 16, 4, true, true, ++seed);
  check_decode(32, 200, 136, 100, 48, 8, true, true, ++seed);
  check_decode(17, 300, 264, 128, 128, 2, false, true, ++seed);
  check_decode(4, 40, 1100, 70, 16, 1, false, true, ++seed);  // more chunks of A than it has slots
  check_decode(9, 80, 1100, 64, 16, 2, true, false, ++seed);
  return 0;
}
