/* Causal attention of packed sequences, forward and backward: each attends to itself alone, whatever their lengths.
 *
 * Called by attention.py. All products are those of products.h: scores, weights and their gradients are summed in float32, and rounded to T
 * where they are multiplied again. The weights are computed again in the backward pass from their normaliser, so that nothing of the square
 * of a length is kept. One thread does one sequence's heads of one group of keys: no number is summed by two, and how many threads there are
 * changes no bit.
 *
 * N tokens of all sequences, D = size of a head. Queries are [N, heads, D] with strides, keys and values [N, groups, D] with strides.
 */
#include "products.h"

enum { QUERIES = 8 * TALL }; /* of which the backward pass keeps the weights at once: what they add to every key, in one product */

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

/* The right side of a product that sums over D: n rows as panels of L. */
static void by_size(const T *x, long stride, long n, long size, T *out) {
    for (long p = 0; p < n; p += L) panel(x + p * stride, stride, n - p < L ? n - p : L, size, out + p * size);
}

/* weight := exp(scale . (score - the largest)) of the first `own` columns, 0 in the rest; returns their sum. */
static float exponentials(const float *score, long own, long columns, float scale, T *weight, float *peak) {
    vf most = (vf){} - INFINITY, all = {};
    long j = 0;
    for (; j + L <= own; j += L) most = larger(loadf(score + j), most);
    if (j < own) most = larger(first(loadf(score + j), own - j, -INFINITY), most);
    *peak = largest(most) * scale;
    for (j = 0; j < columns; j += L) {
        vf e = first(vexp(loadf(score + j) * scale - *peak), own - j, 0);
        store(weight + j, e);
        all += e;
    }
    return total(all);
}

typedef struct { /* a thread's own, for sequences of at most `longest` tokens */
    T *key_by_size, *value_by_size, *key_by_row, *value_by_row; /* the right sides of products */
    T *query_by_row, *grad_by_row; /* of a block of QUERIES */
    T *weight, *slope; /* rows of a tile */
    T *weight_pairs, *slope_pairs; /* [QUERIES / PAIR, longest, PAIR]: of a block, two rows beside each other */
    float *score, *score_slope, *seen, *grad_key, *grad_value;
} Room;

static long laid(long longest, long size, char *base, Room *room) {
    long at = 0, row = filled(longest + TALL), matrix = row * size;
#define PLACE(field, count) room->field = (void *)(base + at); at += ((count) * (long)sizeof(*room->field) + LINE - 1) / LINE * LINE;
    PLACE(key_by_size, matrix) PLACE(value_by_size, matrix) PLACE(key_by_row, matrix) PLACE(value_by_row, matrix)
    PLACE(query_by_row, QUERIES * size) PLACE(grad_by_row, QUERIES * size)
    PLACE(weight, TALL * row) PLACE(slope, TALL * row)
    PLACE(weight_pairs, QUERIES * row) PLACE(slope_pairs, QUERIES * row)
    PLACE(score, TALL * row) PLACE(score_slope, TALL * row) PLACE(seen, TALL * size)
    PLACE(grad_key, matrix) PLACE(grad_value, matrix)
#undef PLACE
    return at + LINE;
}

/* How many bytes a thread needs. */
long attention_bytes(long longest, long size) {
    Room room;
    return laid(longest, size, 0, &room);
}

static void forward_unit(const Job *job, long s, long g, const Room *room) {
    long size = job->size, start = job->starts[s], n = job->starts[s + 1] - start, row = filled(n + TALL), a_group = job->heads / job->groups;
    by_size(job->k.at + start * job->k.token + g * job->k.head, job->k.token, n, size, room->key_by_size);
    by_row(job->v.at + start * job->v.token + g * job->v.head, job->v.token, n, pairs(n), pairs(n) * STEP, size, room->value_by_row);
    for (long h = g * a_group; h < (g + 1) * a_group; h++)
        for (long i = 0; i < n; i += TALL) {
            int rows = n - i < TALL ? n - i : TALL;
            long columns = filled(i + rows);
            float sum[TALL];
            Rows query = {job->q.at + (start + i) * job->q.token + h * job->q.head, job->q.token, PAIR};
            multiplied(rows, query, room->key_by_size, size * L, size / PAIR, columns, room->score, row, 0);
            for (int r = 0; r < rows; r++) {
                float peak;
                sum[r] = exponentials(room->score + r * row, i + r + 1, columns, job->scale, room->weight + r * row, &peak);
                job->normaliser[(start + i + r) * job->heads + h] = peak + logf(sum[r]);
            }
            multiplied(rows, (Rows){room->weight, row, PAIR}, room->value_by_row, pairs(n) * STEP, pairs(i + rows), size, room->seen, size, 0);
            for (long r = 0; r < rows; r++)
                for (long d = 0; d < size; d += L) store(job->out + ((start + i + r) * job->heads + h) * size + d, loadf(room->seen + r * size + d) / sum[r]);
        }
}

/* The weights of the queries [i, i + rows), and the gradient of what they were made from: in rows, and in pairs of rows for those of the
 * block that begins at `block`. */
