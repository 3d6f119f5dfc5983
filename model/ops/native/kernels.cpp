// Kernels of decoding on a CPU, which PyTorch has not, or has in many parts: attention that reads pages, products of a
// few rows, norms and rotations in one pass over memory. Plain C++ behind a C interface: the compiler needs nothing but
// itself, and a second or two.
//
// Every output is computed in an order that depends on its own row or sequence alone, never on its company or on the
// number of threads: a request gets the same bits in any batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <unordered_map>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int W = 8;  // numbers of a vector: AVX2's, of which AVX-512 has twice as many registers
typedef float Vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t Half __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef int32_t Int __attribute__((vector_size(4 * W)));
struct bf16 { uint16_t bits; };
constexpr int64_t MOST_SIZE = 512;  // of a head
constexpr int64_t LINE = 64;       // bytes of a line of the caches
constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec load(const bf16* p) { return (Vec)(__builtin_convertvector(*reinterpret_cast<const Half*>(p), Bits) << 16); }
inline float one(float x) { return x; }
inline float one(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {  // to the nearest, of two the even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline void store(bf16* p, Vec v) {
  for (int i = 0; i < W; ++i) put(p + i, v[i]);
}

// The sums of four vectors.
inline void sums(Vec a, Vec b, Vec c, Vec d, float* out) {
#if defined(__AVX2__)
  const __m256 both = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#else
  const Vec* all[] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i) {
    const Vec& v = *all[i];
    out[i] = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  }
#endif
}
inline float sum(Vec v) {
  float out[4];
  sums(v, v, v, v, out);
  return out[0];
}

// e^x for x <= 0 to 2 units in the last place (Cephes' polynomial), 0 below -87, no number of what is none.
inline Vec exponential(Vec x) {
  const Vec low = Vec{} - 87.0f;
  const Vec bounded = x > low ? x : low;
  const Int k = __builtin_convertvector(bounded * 1.44269504088896341f - 0.5f, Int);
  const Vec f = __builtin_convertvector(k, Vec);
  const Vec r = (bounded - f * 0.693359375f) + f * 2.12194440e-4f;
  Vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  y *= (Vec)((k + 127) << 23);
  return x > low ? y : (x == x ? Vec{} : x);
}

// Work in so many parts, each taken by whoever is free.
template <typename F>
void parallel(int64_t count, int threads, F&& work) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) work(i);
}

// Rows of so many numbers; few of them are done at once.
template <typename F>
void by_row(int64_t count, int64_t width, int threads, F&& work) {
  constexpr int64_t AT_ONCE = 8;
  if (count * width < (1 << 16)) threads = 1;
  parallel((count + AT_ONCE - 1) / AT_ONCE, threads, [&](int64_t part) {
    for (int64_t i = part * AT_ONCE; i < std::min(count, (part + 1) * AT_ONCE); ++i) work(i);
  });
}

// ---- attention by page --------------------------------------------------------------------------------------------

constexpr int64_t STEP = 16;  // positions at a time: their keys and values stay in the first cache for all queries

struct Shape { int64_t heads, kv_heads, size, page; };
struct Partial { float *most, *total, *out; };  // [heads], [heads], [heads, size]

template <int COUNT, typename T>
inline void add_values(float* out, const float* weights, const T* v, int64_t stride, int64_t seen) {
  Vec sum[COUNT];
  for (int j = 0; j < COUNT; ++j) sum[j] = load(out + j * W);
  for (int64_t p = 0; p < seen; ++p)
    for (int j = 0; j < COUNT; ++j) sum[j] += weights[p] * load(v + p * stride + j * W);
  for (int j = 0; j < COUNT; ++j) store(out + j * W, sum[j]);
}

