/* A pass of a Llama-like model over new tokens of many sequences: whole prompts, or the newest token of each; from ids to logits.
 *
 * Compiled for this processor by decode.py, once with T = float and once with T = bfloat16. Between its operations a layer is rounded
 * where transformers rounds it; attention is in float32 until its result. What a row comes to does not depend on the other rows, nor on
 * how many threads there are: each number is summed by one thread in one order.
 *
 * Axes as elsewhere: N rows (tokens), D hidden, V vocabulary. Matrices are row-major; weights are packed (products.h).
 */
#include "products.h"

enum { AHEAD = 2 << 10 }; /* how many bytes in advance keys and values are asked for */

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

/* An adapter beside a product: scale . (x . a^T) . b^T, a scale for each column; a is null where there is none. */
typedef struct { const T *a, *b; const float *scale; long rank; } LowRank;

/* Where the results of a product go: rounded to `out`, which keeps its own value besides if `add`; or in float32 to `logits`.
 * Rows are `width` apart; `bias` may be null. `beside`, null for none: an adapter, and `low` = x . a^T, rows filled(rank) apart. */
typedef struct { T *out; float *logits; const T *bias; long width; int add; const LowRank *beside; const T *low; } Target;

/* Rounded between the two as the learner's layer is (patch_layers.py). */
INLINE void finish(vf sum, vf low, const Target *to, long row, long column) {
    long at = row * to->width + column;
    if (to->bias) sum += load(to->bias + column);
    if (to->beside) sum = rounded(sum) + loadf(to->beside->scale + column) * low;
    if (to->logits) { *(vfu *)(to->logits + at) = sum; return; }
    store(to->out + at, to->add ? load(to->out + at) + rounded(sum) : sum);
}

static void tiled(int rows, int many, Rows x, const T *w, long steps, Ahead ahead, const Target *to, long row, long column) {
    vf sum[TALL][WIDE], low[TALL][WIDE] = {};
    if (to->beside) {
        long row_low = filled(to->beside->rank), some = pairs(to->beside->rank);
        Rows h = {to->low + row * row_low, row_low, PAIR};
        const T *b = to->beside->b + column / L * some * STEP;
#define TILE(height, width) summed(height, width, h, b, some * STEP, some, (Ahead){0}, low);
        EVERY_TILE(rows, many)
#undef TILE
    }
#define TILE(height, width) summed(height, width, x, w, steps * STEP, steps, ahead, sum); \
        for (int r = 0; r < height; r++) for (int c = 0; c < width; c++) finish(sum[r][c], low[r][c], to, row + r, column + c * L);
    EVERY_TILE(rows, many)
#undef TILE
}

