// The gated network for one position of each row: what feed_forward.py computes, in the stages of a step.

#include "../contract/one_token.h"

namespace {

template <typename T>
struct Record {
    Map<T> gate, up, down;
};

template <typename T>
void inner(const Call<T>& c, const Record<T>& m, Wide<T>* out) {
    const int64_t row = m.up.outputs;
    const Share share(row, c.thread, c.threads);
    const auto put = [&](int64_t b, int64_t o, Wide<T> sum) { out[b * row + o] = sum; };
    const auto gated = [&](int64_t b, int64_t o, Wide<T> sum) { out[b * row + o] *= sum / (1 + std::exp(-sum)); };
    product(m.up, c.x, c.batch, share.from, share.end, put);
    product(m.gate, c.x, c.batch, share.from, share.end, gated);
}

template <typename T>
void outer(const Call<T>& c, const Record<T>& m, Wide<T>* given) {
    add(c, m.down, given);
}

}  // namespace

STAGE(inner)
STAGE(outer)
STAGE_OF(inner, bfloat16)
STAGE_OF(outer, bfloat16)
