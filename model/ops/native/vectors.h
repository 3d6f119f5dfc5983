// Vectors of numbers, in two widths, and work in parts.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int W = 8;  // numbers of a vector: AVX2's, of which AVX-512 has twice as many registers
#if defined(__AVX512F__)
constexpr int WIDE = 16;     // of the widest, where arithmetic is the limit
constexpr int ROW_TILE = 6;   // rows of a product whose sums the registers hold
#else
constexpr int WIDE = 8;
constexpr int ROW_TILE = 3;
#endif
typedef float Vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t Half __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef int32_t Int __attribute__((vector_size(4 * W)));
typedef float Wide __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef uint16_t WideHalf __attribute__((vector_size(2 * WIDE), aligned(2), may_alias));
typedef uint32_t WideBits __attribute__((vector_size(4 * WIDE)));
struct bf16 { uint16_t bits; };
constexpr int64_t MOST_SIZE = 512;  // of a head
constexpr int64_t LINE = 64;       // bytes of a line of the caches
constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec load(const bf16* p) { return (Vec)(__builtin_convertvector(*reinterpret_cast<const Half*>(p), Bits) << 16); }
inline Wide wide(const float* p) { return *reinterpret_cast<const Wide*>(p); }
inline Wide wide(const bf16* p) {
  return (Wide)(__builtin_convertvector(*reinterpret_cast<const WideHalf*>(p), WideBits) << 16);
}
// So many numbers, W or WIDE.
template <int LANES, typename T>
inline auto get(const T* p) {
  if constexpr (LANES == W) return load(p);
  else return wide(p);
}
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
#if defined(__AVX512F__)
inline void store(float* p, Wide v) { *reinterpret_cast<Wide*>(p) = v; }
#endif
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
// Both halves of a wide vector in one.
inline Vec folded(Wide v) {
#if defined(__AVX512F__)
  const __m512 all = (__m512)v;
  return (Vec)_mm512_castps512_ps256(all) + (Vec)_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
#else
  return v;
#endif
}
#if defined(__AVX512F__)
inline Vec folded(Vec v) { return v; }
#endif
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

}  // namespace
