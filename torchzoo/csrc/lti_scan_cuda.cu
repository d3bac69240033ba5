// lti_scan on CUDA: x_l = a x_(l-1) + bu_l over l, for B sequences of M complex states, and its
// gradients G_l = dx_l + conj(a) G_(l+1), da = Σ_l G_l conj(x_(l-1)), dx0 = conj(a) G_0.
//
// A sequence is cut into spans of BLOCK steps. A thread has one state and one span, neighbouring
// threads have neighbouring states. `ends_kernel` finds what each span adds to its last state,
// `carry_kernel` goes from span to span with a^BLOCK, from double precision, and `walk_kernel` then
// walks every span from the right state. Traffic: the input twice and the states once. The cuts
// depend on the length alone, so that a sequence's states do not depend on its batch, and da is
// summed in double precision over spans and then over those in their order. Limit: 2³¹ − 1 blocks.
#include "cuda.h"
#include "vandermonde.h"

namespace torchzoo {
namespace {

constexpr int THREADS = 128;

template <class T>
struct alignas(2 * sizeof(T)) Complex {
  T re, im;
};

template <class T>
__device__ __forceinline__ Complex<T> next(Complex<T> a, Complex<T> x, Complex<T> add) {
  return {a.re * x.re - a.im * x.im + add.re, a.re * x.im + a.im * x.re + add.im};
}

// Where things are; with `reverse` the last step is the first and a stands for its conjugate.
template <bool reverse>
struct Scan {
  int64_t sequences, steps, states;

  __host__ __device__ int64_t spans() const { return blocks_of(steps); }
  __host__ __device__ int64_t threads() const { return sequences * spans() * states; }
  __device__ int64_t place(int64_t sequence, int64_t step, int64_t state) const {
    return (sequence * steps + (reverse ? steps - 1 - step : step)) * states + state;
  }
  template <class T>
  __device__ Complex<T> factor(const Complex<T>* a, int64_t state) const {
    const Complex<T> found = a[state];
    return {found.re, reverse ? -found.im : found.im};
  }
};

struct Span {
  int64_t sequence, span, state;
  __device__ Span(int64_t thread, int64_t spans, int64_t states)
      : sequence(thread / states / spans), span(thread / states % spans), state(thread % states) {}
};

// ends (B, spans, M): the last state of each span that starts from 0; not of the last span.
template <bool reverse, class T>
__global__ void __launch_bounds__(THREADS)
    ends_kernel(Scan<reverse> scan, const Complex<T>* __restrict__ a,
                const Complex<T>* __restrict__ in, Complex<T>* __restrict__ ends) {
  const int64_t thread = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (thread >= scan.threads()) return;
  const Span at(thread, scan.spans(), scan.states);
  if (at.span + 1 == scan.spans()) return;
  const Complex<T> factor = scan.factor(a, at.state);
  Complex<T> x{0, 0};
#pragma unroll 8
  for (int k = 0; k < BLOCK; ++k)
    x = next(factor, x, in[scan.place(at.sequence, at.span * BLOCK + k, at.state)]);
  ends[thread] = x;
}

// Turns `ends` into the state before each span; `start` (B, M) may be null for zeros.
template <bool reverse, class T>
__global__ void __launch_bounds__(THREADS)
    carry_kernel(Scan<reverse> scan, const Complex<T>* __restrict__ a,
                 const Complex<T>* __restrict__ start, Complex<T>* __restrict__ ends) {
  const int64_t thread = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (thread >= scan.sequences * scan.states) return;
  const int64_t sequence = thread / scan.states, state = thread % scan.states;
  const Complex<T> once = scan.factor(a, state);
  const Power span = block_power({double(once.re), double(once.im)});
  const Complex<T> factor{static_cast<T>(span.re), static_cast<T>(span.im)};
  Complex<T> x = start ? start[thread] : Complex<T>{0, 0};
  Complex<T>* at = ends + sequence * scan.spans() * scan.states + state;
#pragma unroll 4
  for (int64_t s = 0; s < scan.spans(); ++s, at += scan.states) {
    const Complex<T> end = *at;  // of the last span it is not used
    *at = x;
    x = next(factor, x, end);
  }
}

// `starts` is what carry_kernel made. Backward, `x` and `x0` are the states, `parts` (B, spans, M, 2)
// gets the sums for da, and dx0 (B, M) is written.
template <bool reverse, class T>
__global__ void __launch_bounds__(THREADS)
    walk_kernel(Scan<reverse> scan, const Complex<T>* __restrict__ a,
                const Complex<T>* __restrict__ in, const Complex<T>* __restrict__ starts,
                Complex<T>* __restrict__ out, const Complex<T>* __restrict__ x,
                const Complex<T>* __restrict__ x0, double* __restrict__ parts,
                Complex<T>* __restrict__ dx0) {
  const int64_t thread = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (thread >= scan.threads()) return;
  const Span at(thread, scan.spans(), scan.states);
  const Complex<T> factor = scan.factor(a, at.state);
  const int64_t first = at.span * BLOCK;
  const int64_t last = first + BLOCK < scan.steps ? first + BLOCK : scan.steps;
  Complex<T> now = starts[thread], sum{0, 0};
#pragma unroll 4
  for (int64_t k = first; k < last; ++k) {
    const int64_t place = scan.place(at.sequence, k, at.state);
    now = next(factor, now, in[place]);
    out[place] = now;
    if constexpr (reverse) {
      const bool begin = k + 1 == scan.steps;
      const Complex<T> before =
          begin ? x0[at.sequence * scan.states + at.state] : x[place - scan.states];
      sum.re += now.re * before.re + now.im * before.im;
      sum.im += now.im * before.re - now.re * before.im;
      if (begin) dx0[at.sequence * scan.states + at.state] = next(factor, now, {0, 0});
    }
  }
  if constexpr (reverse) {
    parts[2 * thread] = sum.re;
    parts[2 * thread + 1] = sum.im;
  }
}

// da (2 M) = the sum over `count` rows of parts (count, 2 M); WARP numbers a block.
template <class T>
__global__ void __launch_bounds__(WARP* WARP)
    total_kernel(const double* __restrict__ parts, int64_t count, int64_t size, T* __restrict__ da) {
  __shared__ double sums[WARP][WARP];
  const int64_t at = int64_t(blockIdx.x) * WARP + threadIdx.x;
  double sum = 0;
  if (at < size)
    for (int64_t row = threadIdx.y; row < count; row += WARP) sum += parts[row * size + at];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || at >= size) return;
  double total = 0;
  for (int row = 0; row < WARP; ++row) total += sums[row][threadIdx.x];
  da[at] = static_cast<T>(total);
}

unsigned grid(int64_t threads, int64_t block = THREADS) {
  const int64_t blocks = (threads + block - 1) / block;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "lti_scan: too many blocks: ", blocks);
  return static_cast<unsigned>(blocks);
}

