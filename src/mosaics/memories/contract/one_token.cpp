// A residual step for one position of each row: norm, the maps of all its memories, averages, values, reads and output
// maps by one call. What each part computes is in memories/mosaic/common.py and memories/persistent/feed_forward.py; the
// averages, values and reads are the functions of the libraries of their ops. The calls are in one_token.py, which makes
// the records below: numbers and addresses of 64 bits.

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

template <typename T>
struct Map {
    const T *weight, *bias;  // no bias: null
    int64_t outputs, inputs;
};

template <typename T>
struct Contextual {
    Map<T> key, gate, decay, value, out;
    const T *mix, *length, *base, *slope, *exponent;  // of each head, as the parameters are
    const T *direction, *log_scale, *raw;
    T *next_direction, *next_log_scale, *next_raw;
    T *keys, *values;  // the first slot that is kept
    int64_t key_stride[3], value_stride[3];  // of batch, heads and slots
    int64_t heads, slots, delay, window;     // with the slot of this position; -1: no window
};

template <typename T>
struct FeedForward {
    Map<T> gate, up, down;
};

struct AverageSizes {
    int64_t batch, heads, time, width, threads;
    double floor;
};
struct ValueSizes {
    int64_t batch, heads, time, width, threads;
    double eps, smallest;
};
struct ReadSizes {
    int64_t batch, heads, slots, width, value_width, delay, window, threads;
};

template <typename T>
struct Ops {
    void (*average)(const AverageSizes*, const T*, const int64_t*, const T*, const int64_t*, const T*, const int64_t*,
                    const T*, const T*, T*, T*, void*);
    void (*values)(const ValueSizes*, const T*, const int64_t*, const T*, const T*, T*, T*);
    void (*read)(const ReadSizes*, const T*, const T*, const int64_t*, const float*, const int64_t*, const T*,
                 const int64_t*, const float*, const int64_t*, const T*, const T*, const T*, const int64_t*,
                 const int64_t*, T*, T*);
};

