/* Causal attention of packed sequences, forward and backward: each attends to itself alone, whatever their lengths.
 *
 * Called by attention.py. Everything is computed in float32 from T (vectors.h) and rounded once, at the end. The weights are computed again in
 * the backward pass from their normaliser, so that nothing of the square of a length is kept. One thread does one sequence's heads of one group of
 * keys: no number is summed by two, and how many threads there are changes no bit.
 *
 * N tokens of all sequences, D = size of a head. Queries are [N, heads, D] with strides, keys and values [N, groups, D] with strides.
 */
#include "vectors.h"

enum { WIDE = 4 }; /* registers beside each other in a tile of ROWS x WIDE sums */

typedef struct {
    const T *at;
    long token, head; /* strides */
} View;

typedef struct { /* attention.py fills it */
    long heads, groups, size, sequences;
    const int64_t *starts; /* [sequences + 1] */
    float scale;
    View q, k, v;
    T *out; /* [N, heads, D] */
    float *normaliser; /* [N, heads]: log of the sum of the exponentials */
    const T *grad; /* [N, heads, D], of out */
    T *grad_q, *grad_k, *grad_v; /* [N, heads or groups, D] */
} Job;

/* sum[r][c] += a[r, i] . b[i, c] over i < n, for ROWS rows and as many registers of columns. */
INLINE void gathered(const int many, const float *a, long a_row, const float *b, long b_row, long n, vf sum[ROWS][WIDE]) {
    for (long i = 0; i < n; i++) {
        vf w[WIDE];
        for (int c = 0; c < many; c++) w[c] = loadf(b + i * b_row + c * L);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < many; c++) sum[r][c] += a[r * a_row + i] * w[c];
    }
}

INLINE void cleared(vf sum[ROWS][WIDE]) {
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < WIDE; c++) sum[r][c] = (vf){};
}

/* out [ROWS, columns] = a [ROWS, n] . b [n, columns]; columns are whole registers, rows of out `out_row` apart. */
static void multiplied(const float *a, long a_row, const float *b, long b_row, long n, long columns, float *out, long out_row) {
    long c = 0;
#define PART(many) for (; c + many * L <= columns; c += many * L) { \
        vf sum[ROWS][WIDE]; \
        cleared(sum); \
        gathered(many, a, a_row, b + c, b_row, n, sum); \
        for (int r = 0; r < ROWS; r++) for (int i = 0; i < many; i++) *(vfu *)(out + r * out_row + c + i * L) = sum[r][i]; }
    PART(4) PART(2) PART(1)
#undef PART
}

/* out [n, columns] += sum over ROWS rows r of a[r, j] . b[r]: what a block of queries adds to every key before it. */
static void spread(const float *a, long a_row, const float *b, long b_row, long n, long columns, float *out) {
    long c = 0;
#define PART(many) for (; c + many * L <= columns; c += many * L) { \
        vf w[ROWS][many]; \
        for (int r = 0; r < ROWS; r++) for (int i = 0; i < many; i++) w[r][i] = loadf(b + r * b_row + c + i * L); \
        for (long j = 0; j < n; j++) { \
            vf sum[many]; \
            for (int i = 0; i < many; i++) sum[i] = loadf(out + j * columns + c + i * L); \
            for (int r = 0; r < ROWS; r++) for (int i = 0; i < many; i++) sum[i] += a[r * a_row + j] * w[r][i]; \
            for (int i = 0; i < many; i++) *(vfu *)(out + j * columns + c + i * L) = sum[i]; } }
    PART(4) PART(2) PART(1)
#undef PART
}

/* `rows` rows of a view in float32, [rows, size]; zeros up to `padded` rows. */
static void widened(const T *at, long token, long rows, long padded, long size, float *out) {
    for (long r = 0; r < rows; r++)
        for (long d = 0; d < size; d += L) *(vfu *)(out + r * size + d) = load(at + r * token + d);
    memset(out + rows * size, 0, (padded - rows) * size * sizeof(float));
}

static void transposed(const float *x, long rows, long columns, float *out, long out_row) {
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < columns; c++) out[c * out_row + r] = x[r * columns + c];
}

/* Rounds up to whole registers. */
INLINE long whole(long n) { return (n + L - 1) / L * L; }

/* score [ROWS, columns] := weights of the block of queries that begins at i: exp(scale . score - normaliser), 0 beyond the diagonal. */
INLINE void weighed(float *score, long row, long i, long columns, float scale, const float *normaliser) {
    for (int r = 0; r < ROWS; r++)
        for (long c = 0; c < columns; c += L) {
            vf e = vexp(loadf(score + r * row + c) * scale - normaliser[r]);
            for (int x = 0; x < L && c + L > i + r + 1; x++) if (c + x > i + r) e[x] = 0;
            *(vfu *)(score + r * row + c) = e;
        }
}

/* score := softmax(scale . score) of its first `own` columns, 0 in the rest; returns the log of the sum of the exponentials. */
static float softmax(float *score, long own, long columns, float scale) {
    vf most = (vf){} - INFINITY, all = {};
    long j = 0;
    for (; j + L <= own; j += L) { vf x = loadf(score + j); vi more = x > most; most = (vf)(((vi)x & more) | ((vi)most & ~more)); }
    float peak = -INFINITY;
    for (int x = 0; x < L; x++) peak = most[x] > peak ? most[x] : peak;
    for (; j < own; j++) peak = score[j] > peak ? score[j] : peak;
    peak *= scale;
    for (j = 0; j < columns; j += L) {
        vf e = vexp(loadf(score + j) * scale - peak);
        for (int x = 0; x < L && j + L > own; x++) if (j + x >= own) e[x] = 0;
        *(vfu *)(score + j) = e;
        all += e;
    }
    float sum = total(all);
    for (j = 0; j < columns; j += L) *(vfu *)(score + j) = loadf(score + j) / sum;
    return peak + logf(sum);
}