/* Panels [from, end) of x [N, k] . w^T; rows of x are `filled(k)` apart, with zeros after the last number. */
static void product(long N, const T *x, const T *w, long k, long from, long end, Target to) {
    long stride = filled(k), steps = (k + PAIR - 1) / PAIR;
    for (long n = from; n < end;) {
        int many = next_panels(end - n);
        const T *panels = w + n * steps * STEP, *next = panels + many * steps * STEP;
        for (long r = 0; r < N; r += TALL) {
            int rows = N - r < TALL ? N - r : TALL;
            tiled(rows, many, (Rows){x + r * stride, stride, PAIR}, panels, steps, share_of(next, end - n - many, steps, r, rows, N), &to, r, n * L);
        }
        n += many;
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
    const T *norm, *qkv, *o, *qkv_bias, *o_bias, *q_norm, *k_norm, *mlp_norm, *gate_up, *down;
    T *keys, *values; /* [slots, groups, columns, size] */
    LowRank qkv_beside, o_beside, gate_up_beside, down_beside;
} Layer;

typedef struct {
    long layers, hidden, heads, groups, size, inner, vocabulary, rank; /* the largest rank of an adapter */
    float epsilon, scale;
    const T *embedding, *norm, *head;
    const Layer *layer;
} Model;

typedef struct { T *h, *x, *qkv, *seen, *gate_up, *gated, *low; float *score; } Room;

/* Where things lie in a pass's scratch memory; returns its size in bytes. */
static long laid(const Model *m, long N, long columns, long threads, char *base, Room *room) {
    long at = 0, a_group = m->heads / m->groups;
#define PLACE(field, count) room->field = (void *)(base + at); at += ((count) * (long)sizeof(*room->field) + LINE - 1) / LINE * LINE;
    PLACE(h, N * filled(m->hidden))
    PLACE(x, N * filled(m->hidden))
    PLACE(qkv, N * filled((m->heads + 2 * m->groups) * m->size))
    PLACE(seen, N * filled(m->heads * m->size))
    PLACE(gate_up, N * 2 * filled(m->inner))
    PLACE(gated, N * filled(m->inner))
    PLACE(low, N * filled(m->rank))
    PLACE(score, threads * a_group * columns)
#undef PLACE
    return at + LINE;
}

long room_bytes(const Model *m, long N, long columns, long threads) {
    Room room;
    return laid(m, N, columns, threads, 0, &room);
}

/* One token's heads of one group, and where that group's keys and values are in its sequence's slot. */
typedef struct { T *q, *k, *v, *keys, *values; const T *cos, *sin; long position; } Unit;

/* The tokens of a pass: which slot each belongs to, at which position; cosine, sine [positions, size / 2]; columns of a slot. */
typedef struct { const int64_t *ids, *slots, *positions; const T *cosine, *sine; long columns; } Tokens;

static Unit unit_at(const Model *m, const Layer *l, const Room *room, const Tokens *tokens, long n, long g) {
    long size = m->size, a_group = m->heads / m->groups, position = tokens->positions[n], half = size / 2;
    long slot = (tokens->slots[n] * m->groups + g) * tokens->columns * size;
    T *row = room->qkv + n * filled((m->heads + 2 * m->groups) * size), *k = row + (m->heads + g) * size;
    return (Unit){row + g * a_group * size, k, k + m->groups * size, l->keys + slot, l->values + slot,
                  tokens->cosine + position * half, tokens->sine + position * half, position};
}

/* Rotate the key; write key and value into the slot. */
static void placed(const Model *m, const Layer *l, Unit u) {
    if (l->k_norm) normed(u.k, l->k_norm, m->size, m->epsilon, u.k);
    turned(u.k, u.cos, u.sin, m->size);
    memcpy(u.keys + u.position * m->size, u.k, m->size * sizeof(T));
    memcpy(u.values + u.position * m->size, u.v, m->size * sizeof(T));
}

/* Rotate the queries; look at all that is in the slot up to this token. score: room for heads x columns. */
static void attended(const Model *m, const Layer *l, Unit u, float *score, T *out) {
    long size = m->size, a_group = m->heads / m->groups, columns = u.position + 1;
    float peak[a_group], sum[a_group];
    for (long h = 0; h < a_group; h++) {
        if (l->q_norm) normed(u.q + h * size, l->q_norm, size, m->epsilon, u.q + h * size);
        turned(u.q + h * size, u.cos, u.sin, size);
    }
    scores(a_group, u.q, u.keys, columns, size, m->scale, score, columns, peak);
    for (long h = 0; h < a_group; h++) sum[h] = weights(score + h * columns, columns, peak[h]);
    mixed(a_group, score, columns, u.values, columns, size, sum, out);
}

/* out := silu(gate) * up, of panels [from, to): gate_up holds a register of one, then one of the other. */
static void gated(const T *gate_up, T *out, long from, long to) {
    for (long n = from; n < to; n++) {
        vf a = load(gate_up + 2 * n * L), b = load(gate_up + (2 * n + 1) * L);
        store(out + n * L, rounded(a / (1.0f + vexp(-a))) * b);
    }
}

/* What threads do with some rows: `all` of them share every product and meet between two of them, or one (all = 1) does everything. */
typedef struct { long me, all; float *score; } Share;

#define SHARE(n, from, to) long from = filled(n) / L * by.me / by.all, to = filled(n) / L * (by.me + 1) / by.all;

INLINE void meet(Share by) {
    if (by.all > 1) {
#pragma omp barrier
    }
}

/* A product of x [N, k] and what is beside it: all of its panels for `to`, those [from, end) by this thread. */
static void adapted(long N, const T *x, const T *w, long k, long from, long end, Target to, const LowRank *beside, T *low, Share by) {
    if (beside->a) {
        SHARE(beside->rank, r0, r1)
        product(N, x, beside->a, k, r0, r1, (Target){.out = low, .width = filled(beside->rank)});
        meet(by);
        to.beside = beside, to.low = low;
    }
    product(N, x, w, k, from, end, to);
}

/* All layers, over N tokens; room.h holds what comes out. */
static void read_layers(const Model *m, const Tokens *tokens, const Room *room, long N, Share by) {
    long q = m->heads * m->size, qkv = q + 2 * m->groups * m->size, hidden = m->hidden;
    long h_row = filled(hidden), q_row = filled(q), i_row = filled(m->inner), units = N * m->groups, some = units / (32 * by.all) + 1;
    SHARE(qkv, q0, q1) SHARE(hidden, d0, d1) SHARE(m->inner, i0, i1)
    for (long n = by.me; n < N; n += by.all) memcpy(room->h + n * h_row, m->embedding + tokens->ids[n] * hidden, hidden * sizeof(T));
    for (long i = 0; i < m->layers; i++) {
        const Layer *l = m->layer + i;
        for (long n = by.me; n < N; n += by.all) normed(room->h + n * h_row, l->norm, hidden, m->epsilon, room->x + n * h_row);
        meet(by);
        adapted(N, room->x, l->qkv, hidden, q0, q1, (Target){.out = room->qkv, .bias = l->qkv_bias, .width = filled(qkv)}, &l->qkv_beside, room->low, by);
        meet(by);
        for (long u = units * by.me / by.all; u < units * (by.me + 1) / by.all; u++)
            placed(m, l, unit_at(m, l, room, tokens, u / m->groups, u % m->groups));
        meet(by);
#define ATTEND(u) attended(m, l, unit_at(m, l, room, tokens, u / m->groups, u % m->groups), by.score, \
                           room->seen + u / m->groups * q_row + u % m->groups * (q / m->groups))
        if (by.all > 1) {
#pragma omp for schedule(dynamic, some)
            for (long u = 0; u < units; u++) ATTEND(u);
        } else {
            for (long u = 0; u < units; u++) ATTEND(u);
        }
#undef ATTEND
        adapted(N, room->seen, l->o, q, d0, d1, (Target){.out = room->h, .bias = l->o_bias, .width = h_row, .add = 1}, &l->o_beside, room->low, by);
        meet(by);
        for (long n = by.me; n < N; n += by.all) normed(room->h + n * h_row, l->mlp_norm, hidden, m->epsilon, room->x + n * h_row);
        meet(by);
        adapted(N, room->x, l->gate_up, hidden, 2 * i0, 2 * i1, (Target){.out = room->gate_up, .width = 2 * i_row}, &l->gate_up_beside, room->low, by);
        for (long n = 0; n < N; n++) gated(room->gate_up + n * 2 * i_row, room->gated + n * i_row, i0, i1);
        meet(by);
        adapted(N, room->gated, l->down, m->inner, d0, d1, (Target){.out = room->h, .width = h_row, .add = 1}, &l->down_beside, room->low, by);
        meet(by);
    }
}