// One key-value head's next `seen` positions, at most STEP, into the partial result of one head: online softmax.
template <int SIZE, typename T>
inline void head_step(const float* q, const T* k, const T* v, int64_t own_size, int64_t stride, int64_t seen,
                      float& most, float& total, float* out) {
  const int64_t size = SIZE ? SIZE : own_size;
  float w[STEP];
  for (int64_t p = 0; p < seen; p += 4) {
    Vec s[4] = {};
    const int64_t rows = std::min<int64_t>(4, seen - p);
    const T* row = k + p * stride;
    if (rows == 4) {
      for (int64_t h = 0; h < size; h += W)
        for (int j = 0; j < 4; ++j) s[j] += load(q + h) * load(row + j * stride + h);
    } else {
      for (int64_t j = 0; j < rows; ++j)
        for (int64_t h = 0; h < size; h += W) s[j] += load(q + h) * load(row + j * stride + h);
    }
    sums(s[0], s[1], s[2], s[3], w + p);
  }
  for (int64_t p = seen; p < STEP; ++p) w[p] = -INFINITE;
  float high = w[0];
  for (int64_t p = 1; p < seen; ++p) high = w[p] > high ? w[p] : high;
  if (!(high <= most)) {
    const float shrink = most == -INFINITE ? 0.0f : std::exp(most - high);
    total *= shrink;
    for (int64_t h = 0; h < size; h += W) store(out + h, load(out + h) * shrink);
    most = high;
  }
  Vec added{};
  for (int64_t p = 0; p < STEP; p += W) {
    const Vec e = exponential(load(w + p) - most);
    store(w + p, e);
    added += e;
  }
  total += sum(added);
  int64_t h = 0;
  for (; h + 8 * W <= size; h += 8 * W) add_values<8>(out + h, w, v + h, stride, seen);
  for (; h + 4 * W <= size; h += 4 * W) add_values<4>(out + h, w, v + h, stride, seen);
  for (; h < size; h += W) add_values<1>(out + h, w, v + h, stride, seen);
}

// Some queries that see the same pages, each its first `seen` positions of them.
template <int SIZE, typename T>
void piece(const Shape& s, const T* keys, const T* values, const int64_t* pages, int64_t length, const float* q,
           const int64_t* tokens, const int64_t* seen, const Partial* partials, int64_t count) {
  const int64_t size = SIZE ? SIZE : s.size, group = s.heads / s.kv_heads, stride = s.kv_heads * size;
  for (int64_t i = 0; i < count; ++i) {
    std::fill_n(partials[i].most, s.heads, -INFINITE);
    std::fill_n(partials[i].total, s.heads, 0.0f);
    std::fill_n(partials[i].out, s.heads * size, 0.0f);
  }
  for (int64_t begin = 0; begin < length;) {
    const int64_t at = begin % s.page, steps = std::min({STEP, length - begin, s.page - at});
    const int64_t offset = (pages[begin / s.page] * s.page + at) * stride;
    const int64_t next = begin + steps, further = next < length ? std::min({STEP, length - next, s.page - next % s.page}) : 0;
    const int64_t ahead = further ? (pages[next / s.page] * s.page + next % s.page) * stride : 0;
    for (int64_t head = 0; head < s.kv_heads; ++head) {
      // a head's keys lie too far apart for the processor to foresee them
      for (int64_t p = 0; p < further; ++p)
        for (int64_t h = 0; h < size; h += int64_t(LINE / sizeof(T))) {
          __builtin_prefetch(keys + ahead + p * stride + head * size + h, 0, 2);
          __builtin_prefetch(values + ahead + p * stride + head * size + h, 0, 2);
        }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t own = std::min(steps, seen[i] - begin);
        for (int64_t n = head * group; own > 0 && n < (head + 1) * group; ++n)
          head_step<SIZE>(q + (tokens[i] * s.heads + n) * size, keys + offset + head * size,
                          values + offset + head * size, size, stride, own, partials[i].most[n], partials[i].total[n],
                          partials[i].out + n * size);
      }
    }
    begin += steps;
  }
}

