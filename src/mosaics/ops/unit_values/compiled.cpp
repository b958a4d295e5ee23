// Values that look one position ahead, in one pass forward and one backward: the mathematics is in README.md, the calls
// are in compiled.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

struct Sizes {
    int64_t batch, heads, time, width, threads;
    double eps, smallest;  // a norm up to `smallest` counts as 0
};

template <typename T>
struct Array {
    T* data;
    const int64_t* stride;  // of batch, heads and time
    T* at(int64_t b, int64_t h, int64_t t) const { return data + b * stride[0] + h * stride[1] + t * stride[2]; }
};

template <typename T>
void forward(const Sizes& s, Array<T> raw, const T* mix, const T* length, T* values, T* norms) {
    const std::vector<T> nothing(s.width, T(0));
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1)
    for (int64_t line = 0; line < s.batch * s.heads; line++) {
        const int64_t b = line / s.heads, h = line % s.heads;
        const T own = mix[h], other = 1 - mix[h];
        for (int64_t t = 0; t < s.time; t++) {
            const T* here = raw.at(b, h, t);
            const T* next = t + 1 < s.time ? raw.at(b, h, t + 1) : nothing.data();
            T* value = values + (line * s.time + t) * s.width;
            T square = 0;
#pragma omp simd reduction(+ : square)
            for (int64_t d = 0; d < s.width; d++) {
                const T x = own * here[d] + other * next[d];
                value[d] = x;
                square += x * x;
            }
            T norm = std::sqrt(square);
            if (norm <= T(s.smallest)) norm = std::numeric_limits<T>::infinity();
            const T scale = length[h] / (norm + T(s.eps));
            for (int64_t d = 0; d < s.width; d++) value[d] *= scale;
            if (norms) norms[line * s.time + t] = norm;
        }
    }
}

template <typename T>
void backward(const Sizes& s, Array<T> raw, const T* mix, const T* length, const T* values, const T* norms,
              Array<T> grad, Array<T> grad_raw, T* grad_mix, T* grad_length) {
    const std::vector<T> nothing(s.width, T(0));
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1)
    for (int64_t line = 0; line < s.batch * s.heads; line++) {
        const int64_t b = line / s.heads, h = line % s.heads;
        const T own = mix[h], other = 1 - mix[h];
        std::vector<T> before(s.width, T(0));  // the gradient of the mixed value one position earlier
        double of_mix = 0, of_length = 0;
        for (int64_t t = 0; t < s.time; t++) {
            const T* value = values + (line * s.time + t) * s.width;
            const T *asked = grad.at(b, h, t), *here = raw.at(b, h, t);
            const T* next = t + 1 < s.time ? raw.at(b, h, t + 1) : nothing.data();
            const T norm = norms[line * s.time + t], scale = length[h] / (norm + T(s.eps));
            T along = 0, difference = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t d = 0; d < s.width; d++) along += asked[d] * value[d];
            along /= std::max(length[h], std::numeric_limits<T>::min());
            of_length += along;
            along /= norm;
            T* row = grad_raw.at(b, h, t);
#pragma omp simd reduction(+ : difference)
            for (int64_t d = 0; d < s.width; d++) {
                const T x = scale * asked[d] - along * value[d];
                difference += x * (here[d] - next[d]);
                row[d] = own * x + other * before[d];
                before[d] = x;
            }
            of_mix += difference;
        }
        grad_mix[line] = of_mix;
        grad_length[line] = of_length;
    }
}

}  // namespace

#define EXPORT(T)                                                                                                      \
    extern "C" void forward_##T(const Sizes* s, T* raw, const int64_t* rs, const T* mix, const T* length, T* values,   \
                                T* norms) {                                                                            \
        forward<T>(*s, {raw, rs}, mix, length, values, norms);                                                         \
    }                                                                                                                  \
    extern "C" void backward_##T(const Sizes* s, T* raw, const int64_t* rs, const T* mix, const T* length,             \
                                 const T* values, const T* norms, T* g, const int64_t* gs, T* gr, const int64_t* grs,  \
                                 T* gm, T* gl) {                                                                       \
        backward<T>(*s, {raw, rs}, mix, length, values, norms, {g, gs}, {gr, grs}, gm, gl);                            \
    }

EXPORT(float)
EXPORT(double)
