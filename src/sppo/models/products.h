/* Matrix products with packed weights, for the compiled code of this folder: decode.c, head.c.
 *
 * A product's right side, w [N, K], is packed as panels of L columns: [N / L, K / PAIR, L, PAIR], filled up with zeros. A step of it
 * takes PAIR numbers of a row, repeats them in every lane, and multiplies them with as many of each of L columns: no lanes are ever
 * added up, and each number of the result is summed over k in order, by one lane, whatever lies beside it.
 */
#ifndef SPPO_PRODUCTS_H
#define SPPO_PRODUCTS_H
#include "vectors.h"

#if BF16 && defined(__AVX512BF16__)
enum { PAIR = 2 };
typedef __m512bh word;
typedef int32_t two __attribute__((aligned(2), may_alias));
INLINE word word_at(const T *p) { return (word)_mm512_loadu_si512(p); }
INLINE word repeated(const T *p) { return (word)_mm512_set1_epi32(*(const two *)p); }
INLINE vf fused(vf sum, word a, word b) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
enum { PAIR = 1 };
typedef vf word;
INLINE word word_at(const T *p) { return load(p); }
INLINE word repeated(const T *p) { return (vf){} + wide(*p); }
INLINE vf fused(vf sum, word a, word b) { return sum + a * b; }
#endif

/* A tile of a product: TALL rows by WIDE registers of columns, so that all its sums stay in registers. */
#if defined(__AVX512F__)
enum { TALL = 6, WIDE = 4 };
#elif defined(__AVX2__)
enum { TALL = 6, WIDE = 2 };
#else
enum { TALL = 4, WIDE = 2 };
#endif
enum { STEP = PAIR * L, BLOCK = 4 };

long lanes(void) { return L; }
long pair(void) { return PAIR; }

INLINE long filled(long n) { return (n + L - 1) / L * L; } /* whole registers */

/* w [N, K] as panels; between two of them is room for `every` - 1 others. */
void pack(const T *w, long N, long K, long every, long threads, T *packed) {
    long steps = (K + PAIR - 1) / PAIR;
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < filled(N) / L; p++) {
        T *to = packed + p * every * steps * STEP;
        long rows = N - p * L < L ? N - p * L : L;
        if (rows < L || K % PAIR) memset(to, 0, steps * STEP * sizeof(T));
        for (long k = 0; k + PAIR <= K; k += PAIR)
            for (long j = 0; j < rows; j++) memcpy(to + k * L + j * PAIR, w + (p * L + j) * K + k, PAIR * sizeof(T));
        if (K % PAIR)
            for (long j = 0; j < rows; j++) to[(K - 1) * L + j * PAIR] = w[(p * L + j) * K + K - 1];
    }
}

/* The left side of a tile: its first row's first PAIR numbers; how far it is to the next row, and to the next numbers of a row. */
typedef struct { const T *at; long row, step; } Rows;

/* Memory that is soon needed: so many lines are asked for in each BLOCK of steps. Memory is slower than the sums, and asked for in bursts
 * it stops them. */
typedef struct { const char *at; long lines; } Ahead;

/* found: rows x (many panels) of x . w^T. */
INLINE void summed(const int rows, const int many, Rows x, const T *w, long steps, Ahead ahead, vf found[TALL][WIDE]) {
    vf sum[TALL][WIDE]; /* in registers, whatever is done with what was found */
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < many; c++) sum[r][c] = (vf){};
    for (long i = 0; i < steps; i++) {
        if (i % BLOCK == 0)
            for (long n = 0; n < ahead.lines; n++, ahead.at += LINE) __builtin_prefetch(ahead.at, 0, 2);
        word b[WIDE];
#pragma GCC unroll 8
        for (int c = 0; c < many; c++) b[c] = word_at(w + (c * steps + i) * STEP);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            word a = repeated(x.at + r * x.row + i * x.step);
#pragma GCC unroll 8
            for (int c = 0; c < many; c++) sum[r][c] = fused(sum[r][c], a, b[c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < many; c++) found[r][c] = sum[r][c];
}

/* Every (rows, panels) that a tile may be, known when it is compiled; TILE(rows, many) is what to do. */
#define TILE_ROWS(r, many) case r: if ((many) == WIDE) { TILE(r, WIDE) } else if ((many) == 2) { TILE(r, 2) } else { TILE(r, 1) } break;
#if defined(__AVX2__)
#define EVERY_TILE(rows, many) switch (rows) { TILE_ROWS(1, many) TILE_ROWS(2, many) TILE_ROWS(3, many) TILE_ROWS(4, many) TILE_ROWS(5, many) TILE_ROWS(6, many) }
#else
#define EVERY_TILE(rows, many) switch (rows) { TILE_ROWS(1, many) TILE_ROWS(2, many) TILE_ROWS(3, many) TILE_ROWS(4, many) }
#endif

/* The panels of the next tile, of so many that are left: WIDE, 2 or 1. */
INLINE int next_panels(long left) { return left >= WIDE ? WIDE : left >= 2 ? 2 : 1; }

/* A tile's share of the panels that will be needed after these, in which rows [r, r + rows) of N take part. */
INLINE Ahead share_of(const T *panels, long count, long steps, long r, int rows, long N) {
    long lines = (count < WIDE ? count : WIDE) * steps * STEP * (long)sizeof(T) / LINE, blocks = (steps + BLOCK - 1) / BLOCK;
    return (Ahead){(const char *)panels + lines * r / N * LINE, (lines * rows / N + blocks - 1) / blocks};
}
#endif
