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

template <typename T, typename W = Wide<T>>
struct Ops {
    void (*average)(const AverageSizes*, const W*, const int64_t*, const W*, const int64_t*, const W*, const int64_t*,
                    const W*, const W*, W*, W*, void*);
    void (*values)(const ValueSizes*, const W*, const int64_t*, const W*, const W*, W*, W*);
    void (*read)(const ReadSizes*, const W*, const T*, const int64_t*, const float*, const int64_t*, const T*,
                 const int64_t*, const float*, const int64_t*, const W*, const W*, const W*, const int64_t*,
                 const int64_t*, W*, W*);
};

template <typename T>
struct Record {
    Ops<T> ops;
    double smallest, floor;
    Map<T> key, gate, decay, value, out;
    const T *mix, *length, *base, *slope, *exponent;  // of each head, as the parameters are
    const Wide<T> *direction, *log_scale;
    const T* raw;
    Wide<T> *next_direction, *next_log_scale;
    T *next_raw, *keys, *values;             // of the last two the first slot that is kept
    int64_t key_stride[3], value_stride[3];  // of batch, heads and slots
    int64_t heads, slots, delay, window;     // with the slot of this position; -1: no window
};

// What lies between the maps of a contextual memory, for one row and head: `mapped` are the row's keys, gates, decays
// and values, one after the other. What is stored is read as it is stored, also of this position.
template <typename T, typename W = Wide<T>>
void line(const Record<T>& m, const W* mapped, int64_t b, int64_t h, W* answer) {
    const int64_t width = m.key.outputs / m.heads, at = b * m.heads + h, last = m.slots - 1, none[3] = {0, 0, 0};
    const W* gates = mapped + m.key.outputs;
    const W *raw_key = mapped + h * width, *raw_value = gates + 2 * m.heads + h * width;
    const W gate = gates[h], decay = -std::abs(gates[m.heads + h]);
    W* direction = m.next_direction + at * width;
    T *keys = m.keys + b * m.key_stride[0] + h * m.key_stride[1], *key = keys + last * m.key_stride[2],
      *values = m.values + b * m.value_stride[0] + h * m.value_stride[1], *raw = m.next_raw + at * width;
    const AverageSizes average{1, 1, 1, width, 1, m.floor};
    m.ops.average(&average, raw_key, none, &gate, none, &decay, none, m.direction + at * width, m.log_scale + at,
                  direction, m.next_log_scale + at, nullptr);
    std::copy_n(direction, width, key);
    std::copy_n(raw_value, width, raw);

    std::vector<W> both(5 * width);  // the raw value before and this one, their values, the query
    W *made = both.data() + 2 * width, *query = made + 2 * width;
    std::copy_n(m.raw + at * width, width, both.data());
    std::copy_n(raw, width, both.data() + width);
    const W mix = m.mix[h], length = std::exp(std::min(W(m.length[h]), W(15)));
    const int64_t strides[3] = {0, 0, width};
    const ValueSizes two{1, 1, 2, width, 1, 0.0, m.smallest};
    m.ops.values(&two, both.data(), strides, &mix, &length, made, nullptr);
    std::copy_n(made, width, values + (last - 1) * m.value_stride[2]);
    std::copy_n(made + width, width, values + last * m.value_stride[2]);

    const W base = std::exp(std::min(W(m.base[h]), W(10))), slope = std::exp(std::min(W(m.slope[h]), W(10)));
    const W exponent = std::min(std::abs(W(m.exponent[h])), W(1));
    const ReadSizes read{1, 1, m.slots, width, width, m.delay, m.window, 1};
    std::copy_n(key, width, query);
    m.ops.read(&read, query, keys, m.key_stride, nullptr, nullptr, values, m.value_stride, nullptr, nullptr, &base,
               &slope, &exponent, nullptr, nullptr, answer, nullptr);
}

// How many numbers the maps give of a row; behind those of all rows lies what is read.
template <typename T>
int64_t mapped(const Record<T>& m) {
    return m.key.outputs + 2 * m.heads + m.value.outputs;
}

template <typename T>
void maps(const Call<T>& c, const Record<T>& m, Wide<T>* out) {
    const int64_t row = mapped(m);
    for (const auto* map : {&m.key, &m.gate, &m.decay, &m.value}) {
        const Share share(map->outputs, c.thread, c.threads);
        const auto take = [&](int64_t b, int64_t o, Wide<T> sum) { out[b * row + o] = sum; };
        product(*map, c.x, c.batch, share.from, share.end, take);
        out += map->outputs;
    }
}

template <typename T>
void reads(const Call<T>& c, const Record<T>& m, Wide<T>* given) {
    const int64_t row = mapped(m), own = m.value.outputs / m.heads;
    for (int64_t i = c.thread; i < c.batch * m.heads; i += c.threads)
        line(m, given + i / m.heads * row, i / m.heads, i % m.heads, given + c.batch * row + i * own);
}

template <typename T>
void out(const Call<T>& c, const Record<T>& m, Wide<T>* given) {
    add(c, m.out, given + c.batch * mapped(m));
}

}  // namespace

STAGE(maps)
STAGE(reads)
STAGE(out)
STAGE_OF(maps, bfloat16)
STAGE_OF(reads, bfloat16)
STAGE_OF(out, bfloat16)
