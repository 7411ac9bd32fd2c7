// Convolution with binary weights by looking up sums; native.py compiles this file together with native.cpp.
//
// Four channels of a pixel have 16 signed sums, which are one vector. Four weights of an output channel are the number of
// a sum: one permutation finds those of 16 output channels, in place of four multiplications for each of them.

#include "native.h"

#if defined(__AVX512F__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

const int GROUP = 4, LANES = 16, MOST = 8;  // channels of a table; output channels of a vector; most pixels at a time

const long CACHE = 1 << 17;  // numbers of a current that are held before the neurons take them

struct Convolution {
    const float *x;          // (m, h, w, c)
    const int *words;        // (o / LANES, k * k, c / 32, LANES): bit i of a word is 1 where the weight i is negative
    const float *scale, *bias;  // (o)
    float *y;                // (m, oh, ow, o)
    long m, h, w, c, oh, ow, o, k, stride, padding;

    long groups() const { return (c + GROUP - 1) / GROUP; }
    long pixel() const { return groups() * LANES; }              // numbers of the tables of a pixel
    long words_of_tap() const { return (groups() + 7) / 8 * LANES; }
    long row() const { return (w + 2 * padding + MOST * stride) * pixel(); }  // with what is read past its end
};

// The tables of a pixel: number b of a table is the sum of the channels j, negative where bit j of b is 1
void tabulate(const Convolution &a, const float *x, float *to) {
    const __m512 one = _mm512_set1_ps(1.f), minus = _mm512_set1_ps(-1.f);
    const __m512 sign[GROUP] = {
        _mm512_mask_blend_ps(0xAAAA, one, minus), _mm512_mask_blend_ps(0xCCCC, one, minus),
        _mm512_mask_blend_ps(0xF0F0, one, minus), _mm512_mask_blend_ps(0xFF00, one, minus)};
    for (long c = 0; c < a.c; c += GROUP, to += LANES) {
        __m512 sum = _mm512_mul_ps(_mm512_set1_ps(x[c]), sign[0]);
        for (int j = 1; j < GROUP; j++)
            if (c + j < a.c) sum = _mm512_fmadd_ps(_mm512_set1_ps(x[c + j]), sign[j], sum);
        _mm512_storeu_ps(to, sum);
    }
}

// Row y of image m, with its padding; of pixels that no output reads nothing is written
void tabulate_row(const Convolution &a, long m, long y, float *to) {
    if (y < 0 || y >= a.h) {
        std::memset(to, 0, (a.w + 2 * a.padding) * a.pixel() * sizeof(float));
        return;
    }
    const long edge = a.padding * a.pixel();
    std::memset(to, 0, edge * sizeof(float));
    std::memset(to + edge + a.w * a.pixel(), 0, edge * sizeof(float));
    for (long x = 0; x < a.w; x++)
        if ((x + a.padding) % a.stride < a.k)
            tabulate(a, a.x + ((m * a.h + y) * a.w + x) * a.c, to + edge + x * a.pixel());
}

// 16 * V output channels from the block `first` on, of up to P pixels from y on; rows: tables of their first tap
template <int V, int P> void multiply(const Convolution &a, const float *const *rows, long first, float *y, long count) {
    __m512 sum[V][P];
    for (auto &channels : sum)
        for (auto &s : channels) s = _mm512_setzero_ps();
    const long groups = a.groups(), pixel = a.pixel(), next = a.stride * pixel, block = a.k * a.k * a.words_of_tap();
    const int *words = a.words + first * block;
    for (long ky = 0; ky < a.k; ky++)
        for (long kx = 0; kx < a.k; kx++) {
            const float *table = rows[ky] + kx * pixel;
            for (long done = 0; done < groups; done += 8, words += LANES) {
                __m512i four[V];
                for (int v = 0; v < V; v++) four[v] = _mm512_loadu_si512(words + v * block);
#pragma GCC unroll 1
                for (long g = std::min(8l, groups - done); g > 0; g--, table += LANES) {
#pragma GCC unroll 8  // so that the sums stay in registers
                    for (int p = 0; p < P; p++) {
                        const __m512 sums = _mm512_loadu_ps(table + p * next);
                        for (int v = 0; v < V; v++)
                            sum[v][p] = _mm512_add_ps(sum[v][p], _mm512_permutexvar_ps(four[v], sums));
                    }
                    for (auto &f : four) f = _mm512_srli_epi32(f, GROUP);
                }
            }
        }
    for (int v = 0; v < V; v++) {
        const long o = (first + v) * LANES;
        const __mmask16 there = a.o - o < LANES ? (1 << (a.o - o)) - 1 : 0xFFFF;
        const __m512 scale = _mm512_maskz_loadu_ps(there, a.scale + o), bias = _mm512_maskz_loadu_ps(there, a.bias + o);
#pragma GCC unroll 8
        for (int p = 0; p < P; p++)
            if (p < count) _mm512_mask_storeu_ps(y + p * a.o + o, there, _mm512_fmadd_ps(sum[v][p], scale, bias));
    }
}

// The rows of the output from `begin` to `end`, those of all images counted together
void rows_of(const Convolution &a, long begin, long end) {
    static thread_local std::vector<float> tables;  // of the k last rows of the input
    const long row = a.row(), blocks = (a.o + LANES - 1) / LANES;
    if ((long)tables.size() < a.k * row) tables.resize(a.k * row);
    std::vector<const float *> rows(a.k);
    long image = -1, known = 0;
    for (long line = begin; line < end; line++) {
        const long m = line / a.oh, top = line % a.oh * a.stride - a.padding;
        known = m == image ? std::max(known, top) : top;
        image = m;
        auto table = [&](long y) { return tables.data() + (y + a.padding) % a.k * row; };
        for (; known < top + a.k; known++) tabulate_row(a, m, known, table(known));
        for (long x = 0; x < a.ow; x += MOST) {
            const long next = a.stride * a.pixel();
            auto from = [&](long first) {
                for (long ky = 0; ky < a.k; ky++) rows[ky] = table(top + ky) + first * next;
                return a.y + (line * a.ow + first) * a.o;
            };
            long b = 0;
            for (; b + 4 <= blocks; b += 4)
                for (long first = x; first < std::min(a.ow, x + MOST); first += 4)
                    multiply<4, 4>(a, rows.data(), b, from(first), a.ow - first);
            for (; b + 2 <= blocks; b += 2) multiply<2, 8>(a, rows.data(), b, from(x), a.ow - x);
            if (b < blocks) multiply<1, 8>(a, rows.data(), b, from(x), a.ow - x);
        }
    }
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

}  // namespace

extern "C" int looks_up() { return 1; }

extern "C" void lookup(const Convolution *convolution, int threads) {
    const Convolution &a = *convolution;
    const long lines = a.m * a.oh;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int i = 0; i < threads; i++) rows_of(a, lines * i / threads, lines * (i + 1) / threads);
}

extern "C" void lookup_neuron(const Convolution *convolution, const Layer *layer, int threads) {
    const Convolution &a = *convolution;
    const long images = a.m / layer->k, most = CACHE / (layer->k * a.ow * a.o), fair = (images * a.oh - 1) / threads + 1;
    const long rows = std::max(1l, std::min({most, fair, a.oh})), parts = (a.oh - 1) / rows + 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long i = 0; i < images * parts; i++) {
        const long begin = i % parts * rows;
        fire_rows(a, *layer, i / parts, begin, std::min(a.oh, begin + rows));
    }
}

#else

extern "C" int looks_up() { return 0; }
extern "C" void lookup(const void *, int) {}
extern "C" void lookup_neuron(const void *, const Layer *, int) {}

#endif