// Contiguous, and with complex numbers that can be read as one.
Tensor dense(const Tensor& tensor) {
  const Tensor found = torch::stable::contiguous(tensor);
  const size_t size = found.scalar_type() == ScalarType::Double ? 16 : 8;
  const bool fits = reinterpret_cast<uintptr_t>(found.const_data_ptr()) % size == 0;
  return fits ? found : torch::stable::clone(found);
}

template <class T>
const Complex<T>* read(const Tensor& tensor) {
  return static_cast<const Complex<T>*>(tensor.const_data_ptr());
}

template <class T>
Complex<T>* write(Tensor& tensor) {
  return static_cast<Complex<T>*>(tensor.mutable_data_ptr());
}

// Fills `starts` (B, spans, M) with the state before each span.
template <class T, bool reverse>
void find_starts(Scan<reverse> scan, const Tensor& a, const Tensor& in, const Complex<T>* start,
                 Tensor& starts) {
  ends_kernel<<<grid(scan.threads()), THREADS, 0, stream(in)>>>(scan, read<T>(a), read<T>(in),
                                                                write<T>(starts));
  check_launch("ends_kernel");
  carry_kernel<<<grid(scan.sequences * scan.states), THREADS, 0, stream(in)>>>(
      scan, read<T>(a), start, write<T>(starts));
  check_launch("carry_kernel");
}

