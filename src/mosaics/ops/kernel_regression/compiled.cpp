// Kernel regression in tiles, for processors: the mathematics is in README.md, the calls are in compiled.py.
//
// A tile is a block of queries of one head against a span of its slots. Keys and values of a span are packed once and
// met by all blocks that read any of them. Logits are moved by a number for each query that is known beforehand, so
// that sums of exponentials need no maximum and are added in any order. All products are C += A B with rows of C and B
// in vector registers and scalars of A broadcast.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>
#ifdef __SSE__
#include <immintrin.h>
#endif

namespace {

// A product keeps ROWS x PANEL sums, PANEL vectors and a scalar in registers: x86 has 32 with AVX-512, else 16. Where
// they do not fit, vectors are read from memory for each row, and loads limit it.
#if defined(__AVX512F__)
constexpr int BYTES = 64, PANEL = 4;
#elif defined(__AVX__)
constexpr int BYTES = 32, PANEL = 2;
#elif defined(__SSE__)
constexpr int BYTES = 16, PANEL = 2;
#else
constexpr int BYTES = 16, PANEL = 4;
#endif
constexpr int ROWS = 6;
constexpr int64_t QUERIES = 48, SLOTS = 128;  // of a tile
constexpr int64_t TOGETHER = 16;              // blocks of queries that share the packing of a span

// Memory that begins with a line of the cache: a vector that lies in two lines is two loads.
template <typename T>
struct Allocator {
    using value_type = T;
    static constexpr std::align_val_t line{64};
    Allocator() = default;
    template <typename U>
    Allocator(const Allocator<U>&) {}
    T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), line)); }
    void deallocate(T* data, std::size_t) { ::operator delete(data, line); }
    bool operator==(const Allocator&) const { return true; }
    bool operator!=(const Allocator&) const { return false; }
};

template <typename T>
using Buffer = std::vector<T, Allocator<T>>;

template <typename T>
struct Vector {
    static constexpr int64_t width = BYTES / sizeof(T);
    typedef T type __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
};

template <typename T>
T total(const T* x) {  // of one vector, in the order that takes the fewest steps
    T part[Vector<T>::width];
    std::memcpy(part, x, BYTES);
    for (int64_t n = Vector<T>::width / 2; n > 0; n /= 2)
        for (int64_t i = 0; i < n; i++) part[i] += part[i + n];
    return part[0];
}

template <typename T>
T dot(const T* a, const T* b, int64_t count) {
    using V = typename Vector<T>::type;
    constexpr int64_t w = Vector<T>::width;
    V sums{};
    int64_t i = 0;
    for (; i + w <= count; i += w) sums += *(const V*)(a + i) * *(const V*)(b + i);
    T sum = total<T>((const T*)&sums);
    for (; i < count; i++) sum += a[i] * b[i];
    return sum;
}

template <typename T>
int64_t padded(int64_t width, int64_t vectors = 1) {  // to a multiple of so many vectors
    const int64_t w = vectors * Vector<T>::width;
    return (width + w - 1) / w * w;
}

// Up to PANEL vectors wide and ROWS rows high: C[i][:] (+)= sum over k of a[i * row + k * step] * b[k * ldb + :].
template <typename T, int R, int N>
inline void kernel(int64_t depth, const T* a, int64_t row, int64_t step, const T* b, int64_t ldb, T* c, int64_t ldc,
                   bool add) {
    using V = typename Vector<T>::type;
    constexpr int64_t w = Vector<T>::width;
    V total[R][N];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) total[i][j] = add ? *(const V*)(c + i * ldc + j * w) : V{};
    for (int64_t k = 0; k < depth; k++) {
        V right[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) right[j] = *(const V*)(b + k * ldb + j * w);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            const T left = a[i * row + k * step];
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) total[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) *(V*)(c + i * ldc + j * w) = total[i][j];
}

template <typename T, int N>
void strip(int64_t rows, int64_t depth, const T* a, int64_t row, int64_t step, const T* b, int64_t ldb, T* c,
           int64_t ldc, bool add) {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS) kernel<T, ROWS, N>(depth, a + i * row, row, step, b, ldb, c + i * ldc, ldc, add);
    for (; i + 4 <= rows; i += 4) kernel<T, 4, N>(depth, a + i * row, row, step, b, ldb, c + i * ldc, ldc, add);
    for (; i + 2 <= rows; i += 2) kernel<T, 2, N>(depth, a + i * row, row, step, b, ldb, c + i * ldc, ldc, add);
    for (; i < rows; i++) kernel<T, 1, N>(depth, a + i * row, row, step, b, ldb, c + i * ldc, ldc, add);
}

