// The read of one query for each row and head: what is stored passes by once, as it is stored; or, if an error is
// allowed, a sketch of the keys passes by, and then the pairs that matter. The mathematics is in README.md, the calls are
// in single.py and bounded.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

struct Sizes {
    int64_t batch, heads, slots, width, value_width, delay, window, threads;  // -1: no delay, no window
};

struct Bfloat16 {
    uint16_t bits;
    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &wide, sizeof x);
        return x;
    }
};

#ifdef __AVX2__
// The numbers of a register, wherever they begin, and what stored ones are as such. (The compiler's own loops over numbers
// of 8 bits take 64 at a time, and those of a narrower head one by one. For other processors they are faster than this.)
#ifdef __AVX512F__
constexpr int64_t BYTES = 64;
#else
constexpr int64_t BYTES = 32;
#endif

template <typename T>
struct Vector {
    static constexpr int64_t lanes = BYTES / sizeof(T);
    typedef T type __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
};

template <typename T>
inline typename Vector<T>::type wide(const T* x) {
    return *reinterpret_cast<const typename Vector<T>::type*>(x);
}

inline Vector<float>::type wide(const Bfloat16* x) {
    typedef uint16_t Narrow __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));
    typedef int32_t Whole __attribute__((vector_size(BYTES)));
    return (Vector<float>::type)(__builtin_convertvector(*reinterpret_cast<const Narrow*>(x), Whole) << 16);
}

inline Vector<float>::type wide(const int8_t* x) {
#ifdef __AVX512F__
    const __m512i whole = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return (Vector<float>::type)_mm512_cvtepi32_ps(whole);
#else
    const __m256i whole = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
    return (Vector<float>::type)_mm256_cvtepi32_ps(whole);
#endif
}
#endif

template <typename S>
struct Array {
    const S* data;
    const int64_t* stride;  // of batch, heads and slots
    const float* scale;     // of 8 bits, or null
    const int64_t* scale_stride;
    const S* at(int64_t b, int64_t h) const { return data + b * stride[0] + h * stride[1]; }
    const float* scale_at(int64_t b, int64_t h) const {
        return scale ? scale + b * scale_stride[0] + h * scale_stride[1] : nullptr;
    }
};

// exp(x) of count numbers up to 0. In float32 to about 1e-7: 2^n times a polynomial of what is left, |r| <= ln 2 / 2; 0
// below e^-80, as products with denormal results would be slow and nobody notices them.
inline void exponentials(float* x, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const float y = x[i] >= -80.0f ? x[i] : -80.0f;  // also where x is no number: then the difference below is none
        const float n = std::rint(y * 1.44269504f);
        const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
        float sum = 1.0f / 5040;
        sum = sum * r + 1.0f / 720;
        sum = sum * r + 1.0f / 120;
        sum = sum * r + 1.0f / 24;
        sum = sum * r + 1.0f / 6;
        sum = sum * r + 0.5f;
        sum = sum * r + 1.0f;
        sum = sum * r + 1.0f;
        const int32_t power = (int32_t(n) + 127) << 23;
        float scale;
        std::memcpy(&scale, &power, sizeof scale);
        x[i] = x[i] < -80.0f ? 0.0f : sum * scale + (x[i] - y);
    }
}

inline void exponentials(double* x, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] = std::exp(x[i]);
}

constexpr int64_t BLOCK = 128;

template <typename T, typename S>
struct Stored {
    Array<S> keys, values;
    const T *base, *slope, *exponent;
    const int64_t *start, *stored;
    T *out, *logs;
};

template <typename T, typename S>
inline T product(const T* a, const S* b, const int64_t width) {
#ifdef __AVX2__
    constexpr int64_t lanes = Vector<T>::lanes;
    typename Vector<T>::type sums{};
    int64_t d = 0;
    for (; d + lanes <= width; d += lanes) sums += wide(a + d) * wide(b + d);
    T parts[lanes];
    std::memcpy(parts, &sums, sizeof parts);
    for (int64_t half = lanes / 2; half; half /= 2)
        for (int64_t i = 0; i < half; i++) parts[i] += parts[i + half];
    for (; d < width; d++) parts[0] += a[d] * T(b[d]);
    return parts[0];
#else
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; d++) sum += a[d] * T(b[d]);
    return sum;
#endif
}

// What one query, times the bandwidth, reads of one row and head: the slots from `first` to `end`.
template <typename T, typename S>
struct Line {
    int64_t first, end, width, value_width, key_stride, value_stride, key_scale_stride, value_scale_stride;
    const S *key, *value;
    const float *key_scale, *value_scale;
    std::vector<T> query;
    T *answer, *log;

