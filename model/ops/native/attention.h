// Attention that reads pages where they are: how it is divided, and the pieces.
#pragma once

#include <unordered_map>

#include "vectors.h"

namespace {

constexpr int64_t STEP = 16;  // positions between which the sums of softmax are put right
constexpr int64_t ROWS = 4;   // positions at a time: all heads' keys, then their values, so that memory is read in order

struct Shape { int64_t heads, kv_heads, size, page; };
struct Partial { float *most, *total, *out; };  // [heads], [heads], [heads, size]

// The products of a query with at most ROWS keys.
template <int LANES, int SIZE, typename T>
inline void logits(const float* q, const T* k, int64_t own_size, int64_t stride, int64_t rows, float* out) {
  const int64_t size = SIZE ? SIZE : own_size;
  const T* row[ROWS];
  for (int64_t j = 0; j < ROWS; ++j) row[j] = k + std::min(j, rows - 1) * stride;
  decltype(get<LANES>(q)) s[ROWS] = {};
  for (int64_t h = 0; h < size; h += LANES) {
    const auto own = get<LANES>(q + h);
    for (int64_t j = 0; j < ROWS; ++j) s[j] += own * get<LANES>(row[j] + h);
  }
  sums(folded(s[0]), folded(s[1]), folded(s[2]), folded(s[3]), out);
}

template <int LANES, int COUNT, typename T>
inline void add_values(float* out, const float* weights, const T* v, int64_t stride, int64_t rows) {
  decltype(get<LANES>(out)) sum[COUNT];
  for (int j = 0; j < COUNT; ++j) sum[j] = get<LANES>(out + j * LANES);
  for (int64_t p = 0; p < rows; ++p)
    for (int j = 0; j < COUNT; ++j) sum[j] += weights[p] * get<LANES>(v + p * stride + j * LANES);
  for (int j = 0; j < COUNT; ++j) store(out + j * LANES, sum[j]);
}

// At most ROWS values by their weights.
template <int LANES, int SIZE, typename T>
inline void weigh(float* out, const float* weights, const T* v, int64_t own_size, int64_t stride, int64_t rows) {
  const int64_t size = SIZE ? SIZE : own_size;
  int64_t h = 0;
  for (; h + 4 * LANES <= size; h += 4 * LANES) add_values<LANES, 4>(out + h, weights, v + h, stride, rows);
  for (; h < size; h += LANES) add_values<LANES, 1>(out + h, weights, v + h, stride, rows);
}

// The logits of the next `seen` positions, at most STEP, become weights: online softmax.
inline void soften(float* w, int64_t seen, int64_t size, float& most, float& total, float* out) {
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
}

// Some queries that see the same pages, each its first `seen` positions of them.
template <int SIZE, typename T>
void piece(const Shape& s, const T* keys, const T* values, const int64_t* pages, int64_t length, const float* q,
           const int64_t* tokens, const int64_t* seen, const Partial* partials, int64_t count) {
  constexpr int LANES = SIZE != 0 && SIZE % WIDE == 0 ? WIDE : W;
  const int64_t size = SIZE ? SIZE : s.size, group = s.heads / s.kv_heads, stride = s.kv_heads * size;
  const auto place = [&](int64_t position) {
    return (pages[position / s.page] * s.page + position % s.page) * stride;
  };
  for (int64_t i = 0; i < count; ++i) {
    std::fill_n(partials[i].most, s.heads, -INFINITE);
    std::fill_n(partials[i].total, s.heads, 0.0f);
    std::fill_n(partials[i].out, s.heads * size, 0.0f);
  }
  std::vector<float> weights(count * s.heads * STEP);
  for (int64_t begin = 0, steps; begin < length; begin += steps) {
    steps = std::min({STEP, length - begin, s.page - begin % s.page});
    // The next rows of all heads for each query: `work` with the rows, the query, the head and its weights.
    const auto sweep = [&](const T* from, auto&& work) {
      for (int64_t p = 0; p < steps; p += ROWS) {
        const T* rows = from + place(begin + p);
        // what comes next is fetched row by row, while the queries see these
        const T* later = from + place(std::min(begin + p + ROWS, length - 1));
        const int64_t fetched = begin + p + ROWS < length ? std::min(ROWS, s.page - (begin + p + ROWS) % s.page) : 0;
        for (int64_t head = 0; head < s.kv_heads; ++head) {
          for (int64_t r = 0; r < fetched; ++r)
            for (int64_t h = 0; h < size; h += int64_t(LINE / sizeof(T)))
              __builtin_prefetch(later + r * stride + head * size + h, 0, 3);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t own = std::min({ROWS, steps - p, seen[i] - begin - p});
            for (int64_t n = head * group; own > 0 && n < (head + 1) * group; ++n)
              work(rows + head * size, i, n, &weights[(i * s.heads + n) * STEP + p], own);
          }
        }
      }
    };
    sweep(keys, [&](const T* k, int64_t i, int64_t n, float* w, int64_t rows) {
      logits<LANES, SIZE>(q + (tokens[i] * s.heads + n) * size, k, size, stride, rows, w);
    });
    for (int64_t i = 0; i < count; ++i)
      for (int64_t n = 0; n < s.heads && seen[i] > begin; ++n)
        soften(&weights[(i * s.heads + n) * STEP], std::min(steps, seen[i] - begin), size, partials[i].most[n],
               partials[i].total[n], partials[i].out + n * size);
    sweep(values, [&](const T* v, int64_t i, int64_t n, const float* w, int64_t rows) {
      weigh<LANES, SIZE>(partials[i].out + n * size, w, v, size, stride, rows);
    });
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

}  // namespace
