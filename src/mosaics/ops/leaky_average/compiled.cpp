// The gated recurrence of the keys, step by step as its equation has it, a line (row of the batch and head) after the
// other: the mathematics is in README.md, the calls are in compiled.py.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

struct Sizes {
    int64_t batch, heads, time, width, threads;
    double floor;  // a norm up to this counts as 0
};

template <typename T>
struct Array {
    T* data;
    const int64_t* stride;  // of batch, heads and time
    T* at(int64_t b, int64_t h, int64_t t) const { return data + b * stride[0] + h * stride[1] + t * stride[2]; }
};

// What a step keeps for the backward pass: the weights of the input and of the past, divided by the norm.
struct Step {
    double own, past;
};

// All that is carried from step to step is double: in float, rounding would add up over a long document.
template <typename T>
void forward(const Sizes& s, Array<T> inputs, Array<T> gates, Array<T> decays, const T* first, const T* first_scale,
             T* directions, T* scales, Step* steps) {
    constexpr double nothing = -std::numeric_limits<double>::infinity();
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1)
    for (int64_t line = 0; line < s.batch * s.heads; line++) {
        const int64_t b = line / s.heads, h = line % s.heads;
        std::vector<double> average(first + line * s.width, first + (line + 1) * s.width);
        double scale = first_scale[line], inverse = 1;
        for (int64_t t = 0; t < s.time; t++) {
            const double gate = *gates.at(b, h, t), decay = *decays.at(b, h, t) + scale;
            // Divided by the larger of the two one weight is 1 (or no number, as infinity by infinity); without either
            // both are 0.
            const double larger = gate > decay ? gate : decay, top = larger == nothing ? 0.0 : larger;
            const double smaller = std::exp((gate > decay ? decay : gate) - top);
            const double one = larger == nothing ? 0.0 : 1.0 + (top - top);
            const double own = gate > decay ? one : smaller, past = gate > decay ? smaller : one;
            const double kept = past * inverse;
            const T* input = inputs.at(b, h, t);
            double* x = average.data();
            double square = 0;
#pragma omp simd reduction(+ : square)
            for (int64_t d = 0; d < s.width; d++) {
                x[d] = own * input[d] + kept * x[d];
                square += x[d] * x[d];
            }
            const double norm = std::sqrt(square);
            const bool empty = norm <= s.floor;
            inverse = empty ? 0.0 : 1 / norm;
            T* direction = directions + (line * s.time + t) * s.width;
            for (int64_t d = 0; d < s.width; d++) direction[d] = T(x[d] * inverse);
            scale = larger == nothing ? nothing : top + std::log(empty ? s.floor : norm);
            scales[line * s.time + t] = scale;
            if (steps) steps[line * s.time + t] = {own * inverse, past * inverse};
        }
    }
}

template <typename T>
void backward(const Sizes& s, Array<T> inputs, const T* first, const T* directions, const Step* steps, Array<T> grad,
              const T* grad_scales, Array<T> grad_inputs, T* grad_gates, T* grad_decays, T* grad_first,
              T* grad_first_scale) {
#pragma omp parallel for num_threads(s.threads) if (s.threads > 1)
    for (int64_t line = 0; line < s.batch * s.heads; line++) {
        const int64_t b = line / s.heads, h = line % s.heads;
        std::vector<double> later(s.width, 0.0);  // what later steps ask of this direction, and of its scale
        double *carried = later.data(), carried_scale = 0;
        for (int64_t t = s.time - 1; t >= 0; t--) {
            const int64_t at = line * s.time + t;
            const T* direction = directions + at * s.width;
            const T* before = t ? direction - s.width : first + line * s.width;
            const T *asked = grad.at(b, h, t), *input = inputs.at(b, h, t);
            const Step step = steps[at];
            // Along the direction, later steps ask of it just what they ask of its scale: the two cancel.
            T along = grad_scales ? grad_scales[at] : T(0);
#pragma omp simd reduction(- : along)
            for (int64_t d = 0; d < s.width; d++) along -= asked[d] * direction[d];
            T* row = grad_inputs.at(b, h, t);
            double gate = 0, decay = 0;
#pragma omp simd reduction(+ : gate, decay)
            for (int64_t d = 0; d < s.width; d++) {
                const double x = carried[d] + (asked[d] + along * direction[d]);
                gate += x * input[d];
                decay += x * before[d];
                row[d] = T(step.own * x);
                carried[d] = step.past * x;
            }
            grad_gates[at] = step.own * gate;
            grad_decays[at] = carried_scale = step.past * decay;
        }
        for (int64_t d = 0; d < s.width; d++) grad_first[line * s.width + d] = carried[d];
        grad_first_scale[line] = carried_scale;
    }
}

}  // namespace

#define EXPORT(T)                                                                                                      \
    extern "C" void forward_##T(const Sizes* s, T* x, const int64_t* xs, T* g, const int64_t* gs, T* l,                \
                                const int64_t* ls, const T* d, const T* e, T* out, T* scales, void* steps) {           \
        forward<T>(*s, {x, xs}, {g, gs}, {l, ls}, d, e, out, scales, (Step*)steps);                                 \
    }                                                                                                                  \
    extern "C" void backward_##T(const Sizes* s, T* x, const int64_t* xs, const T* d, const T* out, void* steps, T* g, \
                                 const int64_t* gs, const T* scales, T* gx, const int64_t* gxs, T* gg, T* gl, T* gd,   \
                                 T* ge) {                                                                              \
        backward<T>(*s, {x, xs}, d, out, (const Step*)steps, {g, gs}, scales, {gx, gxs}, gg, gl, gd, ge);                 \
    }

EXPORT(float)
EXPORT(double)
