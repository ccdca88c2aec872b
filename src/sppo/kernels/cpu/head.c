/* The output projection and the log-softmax of given tokens, forward and backward, without a matrix of logits: logprobs.py.
 *
 * Called by head.py. Axes: N tokens, D hidden, V vocabulary. Logits are bfloat16 products summed in float32, and are used where they are made, in registers;
 * of so many tokens as head.py makes room for, forward keeps them for backward in two bytes each. The weights are packed (products.h).
 */
#include "products.h"

typedef struct { /* head.py fills it */
    const T *hidden, *head, *weight; /* [N, D], and the weights, packed and, for backward, as they are, [V, D] */
    const int64_t *target;  /* [N] */
    long N, D, V, threads;
    float scale; /* 1 / temperature */
    float *logp, *entropy, *normaliser; /* [N]: what forward finds; backward reads the last */
    const float *grad;                  /* [N] */
    float *grad_hidden;                 /* [N, D] */
    T *grad_weight;                     /* [V, D], or null */
    int16_t *kept;                      /* logits of the first `keeps` tokens: [V / L, across, L] */
    long keeps, across;
} Head;

/* A logit in two bytes: to 0.001 between -64 and 64, whatever its size, where a float of two bytes would be off by 0.008. head.py sees to it that none
 * that matters is beyond. */
enum { FIXED = 512 };

INLINE void keep(int16_t *to, vf x) {
#if defined(__AVX512F__)
    _mm256_stream_si256((__m256i *)to, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)(x * FIXED))));
#else
    for (int j = 0; j < L; j++) to[j] = (int16_t)lrintf(fminf(fmaxf(x[j] * FIXED, -32768), 32767));
#endif
}

INLINE vf kept(const int16_t *from) {
    typedef int16_t vs __attribute__((vector_size(2 * L), aligned(2), may_alias));
    return __builtin_convertvector(__builtin_convertvector(*(const vs *)from, vi), vf) * (1.0f / FIXED);
}

enum { LOW = -1000000000 }; /* below any logit: what it adds is below 1e-28 */

/* What a thread has seen of a token's logits in each lane: the largest, sum of exp(x - largest), sum of x . exp(x - largest). */
typedef struct { vf top, sum, mean; } Seen;

INLINE void looked(const Head *h, const int many, vf x[WIDE], long n, long column, Seen *seen) {
    vf top = seen->top;
    for (int c = 0; c < many; c++) {
        x[c] = first(x[c] * h->scale, h->V - column - c * L, LOW);
        top = larger(x[c], top);
    }
    vf less = vexp(seen->top - top), sum = seen->sum * less, mean = seen->mean * less;
    for (int c = 0; c < many; c++) { vf e = vexp(x[c] - top); sum += e; mean += e * x[c]; }
    *seen = (Seen){top, sum, mean};
    if (n < h->keeps)
        for (int c = 0; c < many; c++) keep(h->kept + ((column / L + c) * h->across + n) * L, x[c]);
    long at = h->target[n] - column;
    if (at >= 0 && at < many * L) h->logp[n] = x[at / L][at % L];
}

/* logp (of the targets), entropy and normaliser, [N]. room: threads x N x sizeof(Seen). */
void head_forward(const Head *h, Seen *room) {
    long N = h->N, D = h->D, steps = (D + PAIR - 1) / PAIR, panels = filled(h->V) / L;
#pragma omp parallel num_threads(h->threads)
    {
        long me = omp_get_thread_num(), all = omp_get_num_threads(), end = panels * (me + 1) / all;
        Seen *seen = room + me * N;
        for (long n = 0; n < N; n++) seen[n] = (Seen){(vf){} + LOW, {}, {}};
        for (long p = panels * me / all; p < end;) {
            int many = next_panels(end - p);
            const T *w = h->head + p * steps * STEP;
            for (long r = 0; r < N; r += TALL) {
                int rows = N - r < TALL ? N - r : TALL;
                Rows x = {h->hidden + r * D, D, PAIR};
                Ahead ahead = share_of(w + many * steps * STEP, end - p - many, steps, r, rows, N);
                vf sum[TALL][WIDE];
#define TILE(height, width) summed(height, width, x, w, steps * STEP, steps, ahead, sum); \
                for (int i = 0; i < height; i++) looked(h, width, sum[i], r + i, p * L, seen + r + i);
                EVERY_TILE(rows, many)
#undef TILE
            }
            p += many;
        }
#pragma omp barrier
#pragma omp for
        for (long n = 0; n < N; n++) {
            float top = LOW, sum = 0, mean = 0;
            for (long t = 0; t < all; t++)
                for (int j = 0; j < L; j++) top = room[t * N + n].top[j] > top ? room[t * N + n].top[j] : top;
            for (long t = 0; t < all; t++) {
                vf less = vexp(room[t * N + n].top - top);
                sum += total(room[t * N + n].sum * less);
                mean += total(room[t * N + n].mean * less);
            }
            h->normaliser[n] = top + logf(sum);
            h->entropy[n] = h->normaliser[n] - mean / sum;
            h->logp[n] -= h->normaliser[n];
        }
    }
}

