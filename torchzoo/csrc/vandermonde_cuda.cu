// vandermonde on CUDA: y_l = c Re Σ_n v_n x_n^l (or the complex sum), and its transposed product
// s_n = c Σ_l g_l conj(x_n^l), with x = exp(log_x), c = 2 for conjugate pairs and 1 else.
//
// Lags are l = BLOCK · i + j. Forward, a block of threads has ROWS · BLOCK lags of one sequence and
// goes through the states, STATES at a time: it puts v x^(BLOCK i) and x^j of those into shared
// memory and adds their products in registers. Transposed, it has one sequence and WIDE states, goes
// through the lags, sums g x^(BLOCK i) over i for each j in registers, and weights with x^j last.
// Powers are computed in double precision wherever they are needed, at less than the cost of the
// products; nothing but inputs and results touches memory. No atomics: the same sums each time.
// Limit: 2³¹ − 1 blocks.
#include "cuda.h"
#include "vandermonde.h"

namespace torchzoo {
namespace {

constexpr int THREADS = 256;
constexpr int ROWS = 32;    // blocks of lags that are in shared memory at once
constexpr int STATES = 16;  // states that are, forward
constexpr int WIDE = 32;    // and transposed
constexpr int LAGS = 4;     // lags of a thread, GROUPS apart
constexpr int GROUPS = BLOCK / LAGS;

template <class T>
struct alignas(2 * sizeof(T)) Complex {
  T re, im;
};

template <class T>
__device__ Complex<T> narrowed(Power x) {
  return {static_cast<T>(x.re), static_cast<T>(x.im)};
}

struct Sizes {
  int64_t channels, rows, states, lags;
};

// The bases of the states from `first` on, and their BLOCK-th powers; those past the last are 0.
template <int count, class T>
__device__ void load_bases(const T* log_x, int64_t first, int64_t states, Power* base, Power* step) {
  const int n = threadIdx.x;
  if (n >= count) return;
  Power x{0, 0};
  if (first + n < states)
    x = exponential(double(log_x[2 * (first + n)]), double(log_x[2 * (first + n) + 1]));
  base[n] = x;
  step[n] = block_power(x);
}

template <bool pairs, class T>
__global__ void __launch_bounds__(THREADS)
    forward_kernel(const T* __restrict__ v, const T* __restrict__ log_x, Sizes sizes,
                   int64_t tiles, T* __restrict__ y) {
  __shared__ Complex<T> low[STATES][BLOCK], left[STATES][ROWS];
  __shared__ Power base[STATES], step[STATES];
  const int64_t sequence = blockIdx.x / tiles, row = blockIdx.x % tiles * ROWS;
  const int64_t h = sequence % sizes.rows;
  log_x += h * sizes.states * 2;
  v += sequence * sizes.states * 2;
  const int group = threadIdx.x % GROUPS, pair = threadIdx.x / GROUPS;  // also: states to fill in
  Complex<T> sum[2][LAGS] = {};
  for (int64_t first = 0; first < sizes.states; first += STATES) {
    __syncthreads();  // the last powers have been read
    load_bases<STATES>(log_x, first, sizes.states, base, step);
    __syncthreads();
    Power x = raised(base[pair], group * LAGS);
#pragma unroll
    for (int j = 0; j < LAGS; ++j, x = times(x, base[pair]))
      low[pair][group * LAGS + j] = narrowed<T>(x);
    Power weight{0, 0};
    if (first + pair < sizes.states)
      weight = {double(v[2 * (first + pair)]), double(v[2 * (first + pair) + 1])};
    x = times(weight, raised(step[pair], row + 2 * group));
    left[pair][2 * group] = narrowed<T>(x);
    left[pair][2 * group + 1] = narrowed<T>(times(x, step[pair]));
    __syncthreads();
#pragma unroll
    for (int n = 0; n < STATES; ++n) {
      Complex<T> power[LAGS];
#pragma unroll
      for (int j = 0; j < LAGS; ++j) power[j] = low[n][j * GROUPS + group];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Complex<T> a = left[n][2 * pair + r];
#pragma unroll
        for (int j = 0; j < LAGS; ++j) {
          sum[r][j].re += a.re * power[j].re - a.im * power[j].im;
          if constexpr (!pairs) sum[r][j].im += a.re * power[j].im + a.im * power[j].re;
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int j = 0; j < LAGS; ++j) {
      const int64_t lag = (row + 2 * pair + r) * BLOCK + j * GROUPS + group;
      if (lag >= sizes.lags) continue;
      const int64_t at = sequence * sizes.lags + lag;
      if constexpr (pairs) {
        y[at] = 2 * sum[r][j].re;
      } else {
        y[2 * at] = sum[r][j].re;
        y[2 * at + 1] = sum[r][j].im;
      }
    }
}
static_assert(THREADS == STATES * GROUPS && ROWS == 2 * GROUPS && ROWS == 2 * (THREADS / GROUPS));

template <bool pairs, class T>
__global__ void __launch_bounds__(THREADS)
    transposed_kernel(const T* __restrict__ g, const T* __restrict__ log_x, Sizes sizes,
                      int64_t tiles, T* __restrict__ s) {
  constexpr int parts = pairs ? 1 : 2, rows = ROWS * 4 / sizeof(T);
  constexpr int filled = rows * WIDE / THREADS;
  __shared__ T part[parts][rows][BLOCK];
  __shared__ Complex<T> high[WIDE][rows];
  __shared__ Power base[WIDE], step[WIDE];
  const int64_t sequence = blockIdx.x / tiles, first = blockIdx.x % tiles * WIDE;
  const int64_t h = sequence % sizes.rows, blocks = blocks_of(sizes.lags);
  log_x += h * sizes.states * 2;
  g += sequence * sizes.lags * parts;
  load_bases<WIDE>(log_x, first, sizes.states, base, step);
  const int group = threadIdx.x % GROUPS, own = threadIdx.x / GROUPS;  // states own, own + GROUPS
  const int state = threadIdx.x / (rows / filled), from = threadIdx.x % (rows / filled) * filled;
  Complex<T> sum[2][LAGS] = {};
  for (int64_t row = 0; row < blocks; row += rows) {
    __syncthreads();  // bases are there, the last powers have been read
    Power x = raised(step[state], row + from);
#pragma unroll
    for (int r = 0; r < filled; ++r, x = times(x, step[state])) high[state][from + r] = narrowed<T>(x);
    for (int k = threadIdx.x; k < rows * BLOCK * parts; k += THREADS) {
      const int64_t at = row * BLOCK * parts + k;
      const T value = at < sizes.lags * parts ? g[at] : T(0);
      part[k % parts][k / parts / BLOCK][k / parts % BLOCK] = value;
    }
    __syncthreads();
#pragma unroll 4
    for (int r = 0; r < rows; ++r) {
      T re[LAGS], im[LAGS];
#pragma unroll
      for (int j = 0; j < LAGS; ++j) {
        re[j] = part[0][r][j * GROUPS + group];
        im[j] = pairs ? T(0) : part[parts - 1][r][j * GROUPS + group];
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const Complex<T> power = high[own + n * GROUPS][r];
#pragma unroll
        for (int j = 0; j < LAGS; ++j) {  // times the conjugate
          sum[n][j].re += re[j] * power.re;
          sum[n][j].im -= re[j] * power.im;
          if constexpr (!pairs) {
            sum[n][j].re += im[j] * power.im;
            sum[n][j].im += im[j] * power.re;
          }
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int local = own + n * GROUPS;
    const Power ahead = raised(base[local], GROUPS);
    Power x = raised(base[local], group);
    Complex<T> total{0, 0};
#pragma unroll
    for (int j = 0; j < LAGS; ++j, x = times(x, ahead)) {
      const Complex<T> power = narrowed<T>(x);
      total.re += sum[n][j].re * power.re + sum[n][j].im * power.im;
      total.im += sum[n][j].im * power.re - sum[n][j].re * power.im;
    }
#pragma unroll
    for (int lanes = GROUPS / 2; lanes; lanes /= 2) {  // over the groups, which are neighbours
      total.re += __shfl_xor_sync(ALL_LANES, total.re, lanes);
      total.im += __shfl_xor_sync(ALL_LANES, total.im, lanes);
    }
    if (group == 0 && first + local < sizes.states) {
      T* to = s + (sequence * sizes.states + first + local) * 2;
      to[0] = (pairs ? 2 : 1) * total.re;
      to[1] = (pairs ? 2 : 1) * total.im;
    }
  }
}
static_assert(WIDE == 2 * (THREADS / GROUPS) && GROUPS == THREADS / GROUPS && GROUPS <= WARP);

unsigned grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "vandermonde: too many blocks: ", blocks);
  return static_cast<unsigned>(blocks);
}

template <bool forward, bool pairs, class T>
void launch(const Tensor& in, const Tensor& log_x, Sizes sizes, Tensor& out) {
  const int64_t tiles = forward ? (blocks_of(sizes.lags) + ROWS - 1) / ROWS
                                : (sizes.states + WIDE - 1) / WIDE;
  const int64_t blocks = sizes.channels * sizes.rows * tiles;
  if (!blocks) return;
  const T *from = in.const_data_ptr<T>(), *bases = log_x.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  if constexpr (forward)
    forward_kernel<pairs><<<grid(blocks), THREADS, 0, stream(in)>>>(from, bases, sizes, tiles, to);
  else
    transposed_kernel<pairs><<<grid(blocks), THREADS, 0, stream(in)>>>(from, bases, sizes, tiles, to);
  check_launch(forward ? "forward_kernel" : "transposed_kernel");
}

template <bool forward>
void run(const Tensor& in, const Tensor& log_x, int64_t lags, bool conj, Tensor& out) {
  const ScalarType type = log_x.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) &&
                      in.scalar_type() == type,
                  "vandermonde: expected float32 or float64, one type");
  check_devices("vandermonde", {in, log_x});
  const DeviceGuard guard(in.get_device_index());
  const Tensor dense = torch::stable::contiguous(in), bases = torch::stable::contiguous(log_x);
  const Sizes sizes{in.size(0), log_x.size(0), log_x.size(1), lags};
  const auto with = [&]<class T>(T) {
    if (conj) launch<forward, true, T>(dense, bases, sizes, out);
    else launch<forward, false, T>(dense, bases, sizes, out);
  };
  if (type == ScalarType::Double) with(double());
  else with(float());
}

Tensor vandermonde(const Tensor& v, const Tensor& log_x, int64_t lags, bool conj) {
  STD_TORCH_CHECK(log_x.dim() == 3 && v.dim() == 4 && log_x.size(2) == 2 && v.size(3) == 2 &&
                      v.size(1) == log_x.size(0) && v.size(2) == log_x.size(1) && lags >= 1,
                  "vandermonde: shapes that don't fit together");
  std::vector<int64_t> shape{v.size(0), v.size(1), lags};
  if (!conj) shape.push_back(2);
  Tensor out = torch::stable::new_empty(v, shape);
  run<true>(v, log_x, lags, conj, out);
  return out;
}

Tensor vandermonde_transposed(const Tensor& grad, const Tensor& log_x, bool conj) {
  STD_TORCH_CHECK(log_x.dim() == 3 && log_x.size(2) == 2 && grad.dim() == (conj ? 3 : 4) &&
                      grad.size(1) == log_x.size(0) && (conj || grad.size(3) == 2) &&
                      grad.size(2) >= 1,
                  "vandermonde_transposed: shapes that don't fit together");
  Tensor out =
      torch::stable::new_empty(grad, {grad.size(0), grad.size(1), log_x.size(1), int64_t(2)});
  run<false>(grad, log_x, grad.size(2), conj, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("vandermonde", TORCH_BOX(&vandermonde));
  m.impl("vandermonde_transposed", TORCH_BOX(&vandermonde_transposed));
}

}  // namespace torchzoo
