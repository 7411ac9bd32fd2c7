// Convolution with binary weights by looking up sums; native.py compiles this file together with native.cpp.
//
// Four channels of a pixel have 16 signed sums, which are one vector. Four weights of an output channel are the number of
// a sum: one permutation finds those of 16 output channels, in place of four multiplications for each of them. Sums of
// codes up to 31 are bytes: one permutation finds those of 16 output channels and 16 input channels.

#include "native.h"

// Of what sums are looked up: 0 nothing, 1 floats, 2 also codes
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#define LOOKS_UP 2
#elif defined(__AVX512F__)
#define LOOKS_UP 1
#else
#define LOOKS_UP 0
#endif

extern "C" int looks_up() { return LOOKS_UP; }

#if LOOKS_UP

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)  // unrolled, so that sums stay in registers

namespace {

const int GROUP = 4, LANES = 16, MOST = 8;  // channels of a table; its sums, output channels of a vector; most pixels

const long CACHE = 1 << 17;  // numbers of a current that are held before the neurons take them

struct Convolution {
    const void *x;              // (m, h, w, c)
    const void *words;          // see `Floats` and `Codes`
    const float *scale, *bias;  // (o)
    float *y;                   // (m, oh, ow, o)
    long m, h, w, c, oh, ow, o, k, stride, padding, codes;  // codes: x holds bytes of at most 31, not floats

    long groups() const { return (c + GROUP - 1) / GROUP; }
    long pixel() const { return groups() * LANES; }  // numbers of the tables of a pixel
    long row() const { return ((w + 2 * padding + MOST * stride + k) * pixel() / 128 + 2) * 128; }  // and past it
};

// scale * sums + bias of the 16 output channels from o on
void put_out(const Convolution &a, __m512 sums, long o, float *y) {
    if (a.o - o >= LANES)
        return _mm512_storeu_ps(y + o, _mm512_fmadd_ps(sums, _mm512_loadu_ps(a.scale + o), _mm512_loadu_ps(a.bias + o)));
    const __mmask16 there = (1 << (a.o - o)) - 1;
    const __m512 scale = _mm512_maskz_loadu_ps(there, a.scale + o), bias = _mm512_maskz_loadu_ps(there, a.bias + o);
    _mm512_mask_storeu_ps(y + o, there, _mm512_fmadd_ps(sums, scale, bias));
}

// words: int (o / LANES, k * k, c / 32, LANES), bit i of a word is 1 where the weight i is negative
struct Floats {
    using Number = float;
    using Sum = float;

    // The tables of a pixel: number b of a table is the sum of the channels j, negative where bit j of b is 1
    static void tabulate(const float *x, long channels, float *to) {
        const __m512 one = _mm512_set1_ps(1.f), minus = _mm512_set1_ps(-1.f);
        const __m512 sign[GROUP] = {
            _mm512_mask_blend_ps(0xAAAA, one, minus), _mm512_mask_blend_ps(0xCCCC, one, minus),
            _mm512_mask_blend_ps(0xF0F0, one, minus), _mm512_mask_blend_ps(0xFF00, one, minus)};
        for (long c = 0; c < channels; c += GROUP, to += LANES) {
            __m512 sum = _mm512_mul_ps(_mm512_set1_ps(x[c]), sign[0]);
            for (int j = 1; j < GROUP; j++)
                if (c + j < channels) sum = _mm512_fmadd_ps(_mm512_set1_ps(x[c + j]), sign[j], sum);
            _mm512_storeu_ps(to, sum);
        }
    }

    // 16 * V output channels from the block `first` on, of up to P pixels from y on; rows: tables of their first tap
    template <int V, int P>
    static void multiply(const Convolution &a, const float *const *rows, long first, float *y, long count) {
        __m512 sum[V][P];
        EACH(v, V)
            EACH(p, P) sum[v][p] = _mm512_setzero_ps();
        const long groups = a.groups(), pixel = a.pixel(), next = a.stride * pixel;
        const long block = a.k * a.k * ((groups + 7) / 8 * LANES);
        const int *words = (const int *)a.words + first * block;
        for (long ky = 0; ky < a.k; ky++)
            for (long kx = 0; kx < a.k; kx++) {
                const float *table = rows[ky] + kx * pixel;
                for (long done = 0; done < groups; done += 8, words += LANES) {
                    __m512i four[V];
                    EACH(v, V) four[v] = _mm512_loadu_si512(words + v * block);
#pragma GCC unroll 1
                    for (long g = std::min(8l, groups - done); g > 0; g--, table += LANES) {
                        EACH(p, P) {
                            const __m512 sums = _mm512_loadu_ps(table + p * next);
                            EACH(v, V)
                                sum[v][p] = _mm512_add_ps(sum[v][p], _mm512_permutexvar_ps(four[v], sums));
                        }
                        EACH(v, V) four[v] = _mm512_srli_epi32(four[v], GROUP);
                    }
                }
            }
        EACH(v, V)
            EACH(p, P)
                if (p < count) put_out(a, sum[v][p], (first + v) * LANES, y + p * a.o);
    }