template <typename T>
void attend(const Shape& s, float scale, const T* query, const T* keys, const T* values, T* out, int64_t tokens,
            const int64_t* pages, const int64_t* items, int64_t item_count, const int64_t* queries,
            const int64_t* parts, float* room, int threads) {
  // items [I, 4]: first of its pages, positions, first of its queries, queries; queries [Q, 3]: token, positions seen,
  // partial; parts [tokens + 1]: each token's first partial. room: [tokens * heads * size] for scaled queries, then
  // partials of heads * (size + 2).
  const int64_t row = s.heads * s.size, width = row + 2 * s.heads;
  float* scaled = room;
  float* partial = room + tokens * row;
  for (int64_t i = 0; i < tokens * row; ++i) scaled[i] = one(query[i]) * scale;
  parallel(item_count, threads, [&](int64_t item) {
    const int64_t* own = items + 4 * item;
    const int64_t count = own[3];
    std::vector<int64_t> token(count), seen(count);
    std::vector<Partial> into(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t* given = queries + 3 * (own[2] + i);
      float* at = partial + given[2] * width;
      token[i] = given[0], seen[i] = given[1], into[i] = {at, at + s.heads, at + 2 * s.heads};
    }
    const auto work = s.size == 64 ? piece<64, T> : s.size == 128 ? piece<128, T> : piece<0, T>;
    work(s, keys, values, pages + own[0], own[1], scaled, token.data(), seen.data(), into.data(), count);
  });
  by_row(tokens, row, threads, [&](int64_t t) {
    for (int64_t n = 0; n < s.heads; ++n) {
      const float* first = partial + parts[t] * width;
      float most = -INFINITE, total = 0.0f;
      for (int64_t p = parts[t]; p < parts[t + 1]; ++p) {
        const float high = first[(p - parts[t]) * width + n];
        most = !(high <= most) ? high : most;
      }
      float* sum = scaled + t * row + n * s.size;  // read for the last time
      std::fill_n(sum, s.size, 0.0f);
      for (int64_t p = 0; p < parts[t + 1] - parts[t]; ++p) {
        const float* own = first + p * width;
        const float weight = std::exp(own[n] - most);
        total += weight * own[s.heads + n];
        for (int64_t h = 0; h < s.size; h += W)
          store(sum + h, load(sum + h) + weight * load(own + 2 * s.heads + n * s.size + h));
      }
      for (int64_t h = 0; h < s.size; h += W) store(out + t * row + n * s.size + h, load(sum + h) / total);
    }
  });
}

// Which pieces of work the attention of a pass falls into: `chunk` positions, a multiple of the page, of a sequence; or
// of several whose pages there are the same, which are then read once for all. tables: the sequences' pages side by side,
// those of sequence b from first[b]; its last counts[b] tokens, of ends[b] positions, ask. Gives the number of pieces.
int64_t plan(const int64_t* tables, const int64_t* first, const int64_t* counts, const int64_t* ends, int64_t sequences,
             int64_t page, int64_t chunk, int64_t together, int64_t* items, int64_t* queries, int64_t* parts) {
  int64_t token = 0, longest = 0, partial = 0;
  std::vector<int64_t> begins(sequences);
  for (int64_t b = 0; b < sequences; ++b) {
    begins[b] = token;
    longest = std::max(longest, ends[b]);
    for (int64_t i = 0; i < counts[b]; ++i) {
      parts[token++] = partial;
      partial += (ends[b] - counts[b] + i) / chunk + 1;
    }
  }
  parts[token] = partial;
  int64_t item_count = 0, query_count = 0;
  std::unordered_map<int64_t, std::vector<int64_t>> heads;  // first page -> sequences that begin a piece with it
  std::vector<std::vector<int64_t>> groups;
  for (int64_t c = 0; c * chunk < longest; ++c) {
    heads.clear();
    groups.clear();
    const int64_t begin = c * chunk, pages = chunk / page;
    const auto at = [&](int64_t b) { return tables + first[b] + c * pages; };
    for (int64_t b = 0; b < sequences; ++b) {
      if (ends[b] <= begin) continue;
      bool found = false;
      if (ends[b] - counts[b] >= begin + chunk - 1) {  // all of its tokens see all of the chunk
        for (const int64_t g : heads[*at(b)]) {
          const int64_t other = groups[g][0];
          if (int64_t(groups[g].size()) < together && std::equal(at(b), at(b) + pages, at(other))) {
            groups[g].push_back(b);
            found = true;
            break;
          }
        }
        if (!found) heads[*at(b)].push_back(groups.size());
      }
      if (!found) groups.push_back({b});
    }
    for (const auto& group : groups) {
      int64_t* item = items + 4 * item_count++;
      item[0] = at(group[0]) - tables, item[1] = std::min(chunk, ends[group[0]] - begin), item[2] = query_count;
      for (const int64_t b : group)
        for (int64_t i = 0; i < counts[b]; ++i) {
          const int64_t seen = ends[b] - counts[b] + i + 1 - begin;
          if (seen <= 0) continue;
          int64_t* query = queries + 3 * query_count++;
          query[0] = begins[b] + i, query[1] = std::min(chunk, seen), query[2] = parts[begins[b] + i] + c;
        }
      item[3] = query_count - item[2];
    }
  }
  return item_count;
}