/* Logits [W, V] after the `wanted` rows of h, normed into x. */
static void read_logits(const Model *m, const T *h, T *x, const int64_t *wanted, long W, float *logits, Share by) {
    long h_row = filled(m->hidden);
    SHARE(m->vocabulary, v0, v1)
    for (long n = by.me; n < W; n += by.all) normed(h + wanted[n] * h_row, m->norm, m->hidden, m->epsilon, x + n * h_row);
    meet(by);
    product(W, x, m->head, m->hidden, v0, v1, (Target){.logits = logits, .width = filled(m->vocabulary)});
}

enum { SMALL = 4 << 20, PIECES = 64 }; /* bytes of weights that every core's cache holds, about; pieces that a pass is cut into, at most */

/* A small model's tokens are cut into pieces of whole sequences, from starts[i] to starts[i + 1]. Returns how many; 0: all threads share each product. */
static long cut(const Model *m, const Tokens *tokens, long N, long threads, long *starts) {
    long q = m->heads * m->size, a_layer = m->hidden * (2 * q + 2 * m->groups * m->size + 3 * m->inner), pieces = 0;
    long least = (N / (4 * threads) + TALL) / TALL * TALL;
    if (threads == 1 || (m->layers * a_layer + m->vocabulary * m->hidden) * (long)sizeof(T) > SMALL || N < 2 * threads * TALL) return 0;
    least = least > N / PIECES + 1 ? least : N / PIECES + 1;
    starts[0] = 0;
    for (long n = 1; n < N; n++)
        if (n - starts[pieces] >= least && tokens->slots[n] != tokens->slots[n - 1]) starts[++pieces] = n;
    starts[++pieces] = N;
    return pieces < threads ? 0 : pieces;
}