    Line(const Sizes& s, const Stored<T, S>& a, const T* queries, int64_t line)
        : first(0), end(s.slots), width(s.width), value_width(s.value_width), key_stride(a.keys.stride[2]),
          value_stride(a.values.stride[2]), query(s.width), answer(a.out + line * s.value_width),
          log(a.logs ? a.logs + line : nullptr) {
        const int64_t b = line / s.heads, h = line % s.heads, own = a.stored ? a.stored[b] : s.slots - 1;
        if (s.delay >= 0) {
            end = std::min(own + 1, s.slots) - s.delay;
            if (a.start) first = std::max(first, a.start[b] + own);
            if (s.window >= 0) first = std::max(first, own - s.window + 1);
        }
        key = a.keys.at(b, h), value = a.values.at(b, h);
        key_scale = a.keys.scale_at(b, h), value_scale = a.values.scale_at(b, h);
        key_scale_stride = key_scale ? a.keys.scale_stride[2] : 0;
        value_scale_stride = value_scale ? a.values.scale_stride[2] : 0;
        std::fill(answer, answer + value_width, T(0));
        if (log) *log = -std::numeric_limits<T>::infinity();
        if (end <= first) return;
        const T *exponent = a.exponent, *slope = a.slope;
        const double beta = a.base[h] + (slope ? slope[h] * std::pow(double(end - first), double(exponent[h])) : 0.0);
        for (int64_t d = 0; d < width; d++) query[d] = T(beta) * queries[line * width + d];
    }

    T logit(int64_t slot) const {
        const T sum = product(query.data(), key + slot * key_stride, width);
        return key_scale ? sum * key_scale[slot * key_scale_stride] : sum;
    }

    // Reads the `from` to `end`th slots of `slots`, or those themselves where `slots` is null.
    void read(const int64_t* slots, int64_t from, const int64_t end) {
        const int64_t value_width = this->value_width, value_stride = this->value_stride;  // locals, for the compiler
        const S* value = this->value;
        T* answer = this->answer;
        T top = -std::numeric_limits<T>::infinity(), total = 0, weights[BLOCK];
        int64_t chosen[BLOCK];
        for (; from < end; from += BLOCK) {
            const int64_t count = std::min(BLOCK, end - from);
            T highest = top;
            for (int64_t j = 0; j < count; j++) chosen[j] = slots ? slots[from + j] : from + j;
            for (int64_t j = 0; j < count; j++) {
                weights[j] = logit(chosen[j]);
                highest = weights[j] > highest ? weights[j] : highest;
            }
            if (highest > top) {
                const T fade = std::exp(top - highest);
                total *= fade;
                for (int64_t d = 0; d < value_width; d++) answer[d] *= fade;
                top = highest;
            }
            for (int64_t j = 0; j < count; j++) weights[j] -= top;
            exponentials(weights, count);
            for (int64_t j = 0; j < count; j++) total += weights[j];
            if (value_scale)
                for (int64_t j = 0; j < count; j++) weights[j] *= value_scale[chosen[j] * value_scale_stride];
            int64_t j = 0;
            for (; j + 4 <= count; j += 4) {
                const S *row = value + chosen[j] * value_stride, *second = value + chosen[j + 1] * value_stride,
                        *third = value + chosen[j + 2] * value_stride, *fourth = value + chosen[j + 3] * value_stride;
                int64_t d = 0;
#ifdef __AVX2__
                using V = typename Vector<T>::type;
                constexpr int64_t lanes = Vector<T>::lanes;
                for (; d + lanes <= value_width; d += lanes)
                    *reinterpret_cast<V*>(answer + d) +=
                        weights[j] * wide(row + d) + weights[j + 1] * wide(second + d) +
                        (weights[j + 2] * wide(third + d) + weights[j + 3] * wide(fourth + d));
                for (; d < value_width; d++)
#else
#pragma omp simd
                for (d = 0; d < value_width; d++)
#endif
                    answer[d] += weights[j] * T(row[d]) + weights[j + 1] * T(second[d]) +
                                 (weights[j + 2] * T(third[d]) + weights[j + 3] * T(fourth[d]));
            }
            for (; j < count; j++) {
                const S* row = value + chosen[j] * value_stride;
#pragma omp simd
                for (int64_t d = 0; d < value_width; d++) answer[d] += weights[j] * T(row[d]);
            }
        }
        for (int64_t d = 0; d < value_width; d++) answer[d] /= total;
        if (log) *log = top + std::log(total);
    }
};

template <typename T, typename S>
void read(const Sizes& s, const T* queries, const Stored<T, S>& stored) {
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1)
    for (int64_t i = 0; i < s.batch * s.heads; i++) {
        Line<T, S> line(s, stored, queries, i);
        if (line.first < line.end) line.read(nullptr, line.first, line.end);
    }
}

// The first `count` keys in 8 bits: key i is scale[i] * data[i] and something of a length of at most radius[i]. Scales and
// radii of the slots lie side by side.
struct Sketch {
    Array<int8_t> keys;
    const float* radius;
    const int64_t* radius_stride;
    int64_t count;
};

