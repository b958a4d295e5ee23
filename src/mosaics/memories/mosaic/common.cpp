// A contextual memory with gated keys for one position of each row: what common.py computes, in the stages of a step.
// Averages, values and reads are the functions of the libraries of their ops.

#include "../contract/one_token.h"

#include <vector>

namespace {

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
struct Record {
    Ops<T> ops;
    double smallest, floor;
    Map<T> key, gate, decay, value, out;
    const T *mix, *length, *base, *slope, *exponent;  // of each head, as the parameters are
    const T *direction, *log_scale, *raw;
    T *next_direction, *next_log_scale, *next_raw;
    T *keys, *values;  // the first slot that is kept
    int64_t key_stride[3], value_stride[3];  // of batch, heads and slots
    int64_t heads, slots, delay, window;     // with the slot of this position; -1: no window
};

// What lies between the maps of a contextual memory, for one row and head: `mapped` are the row's keys, gates, decays
// and values, one after the other.
template <typename T>
void line(const Record<T>& m, const T* mapped, int64_t b, int64_t h, T* answer) {
    const int64_t width = m.key.outputs / m.heads, at = b * m.heads + h, last = m.slots - 1, none[3] = {0, 0, 0};
    const T* gates = mapped + m.key.outputs;
    const T *raw_key = mapped + h * width, *raw_value = gates + 2 * m.heads + h * width;
    const T gate = gates[h], decay = -std::abs(gates[m.heads + h]);
    T *direction = m.next_direction + at * width, *keys = m.keys + b * m.key_stride[0] + h * m.key_stride[1],
      *values = m.values + b * m.value_stride[0] + h * m.value_stride[1];
    const AverageSizes average{1, 1, 1, width, 1, m.floor};
    m.ops.average(&average, raw_key, none, &gate, none, &decay, none, m.direction + at * width, m.log_scale + at,
                  direction, m.next_log_scale + at, nullptr);
    std::copy_n(direction, width, keys + last * m.key_stride[2]);

    std::vector<T> raw(2 * width);
    std::copy_n(m.raw + at * width, width, raw.data());
    std::copy_n(raw_value, width, raw.data() + width);
    std::copy_n(raw_value, width, m.next_raw + at * width);
    const T length = std::exp(std::min(m.length[h], T(15)));
    const int64_t strides[3] = {0, 0, width};
    const ValueSizes two{1, 1, 2, width, 1, 0.0, m.smallest};
    m.ops.values(&two, raw.data(), strides, m.mix + h, &length, values + (last - 1) * m.value_stride[2], nullptr);

    const T base = std::exp(std::min(m.base[h], T(10))), slope = std::exp(std::min(m.slope[h], T(10)));
    const T exponent = std::min(std::abs(m.exponent[h]), T(1));
    const ReadSizes read{1, 1, m.slots, width, width, m.delay, m.window, 1};
    m.ops.read(&read, direction, keys, m.key_stride, nullptr, nullptr, values, m.value_stride, nullptr, nullptr, &base,
               &slope, &exponent, nullptr, nullptr, answer, nullptr);
}

// How many numbers the maps give of a row; behind those of all rows lies what is read.
template <typename T>
int64_t mapped(const Record<T>& m) {
    return m.key.outputs + 2 * m.heads + m.value.outputs;
}

template <typename T>
void maps(const Call<T>& c, const Record<T>& m, T* out) {
    const int64_t row = mapped(m);
    for (const auto* map : {&m.key, &m.gate, &m.decay, &m.value}) {
        const Share share(map->outputs, c.thread, c.threads);
        product(*map, c.x, c.batch, share.from, share.end, [&](int64_t b, int64_t o, T sum) { out[b * row + o] = sum; });
        out += map->outputs;
    }
}

template <typename T>
void reads(const Call<T>& c, const Record<T>& m, T* given) {
    const int64_t row = mapped(m), own = m.value.outputs / m.heads;
    for (int64_t i = c.thread; i < c.batch * m.heads; i += c.threads)
        line(m, given + i / m.heads * row, i / m.heads, i % m.heads, given + c.batch * row + i * own);
}

template <typename T>
void out(const Call<T>& c, const Record<T>& m, T* given) {
    add(c, m.out, given + c.batch * mapped(m));
}

}  // namespace

STAGE(maps)
STAGE(reads)
STAGE(out)