// Columns `from` to `to`, multiples of the vector's width, of C (rows x ...) (+)= A (rows x depth) B (depth x ...). The
// panels of B, PANEL vectors wide, lie `panel` entries apart.
template <typename T>
void product(int64_t rows, int64_t from, int64_t to, int64_t depth, const T* a, int64_t row, int64_t step, const T* b,
             int64_t ldb, int64_t panel, T* c, int64_t ldc, bool add) {
    constexpr int64_t w = Vector<T>::width, p = PANEL * w;
    for (int64_t next; from < to; from = next) {
        next = std::min(from / p * p + p, to);
        const T* right = b + from / p * panel + from % p;
        switch ((next - from) / w) {
            case 4: strip<T, std::min(PANEL, 4)>(rows, depth, a, row, step, right, ldb, c + from, ldc, add); break;
            case 3: strip<T, std::min(PANEL, 3)>(rows, depth, a, row, step, right, ldb, c + from, ldc, add); break;
            case 2: strip<T, 2>(rows, depth, a, row, step, right, ldb, c + from, ldc, add); break;
            default: strip<T, 1>(rows, depth, a, row, step, right, ldb, c + from, ldc, add);
        }
    }
}

// Takes `shift` from `count` numbers, and makes exp of what is left between LOWEST and HIGHEST, of others as if they
// were there: what lies below is no normal float32. `out` may be `x`, which is then lost.
constexpr double LOWEST = -80, HIGHEST = 64;

inline void exponentials(double* x, double shift, double* out, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        x[i] -= shift;
        out[i] = std::exp(std::min(std::max(x[i], LOWEST), HIGHEST));
    }
}

inline void exponentials(float* x, float shift, float* out, int64_t count) {
    using V = Vector<float>::type;
    constexpr int64_t w = Vector<float>::width;
    for (int64_t i = 0; i < count; i += w) {
        V v = *(V*)(x + i) -= shift;
        const V low = V{} + (float)LOWEST, high = V{} + (float)HIGHEST;
#if defined(__AVX__) && !defined(__AVX512F__)  // what GCC makes of the lines below takes thrice as long; NaN stays NaN
        v = (V)_mm256_min_ps((__m256)high, _mm256_max_ps((__m256)low, (__m256)v));
#else
        v = v < low ? low : v;
        v = v > high ? high : v;
#endif
        // v = n log 2 + r with |r| <= log(2) / 2; adding 1.5 * 2^23 rounds to an integer.
        const V magic = V{} + 12582912.0f, shifted = v * 1.44269504f + magic, n = shifted - magic;
        const V r = (v - n * 0.693145752f) - n * 1.42860677e-6f;
        V p = r * (1.0f / 720) + 1.0f / 120;
        p = p * r + 1.0f / 24;
        p = p * r + 1.0f / 6;
        p = p * r + 0.5f;
        p = p * r + 1.0f;
        p = p * r + 1.0f;
#ifdef __AVX512F__
        *(V*)(out + i) = (V)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
        typedef uint32_t I __attribute__((vector_size(BYTES)));
        I exponent;  // n lies in the lowest bits of `shifted`
        std::memcpy(&exponent, &shifted, BYTES);
        exponent = (exponent << 23) + (127u << 23);
        V scale;
        std::memcpy(&scale, &exponent, BYTES);
        *(V*)(out + i) = p * scale;
#endif
    }
}

struct FlushDenormals {  // in this thread, while it lives
#ifdef __SSE__
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

// A tensor (batch, heads, time, width) whose last dimension is contiguous.
template <typename T>
struct Array {
    T* data;
    const int64_t* stride;
    T* at(int64_t b, int64_t h) const { return data + b * stride[0] + h * stride[1]; }
};

// What the gradient of a query's beta is made from, over all slots that it reads, with weights p, their gradients g
// (of the logits) and their logarithms: the sums of g, of g log p and of p log p.
struct OfBeta {
    double grads, grads_logs, logs;

