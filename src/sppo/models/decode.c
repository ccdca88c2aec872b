/* One decoding step of a Llama-like model for a batch of sequences, from their newest tokens to their logits.
 *
 * Compiled for this processor by decode.py, once with T = float and once with T = bfloat16. Between its operations a layer is rounded
 * where transformers rounds it; attention is in float32 until its result. What a row comes to does not depend on the other rows, nor on
 * how many threads there are: each number is summed by one thread in one order.
 *
 * Axes as elsewhere: B rows (sequences), D hidden, V vocabulary. All matrices are row-major, weights [out, in] as nn.Linear has
 * them, read where the model keeps them.
 */
#include "vectors.h"

enum { COLS = 4, NEAR = 24 << 10, AHEAD = 2 << 10 };
/* NEAR: bytes of weights that stay in the first cache while rows pass by; AHEAD: how far in advance keys and values are asked for */

/* What a step of a product multiplies: STEP numbers of a row with STEP of another, summed into a register in float32. */
#if BF16 && defined(__AVX512BF16__)
enum { STEP = 2 * L };
typedef __m512bh word;
INLINE word word_at(const T *p) { return (word)_mm512_loadu_si512(p); }
INLINE vf fused(vf sum, word a, word b) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
enum { STEP = L };
typedef vf word;
INLINE word word_at(const T *p) { return load(p); }
INLINE vf fused(vf sum, word a, word b) { return sum + a * b; }
#endif

/* Ask for `count` numbers a little beyond p: memory is slower than the sums unless it is asked in time. */
INLINE void soon(const T *p, long count) {
    for (long at = 0; at < count * (long)sizeof(T); at += LINE) __builtin_prefetch((const char *)p + AHEAD + at, 0, 2);
}

/* The totals of four registers, which costs little more than that of one. */
INLINE void totals(const vf x[4], float out[4]) {
#if defined(__AVX512F__)
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)x[0], (__m512)x[1]), _mm512_unpackhi_ps((__m512)x[0], (__m512)x[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)x[2], (__m512)x[3]), _mm512_unpackhi_ps((__m512)x[2], (__m512)x[3]));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps((__m256)x[0], (__m256)x[1]), _mm256_hadd_ps((__m256)x[2], (__m256)x[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
    for (int i = 0; i < 4; i++) out[i] = total(x[i]);
#endif
}

/* rows x cols numbers of x . w^T: sums of k products each. */
INLINE void tile(const int rows, const int cols, const T *x, const T *w, long k, float out[ROWS][COLS]) {
    vf sum[ROWS][COLS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < COLS; c++) sum[r][c] = (vf){};
    long i = 0;
    for (; i + STEP <= k; i += STEP) {
        word b[COLS];
        for (int c = 0; c < cols; c++) b[c] = word_at(w + c * k + i);
        for (int r = 0; r < rows; r++) {
            word a = word_at(x + r * k + i);
            for (int c = 0; c < cols; c++) sum[r][c] = fused(sum[r][c], a, b[c]);
        }
    }
    for (int r = 0; r < rows; r++) {
        totals(sum[r], out[r]);
        for (long j = i; j < k; j++)
            for (int c = 0; c < cols; c++) out[r][c] += wide(x[r * k + j]) * wide(w[c * k + j]);
    }
}

static void tiled(int rows, int cols, const T *x, const T *w, long k, float out[ROWS][COLS]) {
#define CASE(r) case r: if (cols == COLS) tile(r, COLS, x, w, k, out); else tile(r, 1, x, w, k, out); break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3)
#if !defined(__AVX2__) || defined(__AVX512F__)
        CASE(4)
#endif
#if defined(__AVX512F__)
        CASE(5) CASE(6)
#endif
    }
#undef CASE
}

/* Where sums go, one or four at a time: see product. */
INLINE void finish(float sum, const T *bias, T *out, float *logits, int add) {
    if (bias) sum += wide(*bias);
    if (add) sum = wide(*out) + rounded1(sum);
    if (logits) *logits = sum;
    else *out = narrow(sum);
}

INLINE void finish4(const float *sums, const T *bias, T *out, float *logits, int add) {
    v4 sum = *(const v4 *)sums;
    if (bias) sum += load4(bias);
    if (add) sum = load4(out) + rounded4(sum);
    if (logits) *(v4 *)logits = sum;
    else store4(out, sum);
}

/* Columns [from, to) of x [B, k] . w^T + bias. They go to `logits` in float32 if that is given; else rounded to `out`, which keeps
 * its own value besides if `add`. Rows of the result are `width` apart. */
