// Eight floats at a time, as gcc and clang know them for every processor.
#pragma once
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef float floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(32)));
typedef uint16_t halves __attribute__((vector_size(16), aligned(2), may_alias));
#define LANES 8
#define INLINE static inline __attribute__((always_inline))
#define PARALLEL _Pragma("omp parallel for schedule(static) if (N * K > 65536)")

INLINE ints widened(const uint16_t *words) {
#ifdef __AVX2__
    return (ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)words));  // gcc 12 makes four of it
#else
    return __builtin_convertvector(*(const halves *)words, ints);
#endif
}

INLINE float total_of(floats values) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += values[i];
    return sum;
}