    // As the sum of g is 0 but for rounding, logits may be counted from their mean: then rounding is not multiplied by
    // all of them, but by what they differ. `log_sum`, the logarithm of the sum of exponentials, adds its gradient
    // times their mean.
    double value(double beta, double log_sum, double of_log_sum) const {
        return (grads_logs - grads * logs + of_log_sum * (logs + log_sum)) / beta;
    }
};

struct Sizes {
    int64_t batch, heads, time, slots, width, value_width, lines, threads;
};

// Rows of `x` from `begin`, `count` of them (then zeros), side by side: out[row][column], `wide` columns.
template <typename T>
void rows_of(const T* x, int64_t stride, int64_t begin, int64_t count, int64_t room, int64_t width, int64_t wide,
             T* out) {
    for (int64_t i = 0; i < room; i++) {
        if (i < count) std::memcpy(out + i * wide, x + (begin + i) * stride, width * sizeof(T));
        std::fill(out + i * wide + (i < count ? width : 0), out + (i + 1) * wide, T(0));
    }
}

// The same in panels: out[column / p][row][column % p].
template <typename T>
void panels_of(const T* x, int64_t stride, int64_t begin, int64_t count, int64_t width, T* out) {
    constexpr int64_t p = PANEL * Vector<T>::width;
    for (int64_t from = 0; from < width; from += p, out += SLOTS * p)
        rows_of<T>(x + from, stride, begin, count, SLOTS, std::min(p, width - from), p, out);
}

// The same transposed, in panels: out[row / p][column][row % p].
template <typename T>
void columns_of(const T* x, int64_t stride, int64_t begin, int64_t count, int64_t width, T* out) {
    constexpr int64_t p = PANEL * Vector<T>::width;
    static_assert(SLOTS % p == 0, "a span is a whole number of panels");
    for (int64_t i = 0; i < SLOTS; i++) {
        T* to = out + i / p * p * width + i % p;
        for (int64_t d = 0; d < width; d++) to[d * p] = i < count ? x[(begin + i) * stride + d] : T(0);
    }
}

// A block of queries and a span of slots from `left`, and the columns of their tile that hold all that may be read.
template <typename T>
struct Tile {
    int64_t rows, left, from, to;
    const int64_t *first, *end;

    Tile(int64_t rows, int64_t left, const int64_t* first, const int64_t* end)
        : rows(rows), left(left), first(first), end(end) {
        from = std::max(first[0] - left, int64_t(0)) / Vector<T>::width * Vector<T>::width;
        to = std::min(padded<T>(std::max(end[rows - 1] - left, int64_t(0))), SLOTS);
    }

    bool empty() const { return to <= from; }

    // The columns of row i that it may read.
    int64_t begin(int64_t i) const { return std::min(std::max(first[i] - left, from), to); }
    int64_t stop(int64_t i) const { return std::max(std::min(end[i] - left, to), begin(i)); }

    void logits(int64_t width, const T* queries, const T* keys, T* out) const {
        constexpr int64_t p = PANEL * Vector<T>::width;
        product<T>(rows, from, to, width, queries, padded<T>(width), 1, keys, p, p * width, out, SLOTS, false);
    }

    // exp(logit - shift), 0 where a query may not read. `logs`, which may be `out`, is left with logit - shift.
    void weights(int64_t width, const T* queries, const T* keys, const T* shift, T* logs, T* out) const {
        logits(width, queries, keys, logs);
        for (int64_t i = 0; i < rows; i++) {
            T* row = out + i * SLOTS;
            exponentials(logs + i * SLOTS + from, shift[i], row + from, to - from);
            std::fill(row + from, row + begin(i), T(0));
            std::fill(row + stop(i), row + to, T(0));
        }
    }

    // Gradients of the logits in the place of those of the weights, which sum to `total` over all slots and whose mean
    // gradient is `along`. That of the logarithm of `total`, over `total`, is `of_sum`; `sums` are without it.
    void softmax_backward(int64_t i, const T* weights, const T* logs, T along, T of_sum, T total, T* grads,
                          OfBeta& sums) const {
        const T *p = weights + i * SLOTS, *log = logs + i * SLOTS, largest = std::log(total);
        const int64_t low = begin(i), high = stop(i);
        T *row = grads + i * SLOTS, g = 0, g_log = 0, p_log = 0;
        std::fill(row + from, row + low, T(0));
        std::fill(row + high, row + to, T(0));
#pragma omp simd reduction(+ : g, g_log, p_log)
        for (int64_t j = low; j < high; j++) {
            const T x = log[j] - largest;
            const T own = (row[j] - along) * p[j];
            row[j] = own + of_sum * p[j];
            g += own;
            g_log += own * x;
            p_log += p[j] * x;
        }
        sums.grads += g;
        sums.grads_logs += g_log;
        sums.logs += p_log / total;
    }
};

// Rows `begin` ... of the queries times beta.
template <typename T>
void scaled(const Array<T>& queries, int64_t b, int64_t h, const T* beta, int64_t begin, int64_t count, int64_t width,
            T* out) {
    const int64_t wide = padded<T>(width);
    rows_of<T>(queries.at(b, h), queries.stride[2], begin, count, count, width, wide, out);
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < width; d++) out[i * wide + d] *= beta[begin + i];
}

