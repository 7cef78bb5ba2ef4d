// Products of a few tokens with packed weights, and dequantizing. Built by cpu_native.py.
//
// y[M, N] = x[M, K] W^T with W packed as in layout.py: w[n, k] = scale * (code - zero). A plane of codes lies in the same
// bits of consecutive words. So eight words, masked, are eight codes times a power of two: no shift, no shuffle. The sum
// over a group is scaled once. All sums are float32, as if W had been dequantized to float32.
#include "cpu_lanes.h"

#include <stdlib.h>

#define MOST 4  // rows, and tokens, at a time

typedef struct {
    const uint16_t *words, *top;  // `top`: the high words of codes in two arrays, 3, 5 and 6 bit
    const uint32_t *grid;         // [groups, N]
    const int64_t *permutation;   // [K] or NULL
    int64_t N, K, group, plane;
    int32_t bits, symmetric;
} Weight;

typedef struct {
    const float *x;     // [M, planes * plane], zeros after K
    const float *sums;  // [M, planes]: the sum of each plane
    int64_t planes, stride;
} Tokens;

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Bits of a code in a low word and in a high one, words per row and plane, and where plane q of row n begins.
INLINE int low_of(int bits) { return bits == 3 ? 2 : bits == 8 ? 8 : bits > 4 ? 4 : bits; }
INLINE int high_of(int bits) { return bits - low_of(bits); }
INLINE int per_word(int bits) { return 16 / low_of(bits); }
INLINE int planes_per_block(int bits) { return high_of(bits) ? 16 / high_of(bits) : per_word(bits); }
INLINE int64_t blocks_of(const Weight *w, int bits) {
    const int64_t block = planes_per_block(bits) * w->plane;
    return (w->K + block - 1) / block;
}
INLINE const uint16_t *words_of(const Weight *w, int64_t n, int64_t q, int bits) {
    const int64_t b = n * blocks_of(w, bits) + q / planes_per_block(bits), sets = planes_per_block(bits) / per_word(bits);
    return w->words + (b * sets + q % planes_per_block(bits) / per_word(bits)) * w->plane;
}
INLINE const uint16_t *top_of(const Weight *w, int64_t n, int64_t q, int bits) {
    return high_of(bits) ? w->top + (n * blocks_of(w, bits) + q / planes_per_block(bits)) * w->plane : w->top;
}

// Eight codes of plane p of a block, times 2**(p's shift).
INLINE floats codes(const uint16_t *words, const uint16_t *top, int64_t c, int bits, int p) {
    const int low = low_of(bits), high = high_of(bits);
    if (high) {
        const int in_byte = 8 / low, below = low * (p % (2 * in_byte));
        const int above = low * (p % in_byte) + high * (p / in_byte % (low / high)) + 8 * (p / (8 / high));
        const ints first = widened(words + c) >> below & ((1 << low) - 1);
        return __builtin_convertvector(first | (widened(top + c) >> above & ((1 << high) - 1)) << low, floats);
    }
    return __builtin_convertvector(widened(words + c) & (((1 << bits) - 1) << bits * p), floats);
}
INLINE float unshift(int bits, int p) { return high_of(bits) ? 1.0f : as_float((uint32_t)(127 - bits * p) << 23); }

INLINE void cell(const Weight *w, int64_t n, int64_t q, int bits, float *scale, float *zero) {
    const uint32_t bits_of = w->grid[q * w->plane / w->group * w->N + n];
    *scale = as_float(w->symmetric ? bits_of : bits_of & ~0xFFu);
    *zero = w->symmetric ? (float)(1 << (bits - 1)) : (float)(bits_of & 0xFF);
}

// Rows n .. n + R - 1, tokens 0 .. M - 1. The words of the rows after the next ones are fetched meanwhile: without that a
// step through a 135M model took 16.2 instead of 13.0 ms (AVX2 machine, one thread, 2026-11-28).
INLINE void rows(const Weight *w, const Tokens *t, const float *bias, float *y, int64_t n, int R, int M, int bits) {
    const int per_block = planes_per_block(bits);
    const int64_t step = words_of(w, 1, 0, bits) - w->words, top_step = top_of(w, 1, 0, bits) - w->top;
    const int64_t plane = w->plane, planes = t->planes, stride = t->stride, N = w->N;
    const int64_t per_group = w->group < plane ? 1 : (w->group + plane - 1) / plane;
    const uint16_t *words = words_of(w, n, 0, bits), *top = top_of(w, n, 0, bits);
    const uint32_t *cells = w->grid + n, sign = w->symmetric ? 0 : 0xFF;
    const float *x = t->x, middle = w->symmetric ? (float)(1 << (bits - 1)) : 0;
    floats total[MOST][MOST];  // not [R][M], which would be on the stack
    float offset[MOST][MOST];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) total[r][m] = (floats){0}, offset[r][m] = 0;
    int64_t left = per_group;
    for (int64_t q = 0, p = 0; q < planes; q++, x += plane) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) __builtin_prefetch(words + (2 * R + r) * step + (p & 1) * 32);
        __builtin_prefetch(cells + 32);
        floats part[MOST][MOST];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) part[r][m] = (floats){0};
        for (int64_t c = 0; c < plane; c += LANES) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const floats f = codes(words + r * step, top + r * top_step, c, bits, (int)p);
