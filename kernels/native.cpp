// A neuron layer in one pass over its current; native.py compiles this file on the machine where it runs.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "native.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

enum Type { F32, BF16, CODES };
template <class V> struct Of;  // the vectors of as many numbers as V
template <> struct Of<Floats> { typedef Ints I; typedef Shorts S; typedef Bytes B; };
template <> struct Of<float> { typedef int32_t I; typedef uint16_t S; typedef uint8_t B; };

template <class To> inline To converted(Floats x) { return __builtin_convertvector(x, To); }
template <class To> inline To converted(Ints x) { return __builtin_convertvector(x, To); }
template <class To> inline To converted(Shorts x) { return __builtin_convertvector(x, To); }
template <class To> inline To converted(float x) { return (To)x; }
template <class To> inline To converted(int32_t x) { return (To)x; }
template <class To> inline To converted(uint16_t x) { return (To)x; }

template <class V> inline V load(const float *from) {
    V found;
    std::memcpy(&found, from, sizeof found);
    return found;
}

template <class V> inline V load(const void *from, long at, int type) {
    if (type == F32) return load<V>((const float *)from + at);
    typename Of<V>::S half;
    std::memcpy(&half, (const uint16_t *)from + at, sizeof half);
    const auto bits = converted<typename Of<V>::I>(half) << 16;
    V found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

template <class V> inline void store(V x, void *to, long at, int type) {
    if (type == F32) {
        std::memcpy((float *)to + at, &x, sizeof x);
        return;
    }
    typename Of<V>::I bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, halves to even
    bits = x == x ? bits : bits * 0 + 0x7fc0;
    const auto half = converted<typename Of<V>::S>(bits);
    std::memcpy((uint16_t *)to + at, &half, sizeof half);
}

// The steps of the neurons from i on, as many as a V holds
template <class V, int X, int OUT> inline void fire(const Layer &a, long i) {
    typedef typename Of<V>::I I;
    const long lane = i % a.period;
    const V zero = {}, top = zero + a.top;
    V v = a.v_in ? load<V>(a.v_in + i) : zero;
    for (long t = 0; t < a.k; t++) {
        auto of_step = [&](const float *values) { return load<V>(values + t * a.period + lane); };
        auto term = [&](const Term &x, int type) {
            const V y = load<V>(x.y, t * x.step + i, type);
            return x.gain ? y * of_step(x.gain) + of_step(x.shift) : y;
        };
        V m = term(a.x, X), s;
        for (int j = 0; j < a.terms; j++) m = term(a.more[j], a.of_more) + m;
        if (a.sum) store<V>(m, a.sum, t * a.n + i, a.of_sum);
        if (a.leak && (t || a.v_in)) m = m + of_step(a.leak) * v;
        if (a.gain) m = m * of_step(a.gain) + of_step(a.shift);
        s = m;
        if (a.threshold) {
            const V threshold = of_step(a.threshold);
            s = m - threshold;
            s = s < zero ? zero : s;            // NaN stays NaN
            v = m > threshold ? threshold : m;  // not read where there is no leak
        }
        if (a.top > 0) {
            V code = s * a.inverse + 0.5f;
            const I whole = converted<I>(code > top ? top : code);
            if (OUT == CODES) {
                const auto bytes = converted<typename Of<V>::B>(whole);
                std::memcpy((uint8_t *)a.out + t * a.n + i, &bytes, sizeof bytes);
                continue;
            }
            s = converted<V>(whole) * a.step;
        }
        store<V>(s, a.out, t * a.n + i, OUT);
    }
    if (a.v_out) std::memcpy(a.v_out + i, &v, sizeof v);
}

template <int X, int OUT> void fire(const Layer &a, long begin, long end) {
    long i = begin;
    for (; i < end && i % LANES; i++) fire<float, X, OUT>(a, i);
    for (; i + LANES <= end; i += LANES) fire<Floats, X, OUT>(a, i);
    for (; i < end; i++) fire<float, X, OUT>(a, i);
}

struct Gradient {
    const void *d;        // (n) of the spikes
    void *s;              // (n) the spikes; d where they are above 0 and not above top, else 0, is written over them
    const float *v;       // (n) or null
    double *sums;         // (2, period), added to: of what is written, and of it times v
    long n, period;
    float top;
    int type;             // of d and s
};

template <class V, int TYPE> inline void masked(const Gradient &a, long i, float *sums) {
    const V zero = {}, s = load<V>(a.s, i, TYPE), d = load<V>(a.d, i, TYPE);
    const V above = s > zero + a.top ? zero : d, kept = s <= zero ? zero : above;
    store<V>(kept, a.s, i, TYPE);
    const V sum = load<V>(sums) + kept;
    std::memcpy(sums, &sum, sizeof sum);
    if (a.v) {
        const V product = load<V>(sums + a.period) + kept * load<V>(a.v + i);
        std::memcpy(sums + a.period, &product, sizeof product);
    }
}

template <int TYPE> void backward(const Gradient &a, int threads) {
    const long rows = a.n / a.period, some = 64 + 4096 / a.period, blocks = rows / some + 1, size = 2 * a.period;
    std::vector<float> sums(blocks * size, 0.f);  // of each block in float, of all in double, in the same order always
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long block = 0; block < blocks; block++) {
        float *own = &sums[block * size];
        const long end = block + 1 < blocks ? (block + 1) * some : rows;
        for (long row = block * some; row < end; row++)
            for (long j = 0; j < a.period; j += LANES) masked<Floats, TYPE>(a, row * a.period + j, own + j);
    }
    for (long i = rows * a.period; i < a.n; i++) masked<float, TYPE>(a, i, &sums[i % a.period]);
    for (long i = 0; i < blocks * size; i++) a.sums[i % size] += sums[i];
}

}  // namespace

extern "C" int lanes() { return LANES; }

void neurons(const Layer &a, long begin, long end) {
    if (a.of_x == F32 && a.of_out == F32) fire<F32, F32>(a, begin, end);
    if (a.of_x == F32 && a.of_out == BF16) fire<F32, BF16>(a, begin, end);
    if (a.of_x == F32 && a.of_out == CODES) fire<F32, CODES>(a, begin, end);
    if (a.of_x == BF16 && a.of_out == F32) fire<BF16, F32>(a, begin, end);
    if (a.of_x == BF16 && a.of_out == BF16) fire<BF16, BF16>(a, begin, end);
    if (a.of_x == BF16 && a.of_out == CODES) fire<BF16, CODES>(a, begin, end);
}

extern "C" void neuron(const Layer *layer, int threads) {
    const long each = (layer->n / threads / LANES + 1) * LANES;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int i = 0; i < threads; i++) neurons(*layer, std::min(layer->n, i * each), std::min(layer->n, (i + 1) * each));
}

// Whether memory ran out
extern "C" int neuron_backward(const Gradient *gradient, int threads) try {
    if (gradient->type == F32) backward<F32>(*gradient, threads);
    if (gradient->type == BF16) backward<BF16>(*gradient, threads);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