// ---- products -----------------------------------------------------------------------------------------------------

// out[r, o] = x[r] . weight[o] for ROWS rows and 4 outputs: 4 weights and ROWS states are loaded for 4 * ROWS products.
// The first rows fetch the weights that come next.
template <int ROWS, bool FIRST, typename T, typename X>
inline void tile(const X* x, int64_t ldx, const T* weight, int64_t inputs, X* out, int64_t ldo) {
  Vec s[ROWS][4] = {};
  for (int64_t i = 0; i < inputs; i += W) {
    if (FIRST && i % int64_t(LINE / sizeof(T)) == 0)
      for (int j = 4; j < 8; ++j) __builtin_prefetch(weight + j * inputs + i, 0, 2);
    Vec w[4];
    for (int j = 0; j < 4; ++j) w[j] = load(weight + j * inputs + i);
    for (int r = 0; r < ROWS; ++r) {
      const Vec own = load(x + r * ldx + i);
      for (int j = 0; j < 4; ++j) s[r][j] += own * w[j];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    float found[4];
    sums(s[r][0], s[r][1], s[r][2], s[r][3], found);
    for (int j = 0; j < 4; ++j) put(out + r * ldo + j, found[j]);
  }
}

template <typename T>
void product(const T* x, int64_t rows, const T* weight, int64_t inputs, int64_t outputs, T* out, int threads) {
  const int64_t share = std::max<int64_t>(4, std::min<int64_t>(64, (outputs / (4 * threads) + 3) / 4 * 4));
  parallel((outputs + share - 1) / share, threads, [&](int64_t part) {
    const int64_t end = std::min(outputs, (part + 1) * share);
    for (int64_t o = part * share; o < end; o += 4) {
      const T* w = weight + o * inputs;
      const int64_t first = rows % 3 ? rows % 3 : 3;
      if (first == 1) tile<1, true>(x, inputs, w, inputs, out + o, outputs);
      if (first == 2) tile<2, true>(x, inputs, w, inputs, out + o, outputs);
      if (first == 3) tile<3, true>(x, inputs, w, inputs, out + o, outputs);
      for (int64_t r = first; r < rows; r += 3)
        tile<3, false>(x + r * inputs, inputs, w, inputs, out + r * outputs + o, outputs);
    }
  });
}

// ---- norms, rotations, the gate -----------------------------------------------------------------------------------

template <typename T>
inline float square(const T* x, int64_t width) {
  Vec s{};
  for (int64_t d = 0; d < width; d += W) s += load(x + d) * load(x + d);
  return sum(s);
}

// added += more, if there is more; normal = added / rms(added) * weight
template <typename T>
void add_norm(T* added, const T* more, const T* weight, T* normal, int64_t rows, int64_t width, float eps,
              int threads) {
  by_row(rows, width, threads, [&](int64_t r) {
    T* x = added + r * width;
    if (more)
      for (int64_t d = 0; d < width; d += W) store(x + d, load(x + d) + load(more + r * width + d));
    const float scale = 1.0f / std::sqrt(square(x, width) / width + eps);
    for (int64_t d = 0; d < width; d += W) store(normal + r * width + d, load(x + d) * scale * load(weight + d));
  });
}

template <typename T>
void gate(const T* both, T* out, int64_t rows, int64_t width, int threads) {
  const auto row = [&](int64_t r) {
    const T* x = both + r * 2 * width;
    for (int64_t f = 0; f < width; f += W) {
      const Vec g = load(x + f), up = load(x + width + f), zero{};
      const Vec e = exponential(g > zero ? zero - g : g);  // of -|g|
      const Vec share = (g > zero ? zero + 1.0f : e) / (e + 1.0f);
      store(out + r * width + f, g * share * up);
    }
  };
  by_row(rows, width, threads, row);
}

// Queries, keys and values of a pass side by side, [T, heads + 2 kv_heads, size]: the first two normalized and turned,
// keys and values written to their slots of the cache. kind: 0 no norm, 1 LayerNorm, 2 RMSNorm.
template <typename T>
void norm_rotate(const T* projected, const T* weight, const T* bias, int kind, float eps, const float* rope,
                 const int64_t* positions, const int64_t* slots, T* query, T* keys, T* values, int64_t tokens,
                 const Shape& s, int threads) {
  const int64_t size = s.size, width = (s.heads + 2 * s.kv_heads) * size;
  by_row(tokens, width, threads, [&](int64_t t) {
    float x[MOST_SIZE];
    const float* turn = rope + positions[t] * size;
    for (int64_t n = 0; n < s.heads + s.kv_heads; ++n) {
      const T* from = projected + t * width + n * size;
      for (int64_t h = 0; h < size; h += W) store(&x[h], load(from + h));
      if (kind) {
        float mean = 0.0f;
        if (kind == 1) {
          Vec total{};
          for (int64_t h = 0; h < size; h += W) total += load(&x[h]);
          mean = sum(total) / size;
          for (int64_t h = 0; h < size; h += W) store(&x[h], load(&x[h]) - mean);
        }
        const float scale = 1.0f / std::sqrt(square(x, size) / size + eps);
        for (int64_t h = 0; h < size; h += W) {
          Vec y = load(&x[h]) * scale * load(weight + n * size + h);
          if (bias) y += load(bias + n * size + h);
          store(&x[h], y);
        }
      }
      T* to = n < s.heads ? query + (t * s.heads + n) * size
                          : keys + (slots[t] * s.kv_heads + n - s.heads) * size;
      for (int64_t h = 0; h < size; h += 2) {
        const float even = x[h], odd = x[h + 1], cosine = turn[h], sine = turn[h + 1];
        put(to + h, even * cosine - odd * sine);
        put(to + h + 1, even * sine + odd * cosine);
      }
    }
    std::memcpy(values + slots[t] * s.kv_heads * size, projected + t * width + (s.heads + s.kv_heads) * size,
                sizeof(T) * s.kv_heads * size);
  });
}

}  // namespace