static void product(long B, const T *x, const T *w, const T *bias, long k, long from, long to, T *out, float *logits, long width, int add) {
    long block = NEAR / (k * (long)sizeof(T)) / COLS * COLS;
    if (block < COLS) block = COLS;
    for (long n = from; n < to; n += block) {
        long end = n + block < to ? n + block : to;
        for (long r = 0; r < B; r += ROWS) {
            int rows = B - r < ROWS ? B - r : ROWS;
            for (long c = n; c < end;) {
                float found[ROWS][COLS];
                int cols = end - c < COLS ? 1 : COLS;
                /* a share of what the next block will need: memory is slower than the sums unless it is asked in time */
                const char *ahead = (const char *)(w + (c + block) * k);
                for (long line = cols * k * (long)sizeof(T) * r / B; line < cols * k * (long)sizeof(T) * (r + rows) / B; line += LINE)
                    __builtin_prefetch(ahead + line, 0, 2);
                tiled(rows, cols, x + r * k, w + c * k, k, found);
                for (int i = 0; i < rows; i++) {
                    long at = (r + i) * width + c;
                    if (cols == COLS) finish4(found[i], bias ? bias + c : 0, out ? out + at : 0, logits ? logits + at : 0, add);
                    else finish(found[i][0], bias ? bias + c : 0, out ? out + at : 0, logits ? logits + at : 0, add);
                }
                c += cols;
            }
        }
    }
}

/* RMS norm of n numbers, in place or not. */
static void normed(const T *x, const T *weight, long n, float epsilon, T *out) {
    vf sum = {};
    long i = 0;
    for (; i + L <= n; i += L) { vf a = load(x + i); sum += a * a; }
    float square = total(sum);
    for (; i < n; i++) square += wide(x[i]) * wide(x[i]);
    float rms = 1.0f / sqrtf(square / n + epsilon);
    for (i = 0; i + L <= n; i += L) store(out + i, rounded(load(x + i) * rms) * load(weight + i));
    for (; i < n; i++) out[i] = narrow(rounded1(wide(x[i]) * rms) * wide(weight[i]));
}

/* x := rotated by its position's angles (cos, sin: half as many). */
static void turned(T *x, const T *cos, const T *sin, long size) {
    long half = size / 2;
    for (long d = 0; d < half; d++) {
        float a = wide(x[d]), b = wide(x[half + d]), c = wide(cos[d]), s = wide(sin[d]);
        x[d] = narrow(rounded1(a * c) - rounded1(b * s));
        x[half + d] = narrow(rounded1(b * c) + rounded1(a * s));
    }
}

/* Some columns from s on of score[h, s] = scale * q[h] . key[s], rows of it `stride` apart; peak[h] is the largest so far. */
INLINE void scored(const int many, long heads, const T *q, const T *keys, long s, long size, float scale, float *score, long stride, float *peak) {
    for (long h = 0; h < heads; h++) {
        vf sum[4] = {};
        float found[4];
        long d = 0;
        for (; d + STEP <= size; d += STEP) {
            word a = word_at(q + h * size + d);
            for (int j = 0; j < many; j++) sum[j] = fused(sum[j], a, word_at(keys + (s + j) * size + d));
        }
        totals(sum, found);
        for (int j = 0; j < many; j++) {
            for (long i = d; i < size; i++) found[j] += wide(q[h * size + i]) * wide(keys[(s + j) * size + i]);
            score[h * stride + s + j] = found[j] *= scale;
            peak[h] = found[j] > peak[h] ? found[j] : peak[h];
        }
    }
}

static void scores(long heads, const T *q, const T *keys, long columns, long size, float scale, float *score, long stride, float *peak) {
    for (long h = 0; h < heads; h++) peak[h] = -INFINITY;
    long s = 0;
    for (; s + 4 <= columns; s += 4) {
        soon(keys + (s + 4) * size, 4 * size);
        scored(4, heads, q, keys, s, size, scale, score, stride, peak);
    }
    for (; s < columns; s++) scored(1, heads, q, keys, s, size, scale, score, stride, peak);
}

/* score := exp(score - peak); returns the sum. */
static float weights(float *score, long columns, float peak) {
    vf sum = {};
    long s = 0;
    for (; s + L <= columns; s += L) { vf e = vexp(loadf(score + s) - peak); *(vfu *)(score + s) = e; sum += e; }
    float all = total(sum);
    for (; s < columns; s++) { vf e = vexp((vf){} + (score[s] - peak)); all += score[s] = e[0]; }
    return all;
}

