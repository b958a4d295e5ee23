// What the parts of a residual step for one position of each row have in common. A memory that declares `one_token`
// brings a C++ file that includes this: its record, and the stages that are computed of it. All memories of the step
// have ended a stage when the next begins; the last stage of each adds its answer to y.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// A number of 16 bits; it is computed with as a float.
struct bfloat16 {
    uint16_t bits;
    bfloat16() = default;
    bfloat16(float x) {  // to the nearest, of two the even one
        uint32_t wide;
        std::memcpy(&wide, &x, sizeof wide);
        bits = x == x ? (wide + 0x7fff + (wide >> 16 & 1)) >> 16 : 0x7fc0;
    }
    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &wide, sizeof x);
        return x;
    }
};

// What numbers of a kind are computed in, between the stages too.
template <typename T>
struct Computed {
    typedef T type;
};
template <>
struct Computed<bfloat16> {
    typedef float type;
};
template <typename T>
using Wide = typename Computed<T>::type;

// What each stage is given, on every thread, beside its memory's record and scratch.
template <typename T>
struct Call {
    const Wide<T>* x;  // (batch, width), after the norm
    Wide<T>* y;        // (batch, width)
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
    static type of(const T* x) { return *reinterpret_cast<const type*>(x); }
};
template <>
struct Vector<bfloat16> {
    typedef Vector<float>::type type;
    static constexpr int64_t lanes = Vector<float>::lanes;
    static type of(const bfloat16* x) {
        typedef uint16_t narrow __attribute__((vector_size(32), aligned(2), may_alias));
        typedef uint32_t wide __attribute__((vector_size(64)));
        const wide bits = __builtin_convertvector(*reinterpret_cast<const narrow*>(x), wide) << 16;
        type found;
        std::memcpy(&found, &bits, sizeof found);
        return found;
    }
};

// The rows from `from` to `end` of a map of x (batch, inputs), of which each is given to `take(b, row, number)`. Weights
// pass by once, four rows at a time, and the next four are asked for ahead.
template <typename T, typename Take>
inline void product(const Map<T>& map, const Wide<T>* x, int64_t batch, int64_t from, int64_t end, Take take) {
    using W = Wide<T>;
    using V = typename Vector<T>::type;
    constexpr int64_t lanes = Vector<T>::lanes;
    const int64_t n = map.inputs, even = n / lanes * lanes;
    const auto finish = [&](V sums, const T* row, const W* own, int64_t o) {
        W parts[lanes];
        std::memcpy(parts, &sums, sizeof parts);
        for (int64_t half = lanes / 2; half; half /= 2)
            for (int64_t i = 0; i < half; i++) parts[i] += parts[i + half];
        W sum = parts[0];
        for (int64_t i = even; i < n; i++) sum += row[i] * own[i];
        return map.bias ? sum + map.bias[o] : sum;
    };
    int64_t o = from;
    for (; o + 4 <= end; o += 4) {
        const T *a = map.weight + o * n, *b = a + n, *c = b + n, *d = c + n;
        for (int64_t r = 0; r < batch; r++) {
            const W* own = x + r * n;
            V p{}, q{}, s{}, t{};
            for (int64_t i = 0; i < even; i += lanes) {
                if (r == 0) {
                    __builtin_prefetch(a + i + 4 * n);
                    __builtin_prefetch(b + i + 4 * n);
                    __builtin_prefetch(c + i + 4 * n);
                    __builtin_prefetch(d + i + 4 * n);
                }
                const V v = Vector<W>::of(own + i);
                p += Vector<T>::of(a + i) * v;
                q += Vector<T>::of(b + i) * v;
                s += Vector<T>::of(c + i) * v;
                t += Vector<T>::of(d + i) * v;
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
            for (int64_t i = 0; i < even; i += lanes) p += Vector<T>::of(a + i) * Vector<W>::of(x + r * n + i);
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
inline void add(const Call<T>& c, const Map<T>& map, const Wide<T>* given) {
    const Share share(c.width, c.thread, c.threads);
    const auto take = [&](int64_t b, int64_t o, Wide<T> sum) { c.y[b * c.width + o] += sum; };
    product(map, given, c.batch, share.from, share.end, take);
}

}  // namespace

// Makes `name`, a template over the kind of number that weights are, a stage of that kind: `name_float`.
#define STAGE_OF(name, T)                                                                        \
    extern "C" void name##_##T(const Call<T>* call, const Record<T>* record, Wide<T>* scratch) { \
        name<T>(*call, *record, scratch);                                                        \
    }
#define STAGE(name) STAGE_OF(name, float) STAGE_OF(name, double)