    // The output channels of up to MOST pixels
    template <class Rows> static void pixels(const Convolution &a, const Rows &rows, float *y, long count) {
        const long blocks = (a.o + LANES - 1) / LANES;
        long b = 0;
        for (; b + 4 <= blocks; b += 4)
            for (long p = 0; p < std::min(count, (long)MOST); p += 4)
                multiply<4, 4>(a, rows(p), b, y + p * a.o, count - p);
        for (; b + 2 <= blocks; b += 2) multiply<2, 8>(a, rows(0), b, y, count);
        if (b < blocks) multiply<1, 8>(a, rows(0), b, y, count);
    }
};

#if LOOKS_UP > 1

// words: uint8 (o / LANES, k, steps, 64), steps of 8 tables of the pixels under a row of the kernel, one after the other:
// byte 4 * i + j holds weights of the output channel i, its low half for the table j, its high half for the table j + 4
struct Codes {
    using Number = uint8_t;
    using Sum = int8_t;

    static void tabulate(const uint8_t *x, long channels, int8_t *to) {
        const __mmask64 negative[GROUP] = {
            0xAAAAAAAAAAAAAAAA, 0xCCCCCCCCCCCCCCCC, 0xF0F0F0F0F0F0F0F0, 0xFF00FF00FF00FF00};
        const __m512i table = _mm512_set_epi32(
            0x0C0C0C0C, 0x0C0C0C0C, 0x0C0C0C0C, 0x0C0C0C0C, 0x08080808, 0x08080808, 0x08080808, 0x08080808,
            0x04040404, 0x04040404, 0x04040404, 0x04040404, 0, 0, 0, 0);
        for (long c = 0; c < channels; c += LANES, to += 4 * LANES) {
            const long there = std::min((long)LANES, channels - c);
            const __m512i codes = _mm512_castsi128_si512(_mm_maskz_loadu_epi8((1 << there) - 1, x + c));
            __m512i sum = _mm512_setzero_si512();
            for (int j = 0; j < GROUP; j++) {
                const __m512i code = _mm512_permutexvar_epi8(_mm512_add_epi8(table, _mm512_set1_epi8(j)), codes);
                sum = _mm512_mask_sub_epi8(_mm512_add_epi8(sum, code), negative[j], sum, code);
            }
            _mm512_storeu_si512(to, sum);
        }
    }

    template <int V, int P>
    static void multiply(const Convolution &a, const int8_t *const *rows, long first, float *y, long count) {
        __m512i sum[V][P];
        EACH(v, V)
            EACH(p, P) sum[v][p] = _mm512_setzero_si512();
        const long next = a.stride * a.pixel(), tables = a.k * a.groups(), block = a.k * ((tables + 7) / 8 * 64);
        const __m512i half = _mm512_set1_epi8(15), table_of = _mm512_set1_epi32(0x30201000);
        const uint8_t *words = (const uint8_t *)a.words + first * block;
        for (long ky = 0; ky < a.k; ky++) {
            const int8_t *table = rows[ky];
            for (long left = tables; left > 0; left -= 8, table += 8 * LANES, words += 64) {
                const __m512i low_there = ones(left), high_there = ones(left - 4);
                __m512i low[V], high[V];
                EACH(v, V) {
                    const __m512i both = _mm512_loadu_si512(words + v * block);
                    low[v] = _mm512_or_si512(_mm512_and_si512(both, half), table_of);
                    high[v] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(both, 4), half), table_of);
                }
                EACH(p, P) {
                    const __m512i of_low = _mm512_loadu_si512(table + p * next);
                    const __m512i of_high = _mm512_loadu_si512(table + p * next + 64);
                    EACH(v, V) {
                        const __m512i one = _mm512_permutexvar_epi8(low[v], of_low);
                        const __m512i other = _mm512_permutexvar_epi8(high[v], of_high);
                        sum[v][p] = _mm512_dpbusd_epi32(sum[v][p], low_there, one);
                        sum[v][p] = _mm512_dpbusd_epi32(sum[v][p], high_there, other);
                    }
                }
            }
        }
        EACH(v, V)
            EACH(p, P)
                if (p < count) put_out(a, _mm512_cvtepi32_ps(sum[v][p]), (first + v) * LANES, y + p * a.o);
    }

    // 1 for those of four tables that are there
    static __m512i ones(long left) {
        return _mm512_set1_epi32(left >= 4 ? 0x01010101 : left <= 0 ? 0 : 0x01010101 >> 8 * (4 - left));
    }

    template <class Rows> static void pixels(const Convolution &a, const Rows &rows, float *y, long count) {
        const long blocks = (a.o + LANES - 1) / LANES;
        long b = 0;
        for (; b + 2 <= blocks; b += 2) {
            if (count > 4)
                multiply<2, 8>(a, rows(0), b, y, count);
            else
                multiply<2, 4>(a, rows(0), b, y, count);
        }
        if (b < blocks) multiply<1, 8>(a, rows(0), b, y, count);
    }
};

