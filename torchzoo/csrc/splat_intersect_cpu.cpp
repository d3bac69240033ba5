// splat_intersect: which splats can be seen in which tile, nearest first.
//
// The splats of a camera are sorted by depth once. Runs of tiles, one a row of tiles that a splat
// reaches, are found in that order by chunks of splats, which count what they add to each tile; a
// scan over the tiles, chunk by chunk within a tile, then says where each chunk's entries go. So
// every list comes out sorted, whatever the number of chunks, and nothing is sorted but the splats.
#include "splat_tile.h"

#include <array>

namespace torchzoo::splat {
namespace {

constexpr int64_t CHUNK = 512;  // splats, at the least
constexpr int64_t FEW = 256;    // splats that are sorted by comparisons

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// Numbers in the order of the depths, -0 as 0.
template <class T>
Bits<T> key(T depth) {
  const auto bits = std::bit_cast<Bits<T>>(depth + T(0));
  constexpr Bits<T> sign = Bits<T>(1) << (8 * sizeof(T) - 1);
  return bits & sign ? ~bits : bits | sign;
}

template <class T>
struct Entry {
  Bits<T> key;
  int32_t splat;
};

// By key, stable: 11 bits at a time from the lowest on, where they differ at all.
template <class T>
void sort_by_key(std::vector<Entry<T>>& entries) {
  if (static_cast<int64_t>(entries.size()) < FEW) {
    std::stable_sort(entries.begin(), entries.end(),
                     [](const auto& a, const auto& b) { return a.key < b.key; });
    return;
  }
  constexpr int digit = 11, passes = (8 * sizeof(T) + digit - 1) / digit;
  std::vector<std::array<int64_t, 1 << digit>> counts(passes);
  const auto at = [](Bits<T> key, int pass) { return (key >> (pass * digit)) & ((1 << digit) - 1); };
  for (const Entry<T>& e : entries)
    for (int pass = 0; pass < passes; ++pass) ++counts[pass][at(e.key, pass)];
  std::vector<Entry<T>> other(entries.size());
  for (int pass = 0; pass < passes; ++pass) {
    auto& count = counts[pass];
    if (count[at(entries[0].key, pass)] == static_cast<int64_t>(entries.size())) continue;
    int64_t before = 0;
    for (int64_t& c : count) before += std::exchange(c, before);
    for (const Entry<T>& e : entries) other[count[at(e.key, pass)]++] = e;
    entries.swap(other);
  }
}

struct Run {  // of tiles that follow each other in a row
  int32_t splat, first, count;
};

struct Chunk {
  std::vector<Run> runs;
  std::vector<int64_t> counts;  // a tile; later: where its next entry goes
};

struct Camera {
  std::vector<int32_t> order;  // the splats that are seen, nearest first
  std::vector<Chunk> chunks;
  int64_t total = 0;
};

template <class T>
struct Problem {
  const T *means, *depths, *shapes, *opacities, *betas;  // of all cameras; betas may be null
  const int32_t* radii;
  int64_t splats, width, height, tile, across, down;
  Kernel kernel;
  double pixel, alpha_min;
  bool boxes;

  void sort(int64_t camera, Camera& to) const {
    std::vector<Entry<T>> seen;
    seen.reserve(splats);
    for (int64_t n = 0; n < splats; ++n) {
      const int64_t i = camera * splats + n;
      if (radii[2 * i] <= 0 || radii[2 * i + 1] <= 0) continue;
      const bool finite = means[2 * i] - means[2 * i] == 0 && means[2 * i + 1] - means[2 * i + 1] == 0;
      if (finite && depths[i] == depths[i]) seen.push_back({key(depths[i]), static_cast<int32_t>(n)});
    }
    sort_by_key(seen);
    to.order.resize(seen.size());
    for (size_t k = 0; k < seen.size(); ++k) to.order[k] = seen[k].splat;
  }

  void ask_for(int64_t i) const {
    __builtin_prefetch(means + 2 * i);
    __builtin_prefetch(radii + 2 * i);
    __builtin_prefetch(shapes + 3 * i);
    __builtin_prefetch(opacities + i);
  }