#pragma GCC unroll 4
                for (int m = 0; m < M; m++) part[r][m] += f * *(const floats *)(x + m * stride + c);
            }
        }
        const float back = unshift(bits, (int)p);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const float scale = as_float(cells[r] & ~sign), zero = middle + (float)(cells[r] & sign);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                total[r][m] += part[r][m] * (scale * back);
                offset[r][m] += scale * zero * t->sums[m * planes + q];
            }
        }
        if (--left == 0) left = per_group, cells += N;
        if (++p % per_word(bits) == 0) words += plane;  // of low words, a block may have several sets
        if (p == per_block) p = 0, top += plane;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
            y[m * N + n + r] = total_of(total[r][m]) - offset[r][m] + (bias ? bias[n + r] : 0);
}

// One function for each M and width: the compiler must know both to keep the sums in registers.
#define MATMUL(M, R, BITS) \
    static void matmul_##M##_##BITS(const Weight *w, const Tokens *t, const float *bias, float *y) { \
        const int64_t N = w->N, K = w->K, whole = N / R; \
        PARALLEL \
        for (int64_t i = 0; i < whole; i++) rows(w, t, bias, y, i * R, R, M, BITS); \
        for (int64_t n = whole * R; n < N; n++) rows(w, t, bias, y, n, 1, M, BITS); \
    }
#define WIDTH(BITS) MATMUL(1, 4, BITS) MATMUL(2, 4, BITS) MATMUL(4, 2, BITS)
WIDTH(2) WIDTH(3) WIDTH(4) WIDTH(5) WIDTH(6) WIDTH(8)

typedef void (*Matmul)(const Weight *, const Tokens *, const float *, float *);
static const Matmul MATMULS[3][6] = {
    {matmul_1_2, matmul_1_3, matmul_1_4, matmul_1_5, matmul_1_6, matmul_1_8},
    {matmul_2_2, matmul_2_3, matmul_2_4, matmul_2_5, matmul_2_6, matmul_2_8},
    {matmul_4_2, matmul_4_3, matmul_4_4, matmul_4_5, matmul_4_6, matmul_4_8},
};

// x [M, K], bias [N] or NULL, y [M, N]. Returns 1 if there is no memory.
int llmq_matmul(const Weight *w, const float *x, const float *bias, float *y, int64_t M) {
    const int64_t planes = (w->K + w->plane - 1) / w->plane, stride = planes * w->plane;
    float *room = malloc((size_t)(4 * (stride + planes)) * sizeof(float));
    if (!room) return 1;
    float *padded = room, *sums = room + 4 * stride;
    const Tokens t = {padded, sums, planes, stride};
    for (int64_t done = 0; done < M;) {
        const int kind = M - done >= 4 ? 2 : M - done >= 2 ? 1 : 0;
        for (int m = 0; m < 1 << kind; m++) {
            const float *from = x + (done + m) * w->K;
            float *to = padded + m * stride;
            if (w->permutation)
                for (int64_t k = 0; k < w->K; k++) to[k] = from[w->permutation[k]];
            else
                memcpy(to, from, (size_t)w->K * sizeof(float));
            memset(to + w->K, 0, (size_t)(stride - w->K) * sizeof(float));
            for (int64_t q = 0; q < planes; q++) {
                floats sum = {0};
                for (int64_t c = 0; c < w->plane; c += LANES) sum += *(const floats *)(to + q * w->plane + c);
                sums[m * planes + q] = total_of(sum);
            }
        }
        MATMULS[kind][w->bits == 8 ? 5 : w->bits - 2](w, &t, bias, y + done * w->N);
        done += 1 << kind;
    }
    free(room);
    return 0;
}

// Plane q of row n, dequantized; `size` of its inputs exist.
INLINE void plane_of_row(const Weight *w, int64_t n, int64_t q, int64_t size, float *out, int bits) {
    const int p = (int)(q % planes_per_block(bits));
    const uint16_t *words = words_of(w, n, q, bits), *top = top_of(w, n, q, bits);
    float scale, zero;
    cell(w, n, q, bits, &scale, &zero);
    int64_t c = 0;
    for (; c + LANES <= size; c += LANES)
        *(floats *)(out + c) = (codes(words, top, c, bits, p) * unshift(bits, p) - zero) * scale;
    if (c < size) {
        const floats rest = (codes(words, top, c, bits, p) * unshift(bits, p) - zero) * scale;
        memcpy(out + c, &rest, (size_t)(size - c) * sizeof(float));
    }
}

// out [stop - start, K] = rows start .. stop - 1, dequantized, columns in the packed order.
#define DEQUANTIZE(BITS) \
    static void dequantize_##BITS(const Weight *w, int64_t start, int64_t N, float *out) { \
        const int64_t K = w->K; \
        PARALLEL \
        for (int64_t n = 0; n < N; n++) \
            for (int64_t k = 0; k < K; k += w->plane) { \
                const int64_t size = K - k < w->plane ? K - k : w->plane; \
                plane_of_row(w, start + n, k / w->plane, size, out + n * K + k, BITS); \
            } \
    }
DEQUANTIZE(2) DEQUANTIZE(3) DEQUANTIZE(4) DEQUANTIZE(5) DEQUANTIZE(6) DEQUANTIZE(8)

void llmq_dequantize(const Weight *w, int64_t start, int64_t stop, float *out) {
    switch (w->bits) {
        case 2: dequantize_2(w, start, stop - start, out); break;
        case 3: dequantize_3(w, start, stop - start, out); break;
        case 4: dequantize_4(w, start, stop - start, out); break;
        case 5: dequantize_5(w, start, stop - start, out); break;
        case 6: dequantize_6(w, start, stop - start, out); break;
        case 8: dequantize_8(w, start, stop - start, out); break;
    }
}
