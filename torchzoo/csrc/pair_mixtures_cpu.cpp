// pair_mixtures and pair_mixtures_backward on the CPU: of a vector of inputs all functions are computed in
// registers, summed up for one or two mixtures at a time and forgotten. So x is read once for two
// mixtures, and what is returned written once.
//
// What goes to shifts and weights is summed in vectors over a stretch of a row, in doubles over a fixed
// number of rows, and then over these in their order, so that no result depends on the threads.
#include "gemm.h"
#include "pair_mixtures.h"

#include <limits>

namespace torchzoo {
namespace {

using mixtures::Apart;
using mixtures::check_gradients;
using mixtures::check_sizes;
using mixtures::End;
using mixtures::Function;
using mixtures::PairSlopes;
using mixtures::Range;
using mixtures::Sizes;
using mixtures::Together;

constexpr int64_t BLOCK = 16384;   // inputs of a task
constexpr int64_t STRETCH = 4096;  // inputs that are summed over in the type of x

template <class T>
struct Problem {
  Sizes s;
  const T *x, *weight;
  std::vector<Function<T>> functions;
  bool together;  // whether an exponential an input is enough
};

// The first `count` numbers of a vector, the others filled up.
template <class Vec, class T>
TZ_INLINE Vec load(const T* from, int64_t count, T fill) {
  constexpr int64_t lanes = sizeof(Vec) / sizeof(T);
  Vec v;
  if (count >= lanes) std::memcpy(&v, from, sizeof(v));
  else
    for (int64_t l = 0; l < lanes; ++l) v[l] = l < count ? from[l] : fill;
  return v;
}

template <class Vec, class T>
TZ_INLINE void store(const Vec& v, T* to, int64_t count) {
  constexpr int64_t lanes = sizeof(Vec) / sizeof(T);
  if (count >= lanes) std::memcpy(to, &v, sizeof(v));
  else
    for (int64_t l = 0; l < count; ++l) to[l] = v[l];
}

template <class Vec, class Int>
TZ_INLINE void take(Vec& best, Int& where, const Vec& key, const Int& place) {
  const Int better = key < best;
  best = better ? key : best;
  where = better ? place : where;
}

// The end that is the first of all lanes.
template <class T, class Vec, class Int>
TZ_INLINE End<T> first_of(const Vec& best, const Int& where) {
  End<T> end{best[0], where[0]};
  for (size_t l = 1; l < sizeof(Vec) / sizeof(T); ++l) end.take(best[l], where[l]);
  return end;
}

// A row's sums (count, D) for `count` mixtures from the one on whose weights are given, and its ends.
template <int count, class At, class Vec, class T>
TZ_INLINE void mix(const Problem<T>& p, const T* x, const T* weight, T* mixed, T* ends, int64_t* places) {
  using Int = decltype(Vec() < Vec());
  constexpr int64_t lanes = sizeof(Vec) / sizeof(T);
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const int64_t inputs = p.s.inputs, functions = p.s.functions;
  Int place, where[2], nan = {};
  for (int64_t l = 0; l < lanes; ++l) place[l] = l;
  Vec best[2] = {Vec{} + infinity, Vec{} + infinity};
  where[0] = where[1] = place;
  for (int64_t i = 0; i < inputs; i += lanes, place += lanes) {
    // beyond the row there is an input of it again: of equal ones the first is taken for an end
    const At at(load<Vec>(x + i, inputs - i, x[i]));
    Vec sum[count] = {}, least = Vec{} + infinity, most = Vec{} - infinity;
    Int bad = {};
    for (int64_t k = 0; k < functions; ++k) {
      const Vec phi = at.value(p.functions[k]);
      for (int m = 0; m < count; ++m) sum[m] += phi * weight[m * functions + k];
      least = phi < least ? phi : least;
      most = phi > most ? phi : most;
      bad |= phi != phi;
    }
    for (int m = 0; m < count; ++m) store(sum[m], mixed + m * inputs + i, inputs - i);
    take(best[0], where[0], bad ? Vec{} - infinity : least, place);
    take(best[1], where[1], bad ? Vec{} - infinity : -most, place);
    nan |= bad;
  }
  bool any = false;
  for (int64_t l = 0; l < lanes; ++l) any |= nan[l] != 0;
  for (int e = 0; e < 2; ++e) {
    const End<T> end = first_of<T>(best[e], where[e]);
    ends[e] = any ? std::numeric_limits<T>::quiet_NaN() : e ? -end.key : end.key;
    places[e] = end.place;
  }
}

template <class T>
struct Gradients {  // what comes from above, and where it goes
  const T *mixed, *ends;
  const int64_t* places;
  T* x;
};

// dx of a stretch of a row, added to what is there, and vectors of sums: for each function what goes to
// its shifts and to its weights.
template <int count, class At, class Vec, class Loose, class T>
TZ_INLINE void unmix(const Problem<T>& p, const T* x, const T* weight, const T* grad, int64_t inputs,
                     T* dx, Loose* sums) {
  constexpr int64_t lanes = sizeof(Vec) / sizeof(T);
  const int64_t functions = p.s.functions;
  for (int64_t i = 0; i < inputs; i += lanes) {
    const At at(load<Vec>(x + i, inputs - i, x[i]));
    Vec above[count], to_x = load<Vec>(dx + i, inputs - i, T(0));
    for (int m = 0; m < count; ++m) above[m] = load<Vec>(grad + m * p.s.inputs + i, inputs - i, T(0));
    Loose* sum = sums;
    for (int64_t k = 0; k < functions; ++k, sum += 2 + count) {
      const PairSlopes<Vec> d = at.slopes(p.functions[k]);
      Vec g = above[0] * weight[k];
      for (int m = 1; m < count; ++m) g += above[m] * weight[m * functions + k];
      const Vec low = g * d.low, high = g * d.high;
      to_x -= low + high;
      sum[0] += low;
      sum[1] += high;
      for (int m = 0; m < count; ++m) sum[2 + m] += above[m] * d.phi;
    }
    store(to_x, dx + i, inputs - i);
  }
}

// The same for what goes to the ends of a row, in the first two lanes. Functions that are equal there
// share it: they are computed once, into `phi`, as another time they might be rounded in another way.
template <class At, class Vec, class Loose, class T>
TZ_INLINE void unmix_ends(const Problem<T>& p, const T* x, const T* grad, const int64_t* places, T* dx,
                          Loose* sums, T* phi) {
  const int64_t functions = p.s.functions;
  Vec both = Vec{} + x[places[0]], to_x = {};
  both[1] = x[places[1]];
  const At at(both);
  T end[2] = {std::numeric_limits<T>::infinity(), -std::numeric_limits<T>::infinity()};
  for (int64_t k = 0; k < functions; ++k) {
    const Vec value = at.value(p.functions[k]);
    phi[2 * k] = value[0], phi[2 * k + 1] = value[1];
    end[0] = std::min(end[0], value[0]), end[1] = std::max(end[1], value[1]);
  }
  T ties[2] = {};  // none where a function is NaN, whose share is NaN then
  for (int64_t k = 0; k < 2 * functions; ++k) ties[k % 2] += phi[k] == end[k % 2];
  for (int64_t k = 0; k < functions; ++k) {
    const PairSlopes<Vec> d = at.slopes(p.functions[k]);
    Vec g = {};
    for (int e = 0; e < 2; ++e) g[e] = (phi[2 * k + e] == end[e] ? grad[e] : T(0)) / ties[e];
    const Vec low = g * d.low, high = g * d.high;
    to_x -= low + high;
    sums[2 * k] += low;
    sums[2 * k + 1] += high;
  }
  for (int e = 0; e < 2; ++e) dx[places[e]] += to_x[e];
}

// Adds the lanes of the sums to `part`: l, u (functions), and from `first` on weights (M, functions).
template <int count, class T, class Loose>
TZ_INLINE void flush(const Sizes& s, int64_t first, Loose* sums, double* part) {
  for (int64_t k = 0; k < s.functions; ++k)
    for (int64_t j = 0; j < 2 + count; ++j) {
      Loose& sum = sums[k * (2 + count) + j];
      double total = 0;
      for (size_t l = 0; l < sizeof(Loose) / sizeof(T); ++l) total += static_cast<double>(sum[l]);
      part[(j < 2 ? j : j + first) * s.functions + k] += total;
      sum = Loose{};
    }
}

template <int count, class At, class Vec, class Loose, class T>
TZ_INLINE void unmix_row(const Problem<T>& p, const Gradients<T>& g, int64_t row, int64_t first,
                         Loose* sums, double* part) {
  const int64_t inputs = p.s.inputs;
  const T* grad = g.mixed + (row * p.s.mixtures + first) * inputs;
  for (int64_t i = 0; i < inputs; i += STRETCH) {
    const int64_t at = row * inputs + i;
    unmix<count, At, Vec>(p, p.x + at, p.weight + first * p.s.functions, grad + i,
                          std::min(STRETCH, inputs - i), g.x + at, sums);
    flush<count, T>(p.s, first, sums, part);
  }
}

template <int bytes, template <class, class> class At, class T>
TZ_INLINE void mix_rows(const Problem<T>& p, int64_t begin, int64_t end, T* mixed, T* ends,
                        int64_t* places) {
  using Vec = typename Tile<bytes, T>::Vec;
  const int64_t inputs = p.s.inputs, functions = p.s.functions, mixtures = p.s.mixtures;
  for (int64_t row = begin; row < end; ++row)
    for (int64_t m = 0; m < mixtures; m += 2) {
      T* to = mixed + (row * mixtures + m) * inputs;
      const T *x = p.x + row * inputs, *weight = p.weight + m * functions;
      if (m + 1 < mixtures)
        mix<2, At<T, Vec>, Vec>(p, x, weight, to, ends + 2 * row, places + 2 * row);
      else
        mix<1, At<T, Vec>, Vec>(p, x, weight, to, ends + 2 * row, places + 2 * row);
    }
}

template <int bytes, template <class, class> class At, class T>
TZ_INLINE void unmix_rows(const Problem<T>& p, const Gradients<T>& g, int64_t begin, int64_t end,
                          double* part) {
  using Vec = typename Tile<bytes, T>::Vec;
  using Loose = typename Tile<bytes, T>::Loose;
  using Own = At<T, Vec>;
  const int64_t inputs = p.s.inputs, functions = p.s.functions;
  std::vector<T> held(4 * functions * Tile<bytes, T>::lanes), phi(2 * functions);
  auto* sums = reinterpret_cast<Loose*>(held.data());
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * inputs;
    std::fill_n(g.x + at, inputs, T(0));
    unmix_ends<Own, Vec>(p, p.x + at, g.ends + 2 * row, g.places + 2 * row, g.x + at, sums, phi.data());
    flush<0, T>(p.s, 0, sums, part);
    for (int64_t m = 0; m < p.s.mixtures; m += 2)
      if (m + 1 < p.s.mixtures) unmix_row<2, Own, Vec>(p, g, row, m, sums, part);
      else unmix_row<1, Own, Vec>(p, g, row, m, sums, part);
  }
}

template <int bytes, class T>
TZ_INLINE void forward_body(const Problem<T>* p, int64_t begin, int64_t end, T* mixed, T* ends,
                            int64_t* places) {
  if (p->together) mix_rows<bytes, Together>(*p, begin, end, mixed, ends, places);
  else mix_rows<bytes, Apart>(*p, begin, end, mixed, ends, places);
}
TZ_ISA(forward, forward_body)

template <int bytes, class T>
TZ_INLINE void backward_body(const Problem<T>* p, const Gradients<T>* g, int64_t begin, int64_t end,
                             double* part) {
  if (p->together) unmix_rows<bytes, Together>(*p, *g, begin, end, part);
  else unmix_rows<bytes, Apart>(*p, *g, begin, end, part);
}
TZ_ISA(backward, backward_body)

template <class T>
Problem<T> problem(const Sizes& s, const Tensor& x, const Tensor& low, const Tensor& high,
                   const Tensor& weight) {
  Problem<T> p{s, x.const_data_ptr<T>(), weight.const_data_ptr<T>(), {}, true};
  const T *l = low.const_data_ptr<T>(), *u = high.const_data_ptr<T>();
  for (int64_t k = 0; k < s.functions; ++k) {
    p.together &= std::abs(l[k]) <= Range<T>::reach && std::abs(u[k]) <= Range<T>::reach;
    p.functions.push_back({l[k], u[k], std::exp(l[k]), std::exp(-u[k])});
  }
  return p;
}

template <class Run>
void with_type(const Tensor& tensor, const Run& run) {
  if (tensor.scalar_type() == ScalarType::Double) return run.template operator()<double>();
  run.template operator()<float>();
}

int64_t rows_of_a_task(const Sizes& s) { return std::max<int64_t>(1, BLOCK / s.inputs); }

std::tuple<Tensor, Tensor, Tensor> pair_mixtures(const Tensor& x_, const Tensor& low_,
                                                 const Tensor& high_, const Tensor& weight_) {
  const Sizes s = check_sizes("pair_mixtures", x_, low_, high_, weight_);
  const Tensor x = dense(x_), low = dense(low_), high = dense(high_), weight = dense(weight_);
  Tensor mixed = torch::stable::new_empty(x, {s.rows, s.mixtures, s.inputs});
  Tensor ends = torch::stable::new_empty(x, {s.rows, 2});
  Tensor places = torch::stable::new_empty(x, {s.rows, 2}, ScalarType::Long);
  with_type(x, [&]<class T>() {
    const Problem<T> p = problem<T>(s, x, low, high, weight);
    T *to = mixed.mutable_data_ptr<T>(), *to_ends = ends.mutable_data_ptr<T>();
    int64_t* to_places = places.mutable_data_ptr<int64_t>();
    parallel_for(0, s.rows, rows_of_a_task(s), [&](int64_t begin, int64_t end) {
      forward(&p, begin, end, to, to_ends, to_places);
    });
  });
  return {mixed, ends, places};
}

// Σ of the parts (blocks, functions·(2 + M)) in their order, cut into l, u and the weights.
template <class T>
void add_up(const Sizes& s, const std::vector<double>& parts, T* low, T* high, T* weight) {
  std::vector<double> total(s.sums());
  for (size_t i = 0; i < parts.size(); ++i) total[i % s.sums()] += parts[i];
  const int64_t k = s.functions;
  std::copy_n(total.begin(), k, low);
  std::copy_n(total.begin() + k, k, high);
  std::copy_n(total.begin() + 2 * k, k * s.mixtures, weight);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_mixtures_backward(
    const Tensor& grad_, const Tensor& grad_ends_, const Tensor& x_, const Tensor& low_,
    const Tensor& high_, const Tensor& weight_, const Tensor& places_) {
  const Sizes s = check_sizes("pair_mixtures_backward", x_, low_, high_, weight_);
  check_gradients("pair_mixtures_backward", s, x_, grad_, grad_ends_, places_);
  const Tensor x = dense(x_), low = dense(low_), high = dense(high_), weight = dense(weight_);
  const Tensor grad = dense(grad_), grad_ends = dense(grad_ends_), places = dense(places_);
  const int64_t* at = places.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(std::all_of(at, at + 2 * s.rows, [&](int64_t i) { return i >= 0 && i < s.inputs; }),
                  "pair_mixtures_backward: places outside the inputs");
  Tensor dx = fresh(x), dlow = fresh(low), dhigh = fresh(high), dweight = fresh(weight);
  with_type(x, [&]<class T>() {
    const Problem<T> p = problem<T>(s, x, low, high, weight);
    const Gradients<T> g{grad.const_data_ptr<T>(), grad_ends.const_data_ptr<T>(), at,
                         dx.mutable_data_ptr<T>()};
    const int64_t rows = rows_of_a_task(s), tasks = (s.rows + rows - 1) / rows;
    std::vector<double> parts(tasks * s.sums());
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        backward(&p, &g, t * rows, std::min(s.rows, (t + 1) * rows), parts.data() + t * s.sums());
    });
    add_up(s, parts, dlow.mutable_data_ptr<T>(), dhigh.mutable_data_ptr<T>(),
           dweight.mutable_data_ptr<T>());
  });
  return {dx, dlow, dhigh, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("pair_mixtures", TORCH_BOX(&pair_mixtures));
  m.impl("pair_mixtures_backward", TORCH_BOX(&pair_mixtures_backward));
}

}  // namespace torchzoo