/* How many floats a thread needs for sequences of at most `longest` tokens. */
long attention_floats(long longest, long size) {
    long row = whole(longest + ROWS), matrix = (row + ROWS) * size;
    return 6 * matrix + 2 * ROWS * row + 3 * ROWS * size + LINE;
}

static void forward_unit(const Job *job, long s, long g, float *room) {
    long size = job->size, start = job->starts[s], n = job->starts[s + 1] - start, row = whole(n + ROWS), a_group = job->heads / job->groups;
    float *key = room, *turned = key + row * size, *value = turned + row * size, *score = value + row * size, *query = score + ROWS * row, *seen = query + ROWS * size;
    widened(job->k.at + start * job->k.token + g * job->k.head, job->k.token, n, row, size, key);
    widened(job->v.at + start * job->v.token + g * job->v.head, job->v.token, n, row, size, value);
    transposed(key, row, size, turned, row);
    for (long h = g * a_group; h < (g + 1) * a_group; h++)
        for (long i = 0; i < n; i += ROWS) {
            long rows = n - i < ROWS ? n - i : ROWS, before = whole(i + ROWS), most = i + rows;
            float normaliser[ROWS];
            widened(job->q.at + (start + i) * job->q.token + h * job->q.head, job->q.token, rows, ROWS, size, query);
            multiplied(query, size, turned, row, size, before, score, row);
            for (int r = 0; r < ROWS; r++) normaliser[r] = softmax(score + r * row, i + r + 1 < most ? i + r + 1 : most, before, job->scale);
            multiplied(score, row, value, size, most, size, seen, size);
            for (long r = 0; r < rows; r++) {
                job->normaliser[(start + i + r) * job->heads + h] = normaliser[r];
                for (long d = 0; d < size; d += L) store(job->out + ((start + i + r) * job->heads + h) * size + d, loadf(seen + r * size + d));
            }
        }
}

static void backward_unit(const Job *job, long s, long g, float *room) {
    long size = job->size, start = job->starts[s], n = job->starts[s + 1] - start, row = whole(n + ROWS), a_group = job->heads / job->groups, matrix = row * size;
    float *key = room, *key_t = key + matrix, *value_t = key_t + matrix, *grad_key = value_t + matrix, *grad_value = grad_key + matrix, *weight = grad_value + matrix;
    float *slope = weight + ROWS * row, *query = slope + ROWS * row, *grad = query + ROWS * size, *seen = grad + ROWS * size;
    widened(job->v.at + start * job->v.token + g * job->v.head, job->v.token, n, row, size, key);
    transposed(key, row, size, value_t, row);
    widened(job->k.at + start * job->k.token + g * job->k.head, job->k.token, n, row, size, key);
    transposed(key, row, size, key_t, row);
    memset(grad_key, 0, 2 * matrix * sizeof(float));
    for (long h = g * a_group; h < (g + 1) * a_group; h++)
        for (long i = 0; i < n; i += ROWS) {
            long rows = n - i < ROWS ? n - i : ROWS, before = whole(i + ROWS), most = i + rows, token = (start + i) * job->heads + h;
            float normaliser[ROWS], inner[ROWS];
            for (int r = 0; r < ROWS; r++) normaliser[r] = r < rows ? job->normaliser[token + r * job->heads] : INFINITY; /* a weight next to 0, of a gradient of 0 */
            widened(job->q.at + (start + i) * job->q.token + h * job->q.head, job->q.token, rows, ROWS, size, query);
            widened(job->grad + token * size, job->heads * size, rows, ROWS, size, grad);
            widened(job->out + token * size, job->heads * size, rows, ROWS, size, seen);
            for (int r = 0; r < ROWS; r++) {
                vf sum = {};
                for (long d = 0; d < size; d += L) sum += loadf(grad + r * size + d) * loadf(seen + r * size + d);
                inner[r] = total(sum);
            }
            multiplied(query, size, key_t, row, size, before, weight, row);
            weighed(weight, row, i, before, job->scale, normaliser);
            multiplied(grad, size, value_t, row, size, before, slope, row);
            for (int r = 0; r < ROWS; r++)
                for (long j = 0; j < before; j += L)
                    *(vfu *)(slope + r * row + j) = loadf(weight + r * row + j) * (loadf(slope + r * row + j) - inner[r]) * job->scale;
            spread(weight, row, grad, size, most, size, grad_value);
            spread(slope, row, query, size, most, size, grad_key);
            multiplied(slope, row, key, size, most, size, seen, size);
            for (long r = 0; r < rows; r++)
                for (long d = 0; d < size; d += L) store(job->grad_q + (token + r * job->heads) * size + d, loadf(seen + r * size + d));
        }
    for (long j = 0; j < n; j++)
        for (long d = 0; d < size; d += L) {
            long at = ((start + j) * job->groups + g) * size + d;
            store(job->grad_k + at, loadf(grad_key + j * size + d));
            store(job->grad_v + at, loadf(grad_value + j * size + d));
        }
}

/* out and normaliser, or (if `backward`) the gradients; `room` holds attention_floats for each thread. */
void attention(const Job *job, long backward, long longest, long threads, float *room) {
    long each = attention_floats(longest, job->size);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long unit = 0; unit < job->sequences * job->groups; unit++) {
        float *own = (float *)(((uintptr_t)(room + omp_get_thread_num() * each) + LINE - 1) / LINE * LINE);
        if (backward) backward_unit(job, unit / job->groups, unit % job->groups, own);
        else forward_unit(job, unit / job->groups, unit % job->groups, own);
    }
}