#define KERNELS(T, name)                                                                                              \
  extern "C" void attend_##name(int64_t heads, int64_t kv_heads, int64_t size, int64_t page, float scale,            \
                                const T* q, const T* keys, const T* values, T* out, int64_t tokens,                  \
                                const int64_t* pages, const int64_t* items, int64_t count, const int64_t* queries,   \
                                const int64_t* parts, float* room, int threads) {                                    \
    attend<T>({heads, kv_heads, size, page}, scale, q, keys, values, out, tokens, pages, items, count, queries,      \
              parts, room, threads);                                                                                 \
  }                                                                                                                   \
  extern "C" void product_##name(const T* x, int64_t rows, const T* weight, int64_t inputs, int64_t outputs, T* out, \
                                 int threads) {                                                                      \
    product<T>(x, rows, weight, inputs, outputs, out, threads);                                                      \
  }                                                                                                                   \
  extern "C" void add_norm_##name(T* added, const T* more, const T* weight, T* normal, int64_t rows, int64_t width,  \
                                  float eps, int threads) {                                                          \
    add_norm<T>(added, more, weight, normal, rows, width, eps, threads);                                             \
  }                                                                                                                   \
  extern "C" void gate_##name(const T* both, T* out, int64_t rows, int64_t width, int threads) {                     \
    gate<T>(both, out, rows, width, threads);                                                                        \
  }                                                                                                                   \
  extern "C" void norm_rotate_##name(const T* projected, const T* weight, const T* bias, int kind, float eps,        \
                                     const float* rope, const int64_t* positions, const int64_t* slots, T* query,    \
                                     T* keys, T* values, int64_t tokens, int64_t heads, int64_t kv_heads,            \
                                     int64_t size, int threads) {                                                    \
    norm_rotate<T>(projected, weight, bias, kind, eps, rope, positions, slots, query, keys, values, tokens,          \
                   {heads, kv_heads, size, 0}, threads);                                                             \
  }

extern "C" int64_t plan_attention(const int64_t* tables, const int64_t* first, const int64_t* counts,
                                  const int64_t* ends, int64_t sequences, int64_t page, int64_t chunk,
                                  int64_t together, int64_t* items, int64_t* queries, int64_t* parts) {
  return plan(tables, first, counts, ends, sequences, page, chunk, together, items, queries, parts);
}

KERNELS(float, float32)
KERNELS(bf16, bfloat16)
