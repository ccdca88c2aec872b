/* Matrix products with packed weights, for the compiled code of this folder: attention.c, decode.c, head.c.
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
/* Spelled out where it can be: for a tile of one row GCC prefers two instructions on some processors, which round twice. */
#if defined(__AVX512F__)
INLINE vf fused(vf sum, word a, word b) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum); }
#elif defined(__FMA__)
INLINE vf fused(vf sum, word a, word b) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum); }
#else
INLINE vf fused(vf sum, word a, word b) { return sum + a * b; }
#endif
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
INLINE long pairs(long n) { return (n + PAIR - 1) / PAIR; }

/* At most L rows of w, K numbers each, as one panel: [K / PAIR, L, PAIR], zeros beyond them. */
static void panel(const T *w, long stride, long rows, long K, T *to) {
    if (rows < L || K % PAIR) memset(to, 0, (K + PAIR - 1) / PAIR * STEP * sizeof(T));
    for (long k = 0; k + PAIR <= K; k += PAIR)
        for (long j = 0; j < rows; j++) memcpy(to + k * L + j * PAIR, w + j * stride + k, PAIR * sizeof(T));
    if (K % PAIR)
        for (long j = 0; j < rows; j++) to[(K - 1) * L + j * PAIR] = w[j * stride + K - 1];
}

/* w [N, K] as panels; between two of them is room for `every` - 1 others. */
void pack(const T *w, long N, long K, long every, long threads, T *packed) {
    long steps = (K + PAIR - 1) / PAIR;
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < N; n += L) panel(w + n * K, K, N - n < L ? N - n : L, K, packed + n / L * every * steps * STEP);
}

/* PAIR registers, rounded, as a step of a panel: the numbers of a column beside each other. */
INLINE void store_pairs(T *to, const vf *x) {
#if BF16
    if (PAIR == 2) {
        typedef vu vuu __attribute__((aligned(2), may_alias));
        *(vuu *)to = (vu)rounded(x[0]) >> 16 | (vu)rounded(x[PAIR - 1]);
        return;
    }
#endif
    store(to, x[0]);
}

/* The right side of a product that sums over rows of x, `size` columns (whole registers), `steps` pairs of them: size / L panels, `apart`;
 * zeros in rows from n on. */
static __attribute__((unused)) void by_row(const T *x, long stride, long n, long steps, long apart, long size, T *out) {
    for (long i = 0; i < steps; i++)
        for (long d = 0; d < size; d += L) {
            vf row[PAIR];
            for (int r = 0; r < PAIR; r++) row[r] = i * PAIR + r < n ? load(x + (i * PAIR + r) * stride + d) : (vf){};
            store_pairs(out + d / L * apart + i * STEP, row);
        }
}

/* The left side of a tile: its first row's first PAIR numbers; how far it is to the next row, and to the next numbers of a row. */
typedef struct { const T *at; long row, step; } Rows;

/* Memory that is soon needed: so many lines are asked for in each BLOCK of steps. Memory is slower than the sums, and asked for in bursts
 * it stops them. */
typedef struct { const char *at; long lines; } Ahead;

/* found: rows x (many panels, `apart`) of x . w^T. */
INLINE void summed(const int rows, const int many, Rows x, const T *w, long apart, long steps, Ahead ahead, vf found[TALL][WIDE]) {
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
        for (int c = 0; c < many; c++) b[c] = word_at(w + c * apart + i * STEP);
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

/* out [rows, columns] = x . w^T in float32, or added to it; at most TALL rows, columns whole registers, panels of w `apart`. */
static __attribute__((unused)) void multiplied(int rows, Rows x, const T *w, long apart, long steps, long columns, float *out, long out_row, int add) {
    for (long c = 0; c < columns;) {
        int many = next_panels((columns - c) / L);
        vf sum[TALL][WIDE];
#define TILE(height, width) summed(height, width, x, w + c / L * apart, apart, steps, (Ahead){0}, sum); \
        for (int r = 0; r < height; r++) for (int i = 0; i < width; i++) { \
            vfu *at = (vfu *)(out + r * out_row + c + i * L); \
            *at = (add ? loadf(out + r * out_row + c + i * L) : (vf){}) + sum[r][i]; }
        EVERY_TILE(rows, many)
#undef TILE
        c += many * L;
    }
}

/* A tile's share of the panels that will be needed after these, in which rows [r, r + rows) of N take part. */
INLINE Ahead share_of(const T *panels, long count, long steps, long r, int rows, long N) {
    long lines = (count < WIDE ? count : WIDE) * steps * STEP * (long)sizeof(T) / LINE, blocks = (steps + BLOCK - 1) / BLOCK;
    return (Ahead){(const char *)panels + lines * r / N * LINE, (lines * rows / N + blocks - 1) / blocks};
}
#endif