/* Float32 logits, [W, filled(V)], after the tokens at the `wanted` rows, when N new tokens have been read.
 *
 * The tokens of a sequence stand in order of their positions, and those before them are in its slot. memory: room_bytes(N, columns of
 * the longest with its new tokens, threads).
 *
 * A small model's threads each take some sequences through all layers, the next piece when they are done: they wait for each other twice a pass, not
 * nine times a layer, and where a core has other work the rest of the pass is done by the others. The matrices of a large one are read once, by all. */
void read_tokens(const Model *m, const Tokens *tokens, long N, const int64_t *wanted, long W, long threads, char *memory, float *logits) {
    long q = m->heads * m->size, qkv = q + 2 * m->groups * m->size, hidden = m->hidden, most = 0, starts[PIECES + 1];
    long h_row = filled(hidden), v_row = filled(m->vocabulary), pieces = cut(m, tokens, N, threads, starts);
    for (long n = 0; n < N; n++) most = tokens->positions[n] + 1 > most ? tokens->positions[n] + 1 : most;
    Room room;
    laid(m, N, most, threads, (char *)(((uintptr_t)memory + LINE - 1) / LINE * LINE), &room);
    if (hidden % L || q % L) memset(room.h, 0, (char *)room.score - (char *)room.h); /* what fills up a product's rows must be 0 */
#pragma omp parallel num_threads(threads)
    {
        Share by = {omp_get_thread_num(), omp_get_num_threads(), room.score + omp_get_thread_num() * (m->heads / m->groups) * most};
        if (!pieces) {
            read_layers(m, tokens, &room, N, by);
            read_logits(m, room.h, room.x, wanted, W, logits, by);
        } else {
            Share alone = {0, 1, by.score};
#pragma omp for schedule(dynamic, 1)
            for (long i = 0; i < pieces; i++) {
                long n = starts[i];
                Tokens mine = *tokens;
                Room its = {room.h + n * h_row, room.x + n * h_row, room.qkv + n * filled(qkv), room.seen + n * filled(q),
                            room.gate_up + n * 2 * filled(m->inner), room.gated + n * filled(m->inner), room.low + n * filled(m->rank), 0};
                mine.ids += n, mine.slots += n, mine.positions += n;
                read_layers(m, &mine, &its, starts[i + 1] - n, alone);
            }
            long some = W / (4 * by.all) / TALL * TALL + TALL;
#pragma omp for schedule(dynamic, 1)
            for (long n = 0; n < W; n += some)
                read_logits(m, room.h, room.x + n * h_row, wanted + n, W - n < some ? W - n : some, logits + n * v_row, alone);
        }
    }
}