  // `x` as a number of tiles within 0 … limit; NaN as 0.
  static int64_t within(double x, int64_t limit) {
    return x > 0 ? (x < static_cast<double>(limit) ? static_cast<int64_t>(x) : limit) : 0;
  }

  Chunk find(int64_t camera, const Camera& of, int64_t begin, int64_t end) const {
    Chunk to;  // its own, as chunks that lie side by side share cache lines
    const double size = static_cast<double>(tile);
    to.counts.assign(across * down, 0);
    to.runs.reserve(4 * (end - begin));
    for (int64_t k = begin; k < end; ++k) {
      const int32_t n = of.order[k];
      const int64_t i = camera * splats + n;
      ask_for(camera * splats + of.order[std::min(k + AHEAD, end - 1)]);
      const double x = means[2 * i], y = means[2 * i + 1];
      // The box in the tensors' own type, so that every implementation rounds it alike.
      const T rx = static_cast<T>(radii[2 * i]), ry = static_cast<T>(radii[2 * i + 1]);
      const int64_t left = within(std::floor((means[2 * i] - rx) / T(tile)), across);
      const int64_t right = within(std::ceil((means[2 * i] + rx) / T(tile)), across);
      const int64_t top = within(std::floor((means[2 * i + 1] - ry) / T(tile)), down);
      const int64_t bottom = within(std::ceil((means[2 * i + 1] + ry) / T(tile)), down);
      if (left >= right) continue;
      Region<double> seen{};
      if (!boxes)
        seen = region<double>(kernel, shapes[3 * i], shapes[3 * i + 1], shapes[3 * i + 2], opacities[i],
                              betas ? betas[n] : 2.0, pixel, alpha_min);
      for (int64_t row = top; row < bottom; ++row) {
        int64_t first = left, last = right;
        if (!boxes) {
          double low, high;
          const double upper = static_cast<double>(row * tile) + 0.5 - y;
          const double lower = static_cast<double>(std::min((row + 1) * tile, height)) - 0.5 - y;
          if (!extent(seen, upper, lower, low, high)) continue;
          low += x, high += x;
          if (low > static_cast<double>(width) - 0.5) continue;
          first = std::max(left, within(std::ceil((low + 0.5) / size) - 1, across));
          last = std::min(right, within(std::floor((high - 0.5) / size) + 1, across));
        }
        if (first >= last) continue;
        const int64_t at = row * across + first;
        to.runs.push_back({n, static_cast<int32_t>(at), static_cast<int32_t>(last - first)});
        for (int64_t t = at; t < at + last - first; ++t) ++to.counts[t];
      }
    }
    return to;
  }
};

// Turns counts into places in the camera's part of the lists, and says where the tiles begin in it.
void scan(Camera& of, int64_t tiles, int64_t* begins) {
  int64_t before = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    begins[t] = before;
    for (Chunk& chunk : of.chunks) before += std::exchange(chunk.counts[t], before);
  }
  of.total = before;
}

void scatter(Chunk& of, int32_t* ids) {
  for (const Run& run : of.runs)
    for (int32_t t = run.first; t < run.first + run.count; ++t) ids[of.counts[t]++] = run.splat;
}

// Runs `work(camera, chunk)` for all chunks of all cameras.
template <class Work>
void for_chunks(std::vector<Camera>& cameras, const Work& work) {
  std::vector<std::pair<int64_t, int64_t>> all;
  for (size_t c = 0; c < cameras.size(); ++c)
    for (size_t q = 0; q < cameras[c].chunks.size(); ++q) all.emplace_back(c, q);
  const int64_t count = static_cast<int64_t>(all.size());
  Queue queue(count);
  queue.share_out([&] {
    for (int64_t k; (k = queue.next()) < count;) work(all[k].first, all[k].second);
  });
}

template <class T>
Tensor lists(const Problem<T>& of, int64_t count, const Tensor& like, int64_t* offsets) {
  const int64_t tiles = of.across * of.down;
  std::vector<Camera> cameras(count);
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) of.sort(c, cameras[c]);
  });
  const int64_t most = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  for (Camera& camera : cameras)
    camera.chunks.resize(std::min<int64_t>((camera.order.size() + CHUNK - 1) / CHUNK, most));
  for_chunks(cameras, [&](int64_t c, int64_t q) {
    Camera& camera = cameras[c];
    const int64_t seen = camera.order.size(), chunks = camera.chunks.size();
    camera.chunks[q] = of.find(c, camera, q * seen / chunks, (q + 1) * seen / chunks);
  });
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) scan(cameras[c], tiles, offsets + c * tiles);
  });
  std::vector<int64_t> before(count + 1);
  for (int64_t c = 0; c < count; ++c) before[c + 1] = before[c] + cameras[c].total;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t t = 0; t < tiles; ++t) offsets[c * tiles + t] += before[c];
  offsets[count * tiles] = before[count];
  Tensor ids = fresh(like, {before[count]}, ScalarType::Int);
  int32_t* to = ids.mutable_data_ptr<int32_t>();
  for_chunks(cameras, [&](int64_t c, int64_t q) { scatter(cameras[c].chunks[q], to + before[c]); });
  return ids;
}