// beta, shift, total and far are (batch, heads, time); first and end (lines, time), of all rows or of each. Where there
// is `far`, blocks without a query that it names stay as they are.
template <typename T>
void forward(const Sizes& s, Array<T> queries, Array<T> keys, Array<T> values, const T* beta, const T* shift,
             const int64_t* first, const int64_t* end, Array<T> out, T* totals, const bool* far, bool only_largest) {
    const int64_t wide = padded<T>(s.width), value_wide = padded<T>(s.value_width), lines = s.batch * s.heads;
    int64_t together = TOGETHER;  // fewer, where threads would have nothing to do
    while (together > 1 && lines * ((s.time + together * QUERIES - 1) / (together * QUERIES)) < s.threads) together /= 2;
    const int64_t span = together * QUERIES, parts = (s.time + span - 1) / span;
    constexpr int64_t w = Vector<T>::width, p = PANEL * w;
    using V = typename Vector<T>::type;
#pragma omp parallel num_threads(s.threads)
    {
        FlushDenormals flush;
        Buffer<T> asked(span * wide), answer(span * value_wide), sums(span * w), packed_keys(SLOTS * s.width),
            packed_values(SLOTS * padded<T>(s.value_width, PANEL)), tile(QUERIES * SLOTS);
        bool asked_for[TOGETHER];
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < lines * parts; unit++) {
            // The last queries have the most to read: they come first.
            const int64_t line = unit % lines, begin = (parts - 1 - unit / lines) * span;
            const int64_t b = line / s.heads, h = line % s.heads, count = std::min(span, s.time - begin);
            const int64_t* from = first + (s.lines > 1 ? b : 0) * s.time + begin;
            const int64_t* to = end + (s.lines > 1 ? b : 0) * s.time + begin;
            const T* move = shift + line * s.time + begin;
            const auto asks = [&](int64_t i) {
                const bool* of = far + line * s.time + begin + i;
                return !far || std::any_of(of, of + std::min(QUERIES, count - i), [](bool x) { return x; });
            };
            int64_t asking = 0;
            for (int64_t i = 0; i < count; i += QUERIES) asking += asked_for[i / QUERIES] = asks(i);
            if (!asking) continue;
            scaled(queries, b, h, beta + line * s.time, begin, count, s.width, asked.data());
            std::fill(answer.begin(), answer.end(), T(0));
            std::fill(sums.begin(), sums.end(), only_largest ? T(-INFINITY) : T(0));
            // Spans begin where they do for any blocks, so that no rounding depends on the number of threads.
            for (int64_t left = std::max(from[0], int64_t(0)) / SLOTS * SLOTS; left < to[count - 1]; left += SLOTS) {
                const int64_t filled = std::min(SLOTS, s.slots - left);
                columns_of<T>(keys.at(b, h), keys.stride[2], left, filled, s.width, packed_keys.data());
                if (!only_largest)
                    panels_of<T>(values.at(b, h), values.stride[2], left, filled, s.value_width, packed_values.data());
                for (int64_t i = 0; i < count; i += QUERIES) {
                    const int64_t rows = std::min(QUERIES, count - i);
                    const Tile<T> t(rows, left, from + i, to + i);
                    if (t.empty() || !asked_for[i / QUERIES]) continue;
                    if (only_largest) {
                        t.logits(s.width, asked.data() + i * wide, packed_keys.data(), tile.data());
                        for (int64_t r = 0; r < rows; r++)
                            for (int64_t j = t.begin(r); j < t.stop(r); j++)
                                sums[(i + r) * w] = std::max(sums[(i + r) * w], tile[r * SLOTS + j]);
                        continue;
                    }
                    t.weights(s.width, asked.data() + i * wide, packed_keys.data(), move + i, tile.data(), tile.data());
                    for (int64_t r = 0; r < rows; r++) {
                        V& sum = *(V*)&sums[(i + r) * w];
                        for (int64_t j = t.from; j < t.to; j += w) sum += *(V*)&tile[r * SLOTS + j];
                    }
                    product<T>(rows, 0, value_wide, t.to - t.from, tile.data() + t.from, SLOTS, 1,
                               packed_values.data() + t.from * p, p, SLOTS * p, answer.data() + i * value_wide,
                               value_wide, true);
                }
            }
            for (int64_t i = 0; i < count; i++) {
                if (!asked_for[i / QUERIES]) continue;
                if (only_largest) {
                    totals[line * s.time + begin + i] = sums[i * w] == T(-INFINITY) ? T(0) : sums[i * w];
                    continue;
                }
                T sum = total<T>(&sums[i * w]);
                if (sum == 0) sum = 1;  // who reads nothing is answered 0
                totals[line * s.time + begin + i] = sum;
                T* row = out.at(b, h) + (begin + i) * out.stride[2];
                const T inverse = 1 / sum;
                for (int64_t d = 0; d < s.value_width; d++) row[d] = answer[i * value_wide + d] * inverse;
            }
        }
    }
}