inline int32_t whole_product(const int16_t* a, const int8_t* b, int64_t from, int64_t width) {
    int32_t sum = 0;
    for (int64_t d = from; d < width; d++) sum += int32_t(a[d]) * int32_t(b[d]);
    return sum;
}

// Products of a query with `count` rows in 8 bits, in whole numbers.
template <typename T>
void whole_products(const int16_t* query, const int8_t* rows, int64_t stride, int64_t width, int64_t count, T* out) {
    int64_t i = 0;
#ifdef __AVX2__
    const int64_t even = width / 16 * 16;
    for (; i + 4 <= count; i += 4) {
        const int8_t* row = rows + i * stride;
        __m256i sum[4] = {};
        for (int64_t d = 0; d < even; d += 16) {
            const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + d));
            for (int64_t j = 0; j < 4; j++) {
                const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + j * stride + d));
                sum[j] = _mm256_add_epi32(sum[j], _mm256_madd_epi16(q, _mm256_cvtepi8_epi16(x)));
            }
        }
        const __m256i all =
            _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
        int32_t sums[4];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(sums),
                         _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
        for (int64_t j = 0; j < 4; j++)
            out[i + j] = T(sums[j] + (even < width ? whole_product(query, row + j * stride, even, width) : 0));
    }
#endif
    for (; i < count; i++) out[i] = T(whole_product(query, rows + i * stride, 0, width));
}

// The slots that a line has to read so that all others together have at most epsilon / 2 of the sum of the weights.
template <typename T, typename S>
std::vector<int64_t> needed(const Line<T, S>& line, const Sketch& sketch, int64_t b, int64_t h, double epsilon) {
    constexpr int64_t BINS = 256;
    const int64_t count = std::max<int64_t>(0, std::min(sketch.count, line.end) - line.first);
    const int8_t* data = sketch.keys.at(b, h);
    const float* scale = sketch.keys.scale_at(b, h);
    const float* radius = sketch.radius ? sketch.radius + b * sketch.radius_stride[0] + h * sketch.radius_stride[1] : nullptr;
    T norm = 0, largest = 0;
    for (const T x : line.query) {
        norm += x * x;
        largest = std::max(largest, std::abs(x));
    }
    norm = std::sqrt(norm);
    // The query in whole numbers, so many that no sum of products with 8 bits leaves an int32.
    const int64_t width = line.width, most = std::min<int64_t>(32767, 16909320 / width);
    const T step_of_query = largest > 0 ? largest / T(most) : T(1);
    std::vector<int16_t> whole(width);
    for (int64_t d = 0; d < width; d++) whole[d] = int16_t(std::rint(line.query[d] / step_of_query));
    // Of a product with numbers up to 127: what the query's rounding, and that of what is computed here, can be.
    const T rounding =
        T(127) * T(width) * (step_of_query * T(0.51) + norm * 8 * std::numeric_limits<T>::epsilon());
    static thread_local std::vector<T> score, bound;  // of each pair, the least and the largest logit
    score.resize(count), bound.resize(count);
    const int64_t stride = sketch.keys.stride[2], blocks = (count + BLOCK - 1) / BLOCK;
    std::vector<T> tops(blocks), highs(blocks);  // of each block, the largest of both
    const auto estimate = [&](auto slack) {
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t from = block * BLOCK, size = std::min(BLOCK, count - from);
            T *scores = score.data() + from, *bounds = bound.data() + from;
            whole_products(whole.data(), data + (line.first + from) * stride, stride, width, size, scores);
            T top = -std::numeric_limits<T>::infinity(), high = top;
            bool sound = true;
#pragma omp simd reduction(max : top, high) reduction(&& : sound)
            for (int64_t i = 0; i < size; i++) {
                const int64_t slot = line.first + from + i;
                const T middle = T(scale[slot]) * step_of_query * scores[i], own = slack(slot);
                scores[i] = middle - own;
                bounds[i] = middle + own;
                top = std::max(top, scores[i]);
                high = std::max(high, bounds[i]);
                sound = sound && bounds[i] == bounds[i];
            }
            tops[block] = top;
            highs[block] = sound ? high : std::numeric_limits<T>::infinity();
        }
    };
    if (radius)
        estimate([&](int64_t slot) { return rounding * T(scale[slot]) + norm * T(radius[slot]); });
    else
        estimate([&](int64_t slot) { return rounding * T(scale[slot]); });
    const int64_t others = line.end - line.first - count;
    std::vector<T> exact(others), weights(BLOCK);
    T top = -std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < others; i++) {
        exact[i] = line.logit(line.first + count + i);
        top = std::max(top, exact[i]);
    }
    for (const T x : tops) top = std::max(top, x);
    double sum = 0;  // of weights over e^top: no more than all are at least
    const auto add = [&](const T* logits, int64_t size) {
        for (int64_t j = 0; j < size; j++) weights[j] = logits[j] - top;
        exponentials(weights.data(), size);
        T all = 0;
        for (int64_t j = 0; j < size; j++) all += weights[j];
        sum += all;
    };
    for (int64_t block = 0; block < blocks; block++)
        if (!(tops[block] < top - 16)) add(score.data() + block * BLOCK, std::min(BLOCK, count - block * BLOCK));
    for (int64_t from = 0; from < others; from += BLOCK) add(exact.data() + from, std::min(BLOCK, others - from));
    // Half of what may be left out goes to pairs below a floor, whatever their number; half to the lowest bins above it.
    const double allowed = epsilon / 4 * sum, floor = double(top) + std::log(allowed / double(line.end - line.first));
    std::vector<int64_t> slots;
    T highest = T(floor);
    for (int64_t block = 0; block < blocks; block++) {
        if (highs[block] < T(floor)) continue;
        for (int64_t i = block * BLOCK; i < std::min(count, (block + 1) * BLOCK); i++)
            if (!(bound[i] < T(floor))) {  // also what is no number
                slots.push_back(i);
                highest = std::max(highest, bound[i]);
            }
    }
    const double step = (double(highest) - floor) / BINS;
    int64_t bins[BINS] = {}, lowest = 0;
    const auto bin = [&](int64_t i) {
        const double at = (double(bound[i]) - floor) / step;
        return at >= 0 && at < BINS ? int64_t(at) : BINS - 1;
    };
    if (step > 0 && std::isfinite(step)) {
        for (const int64_t i : slots) bins[bin(i)]++;
        double left = 0;
        for (; lowest < BINS; lowest++) {
            left += double(bins[lowest]) * std::exp(floor + step * double(lowest + 1) - double(top));
            if (!(left < allowed)) break;
        }
        int64_t kept = 0;
        for (const int64_t i : slots)
            if (bin(i) >= lowest) slots[kept++] = line.first + i;
        slots.resize(kept);
    } else {
        for (int64_t& i : slots) i += line.first;
    }
    for (int64_t i = 0; i < others; i++) slots.push_back(line.first + count + i);
    return slots;
}