std::tuple<Tensor, Tensor> splat_intersect(const Tensor& means2d, const Tensor& radii, const Tensor& depths,
                                           const Tensor& shape2d, const Tensor& opacities,
                                           std::optional<Tensor> beta, int64_t width, int64_t height,
                                           int64_t tile_size, int64_t kernel, double pixel,
                                           double alpha_min, bool inria) {
  const char* op = "splat_intersect";
  const int64_t cameras = means2d.size(0), splats = means2d.size(1), all = cameras * splats;
  const ScalarType type = means2d.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
                  ": expected float32 or float64");
  STD_TORCH_CHECK(width > 0 && height > 0 && tile_size > 0, op, ": width, height or tile_size below 1");
  const int64_t across = (width + tile_size - 1) / tile_size, down = (height + tile_size - 1) / tile_size;
  STD_TORCH_CHECK(across * down <= INT32_MAX && splats <= INT32_MAX, op, ": too many tiles or splats");
  STD_TORCH_CHECK(kernel >= GAUSSIAN && kernel <= ANALYTIC, op, ": unknown kernel");
  STD_TORCH_CHECK(kernel != GENERALIZED_EXPONENTIAL || beta, op, ": no beta");
  const Tensor means = dense(means2d), sizes = dense(radii), z = dense(depths), shapes = dense(shape2d),
               o = dense(opacities), exponents = dense(beta);
  STD_TORCH_CHECK(means.numel() == 2 * all && sizes.numel() == 2 * all && z.numel() == all &&
                      shapes.numel() == 3 * all && o.numel() == all && (!beta || exponents.numel() == splats),
                  op, ": sizes don't fit each other");
  STD_TORCH_CHECK(sizes.scalar_type() == ScalarType::Int && z.scalar_type() == type &&
                      shapes.scalar_type() == type && o.scalar_type() == type &&
                      (!beta || exponents.scalar_type() == type),
                  op, ": dtypes don't fit each other");
  Tensor offsets = fresh(means2d, {cameras * across * down + 1}, ScalarType::Long);
  int64_t* begins = offsets.mutable_data_ptr<int64_t>();
  const auto run = [&]<class T>(T) {
    const Problem<T> of{means.const_data_ptr<T>(), z.const_data_ptr<T>(), shapes.const_data_ptr<T>(),
                        o.const_data_ptr<T>(), beta ? exponents.const_data_ptr<T>() : nullptr,
                        sizes.const_data_ptr<int32_t>(), splats, width, height, tile_size, across, down,
                        Kernel(kernel), pixel, alpha_min, inria};
    return lists(of, cameras, means2d, begins);
  };
  Tensor ids = type == ScalarType::Double ? run(double{}) : run(float{});
  return {offsets, ids};
}

}  // namespace
}  // namespace torchzoo::splat

STABLE_TORCH_LIBRARY_IMPL(torchzoo, CPU, m) {
  m.impl("splat_intersect", TORCH_BOX(&torchzoo::splat::splat_intersect));
}
