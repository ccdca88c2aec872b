/* Registers of floats, as wide as this processor has them, for the compiled code of this folder.
 *
 * T is what weights and activations are kept in: float, or bfloat16 with -DBF16=1. Sums are in float32.
 */
#ifndef SPPO_VECTORS_H
#define SPPO_VECTORS_H
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { L = 16 }; /* floats in a register */
#elif defined(__AVX2__)
enum { L = 8 };
#else
enum { L = 4 };
#endif
enum { LINE = 64 }; /* bytes of a line of the cache */

typedef float vf __attribute__((vector_size(4 * L)));
typedef float vfu __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * L)));
typedef int32_t vi __attribute__((vector_size(4 * L)));
#define INLINE static inline __attribute__((always_inline))

#if BF16
typedef uint16_t T;
typedef uint16_t vh __attribute__((vector_size(2 * L), aligned(2), may_alias));
INLINE float wide(T x) { union { uint32_t u; float f; } c = {(uint32_t)x << 16}; return c.f; }
INLINE T narrow(float x) { union { float f; uint32_t u; } c = {x}; return (c.u + 0x7fff + (c.u >> 16 & 1)) >> 16; }
INLINE vf load(const T *p) { return (vf)(__builtin_convertvector(*(const vh *)p, vu) << 16); }
INLINE vf rounded(vf x) { vu u = (vu)x; return (vf)((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u); }
INLINE void store(T *p, vf x) { vu u = (vu)x; *(vh *)p = __builtin_convertvector((u + 0x7fff + (u >> 16 & 1)) >> 16, vh); }
#else
typedef float T;
INLINE float wide(T x) { return x; }
INLINE T narrow(float x) { return x; }
INLINE vf load(const T *p) { return *(const vfu *)p; }
INLINE vf rounded(vf x) { return x; }
INLINE void store(T *p, vf x) { *(vfu *)p = x; }
#endif
INLINE float rounded1(float x) { return wide(narrow(x)); }
INLINE vf loadf(const float *p) { return *(const vfu *)p; }

/* 0, 1, 2, ... */
INLINE vi lane_numbers(void) {
    vi x = {};
    for (int j = 0; j < L; j++) x[j] = j;
    return x;
}

/* x, with `instead` in the lanes from the `count`th on. */
INLINE vf first(vf x, long count, float instead) {
    if (count >= L) return x;
    vi within = lane_numbers() < (int32_t)count;
    return (vf)(((vi)x & within) | ((vi)((vf){} + instead) & ~within));
}

/* A register's lanes, each with that `apart` from it beside it: half of them, then a quarter, ... until one lane holds all. */
INLINE vf further(vf x, int apart) { return __builtin_shuffle(x, lane_numbers() ^ apart); }

INLINE float total(vf x) {
#pragma GCC unroll 4
    for (int apart = L / 2; apart; apart /= 2) x += further(x, apart);
    return x[0];
}

/* The larger, lane by lane; b where one is not a number. */
INLINE vf larger(vf a, vf b) {
    vi first = a > b;
    return (vf)(((vi)a & first) | ((vi)b & ~first));
}

/* The largest lane that is a number; -infinity where none is. */
INLINE float largest(vf x) {
#pragma GCC unroll 4
    for (int apart = L / 2; apart; apart /= 2) x = larger(x, further(x, apart));
    return x[0];
}

/* exp, to 2e-7 of its value; below -87 what is left of it. NaN stays NaN. */
INLINE vf vexp(vf x) {
    const vf low = (vf){} - 87.0f, high = (vf){} + 88.0f;
    vi under = x < low, over = x > high;
    x = (vf)(((vi)low & under) | ((vi)high & over) | ((vi)x & ~(under | over)));
    vf n = x * 1.44269504f + 12582912.0f - 12582912.0f; /* rounds to an integer */
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = (vf){} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}
#endif
