// What lies between the packed products of a decode step: a dense product, norms, rotations. Built by cpu_native.py.
#include <math.h>

#include "cpu_lanes.h"

// y[M, N] = x[M, K] W^T + bias with W in float16 (kind 0) or bfloat16 (kind 1), sums in float32.
INLINE floats widened_16(const uint16_t *from, int kind) {
#ifdef __F16C__
    if (kind == 0) return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    if (kind == 0) {
        floats all;
        for (int i = 0; i < LANES; i++) {
            _Float16 one;
            memcpy(&one, from + i, 2);
            all[i] = (float)one;
        }
        return all;
    }
#endif
    return (floats)(widened(from) << 16);
}

#define LINEAR(KIND) \
    static void linear_##KIND(const uint16_t *W, const float *x, const float *bias, float *y, int64_t N, int64_t K) { \
        PARALLEL \
        for (int64_t n = 0; n < N; n++) { \
            const uint16_t *row = W + n * K; \
            floats sums[4] = {{0}, {0}, {0}, {0}}; \
            int64_t k = 0; \
            for (; k + 4 * LANES <= K; k += 4 * LANES) \
                for (int i = 0; i < 4; i++) \
                    sums[i] += widened_16(row + k + i * LANES, KIND) * *(const floats *)(x + k + i * LANES); \
            for (; k + LANES <= K; k += LANES) sums[0] += widened_16(row + k, KIND) * *(const floats *)(x + k); \
            y[n] = total_of(sums[0] + sums[1] + (sums[2] + sums[3])) + (bias ? bias[n] : 0); \
        } \
    }
LINEAR(0) LINEAR(1)

// K must be a multiple of 8.
void llmq_linear_16(const uint16_t *W, int kind, const float *x, const float *bias, float *y, int64_t N, int64_t K,
                    int64_t M) {
    for (int64_t m = 0; m < M; m++) (kind ? linear_1 : linear_0)(W, x + m * K, bias, y + m * N, N, K);
}

// y = x / sqrt(mean(x^2) + eps) * weight, row by row.
void llmq_rms_norm(const float *x, const float *weight, float eps, float *y, int64_t rows, int64_t K) {
    for (int64_t r = 0; r < rows; r++, x += K, y += K) {
        floats squares = {0};
        int64_t k = 0;
        for (; k + LANES <= K; k += LANES) {
            const floats some = *(const floats *)(x + k);
            squares += some * some;
        }
        float sum = total_of(squares);
        for (; k < K; k++) sum += x[k] * x[k];
        const float factor = 1.0f / sqrtf(sum / (float)K + eps);
        for (k = 0; k < K; k++) y[k] = x[k] * factor * weight[k];
    }
}

// Rotary embedding of heads of D numbers: y = a * cos + (-second half of a, first half of a) * sin.
void llmq_rotate(const float *a, const float *cos, const float *sin, float *y, int64_t heads, int64_t D) {
    const int64_t half = D / 2;
    for (int64_t h = 0; h < heads; h++, a += D, y += D)
        for (int64_t d = 0; d < half; d++) {
            y[d] = a[d] * cos[d] - a[d + half] * sin[d];
            y[d + half] = a[d + half] * cos[d + half] + a[d] * sin[d + half];
        }
}