template <typename T>
struct Step {
    Ops<T> ops;
    const T *x, *norm;
    T* y;
    int64_t batch, width, threads, contextual, feed_forward;  // the last two: how many records of each follow
    double norm_eps, value_eps, smallest, floor;
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

// What lies between the maps of a contextual memory, for one row and head: `mapped` are the row's keys, gates, decays
// and values, one after the other.
template <typename T>
void line(const Step<T>& s, const Contextual<T>& m, const T* mapped, int64_t b, int64_t h, T* answer) {
    const int64_t width = m.key.outputs / m.heads, at = b * m.heads + h, last = m.slots - 1, none[3] = {0, 0, 0};
    const T* gates = mapped + m.key.outputs;
    const T *raw_key = mapped + h * width, *raw_value = gates + 2 * m.heads + h * width;
    const T gate = gates[h], decay = -std::abs(gates[m.heads + h]);
    T *direction = m.next_direction + at * width, *keys = m.keys + b * m.key_stride[0] + h * m.key_stride[1],
      *values = m.values + b * m.value_stride[0] + h * m.value_stride[1];
    const AverageSizes average{1, 1, 1, width, 1, s.floor};
    s.ops.average(&average, raw_key, none, &gate, none, &decay, none, m.direction + at * width, m.log_scale + at,
                  direction, m.next_log_scale + at, nullptr);
    std::copy_n(direction, width, keys + last * m.key_stride[2]);

    std::vector<T> raw(2 * width);
    std::copy_n(m.raw + at * width, width, raw.data());
    std::copy_n(raw_value, width, raw.data() + width);
    std::copy_n(raw_value, width, m.next_raw + at * width);
    const T length = std::exp(std::min(m.length[h], T(15)));
    const int64_t strides[3] = {0, 0, width};
    const ValueSizes two{1, 1, 2, width, 1, s.value_eps, s.smallest};
    s.ops.values(&two, raw.data(), strides, m.mix + h, &length, values + (last - 1) * m.value_stride[2], nullptr);

    const T base = std::exp(std::min(m.base[h], T(10))), slope = std::exp(std::min(m.slope[h], T(10)));
    const T exponent = std::min(std::abs(m.exponent[h]), T(1));
    const ReadSizes read{1, 1, m.slots, width, width, m.delay, m.window, 1};
    s.ops.read(&read, direction, keys, m.key_stride, nullptr, nullptr, values, m.value_stride, nullptr, nullptr, &base,
               &slope, &exponent, nullptr, nullptr, answer, nullptr);
}

template <typename T>
void step(const Step<T>& s, const Contextual<T>* contextual, const FeedForward<T>* feed_forward) {
    const int64_t batch = s.batch, width = s.width;
    // Of each memory and row what its maps give, and what is read or made of it.
    std::vector<std::vector<T>> mapped(s.contextual), read(s.contextual), inner(s.feed_forward);
    for (int64_t k = 0; k < s.contextual; k++) {
        const auto& m = contextual[k];
        mapped[k].resize(batch * (m.key.outputs + 2 * m.heads + m.value.outputs));
        read[k].resize(batch * m.value.outputs);
    }
    for (int64_t k = 0; k < s.feed_forward; k++) inner[k].resize(batch * feed_forward[k].up.outputs);
    std::vector<T> x(batch * width);
    for (int64_t b = 0; b < batch; b++) {
        const T* own = s.x + b * width;
        T square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < width; i++) square += own[i] * own[i];
        const T scale = 1 / std::sqrt(square / T(width) + T(s.norm_eps));
        for (int64_t i = 0; i < width; i++) x[b * width + i] = own[i] * scale * s.norm[i];
    }
#pragma omp parallel num_threads(s.threads) if (s.threads > 1)
    {
#ifdef _OPENMP
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
        const int64_t thread = 0, threads = 1;
#endif
        for (int64_t k = 0; k < s.contextual; k++) {
            const auto& m = contextual[k];
            const int64_t row = m.key.outputs + 2 * m.heads + m.value.outputs;
            T* out = mapped[k].data();
            for (const auto* map : {&m.key, &m.gate, &m.decay, &m.value}) {
                const Share share(map->outputs, thread, threads);
                product(*map, x.data(), batch, share.from, share.end,
                        [&](int64_t b, int64_t o, T sum) { out[b * row + o] = sum; });
                out += map->outputs;
            }
        }
        for (int64_t k = 0; k < s.feed_forward; k++) {
            const auto& m = feed_forward[k];
            const int64_t row = m.up.outputs;
            const Share share(row, thread, threads);
            T* out = inner[k].data();
            const auto put = [&](int64_t b, int64_t o, T sum) { out[b * row + o] = sum; };
            const auto gated = [&](int64_t b, int64_t o, T sum) { out[b * row + o] *= sum / (1 + std::exp(-sum)); };
            product(m.up, x.data(), batch, share.from, share.end, put);
            product(m.gate, x.data(), batch, share.from, share.end, gated);
        }
#pragma omp barrier
        for (int64_t k = 0; k < s.contextual; k++) {
            const auto& m = contextual[k];
            const int64_t row = m.key.outputs + 2 * m.heads + m.value.outputs, own = m.value.outputs / m.heads;
            for (int64_t i = thread; i < batch * m.heads; i += threads)
                line(s, m, mapped[k].data() + i / m.heads * row, i / m.heads, i % m.heads, read[k].data() + i * own);
        }
#pragma omp barrier
        const Share share(width, thread, threads);
        for (int64_t b = 0; b < batch; b++) std::fill(s.y + b * width + share.from, s.y + b * width + share.end, T(0));
        const auto add = [&](int64_t b, int64_t o, T sum) { s.y[b * width + o] += sum; };
        for (int64_t k = 0; k < s.contextual; k++)
            product(contextual[k].out, read[k].data(), batch, share.from, share.end, add);
        for (int64_t k = 0; k < s.feed_forward; k++)
            product(feed_forward[k].down, inner[k].data(), batch, share.from, share.end, add);
        for (int64_t b = 0; b < batch; b++)
            for (int64_t o = share.from; o < share.end; o++) s.y[b * width + o] += s.x[b * width + o];
    }
}

}  // namespace

#define EXPORT(T)                                                                                             \
    extern "C" void step_##T(const Step<T>* s, const Contextual<T>* contextual, const FeedForward<T>* others) { \
        step<T>(*s, contextual, others);                                                                      \
    }

EXPORT(float)
EXPORT(double)
