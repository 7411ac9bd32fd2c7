// A neuron layer, as native.cpp and lookup.cpp know it.

#pragma once

const int MORE = 4;

struct Term {
    const void *y;              // (k, n)
    const float *gain, *shift;  // (k, period), or null: y itself
    long step;                  // numbers from a time step to the next
};

struct Layer {
    Term x, more[MORE];                     // the current: their sum, from the first on
    const float *v_in;                      // (n) or null: 0
    const float *leak, *threshold;          // (k, period); leak null: no state; threshold null: the sum is put out
    const float *gain, *shift;              // (k, period) of the potential, or null
    float *v_out;                           // (n) or null
    void *out;                              // (k, n)
    void *sum;                              // (k, n) or null: the current
    long k, n, period;                      // period: a multiple of LANES after which the channels repeat
    float inverse, top, step;               // top > 0: code = floor(min(s * inverse + 1/2, top)), spike = code * step
    int terms, of_x, of_more, of_out, of_sum;  // terms: how many `more`; types
};

// The steps of the neurons from `begin` to `end`
void neurons(const Layer &layer, long begin, long end);