/* The values weighed by each head's weights, `many` registers wide, into out [heads, size]. */
INLINE void weighed(const int heads, const int many, const float *weight, long stride, const T *values, long columns, long size, const float *sum, T *out) {
    vf seen[4][4];
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < many; i++) seen[h][i] = (vf){};
    for (long s = 0; s < columns; s++) {
        vf v[4];
        soon(values + s * size, many * L);
        for (int i = 0; i < many; i++) v[i] = load(values + s * size + i * L);
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < many; i++) seen[h][i] += weight[h * stride + s] * v[i];
    }
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < many; i++) store(out + h * size + i * L, seen[h][i] / sum[h]);
}

static void mixed(long heads, const float *weight, long stride, const T *values, long columns, long size, const float *sum, T *out) {
    for (long h = 0; h < heads;) {
        long left = heads - h, d = 0;
        const float *w = weight + h * stride;
        int some = left >= 4 ? 4 : left;
#define PART(n) for (; d + n * L <= size; d += n * L) switch (some) { \
            case 4: weighed(4, n, w, stride, values + d, columns, size, sum + h, out + h * size + d); break; \
            case 3: weighed(3, n, w, stride, values + d, columns, size, sum + h, out + h * size + d); break; \
            case 2: weighed(2, n, w, stride, values + d, columns, size, sum + h, out + h * size + d); break; \
            case 1: weighed(1, n, w, stride, values + d, columns, size, sum + h, out + h * size + d); break; }
        PART(4) PART(2) PART(1)
#undef PART
        for (; d < size; d++)
            for (int i = 0; i < some; i++) {
                float seen = 0;
                for (long s = 0; s < columns; s++) seen += w[i * stride + s] * wide(values[s * size + d]);
                out[(h + i) * size + d] = narrow(seen / sum[h + i]);
            }
        h += some;
    }
}

typedef struct { /* decode.py fills it; absent tensors are null */
    const T *norm, *q, *k, *v, *o, *q_bias, *k_bias, *v_bias, *o_bias, *q_norm, *k_norm, *mlp_norm, *gate, *up, *down;
    T *keys, *values; /* [slots, groups, columns, size] */
} Layer;

typedef struct {
    long layers, hidden, heads, groups, size, inner, vocabulary;
    float epsilon, scale;
    const T *embedding, *norm, *head;
    const Layer *layer;
} Model;

typedef struct { T *h, *x, *qkv, *seen, *gate, *up; float *score; } Room;

/* Where things lie in the memory lent for a step; returns its size in bytes. */
static long laid(const Model *m, long B, long columns, long threads, char *base, Room *room) {
    long at = 0, a_group = m->heads / m->groups;
#define PLACE(field, count) room->field = (void *)(base + at); at += ((count) * (long)sizeof(*room->field) + LINE - 1) / LINE * LINE;
    PLACE(h, B * m->hidden)
    PLACE(x, B * m->hidden)
    PLACE(qkv, B * (m->heads + 2 * m->groups) * m->size)
    PLACE(seen, B * m->heads * m->size)
    PLACE(gate, B * m->inner)
    PLACE(up, B * m->inner)
    PLACE(score, threads * a_group * columns)
#undef PLACE
    return at + LINE;
}

long room_bytes(const Model *m, long B, long columns, long threads) {
    Room room;
    return laid(m, B, columns, threads, 0, &room);
}

/* One sequence's heads of one group: rotate, write key and value into the slot, look at all that is there. */
static void attend(const Model *m, const Layer *l, const Room *room, long b, long g, long length, long slot_columns, long most, int me, const T *cos, const T *sin) {
    long size = m->size, a_group = m->heads / m->groups, columns = length + 1;
    T *row = room->qkv + b * (m->heads + 2 * m->groups) * size;
    T *q = row + g * a_group * size, *k = row + (m->heads + g) * size, *v = k + m->groups * size;
    T *keys = l->keys + (b * m->groups + g) * slot_columns * size, *values = l->values + (b * m->groups + g) * slot_columns * size;
    if (l->k_norm) normed(k, l->k_norm, size, m->epsilon, k);
    turned(k, cos, sin, size);
    memcpy(keys + length * size, k, size * sizeof(T));
    memcpy(values + length * size, v, size * sizeof(T));
    float *score = room->score + me * a_group * most, peak[a_group], sum[a_group];
    for (long h = 0; h < a_group; h++) {
        if (l->q_norm) normed(q + h * size, l->q_norm, size, m->epsilon, q + h * size);
        turned(q + h * size, cos, sin, size);
    }
    scores(a_group, q, keys, columns, size, m->scale, score, most, peak);
    for (long h = 0; h < a_group; h++) sum[h] = weights(score + h * most, columns, peak[h]);
    mixed(a_group, score, most, values, columns, size, sum, room->seen + (b * m->heads + g * a_group) * size);
}