// The largest of `count` numbers, whole vectors.
template <typename T>
T largest_of(const T* x, int64_t count) {
    using V = typename Vector<T>::type;
    constexpr int64_t w = Vector<T>::width;
    V most = *(const V*)x;
    for (int64_t j = w; j < count; j += w) {
        const V next = *(const V*)(x + j);
        most = next > most ? next : most;
    }
    T part[w];
    std::memcpy(part, &most, BYTES);
    for (int64_t n = w / 2; n > 0; n /= 2)
        for (int64_t i = 0; i < n; i++) part[i] = std::max(part[i], part[i + n]);
    return part[0];
}

// What is kept of a query's weights while spans of slots go by: sums of e = exp(logit - most), of e (logit - most), of e
// times how far back a slot lies, of e over slots that are near, and over those that bear the query's label in one of two
// lists; in `logits` and `slots` the largest logits, in order.
template <typename T>
struct Kept {
    using V = typename Vector<T>::type;
    using Label = typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type;
    typedef Label Labels __attribute__((vector_size(BYTES), aligned(alignof(Label)), may_alias));
    static constexpr int64_t w = Vector<T>::width;
    static constexpr T LEAST = T(-1e30);  // below every logit that is a number to count with
    T most = LEAST, near = 0;
    V sum{}, along{}, back{}, alike[2]{};

    // Row r of a tile of logits, of the query whose own pair lies in slot `own`.
    void meet(const Tile<T>& t, int64_t r, T* row, T* weights, int64_t own, int64_t reach, const Label* labels,
              Label label, int64_t top, T* logits, int64_t* slots) {
        const int64_t begin = t.begin(r), stop = t.stop(r);
        std::fill(row + t.from, row + begin, LEAST);
        std::fill(row + stop, row + t.to, LEAST);
        const T largest = largest_of<T>(row + t.from, t.to - t.from);
        if (largest > most) {
            const T less = most - largest, factor = std::exp(less);  // 0 the first time
            along = factor > 0 ? factor * (along + less * sum) : V{};
            for (V* x : {&sum, &back, &alike[0], &alike[1]}) *x *= factor;
            near *= factor;
            most = largest;
        }
        if (largest > logits[top - 1])
            for (int64_t j = begin; j < stop; j++) {
                if (!(row[j] > logits[top - 1])) continue;
                int64_t place = top - 1;
                for (; place > 0 && row[j] > logits[place - 1]; place--) {
                    logits[place] = logits[place - 1];
                    slots[place] = slots[place - 1];
                }
                logits[place] = row[j];
                slots[place] = t.left + j;
            }
        exponentials(row + t.from, most, weights + t.from, t.to - t.from);
        std::fill(weights + t.from, weights + begin, T(0));
        std::fill(weights + stop, weights + t.to, T(0));
        V far;
        for (int64_t j = 0; j < w; j++) ((T*)&far)[j] = T(own - t.left - t.from - j);
        for (int64_t j = t.from; j < t.to; j += w, far -= T(w)) {
            const V e = *(const V*)(weights + j);
            sum += e;
            along += e * *(const V*)(row + j);
            back += e * far;
        }
        for (int64_t j = std::max(begin, own - reach - t.left); j < stop; j++) near += weights[j];
        if (t.left + t.from <= own && own < t.left + t.to) weights[own - t.left] = 0;  // bears its own label
        const Labels wanted = Labels{} + label;
        for (int64_t j = t.from; j < t.to; j += w)
            for (int64_t n = 0; n < 2; n++) {
                const Labels same = *(const Labels*)(labels + n * SLOTS + j) == wanted;
                alike[n] += (V)(*(const Labels*)(weights + j) & same);
            }
    }
};