#endif

// Row y of image m, with its padding; of pixels that no output reads nothing is written. From left to right, as the last
// table of a pixel may write up to three more
template <class K> void tabulate_row(const Convolution &a, long m, long y, typename K::Sum *to) {
    const long edge = a.padding * a.pixel();
    if (y < 0 || y >= a.h) {
        std::fill_n(to, a.w * a.pixel() + 2 * edge, 0);
        return;
    }
    std::fill_n(to, edge, 0);
    const auto *from = (const typename K::Number *)a.x + (m * a.h + y) * a.w * a.c;
    for (long x = 0; x < a.w; x++)
        if ((x + a.padding) % a.stride < a.k) K::tabulate(from + x * a.c, a.c, to + edge + x * a.pixel());
    std::fill_n(to + edge + a.w * a.pixel(), edge, 0);
}

// The rows of the output from `begin` to `end`, those of all images counted together
template <class K> void rows_of(const Convolution &a, long begin, long end) {
    using Sum = typename K::Sum;
    struct alignas(64) Line { char bytes[64]; };  // of the cache
    static thread_local std::vector<Line> held;
    const long row = a.row(), size = a.k * row * sizeof(Sum) / sizeof(Line);
    if ((long)held.size() < size) held.resize(size);
    Sum *tables = (Sum *)held.data();  // of the k last rows of the input
    std::vector<const Sum *> taps(a.k);
    long image = -1, known = 0;
    for (long line = begin; line < end; line++) {
        const long m = line / a.oh, top = line % a.oh * a.stride - a.padding;
        known = m == image ? std::max(known, top) : top;
        image = m;
        auto table = [&](long y) { return tables + (y + a.padding) % a.k * row; };
        for (; known < top + a.k; known++) tabulate_row<K>(a, m, known, table(known));
        for (long x = 0; x < a.ow; x += MOST) {
            auto rows = [&](long p) {
                for (long ky = 0; ky < a.k; ky++) taps[ky] = table(top + ky) + (x + p) * a.stride * a.pixel();
                return taps.data();
            };
            K::pixels(a, rows, a.y + (line * a.ow + x) * a.o, a.ow - x);
        }
    }
}

void rows_of(const Convolution &a, long begin, long end) {
#if LOOKS_UP > 1
    if (a.codes) return rows_of<Codes>(a, begin, end);
#endif
    rows_of<Floats>(a, begin, end);
}

// The current of some rows of an image goes from here into the neurons while the cache holds it
void fire_rows(const Convolution &convolution, const Layer &layer, long image, long begin, long end) {
    static thread_local std::vector<float> current;
    const long row = convolution.ow * convolution.o, size = (end - begin) * row, images = convolution.m / layer.k;
    const long first = (image * convolution.oh + begin) * row;  // number of the first neuron
    if ((long)current.size() < layer.k * size) current.resize(layer.k * size);
    for (long t = 0; t < layer.k; t++) {
        Convolution of_step = convolution;
        const long line = (t * images + image) * convolution.oh + begin;
        of_step.y = current.data() + t * size - line * row;
        rows_of(of_step, line, line + end - begin);
    }
    Layer own = layer;
    own.x.y = current.data() - first;
    own.x.step = size;
    neurons(own, first, first + size);
}

// Whether memory ran out while these parts were worked on
template <class Work> bool for_all(long parts, int threads, const Work &work) {
    bool failed = false;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(|| : failed)
    for (long i = 0; i < parts; i++) {
        try {
            work(i);
        } catch (const std::bad_alloc &) {
            failed = true;
        }
    }
    return failed;
}

}  // namespace

extern "C" int lookup(const Convolution *convolution, int threads) {
    const Convolution &a = *convolution;
    const long lines = a.m * a.oh;
    return for_all(threads, threads, [&](long i) { rows_of(a, lines * i / threads, lines * (i + 1) / threads); });
}

extern "C" int lookup_neuron(const Convolution *convolution, const Layer *layer, int threads) {
    const Convolution &a = *convolution;
    const long images = a.m / layer->k, most = CACHE / (layer->k * a.ow * a.o), fair = (images * a.oh - 1) / threads + 1;
    const long rows = std::max(1l, std::min({most, fair, a.oh})), parts = (a.oh - 1) / rows + 1;
    return for_all(images * parts, threads, [&](long i) {
        const long begin = i % parts * rows;
        fire_rows(a, *layer, i / parts, begin, std::min(a.oh, begin + rows));
    });
}

#else

extern "C" int lookup(const void *, int) { return 0; }
extern "C" int lookup_neuron(const void *, const Layer *, int) { return 0; }

#endif