/* The gradient of a tile of logits (divided by `scale`), of `rows` tokens from n on: d logp / d logit = onehot - softmax, rounded as it is multiplied
 * later. To `by_token`, whose rows are a token's, and, where the weights' gradient is wanted, to `by_column`, whose panels are `apart`.
 *
 * Not inlined: the exponential's constants would take the registers that the product's sums need. */
static __attribute__((noinline)) void graded(const Head *h, int rows, int many, vf (*x)[WIDE], float scale, long n, long column, T *by_token, long row, T *by_column, long apart) {
    for (int r = 0; r < rows; r++) {
        float g = h->grad[n + r] * h->scale, normaliser = h->normaliser[n + r];
        long at = h->target[n + r] - column;
        for (int c = 0; c < many; c++) x[r][c] = vexp(x[r][c] * scale - normaliser) * -g;
        if (at >= 0 && at < many * L) x[r][at / L][at % L] += g;
        for (int c = 0; c < many; c++) {
            x[r][c] = first(x[r][c], h->V - column - c * L, 0);
            store(by_token + r * row + c * L, x[r][c]);
        }
    }
    for (int r = 0; r < rows && h->grad_weight; r += PAIR)
        for (int c = 0; c < many; c++) {
            vf pair[2] = {x[r][c], r + 1 < rows ? x[r + 1][c] : (vf){}};
            store_pairs(by_column + c * apart + r / PAIR * STEP, pair);
        }
}

/* What a backward pass holds at once: the gradient of the logits of so many tokens, in so many panels of the vocabulary. */
enum { TOKENS = 336 * TALL, SLICE = 2048 / L };
/* Rows and panels are a line more than a power of two apart: at such a distance all of a tile's would want the same few lines of the cache. */
enum { BY_TOKEN = SLICE * L + LINE, BY_ROW = SLICE * L * L + STEP };

typedef struct {
    T *hidden_by_row, *weight_by_row; /* the right sides of the last two products; the second of a slice */
    T *by_token, *by_column; /* the gradient of the logits, left side of either: [TOKENS, BY_TOKEN], and [SLICE, TOKENS / PAIR, L, PAIR] */
    float *weight_sum; /* [SLICE x L, D]; hidden_by_row, by_column and this only where grad_weight is wanted */
} Room;

static long laid(const Head *h, char *base, Room *room) {
    long at = 0, tokens = h->N < TOKENS ? h->N + PAIR : TOKENS;
#define PLACE(field, count) room->field = (void *)(base + at); at += ((count) * (long)sizeof(*room->field) + LINE - 1) / LINE * LINE;
    PLACE(hidden_by_row, h->grad_weight ? (h->N + PAIR) * h->D : 0) PLACE(weight_by_row, BY_ROW * (h->D / L))
    PLACE(by_token, tokens * BY_TOKEN) PLACE(by_column, h->grad_weight ? tokens * SLICE * L : 0)
    PLACE(weight_sum, h->grad_weight ? SLICE * L * h->D : 0)
#undef PLACE
    return at + LINE;
}

long head_bytes(const Head *h) {
    Room room;
    return laid(h, 0, &room);
}

/* grad_hidden and grad_weight, a slice of the vocabulary after the other: in each the logits again (those that were not kept), their gradient, and what
 * it is multiplied with. A thread has its panels and its tokens; D is a whole number of registers. */