// Of the weights of each query: the `top` largest logits and their slots (-1 where fewer may be read), and six numbers: the
// logarithm of the sum of exponentials, the entropy, the share of slots at most `reach` back, how far back on average, and
// the shares of slots that bear the query's label in the first and in the second of the `labels` (2, slots). Without any
// slot to read they are -inf and 0. beta is (batch, heads, time); first, end, own and
// `wanted`, the queries' labels, (lines, time).
template <typename T>
void summary(const Sizes& s, Array<T> queries, Array<T> keys, const T* beta, const int64_t* first, const int64_t* end,
             const int64_t* own, int64_t reach, const typename Kept<T>::Label* labels,
             const typename Kept<T>::Label* wanted, int64_t top, int64_t* slots, T* logits, T* numbers) {
    const int64_t wide = padded<T>(s.width), lines = s.batch * s.heads;
    int64_t together = TOGETHER;
    while (together > 1 && lines * ((s.time + together * QUERIES - 1) / (together * QUERIES)) < s.threads) together /= 2;
    const int64_t span = together * QUERIES, parts = (s.time + span - 1) / span;
#pragma omp parallel num_threads(s.threads)
    {
        FlushDenormals flush;
        Buffer<T> asked(span * wide), packed_keys(SLOTS * s.width), tile(QUERIES * SLOTS), weights(SLOTS);
        std::vector<typename Kept<T>::Label> packed_labels(2 * SLOTS);
        std::vector<Kept<T>> kept(span);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < lines * parts; unit++) {
            const int64_t line = unit % lines, begin = (parts - 1 - unit / lines) * span;
            const int64_t b = line / s.heads, h = line % s.heads, count = std::min(span, s.time - begin);
            const int64_t range = (s.lines > 1 ? b : 0) * s.time + begin, query = line * s.time + begin;
            const int64_t *from = first + range, *to = end + range;
            scaled(queries, b, h, beta + line * s.time, begin, count, s.width, asked.data());
            std::fill(kept.begin(), kept.end(), Kept<T>());
            std::fill(logits + query * top, logits + (query + count) * top, Kept<T>::LEAST);
            std::fill(slots + query * top, slots + (query + count) * top, int64_t(-1));
            for (int64_t left = std::max(from[0], int64_t(0)) / SLOTS * SLOTS; left < to[count - 1]; left += SLOTS) {
                const int64_t filled = std::min(SLOTS, s.slots - left);
                columns_of<T>(keys.at(b, h), keys.stride[2], left, filled, s.width, packed_keys.data());
                for (int64_t n = 0; n < 2; n++)
                    std::copy_n(labels + n * s.slots + left, filled, packed_labels.data() + n * SLOTS);
                for (int64_t i = 0; i < count; i += QUERIES) {
                    const Tile<T> t(std::min(QUERIES, count - i), left, from + i, to + i);
                    if (t.empty()) continue;
                    t.logits(s.width, asked.data() + i * wide, packed_keys.data(), tile.data());
                    for (int64_t r = 0; r < t.rows; r++) {
                        const int64_t at = query + i + r, slot = own[range + i + r];
                        if (t.stop(r) > t.begin(r))
                            kept[i + r].meet(t, r, tile.data() + r * SLOTS, weights.data(), slot, reach,
                                             packed_labels.data(), wanted[range + i + r], top, logits + at * top,
                                             slots + at * top);
                    }
                }
            }
            for (int64_t i = 0; i < count; i++) {
                const Kept<T>& k = kept[i];
                const T sum = to[i] > from[i] ? total<T>((const T*)&k.sum) : T(1), over = 1 / sum;
                T* number = numbers + 6 * (query + i);
                number[0] = to[i] > from[i] ? k.most + std::log(sum) : T(-INFINITY);
                number[1] = std::log(sum) - total<T>((const T*)&k.along) * over;
                number[2] = k.near * over;
                number[3] = total<T>((const T*)&k.back) * over;
                for (int64_t n = 0; n < 2; n++) number[4 + n] = total<T>((const T*)&k.alike[n]) * over;
            }
        }
    }
}

// What the backward pass holds of a line: queries times beta, gradients of answers over their sums, what follows from
// these for each query, and the gradients of queries (times beta) so far.
template <typename T>
struct OfLine {
    Buffer<T> asked, answer_grad, along, of_sum, asked_grad;
    std::vector<OfBeta> of_beta;

    OfLine(int64_t time, int64_t wide, int64_t value_wide)
        : asked(time * wide), answer_grad(time * value_wide), along(time), of_sum(time), asked_grad(time * wide),
          of_beta(time) {}
};