template <typename T, typename S>
void bounded(const Sizes& s, double epsilon, const T* queries, const Stored<T, S>& stored, const Sketch& sketch,
             int64_t* read) {
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1) schedule(dynamic)
    for (int64_t i = 0; i < s.batch * s.heads; i++) {
        Line<T, S> line(s, stored, queries, i);
        if (read) read[i] = std::max<int64_t>(0, line.end - line.first);
        if (line.end <= line.first) continue;
        const auto slots = needed(line, sketch, i / s.heads, i % s.heads, epsilon);
        if (int64_t(slots.size()) * 2 > line.end - line.first) {  // in order they are read faster
            line.read(nullptr, line.first, line.end);
        } else {
            line.read(slots.data(), 0, slots.size());
            if (read) read[i] = slots.size();
        }
    }
}

}  // namespace

#define STORED                                                                                                         \
    {                                                                                                                  \
        {k, ks, kf, kfs}, {v, vs, vf, vfs}, base, slope, exponent, start, stored, out, logs                            \
    }
#define EXPORT(T, S, suffix)                                                                                           \
    extern "C" void read_##suffix(const Sizes* s, const T* q, const S* k, const int64_t* ks, const float* kf,          \
                                  const int64_t* kfs, const S* v, const int64_t* vs, const float* vf,                  \
                                  const int64_t* vfs, const T* base, const T* slope, const T* exponent,                \
                                  const int64_t* start, const int64_t* stored, T* out, T* logs) {                      \
        read<T, S>(*s, q, STORED);                                                                                     \
    }                                                                                                                  \
    extern "C" void bounded_##suffix(                                                                                  \
        const Sizes* s, const T* q, const S* k, const int64_t* ks, const float* kf, const int64_t* kfs, const S* v,    \
        const int64_t* vs, const float* vf, const int64_t* vfs, const T* base, const T* slope, const T* exponent,      \
        const int64_t* start, const int64_t* stored, T* out, T* logs, const double* epsilon, const int64_t* count,     \
        const int8_t* sketch, const int64_t* sketch_stride, const float* scale, const int64_t* scale_stride,           \
        const float* radius, const int64_t* radius_stride, int64_t* read) {                                            \
        bounded<T, S>(*s, *epsilon, q, STORED,                                                                         \
                      {{sketch, sketch_stride, scale, scale_stride}, radius, radius_stride, *count}, read);            \
    }

EXPORT(double, double, float64)
EXPORT(float, float, float32)
EXPORT(float, Bfloat16, bfloat16)
EXPORT(float, int8_t, int8)
