/* What lies between a Llama-like layer's products, forward and backward: RMS norms, gated units, rotations. Called by elementwise.py.
 *
 * In float32 from T, rounded where transformers rounds it on the way forward, and once on the way back. Rows are whole registers.
 */
#include "vectors.h"

/* y [N, D] = weight . (x / rms), and scale [N] = 1 / rms. */
void norm_forward(const T *x, const T *weight, long N, long D, float epsilon, T *y, float *scale, long threads) {
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < N; n++) {
        const T *in = x + n * D;
        vf square = {};
        for (long i = 0; i < D; i += L) { vf a = load(in + i); square += a * a; }
        float by = scale[n] = 1.0f / sqrtf(total(square) / D + epsilon);
        for (long i = 0; i < D; i += L) store(y + n * D + i, rounded(load(in + i) * by) * load(weight + i));
    }
}

/* grad_x [N, D]; to grad_weight [threads, D], each thread adds its part of the weight's gradient. */
void norm_backward(const T *x, const T *weight, const T *grad, const float *scale, long N, long D, T *grad_x, float *grad_weight, long threads) {
#pragma omp parallel num_threads(threads)
    {
        float *mine = grad_weight + omp_get_thread_num() * D;
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            const T *in = x + n * D, *g = grad + n * D;
            vf along = {};
            for (long i = 0; i < D; i += L) {
                vf a = load(in + i), b = load(g + i);
                along += a * b * load(weight + i);
                *(vfu *)(mine + i) += b * (a * scale[n]);
            }
            float back = total(along) * scale[n] * scale[n] / D;
            for (long i = 0; i < D; i += L) store(grad_x + n * D + i, (load(g + i) * load(weight + i) - load(in + i) * back) * scale[n]);
        }
    }
}

/* out = silu(gate) . up, `count` numbers each. */
void gated_forward(const T *gate, const T *up, long count, T *out, long threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i += L) {
        vf a = load(gate + i);
        store(out + i, rounded(a / (1.0f + vexp(-a))) * load(up + i));
    }
}

void gated_backward(const T *gate, const T *up, const T *grad, long count, T *grad_gate, T *grad_up, long threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i += L) {
        vf a = load(gate + i), g = load(grad + i), share = 1.0f / (1.0f + vexp(-a));
        store(grad_up + i, g * a * share);
        store(grad_gate + i, g * load(up + i) * share * (1.0f + a * (1.0f - share)));
    }
}

/* out [N, heads, D] = x turned by its token's angles, whose cosines and sines, [N, D], are those of D / 2 planes, twice; if `back`, the
 * gradient of what was turned. Halves of D are whole registers. */
void turned(const T *x, const T *cosine, const T *sine, long N, long heads, long D, long back, T *out, long threads) {
    long half = D / 2;
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < N; n++)
        for (long at = n * heads * D; at < (n + 1) * heads * D; at += D)
            for (long d = 0; d < half; d += L) {
                vf a = load(x + at + d), b = load(x + at + half + d), c = load(cosine + n * D + d), s = load(sine + n * D + d);
                if (back) {
                    store(out + at + d, a * c + b * s);
                    store(out + at + half + d, b * c - a * s);
                } else {
                    store(out + at + d, rounded(a * c) - rounded(b * s));
                    store(out + at + half + d, rounded(b * c) + rounded(a * s));
                }
            }
}