template <typename T>
void backward(const Sizes& s, Array<T> queries, Array<T> keys, Array<T> values, const T* beta, const T* shift,
              const int64_t* first, const int64_t* end, Array<T> out, const T* totals, Array<T> grad,
              const T* grad_logs, Array<T> grad_queries, Array<T> grad_keys, Array<T> grad_values, T* grad_beta) {
    constexpr int64_t p = PANEL * Vector<T>::width;
    const int64_t wide = padded<T>(s.width), value_wide = padded<T>(s.value_width), lines = s.batch * s.heads;
    const int64_t spans = (s.slots + SLOTS - 1) / SLOTS, blocks = (s.time + QUERIES - 1) / QUERIES;
    // With fewer lines than threads, several share a line: each has a span of slots, and comes to a block of queries after
    // the thread with the span before, so that gradients of queries are added in the order of one thread.
    const bool shared = lines < s.threads;
    std::vector<OfLine<T>> all(shared ? lines : 0, OfLine<T>(shared ? s.time : 0, wide, value_wide));
    std::vector<std::atomic<int64_t>> turn(shared ? lines * blocks : 0);  // the span that a block meets next
    for (auto& x : turn) x = 0;
    std::atomic<int64_t> next{0};

    const auto begin = [&](OfLine<T>& of, int64_t line, int64_t i, int64_t stop) {
        const int64_t b = line / s.heads, h = line % s.heads;
        scaled(queries, b, h, beta + line * s.time, i, stop - i, s.width, &of.asked[i * wide]);
        std::fill(&of.asked_grad[i * wide], of.asked_grad.data() + stop * wide, T(0));
        std::fill(&of.of_beta[i], of.of_beta.data() + stop, OfBeta{});
        // The weights below are not divided by their sum; this is.
        rows_of<T>(grad.at(b, h), grad.stride[2], i, stop - i, stop - i, s.value_width, value_wide,
                   &of.answer_grad[i * value_wide]);
        for (; i < stop; i++) {
            const T inverse = 1 / totals[line * s.time + i];
            T* row = &of.answer_grad[i * value_wide];
            for (int64_t d = 0; d < s.value_width; d++) row[d] *= inverse;
            of.along[i] = dot<T>(row, out.at(b, h) + i * out.stride[2], s.value_width);
            of.of_sum[i] = grad_logs ? grad_logs[line * s.time + i] * inverse : T(0);
        }
    };
    const auto finish = [&](const OfLine<T>& of, int64_t line, int64_t i, int64_t stop) {
        const int64_t b = line / s.heads, h = line % s.heads;
        for (; i < stop; i++) {
            const T* query = queries.at(b, h) + i * queries.stride[2];
            T* row = grad_queries.at(b, h) + i * grad_queries.stride[2];
            const T sharpness = beta[line * s.time + i];
            // Near 0 the logarithms of the weights say nothing of the logits.
            const T sum = totals[line * s.time + i], log_sum = shift[line * s.time + i] + std::log(sum);
            grad_beta[line * s.time + i] = std::abs(sharpness) < T(0.1)
                                               ? dot<T>(&of.asked_grad[i * wide], query, s.width)
                                               : T(of.of_beta[i].value(sharpness, log_sum, of.of_sum[i] * sum));
            for (int64_t d = 0; d < s.width; d++) row[d] = of.asked_grad[i * wide + d] * sharpness;
        }
    };
#pragma omp parallel num_threads(s.threads)
    {
        FlushDenormals flush;
        Buffer<T> key_columns(SLOTS * s.width), key_rows(SLOTS * padded<T>(s.width, PANEL));
        Buffer<T> value_columns(SLOTS * s.value_width);
        Buffer<T> key_grad(SLOTS * wide), value_grad(SLOTS * value_wide);
        Buffer<T> tile(QUERIES * SLOTS), tile_grad(QUERIES * SLOTS), logs(QUERIES * SLOTS);

        const auto read = [&](OfLine<T>& of, int64_t line, int64_t span) {
            const int64_t b = line / s.heads, h = line % s.heads, left = span * SLOTS;
            const int64_t* from = first + (s.lines > 1 ? b : 0) * s.time;
            const int64_t* to = end + (s.lines > 1 ? b : 0) * s.time;
            const int64_t filled = std::min(SLOTS, s.slots - left);
            columns_of<T>(keys.at(b, h), keys.stride[2], left, filled, s.width, key_columns.data());
            panels_of<T>(keys.at(b, h), keys.stride[2], left, filled, s.width, key_rows.data());
            columns_of<T>(values.at(b, h), values.stride[2], left, filled, s.value_width, value_columns.data());
            std::fill(key_grad.begin(), key_grad.end(), T(0));
            std::fill(value_grad.begin(), value_grad.end(), T(0));
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t i = block * QUERIES, rows = std::min(QUERIES, s.time - i);
                const Tile<T> t(rows, left, from + i, to + i);
                if (t.empty()) continue;
                const int64_t count = t.to - t.from;
                const T* query = &of.asked[i * wide];
                const T* answer = &of.answer_grad[i * value_wide];
                t.weights(s.width, query, key_columns.data(), shift + line * s.time + i, logs.data(), tile.data());
                product<T>(count, 0, value_wide, rows, tile.data() + t.from, 1, SLOTS, answer, value_wide, p,
                           value_grad.data() + t.from * value_wide, value_wide, true);
                product<T>(rows, t.from, t.to, s.value_width, answer, value_wide, 1, value_columns.data(), p,
                           p * s.value_width, tile_grad.data(), SLOTS, false);
                if (shared && !Tile<T>(rows, left - SLOTS, from + i, to + i).empty())
                    while (turn[line * blocks + block].load(std::memory_order_acquire) != span) std::this_thread::yield();
                for (int64_t r = 0; r < rows; r++)
                    t.softmax_backward(r, tile.data(), logs.data(), of.along[i + r], of.of_sum[i + r],
                                       totals[line * s.time + i + r], tile_grad.data(), of.of_beta[i + r]);
                product<T>(rows, 0, wide, count, tile_grad.data() + t.from, SLOTS, 1, key_rows.data() + t.from * p, p,
                           SLOTS * p, &of.asked_grad[i * wide], wide, true);
                if (shared) turn[line * blocks + block].store(span + 1, std::memory_order_release);
                product<T>(count, 0, wide, rows, tile_grad.data() + t.from, 1, SLOTS, query, wide, p,
                           key_grad.data() + t.from * wide, wide, true);
            }
            for (int64_t i = 0; i < filled; i++) {
                std::memcpy(grad_keys.at(b, h) + (left + i) * grad_keys.stride[2], &key_grad[i * wide],
                            s.width * sizeof(T));
                std::memcpy(grad_values.at(b, h) + (left + i) * grad_values.stride[2], &value_grad[i * value_wide],
                            s.value_width * sizeof(T));
            }
        };

        if (shared) {
#pragma omp for
            for (int64_t unit = 0; unit < lines * blocks; unit++) {
                const int64_t line = unit / blocks, i = unit % blocks * QUERIES;
                begin(all[line], line, i, std::min(i + QUERIES, s.time));
            }
            // A span is taken after the one that it waits for.
            for (int64_t unit; (unit = next++) < lines * spans;) read(all[unit % lines], unit % lines, unit / lines);
#pragma omp barrier
#pragma omp for
            for (int64_t unit = 0; unit < lines * blocks; unit++) {
                const int64_t line = unit / blocks, i = unit % blocks * QUERIES;
                finish(all[line], line, i, std::min(i + QUERIES, s.time));
            }
        } else {
            OfLine<T> own(s.time, wide, value_wide);
#pragma omp for schedule(dynamic)
            for (int64_t line = 0; line < lines; line++) {
                begin(own, line, 0, s.time);
                for (int64_t span = 0; span < spans; span++) read(own, line, span);
                finish(own, line, 0, s.time);
            }
        }
    }
}

}  // namespace

