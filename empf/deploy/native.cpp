// All steps of a neuron layer in one pass over its current; native.py compiles this file on the machine where it runs.

#include <cstdint>
#include <cstring>

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
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

struct Layer {
    const float *x;                                 // (k, n), steps `x_step` apart
    const float *v_in;                              // (n) or null: 0
    const float *leak, *threshold, *gain, *shift;   // (k, period); leak null: no state; gain and shift null: none
    float *v_out;                                   // (n) or null
    void *out;                                      // (k, n) floats, or where top > 0 codes of one byte
    long k, n, x_step, period;                      // period: a multiple of LANES after which the channels repeat
    float inverse, top;                             // code = floor(min(s * inverse + 1/2, top))
};

template <class V>
inline V load(const float *from) {
    V found;
    std::memcpy(&found, from, sizeof found);
    return found;
}

inline void store(Floats code, uint8_t *out) {
    const Bytes bytes = __builtin_convertvector(__builtin_convertvector(code, Ints), Bytes);
    std::memcpy(out, &bytes, sizeof bytes);
}
inline void store(float code, uint8_t *out) { *out = (uint8_t)(int32_t)code; }

// The steps of the neurons from i on, as many as a V holds
template <class V>
inline void fire(const Layer &a, long i) {
    const long lane = i % a.period;
    const V zero = {}, top = zero + a.top;
    V v = a.v_in ? load<V>(a.v_in + i) : zero;
    for (long t = 0; t < a.k; t++) {
        auto of_step = [&](const float *values) { return load<V>(values + t * a.period + lane); };
        V m = load<V>(a.x + t * a.x_step + i), s;
        if (a.leak && (t || a.v_in)) m = m + of_step(a.leak) * v;
        if (a.gain) m = m * of_step(a.gain) + of_step(a.shift);
        const V threshold = of_step(a.threshold);
        s = m - threshold;
        s = s < zero ? zero : s;            // NaN stays NaN
        v = m > threshold ? threshold : m;  // not read where there is no leak
        if (a.top > 0) {
            const V code = s * a.inverse + 0.5f;
            store(code > top ? top : code, (uint8_t *)a.out + t * a.n + i);
        } else {
            std::memcpy((float *)a.out + t * a.n + i, &s, sizeof s);
        }
    }
    if (a.v_out) std::memcpy(a.v_out + i, &v, sizeof v);
}

}  // namespace

extern "C" int lanes() { return LANES; }

extern "C" void neuron(const Layer *layer, int threads) {
    const Layer a = *layer;
    const long whole = a.n / LANES;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long i = 0; i < whole; i++) fire<Floats>(a, i * LANES);
    for (long i = whole * LANES; i < a.n; i++) fire<float>(a, i);
}