template <class T>
void forward(const Tensor& a, const Tensor& bu, const Tensor& x0, Tensor& x) {
  const Scan<false> scan{bu.size(0), bu.size(1), a.size(0)};
  if (!scan.threads()) return;
  Tensor starts = torch::stable::new_empty(bu, {2 * scan.threads()});
  find_starts<T>(scan, a, bu, read<T>(x0), starts);
  const Complex<T>* none = nullptr;
  walk_kernel<<<grid(scan.threads()), THREADS, 0, stream(bu)>>>(
      scan, read<T>(a), read<T>(bu), read<T>(starts), write<T>(x), none, none,
      static_cast<double*>(nullptr), static_cast<Complex<T>*>(nullptr));
  check_launch("walk_kernel");
}

template <class T>
void backward(const Tensor& grad, const Tensor& a, const Tensor& x, const Tensor& x0, Tensor& dbu,
              Tensor& da, Tensor& dx0) {
  const Scan<true> scan{grad.size(0), grad.size(1), a.size(0)};
  if (!scan.threads()) return;
  Tensor starts = torch::stable::new_empty(grad, {2 * scan.threads()});
  Tensor parts = torch::stable::new_empty(grad, {2 * scan.threads()}, ScalarType::Double);
  find_starts<T>(scan, a, grad, static_cast<const Complex<T>*>(nullptr), starts);
  double* sums = static_cast<double*>(parts.mutable_data_ptr());
  walk_kernel<<<grid(scan.threads()), THREADS, 0, stream(grad)>>>(
      scan, read<T>(a), read<T>(grad), read<T>(starts), write<T>(dbu), read<T>(x), read<T>(x0), sums,
      write<T>(dx0));
  check_launch("walk_kernel");
  const int64_t size = 2 * scan.states;
  total_kernel<<<grid(size, WARP), dim3(WARP, WARP), 0, stream(grad)>>>(
      static_cast<const double*>(sums), scan.sequences * scan.spans(), size,
      static_cast<T*>(da.mutable_data_ptr()));
  check_launch("total_kernel");
}

void check(const Tensor& a, const Tensor& sequences, const Tensor& x0) {
  const ScalarType type = a.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) &&
                      sequences.scalar_type() == type && x0.scalar_type() == type,
                  "lti_scan: expected float32 or float64, one type");
  STD_TORCH_CHECK(a.dim() == 2 && sequences.dim() == 4 && x0.dim() == 3 && a.size(1) == 2 &&
                      sequences.size(3) == 2 && x0.size(2) == 2 && sequences.size(2) == a.size(0) &&
                      x0.size(1) == a.size(0) && x0.size(0) == sequences.size(0),
                  "lti_scan: shapes that don't fit together");
  check_devices("lti_scan", {a, sequences, x0});
}

Tensor lti_scan(const Tensor& a, const Tensor& bu, const Tensor& x0) {
  check(a, bu, x0);
  const DeviceGuard guard(bu.get_device_index());
  const Tensor in = dense(bu);
  Tensor x = torch::stable::empty_like(in);
  if (a.scalar_type() == ScalarType::Double) forward<double>(dense(a), in, dense(x0), x);
  else forward<float>(dense(a), in, dense(x0), x);
  return x;
}

std::tuple<Tensor, Tensor, Tensor> lti_scan_backward(const Tensor& grad, const Tensor& a,
                                                     const Tensor& x, const Tensor& x0) {
  check(a, grad, x0);
  STD_TORCH_CHECK(x.numel() == grad.numel() && x.scalar_type() == grad.scalar_type(),
                  "lti_scan_backward: x must be as grad");
  check_devices("lti_scan_backward", {grad, x});
  const DeviceGuard guard(grad.get_device_index());
  const Tensor g = dense(grad), factors = dense(a), start = dense(x0);
  Tensor dbu = torch::stable::empty_like(g), da = torch::stable::new_zeros(factors, {a.size(0), 2}),
         dx0 = torch::stable::new_zeros(start, {x0.size(0), x0.size(1), int64_t(2)});
  if (a.scalar_type() == ScalarType::Double)
    backward<double>(g, factors, dense(x), start, dbu, da, dx0);
  else
    backward<float>(g, factors, dense(x), start, dbu, da, dx0);
  return {dbu, da, dx0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CUDA, m) {
  m.impl("lti_scan", TORCH_BOX(&lti_scan));
  m.impl("lti_scan_backward", TORCH_BOX(&lti_scan_backward));
}

}  // namespace torchzoo