#define EXPORT(T, suffix)                                                                                              \
    extern "C" void forward_##suffix(const Sizes* s, T* q, const int64_t* qs, T* k, const int64_t* ks, T* v,           \
                                     const int64_t* vs, const T* beta, const T* shift, const int64_t* first,           \
                                     const int64_t* end, T* out, const int64_t* os, T* total, const bool* far,         \
                                     int only_largest) {                                                               \
        forward<T>(*s, {q, qs}, {k, ks}, {v, vs}, beta, shift, first, end, {out, os}, total, far, only_largest);       \
    }                                                                                                                  \
    extern "C" void summary_##suffix(const Sizes* s, T* q, const int64_t* qs, T* k, const int64_t* ks, const T* beta,  \
                                     const int64_t* first, const int64_t* end, const int64_t* own, int reach,          \
                                     const Kept<T>::Label* labels, const Kept<T>::Label* wanted, int top,              \
                                     int64_t* slots, T* logits, T* numbers) {                                          \
        summary<T>(*s, {q, qs}, {k, ks}, beta, first, end, own, reach, labels, wanted, top, slots, logits, numbers);   \
    }                                                                                                                  \
    extern "C" void backward_##suffix(const Sizes* s, T* q, const int64_t* qs, T* k, const int64_t* ks, T* v,          \
                                      const int64_t* vs, const T* beta, const T* shift, const int64_t* first,          \
                                      const int64_t* end, T* out, const int64_t* os, const T* total, T* g,             \
                                      const int64_t* gs, const T* gl, T* gq, const int64_t* gqs, T* gk,                \
                                      const int64_t* gks, T* gv, const int64_t* gvs, T* gb) {                          \
        backward<T>(*s, {q, qs}, {k, ks}, {v, vs}, beta, shift, first, end, {out, os}, total, {g, gs}, gl, {gq, gqs},  \
                    {gk, gks}, {gv, gvs}, gb);                                                                         \
    }

EXPORT(float, float)
EXPORT(double, double)
