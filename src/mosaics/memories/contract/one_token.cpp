// A residual step for one position of each row: the norm, the stages of all its memories, and the sum. The call is in
// one_token.py, what a memory brings in a C++ file of its own.

#include "one_token.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <vector>

namespace {

template <typename T>
struct Step {
    const T *x, *norm;
    T* y;
    int64_t batch, width, threads, count;  // of parts
    double norm_eps;
};

template <typename T>
struct Part {
    const int64_t* numbers;  // of the record, of the scratch for each row, of stages; their addresses; the record
    Wide<T>* scratch;

    int64_t stages() const { return numbers[2]; }
    void run(int64_t stage, const Call<T>& call) const {
        const auto function = reinterpret_cast<void (*)(const Call<T>*, const int64_t*, Wide<T>*)>(numbers[3 + stage]);
        function(&call, numbers + 3 + stages(), scratch);
    }
};

template <typename T>
void step(const Step<T>& s, const int64_t* numbers) {
    using W = Wide<T>;
    const int64_t batch = s.batch, width = s.width;
    std::vector<Part<T>> parts(s.count);
    int64_t room = 2 * batch * width, most = 0;
    for (auto& part : parts) {
        part.numbers = numbers;
        room += batch * numbers[1], most = std::max(most, numbers[2]);
        numbers += 3 + numbers[2] + numbers[0];
    }
    std::vector<W> x(room);
    W *y = x.data() + batch * width, *free = y + batch * width;
    for (auto& part : parts) part.scratch = free, free += batch * part.numbers[1];
    for (int64_t b = 0; b < batch; b++) {
        const T* own = s.x + b * width;
        W square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < width; i++) square += W(own[i]) * W(own[i]);
        const W scale = 1 / std::sqrt(square / W(width) + W(s.norm_eps));
        for (int64_t i = 0; i < width; i++) x[b * width + i] = own[i] * scale * s.norm[i];
    }
#pragma omp parallel num_threads(s.threads) if (s.threads > 1)
    {
#ifdef _OPENMP
        const Call<T> call{x.data(), y, batch, width, omp_get_thread_num(), omp_get_num_threads()};
#else
        const Call<T> call{x.data(), y, batch, width, 0, 1};
#endif
        for (int64_t stage = 0; stage + 1 < most; stage++) {
            for (const auto& part : parts)
                if (stage + 1 < part.stages()) part.run(stage, call);
#pragma omp barrier
        }
        const Share share(width, call.thread, call.threads);
        for (const auto& part : parts) part.run(part.stages() - 1, call);
        for (int64_t b = 0; b < batch; b++)
            for (int64_t o = b * width + share.from; o < b * width + share.end; o++) s.y[o] = W(s.x[o]) + y[o];
    }
}

}  // namespace

extern "C" void step_float(const Step<float>* s, const int64_t* parts) { step(*s, parts); }
extern "C" void step_double(const Step<double>* s, const int64_t* parts) { step(*s, parts); }
extern "C" void step_bfloat16(const Step<bfloat16>* s, const int64_t* parts) { step(*s, parts); }