static void sloped(const Job *job, long token, int rows, long i, long block, long row, const Room *room) {
    long size = job->size, heads = job->heads, columns = filled(i + rows);
    for (int r = 0; r < TALL; r += PAIR) {
        float normaliser[PAIR], inner[PAIR];
        for (int p = 0; p < PAIR && r + p < rows; p++) {
            vf sum = {};
            long at = (token + (r + p) * heads) * size;
            for (long d = 0; d < size; d += L) sum += load(job->grad + at + d) * load(job->out + at + d);
            normaliser[p] = job->normaliser[token + (r + p) * heads];
            inner[p] = total(sum);
        }
        for (long j = 0; r < rows && j < columns; j += L) {
            vf weight[PAIR] = {}, slope[PAIR] = {};
            for (int p = 0; p < PAIR && r + p < rows; p++) {
                long at = (r + p) * row + j;
                weight[p] = first(vexp(loadf(room->score + at) * job->scale - normaliser[p]), i + r + p + 1 - j, 0);
                slope[p] = weight[p] * (loadf(room->score_slope + at) - inner[p]) * job->scale;
                store(room->slope + at, slope[p]);
            }
            long at = (i + r - block) / PAIR * row * PAIR + j * PAIR;
            store_pairs(room->weight_pairs + at, weight);
            store_pairs(room->slope_pairs + at, slope);
        }
    }
}

static void backward_unit(const Job *job, long s, long g, const Room *room) {
    long size = job->size, start = job->starts[s], n = job->starts[s + 1] - start, row = filled(n + TALL), a_group = job->heads / job->groups;
    const T *key = job->k.at + start * job->k.token + g * job->k.head, *value = job->v.at + start * job->v.token + g * job->v.head;
    by_size(key, job->k.token, n, size, room->key_by_size);
    by_row(key, job->k.token, n, pairs(n), pairs(n) * STEP, size, room->key_by_row);
    by_size(value, job->v.token, n, size, room->value_by_size);
    memset(room->grad_key, 0, n * size * sizeof(float));
    memset(room->grad_value, 0, n * size * sizeof(float));
    for (long h = g * a_group; h < (g + 1) * a_group; h++)
        for (long block = 0; block < n; block += QUERIES) {
            long queries = n - block < QUERIES ? n - block : QUERIES, first = (start + block) * job->heads + h;
            const T *query = job->q.at + (start + block) * job->q.token + h * job->q.head;
            by_row(query, job->q.token, queries, pairs(QUERIES), pairs(QUERIES) * STEP, size, room->query_by_row);
            by_row(job->grad + first * size, job->heads * size, queries, pairs(QUERIES), pairs(QUERIES) * STEP, size, room->grad_by_row);
            for (long i = block; i < block + queries; i += TALL) {
                int rows = block + queries - i < TALL ? block + queries - i : TALL;
                long columns = filled(i + rows), token = (start + i) * job->heads + h;
                Rows tile = {query + (i - block) * job->q.token, job->q.token, PAIR}, grad = {job->grad + token * size, job->heads * size, PAIR};
                multiplied(rows, tile, room->key_by_size, size * L, size / PAIR, columns, room->score, row, 0);
                multiplied(rows, grad, room->value_by_size, size * L, size / PAIR, columns, room->score_slope, row, 0);
                sloped(job, token, rows, i, block, row, room);
                multiplied(rows, (Rows){room->slope, row, PAIR}, room->key_by_row, pairs(n) * STEP, pairs(i + rows), size, room->seen, size, 0);
                for (long r = 0; r < rows; r++)
                    for (long d = 0; d < size; d += L) store(job->grad_q + (token + r * job->heads) * size + d, loadf(room->seen + r * size + d));
            }
            for (long j = 0; j < block + queries; j += TALL) { /* tiles of keys begin where tiles of queries do: what sees them begins with a tile */
                int rows = block + queries - j < TALL ? block + queries - j : TALL;
                long skip = j > block ? (j - block) / PAIR : 0, at = (skip * row + j) * PAIR, steps = pairs(queries) - skip;
                multiplied(rows, (Rows){room->weight_pairs + at, PAIR, row * PAIR}, room->grad_by_row + skip * STEP, pairs(QUERIES) * STEP, steps, size,
                           room->grad_value + j * size, size, 1);
                multiplied(rows, (Rows){room->slope_pairs + at, PAIR, row * PAIR}, room->query_by_row + skip * STEP, pairs(QUERIES) * STEP, steps, size,
                           room->grad_key + j * size, size, 1);
            }
        }
    for (long j = 0; j < n; j++)
        for (long d = 0; d < size; d += L) {
            long at = ((start + j) * job->groups + g) * size + d;
            store(job->grad_k + at, loadf(room->grad_key + j * size + d));
            store(job->grad_v + at, loadf(room->grad_value + j * size + d));
        }
}

/* out and normaliser, or (if `backward`) the gradients; `memory` holds attention_bytes for each thread. */
void attention(const Job *job, long backward, long longest, long threads, char *memory) {
    long each = attention_bytes(longest, job->size);
#pragma omp parallel num_threads(threads)
    {
        Room room;
        laid(longest, job->size, (char *)(((uintptr_t)(memory + omp_get_thread_num() * each) + LINE - 1) / LINE * LINE), &room);
#pragma omp for schedule(dynamic, 1)
        for (long unit = 0; unit < job->sequences * job->groups; unit++) {
            if (backward) backward_unit(job, unit / job->groups, unit % job->groups, &room);
            else forward_unit(job, unit / job->groups, unit % job->groups, &room);
        }
    }
}
