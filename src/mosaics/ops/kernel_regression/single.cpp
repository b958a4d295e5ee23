// The read of one query for each row and head: what is stored passes by once, as it is stored. The mathematics is in
// README.md, the calls are in single.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

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

template <typename T, typename S>
void read(const Sizes& s, const T* queries, Array<S> keys, Array<S> values, const T* base, const T* slope,
          const T* exponent, const int64_t* start, const int64_t* stored, T* out, T* logs) {
    constexpr int64_t BLOCK = 128;
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1)
    for (int64_t line = 0; line < s.batch * s.heads; line++) {
        const int64_t b = line / s.heads, h = line % s.heads, own = stored ? stored[b] : s.slots - 1;
        int64_t first = 0, end = s.slots;
        if (s.delay >= 0) {
            end = std::min(own + 1, s.slots) - s.delay;
            if (start) first = std::max(first, start[b] + own);
            if (s.window >= 0) first = std::max(first, own - s.window + 1);
        }
        T* answer = out + line * s.value_width;
        std::fill(answer, answer + s.value_width, T(0));
        if (logs) logs[line] = -std::numeric_limits<T>::infinity();
        if (end <= first) continue;
        const double beta = base[h] + (slope ? slope[h] * std::pow(double(end - first), double(exponent[h])) : 0.0);
        std::vector<T> query(s.width);
        for (int64_t d = 0; d < s.width; d++) query[d] = T(beta) * queries[line * s.width + d];
        const S *key = keys.at(b, h), *value = values.at(b, h);
        const float *key_scale = keys.scale_at(b, h), *value_scale = values.scale_at(b, h);
        T top = -std::numeric_limits<T>::infinity(), total = 0, weights[BLOCK];
        for (int64_t from = first; from < end; from += BLOCK) {
            const int64_t count = std::min(BLOCK, end - from);
            T highest = top;
            for (int64_t j = 0; j < count; j++) {
                const S* row = key + (from + j) * keys.stride[2];
                T sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t d = 0; d < s.width; d++) sum += query[d] * T(row[d]);
                if (key_scale) sum *= key_scale[(from + j) * keys.scale_stride[2]];
                weights[j] = sum;
                highest = sum > highest ? sum : highest;
            }
            if (highest > top) {
                const T fade = std::exp(top - highest);
                total *= fade;
                for (int64_t d = 0; d < s.value_width; d++) answer[d] *= fade;
                top = highest;
            }
            for (int64_t j = 0; j < count; j++) weights[j] -= top;
            exponentials(weights, count);
            for (int64_t j = 0; j < count; j++) total += weights[j];
            if (value_scale)
                for (int64_t j = 0; j < count; j++) weights[j] *= value_scale[(from + j) * values.scale_stride[2]];
            int64_t j = 0;
            for (; j + 4 <= count; j += 4) {
                const S* row = value + (from + j) * values.stride[2];
                const S *second = row + values.stride[2], *third = second + values.stride[2],
                        *fourth = third + values.stride[2];
#pragma omp simd
                for (int64_t d = 0; d < s.value_width; d++)
                    answer[d] += weights[j] * T(row[d]) + weights[j + 1] * T(second[d]) +
                                 (weights[j + 2] * T(third[d]) + weights[j + 3] * T(fourth[d]));
            }
            for (; j < count; j++) {
                const S* row = value + (from + j) * values.stride[2];
#pragma omp simd
                for (int64_t d = 0; d < s.value_width; d++) answer[d] += weights[j] * T(row[d]);
            }
        }
        for (int64_t d = 0; d < s.value_width; d++) answer[d] /= total;
        if (logs) logs[line] = top + std::log(total);
    }
}

}  // namespace

#define EXPORT(T, S, suffix)                                                                                           \
    extern "C" void read_##suffix(const Sizes* s, const T* q, const S* k, const int64_t* ks, const float* kf,          \
                                  const int64_t* kfs, const S* v, const int64_t* vs, const float* vf,                  \
                                  const int64_t* vfs, const T* base, const T* slope, const T* exponent,                \
                                  const int64_t* start, const int64_t* stored, T* out, T* logs) {                      \
        read<T, S>(*s, q, {k, ks, kf, kfs}, {v, vs, vf, vfs}, base, slope, exponent, start, stored, out, logs);        \
    }

EXPORT(double, double, float64)
EXPORT(float, float, float32)
EXPORT(float, Bfloat16, bfloat16)
EXPORT(float, int8_t, int8)
