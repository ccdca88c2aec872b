/* The output projection and the log-softmax of given tokens, forward and backward, without the logits: logprobs.py.
 *
 * Called by head.py. Axes: N tokens, D hidden, V vocabulary. Logits are bfloat16 products summed in float32, and are used where they are made, in registers.
 * The weights are packed (products.h).
 */
#include "products.h"

typedef struct { /* head.py fills it */
    const T *hidden, *head; /* [N, D], and the weights [V, D] packed */
    const int64_t *target;  /* [N] */
    long N, D, V, threads;
    float scale; /* 1 / temperature */
    float *logp, *entropy, *normaliser; /* [N]: what forward finds; backward reads the last */
    const float *grad;                  /* [N] */
    T *grad_logits;  /* [N, V]: (onehot - softmax) . grad */
    T *grad_packed;  /* its transpose packed, [V / L, N / PAIR, L, PAIR] */
} Head;

enum { LOW = -1000000000 }; /* below any logit: what it adds is below 1e-28 */

/* What a thread has seen of a token's logits in each lane: the largest, sum of exp(x - largest), sum of x . exp(x - largest). */
typedef struct { vf top, sum, mean; } Seen;

/* x, with `instead` in the lanes from the `count`th on. */
INLINE vf first(vf x, long count, float instead) {
    if (count >= L) return x;
    vi within = lane_numbers() < (int32_t)count;
    return (vf)(((vi)x & within) | ((vi)((vf){} + instead) & ~within));
}

INLINE void looked(const Head *h, const int many, vf x[WIDE], long n, long column, Seen *seen) {
    vf top = seen->top;
    for (int c = 0; c < many; c++) {
        x[c] = first(x[c] * h->scale, h->V - column - c * L, LOW);
        top = larger(x[c], top);
    }
    vf less = vexp(seen->top - top), sum = seen->sum * less, mean = seen->mean * less;
    for (int c = 0; c < many; c++) { vf e = vexp(x[c] - top); sum += e; mean += e * x[c]; }
    *seen = (Seen){top, sum, mean};
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
#define TILE(height, width) summed(height, width, x, w, steps, ahead, sum); \
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

/* The gradient of the logits of token n, d logp / d logit = onehot - softmax, rounded as it is multiplied later. */
INLINE void graded(const Head *h, const int many, vf x[WIDE], long n, long column) {
    float g = h->grad[n] * h->scale;
    for (int c = 0; c < many; c++) {
        long from = column + c * L, left = h->V - from, at = h->target[n] - from;
        x[c] = vexp(x[c] * h->scale - h->normaliser[n]) * -g;
        if (at >= 0 && at < L) x[c] += (vf)((vi)((vf){} + g) & (lane_numbers() == (int32_t)at));
        x[c] = rounded(first(x[c], left, 0));
        T *out = h->grad_logits + n * h->V + from;
        if (left >= L) store(out, x[c]);
        else { T last[L]; store(last, x[c]); memcpy(out, last, left * sizeof(T)); }
    }
}

/* The gradients of one column in two tokens, or one without a second (PAIR = 1: of one), as a product over tokens multiplies them. */
INLINE void paired(T *to, vf one, vf other) {
#if BF16 && defined(__AVX512BF16__)
    *(vu *)to = (vu)one >> 16 | (vu)other;
#else
    store(to, one);
    (void)other;
#endif
}

/* grad_logits, and the same packed by pairs of tokens. */
void head_backward(const Head *h) {
    long N = h->N, D = h->D, steps = (D + PAIR - 1) / PAIR, panels = filled(h->V) / L, pairs = (N + PAIR - 1) / PAIR;
#pragma omp parallel num_threads(h->threads)
    {
        long me = omp_get_thread_num(), all = omp_get_num_threads(), end = panels * (me + 1) / all;
        for (long p = panels * me / all; p < end;) {
            int many = next_panels(end - p);
            const T *w = h->head + p * steps * STEP;
            for (long r = 0; r < N; r += TALL) {
                int rows = N - r < TALL ? N - r : TALL;
                Rows x = {h->hidden + r * D, D, PAIR};
                Ahead ahead = share_of(w + many * steps * STEP, end - p - many, steps, r, rows, N);
                vf sum[TALL][WIDE];
#define TILE(height, width) summed(height, width, x, w, steps, ahead, sum); \
                for (int i = 0; i < height; i++) graded(h, width, sum[i], r + i, p * L); \
                for (int i = 0; i < height; i += PAIR) for (int c = 0; c < width; c++) \
                    paired(h->grad_packed + ((p + c) * pairs + (r + i) / PAIR) * STEP, sum[i][c], i + 1 < height ? sum[i + 1][c] : (vf){});
                EVERY_TILE(rows, many)
#undef TILE
            }
            p += many;
        }
    }
}

/* grad_weight [V, D] += grad_logits^T . hidden, whose transpose [D, N] is packed. D is a whole number of registers. */
void head_weight_gradient(const Head *h, const T *hidden, float *grad_weight) {
    long D = h->D, steps = (h->N + PAIR - 1) / PAIR, panels = filled(h->V) / L, end = D / L;
#pragma omp parallel for num_threads(h->threads) schedule(static)
    for (long p = 0; p < panels; p++)
        for (long d = 0; d < end;) {
            int many = next_panels(end - d);
            for (int v = 0; v < L && p * L + v < h->V; v += 4) {
                int rows = h->V - p * L - v < 4 ? h->V - p * L - v : 4;
                float *out = grad_weight + (p * L + v) * D + d * L;
                for (int r = 0; r < rows; r++)
                    for (int c = 0; c < many; c++) __builtin_prefetch(out + r * D + c * L, 1);
                vf sum[TALL][WIDE];
#define TILE(height, width) summed(height, width, (Rows){h->grad_packed + p * steps * STEP + v * PAIR, PAIR, STEP}, hidden + d * steps * STEP, steps, (Ahead){0}, sum); \
                for (int r = 0; r < height; r++) for (int c = 0; c < width; c++) { vfu *to = (vfu *)(out + r * D + c * L); *to += sum[r][c]; }
                EVERY_TILE(rows, many)
#undef TILE
            }
            d += many;
        }
}