/* gate := silu(gate) * up */
static void gated(T *gate, const T *up, long n) {
    long i = 0;
    for (; i + L <= n; i += L) { vf a = load(gate + i); store(gate + i, rounded(a / (1.0f + vexp(-a))) * load(up + i)); }
    for (; i < n; i++) { vf e = vexp((vf){} - wide(gate[i])); gate[i] = narrow(rounded1(wide(gate[i]) / (1.0f + e[0])) * wide(up[i])); }
}

/* Float32 logits, [B, V], after one more token of each sequence.
 *
 * ids, lengths: [B], the new tokens and how many are in their slots already. cosine, sine: [positions, size / 2].
 * slot_columns: how many columns a slot has room for. memory: room_bytes(B, columns of the longest with its new token, threads). */
void step(const Model *m, long B, const int64_t *ids, const int64_t *lengths, const T *cosine, const T *sine, long slot_columns, long threads, char *memory, float *logits) {
    long most = 0, hidden = m->hidden, q = m->heads * m->size, kv = m->groups * m->size, width = q + 2 * kv;
    for (long b = 0; b < B; b++) most = lengths[b] + 1 > most ? lengths[b] + 1 : most;
    Room room;
    laid(m, B, most, threads, (char *)(((uintptr_t)memory + LINE - 1) / LINE * LINE), &room);
#pragma omp parallel num_threads(threads)
    {
        long me = omp_get_thread_num(), all = omp_get_num_threads();
#define SHARE(n, from, to) long from = ((n) / COLS * me / all) * COLS, to = me + 1 == all ? (n) : ((n) / COLS * (me + 1) / all) * COLS;
        SHARE(q, q0, q1) SHARE(kv, kv0, kv1) SHARE(hidden, d0, d1) SHARE(m->inner, i0, i1) SHARE(m->vocabulary, v0, v1)
        for (long b = me; b < B; b += all) memcpy(room.h + b * hidden, m->embedding + ids[b] * hidden, hidden * sizeof(T));
        for (long n = 0; n < m->layers; n++) {
            const Layer *l = m->layer + n;
            for (long b = me; b < B; b += all) normed(room.h + b * hidden, l->norm, hidden, m->epsilon, room.x + b * hidden);
#pragma omp barrier
            product(B, room.x, l->q, l->q_bias, hidden, q0, q1, room.qkv, 0, width, 0);
            product(B, room.x, l->k, l->k_bias, hidden, kv0, kv1, room.qkv + q, 0, width, 0);
            product(B, room.x, l->v, l->v_bias, hidden, kv0, kv1, room.qkv + q + kv, 0, width, 0);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
            for (long unit = 0; unit < B * m->groups; unit++) {
                long b = unit / m->groups, half = m->size / 2;
                attend(m, l, &room, b, unit % m->groups, lengths[b], slot_columns, most, me, cosine + lengths[b] * half, sine + lengths[b] * half);
            }
            product(B, room.seen, l->o, l->o_bias, q, d0, d1, room.h, 0, hidden, 1);
#pragma omp barrier
            for (long b = me; b < B; b += all) normed(room.h + b * hidden, l->mlp_norm, hidden, m->epsilon, room.x + b * hidden);
#pragma omp barrier
            product(B, room.x, l->gate, 0, hidden, i0, i1, room.gate, 0, m->inner, 0);
            product(B, room.x, l->up, 0, hidden, i0, i1, room.up, 0, m->inner, 0);
            for (long b = 0; b < B; b++) gated(room.gate + b * m->inner + i0, room.up + b * m->inner + i0, i1 - i0);
#pragma omp barrier
            product(B, room.gate, l->down, 0, m->inner, d0, d1, room.h, 0, hidden, 1);
#pragma omp barrier
        }
        for (long b = me; b < B; b += all) normed(room.h + b * hidden, m->norm, hidden, m->epsilon, room.x + b * hidden);
#pragma omp barrier
        product(B, room.x, m->head, 0, hidden, v0, v1, 0, logits, m->vocabulary, 0);
#undef SHARE
    }
}
