// Kernels of decoding on a CPU, which PyTorch has not, or has in many parts: attention that reads pages, products of a
// few rows, norms and rotations in one pass over memory. Plain C++ behind a C interface: the compiler needs nothing but
// itself, and a second or two.
//
// Every output is computed in an order that depends on its own row or sequence alone, never on its company or on the
// number of threads: a request gets the same bits in any batch.

#include "attention.h"
#include "vectors.h"

namespace {

// ---- products -----------------------------------------------------------------------------------------------------

constexpr int64_t BLOCK = 8;  // outputs whose weights stay in the first cache for all rows

// out[r, o] = x[r] . weight[o] for ROWS rows and 4 outputs: 4 weights and ROWS states are loaded for 4 * ROWS products.
// FETCH: the weights that come a block later, too.
template <int ROWS, bool FETCH, typename T>
inline void tile(const T* x, const T* weight, int64_t inputs, T* out, int64_t outputs) {
  Wide s[ROWS][4] = {};
  int64_t i = 0;
  for (; i + WIDE <= inputs; i += WIDE) {
    if (FETCH && i % int64_t(LINE / sizeof(T)) == 0)
      for (int j = 0; j < 4; ++j) __builtin_prefetch(weight + (BLOCK + j) * inputs + i, 0, 2);
    Wide w[4];
    for (int j = 0; j < 4; ++j) w[j] = get<WIDE>(weight + j * inputs + i);
    for (int r = 0; r < ROWS; ++r) {
      const Wide own = get<WIDE>(x + r * inputs + i);
      for (int j = 0; j < 4; ++j) s[r][j] += own * w[j];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    Vec found[4];
    for (int j = 0; j < 4; ++j) {
      found[j] = folded(s[r][j]);
      if (WIDE > W && i < inputs) found[j] += load(x + r * inputs + i) * load(weight + j * inputs + i);
    }
    float total[4];
    sums(found[0], found[1], found[2], found[3], total);
    for (int j = 0; j < 4; ++j) put(out + r * outputs + j, total[j]);
  }
}

// `rows`, at most ROWS, of `count` outputs, at most BLOCK.
template <int ROWS, bool FETCH, typename T>
inline void block(int64_t rows, const T* x, const T* weight, int64_t inputs, T* out, int64_t outputs, int64_t count) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return block<ROWS - 1, FETCH>(rows, x, weight, inputs, out, outputs, count);
  for (int64_t o = 0; o < count; o += 4)
    tile<ROWS, FETCH>(x, weight + o * inputs, inputs, out + o, outputs);
}

template <typename T>
void product(const T* x, int64_t rows, const T* weight, int64_t inputs, int64_t outputs, T* out, int threads) {
  const int64_t share =
      std::max<int64_t>(BLOCK, std::min<int64_t>(64, (outputs / (4 * threads) + BLOCK - 1) / BLOCK * BLOCK));
  const int64_t first = (rows - 1) % ROW_TILE + 1;
  parallel((outputs + share - 1) / share, threads, [&](int64_t part) {
    const int64_t end = std::min(outputs, (part + 1) * share);
    for (int64_t o = part * share; o < end; o += BLOCK) {
      const int64_t count = std::min(BLOCK, end - o);
      const T* own = weight + o * inputs;
      block<ROW_TILE, true>(first, x, own, inputs, out + o, outputs, count);
      for (int64_t r = first; r < rows; r += ROW_TILE)
        block<ROW_TILE, false>(ROW_TILE, x + r * inputs, own, inputs, out + r * outputs + o, outputs, count);
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