void head_backward(const Head *h, char *memory) {
    long N = h->N, D = h->D, steps = (D + PAIR - 1) / PAIR, panels = filled(h->V) / L, apart = pairs(N) * STEP;
    Room room;
    laid(h, (char *)(((uintptr_t)memory + LINE - 1) / LINE * LINE), &room);
#pragma omp parallel num_threads(h->threads)
    {
        long me = omp_get_thread_num(), all = omp_get_num_threads();
#define SHARE(count, unit) (((count) + (unit) - 1) / (unit) * me / all * (unit))
#define UNTIL(count, unit) (me + 1 == all ? (count) : ((count) + (unit) - 1) / (unit) * (me + 1) / all * (unit))
        long own = SHARE(N, PAIR), rest = UNTIL(N, PAIR) - own;
        if (h->grad_weight) by_row(h->hidden + own * D, D, rest, pairs(rest), apart, D, room.hidden_by_row + own / PAIR * STEP);
#pragma omp barrier
        for (long s = 0; s < panels; s += SLICE) {
            long slice = panels - s < SLICE ? panels - s : SLICE, from = s + SHARE(slice, 1), end = s + UNTIL(slice, 1);
            by_row(h->weight + from * L * D, D, h->V - from * L, (end - from) * L / PAIR, BY_ROW, D, room.weight_by_row + (from - s) * L / PAIR * STEP);
            for (long t = 0; t < N; t += TOKENS) {
                long tokens = N - t < TOKENS ? N - t : TOKENS, column = pairs(tokens) * STEP;
                for (long p = from; p < end;) {
                    int many = next_panels(end - p);
                    const T *w = h->head + p * steps * STEP;
                    for (long r = 0; r < tokens; r += TALL) {
                        int rows = tokens - r < TALL ? tokens - r : TALL;
                        vf sum[TALL][WIDE];
                        int known = t + r + rows <= h->keeps;
                        if (known) {
                            for (int i = 0; i < rows; i++)
                                for (int c = 0; c < many; c++) sum[i][c] = kept(h->kept + ((p + c) * h->across + t + r + i) * L);
                        } else {
                            Rows x = {h->hidden + (t + r) * D, D, PAIR};
                            Ahead ahead = share_of(w + many * steps * STEP, end - p - many, steps, r, rows, tokens);
#define TILE(height, width) summed(height, width, x, w, steps * STEP, steps, ahead, sum);
                            EVERY_TILE(rows, many)
#undef TILE
                        }
                        graded(h, rows, many, sum, known ? 1 : h->scale, t + r, p * L, room.by_token + r * BY_TOKEN + (p - s) * L, BY_TOKEN,
                               room.by_column + (p - s) * column + r / PAIR * STEP, column);
                    }
                    p += many;
                }
                for (long d = 0; d < D && h->grad_weight; d += WIDE * L)
                    for (long v = (from - s) * L; v < (end - s) * L; v += 4)
                        multiplied(4, (Rows){room.by_column + v / L * column + v % L * PAIR, PAIR, STEP}, room.hidden_by_row + d / L * apart + t / PAIR * STEP, apart,
                                   pairs(tokens), D - d < WIDE * L ? D - d : WIDE * L, room.weight_sum + v * D + d, D, t > 0);
                for (long v = from * L; v < end * L && v < h->V && h->grad_weight && t + tokens == N; v++) /* before another has this room, in the next slice */
                    for (long d = 0; d < D; d += L) store(h->grad_weight + v * D + d, loadf(room.weight_sum + (v - s * L) * D + d));
#pragma omp barrier
                for (long d = 0; d < D; d += WIDE * L)
                    for (long r = SHARE(tokens, TALL); r < UNTIL(tokens, TALL); r += TALL)
                        multiplied(tokens - r < TALL ? tokens - r : TALL, (Rows){room.by_token + r * BY_TOKEN, BY_TOKEN, PAIR}, room.weight_by_row + d / L * BY_ROW, BY_ROW,
                                   slice * L / PAIR, D - d < WIDE * L ? D - d : WIDE * L, h->grad_hidden + (t + r) * D + d, D, s > 0);
#pragma omp barrier
            }
        }
#undef SHARE
#undef UNTIL
    }
}
