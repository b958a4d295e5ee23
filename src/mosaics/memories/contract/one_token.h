// What the parts of a residual step for one position of each row have in common. A memory that declares `one_token`
// brings a C++ file that includes this: its record, and the stages that are computed of it. All memories of the step
// have ended a stage when the next begins; the last stage of each adds its answer to y.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// What each stage is given, on every thread, beside its memory's record and scratch.
template <typename T>
struct Call {
    const T* x;  // (batch, width), after the norm
    T* y;        // (batch, width)
    int64_t batch, width, thread, threads;
};

// A linear map as `numbers_of` describes it.
template <typename T>
struct Map {
    const T *weight, *bias;  // no bias: null
    int64_t outputs, inputs;
};

// Numbers in a vector register, or in a few; they need not be aligned.
template <typename T>
struct Vector {
    typedef T type __attribute__((vector_size(64), aligned(alignof(T)), may_alias));
    static constexpr int64_t lanes = 64 / sizeof(T);
};

// The rows from `from` to `end` of a map of x (batch, inputs), of which each is given to `take(b, row, number)`. Weights
// pass by once, four rows at a time, and the next four are asked for ahead.
template <typename T, typename Take>
inline void product(const Map<T>& map, const T* x, int64_t batch, int64_t from, int64_t end, Take take) {
    using V = typename Vector<T>::type;
    constexpr int64_t lanes = Vector<T>::lanes;
    const int64_t n = map.inputs, even = n / lanes * lanes;
    const auto finish = [&](V sums, const T* row, const T* own, int64_t o) {
        T parts[lanes];
        std::memcpy(parts, &sums, sizeof parts);
        for (int64_t half = lanes / 2; half; half /= 2)
            for (int64_t i = 0; i < half; i++) parts[i] += parts[i + half];
        T sum = parts[0];
        for (int64_t i = even; i < n; i++) sum += row[i] * own[i];
        return map.bias ? sum + map.bias[o] : sum;
    };
    int64_t o = from;
    for (; o + 4 <= end; o += 4) {
        const T *a = map.weight + o * n, *b = a + n, *c = b + n, *d = c + n;
        for (int64_t r = 0; r < batch; r++) {
            const T* own = x + r * n;
            V p{}, q{}, s{}, t{};
            for (int64_t i = 0; i < even; i += lanes) {
                if (r == 0) {
                    __builtin_prefetch(a + i + 4 * n);
                    __builtin_prefetch(b + i + 4 * n);
                    __builtin_prefetch(c + i + 4 * n);
                    __builtin_prefetch(d + i + 4 * n);
                }
                const V v = *reinterpret_cast<const V*>(own + i);
                p += *reinterpret_cast<const V*>(a + i) * v;
                q += *reinterpret_cast<const V*>(b + i) * v;
                s += *reinterpret_cast<const V*>(c + i) * v;
                t += *reinterpret_cast<const V*>(d + i) * v;
            }
            take(r, o, finish(p, a, own, o));
            take(r, o + 1, finish(q, b, own, o + 1));
            take(r, o + 2, finish(s, c, own, o + 2));
            take(r, o + 3, finish(t, d, own, o + 3));
        }
    }
    for (; o < end; o++) {
        const T* a = map.weight + o * n;
        for (int64_t r = 0; r < batch; r++) {
            V p{};
            for (int64_t i = 0; i < even; i += lanes)
                p += *reinterpret_cast<const V*>(a + i) * *reinterpret_cast<const V*>(x + r * n + i);
            take(r, o, finish(p, a, x + r * n, o));
        }
    }
}

// This thread's share of `count` rows, in fours.
struct Share {
    int64_t from, end;
    Share(int64_t count, int64_t thread, int64_t threads) {
        const int64_t fours = (count + 3) / 4;
        from = std::min(count, fours * thread / threads * 4), end = std::min(count, fours * (thread + 1) / threads * 4);
    }
};

// The last stage: what a map makes of (batch, inputs) is added to this thread's share of y.
template <typename T>
inline void add(const Call<T>& c, const Map<T>& map, const T* given) {
    const Share share(c.width, c.thread, c.threads);
    product(map, given, c.batch, share.from, share.end, [&](int64_t b, int64_t o, T sum) { c.y[b * c.width + o] += sum; });
}

}  // namespace

// Makes `name`, a template over T, the stages `name_float` and `name_double`.
#define STAGE_OF(name, T)                                                                 \
    extern "C" void name##_##T(const Call<T>* call, const Record<T>* record, T* scratch) { \
        name<T>(*call, *record, scratch);                                                 \
    }
#define STAGE(name) STAGE_OF(name, float) STAGE_OF(name, double)
