/* What the file of every set of instructions begins with. */
#pragma once
#include "native.h"

#include <math.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* A head whose values are all smaller has the scale 0 in 8 bits. */
#define CODES_LEAST 1e-30f

/* Sets the scale of a group of inputs; returns its inverse. NaN tells that one is not finite. */
static inline float group_scale(float most, int finite, float *scale)
{
    if (!finite) {
        *scale = NAN;
        return 0.0f;
    }
    if (most < 1e-30f) { /* its inverse would overflow */
        *scale = 0.0f;
        return 0.0f;
    }
    *scale = most / 127.0f;
    return 127.0f / most;
}

static inline float from_bf16(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline float from_f16(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    uint32_t bits = sign;
    float x;
    if (magnitude >= 0x7c00) bits |= 0x7f800000 | (magnitude & 0x3ff) << 13; /* inf, NaN */
    else if (magnitude >= 0x400) bits |= (magnitude << 13) + (112u << 23);
    else { /* subnormal: an integer times 2^-24 */
        x = (float)magnitude * 0x1p-24f;
        return sign ? -x : x;
    }
    memcpy(&x, &bits, 4);
    return x;
}

static inline float add_lanes(float *lanes)
{
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* In units of the scale, codes stand for ``level + (offset - ZERO) * STEP``. */
#define Q4_ZERO 160
#define Q4_STEP (1 / 12.0f)
#define NL4_ZERO 64
#define NL4_STEP 2.0f

/* The levels of 16 codes, in units of the scale, as fits use them: 0 to 15, or a codebook's. */
typedef struct {
    int uneven; /* a codebook */
    float first, last, flat; /* flat: the level for weights that are all equal */
    float edges[LEVELS - 1], rises[LEVELS - 1]; /* between neighbours */
} level_table;

static inline level_table table_of(const int8_t *levels)
{
    if (!levels) return (level_table){.last = 15, .flat = 8};
    level_table t = {.uneven = 1, .first = levels[0], .last = levels[LEVELS - 1], .flat = NAN};
    for (int i = 0; i < LEVELS; i++) {
        /* Offsets are even, so that with an even level zeros stay zeros. */
        if (!(levels[i] % 2) && !(fabsf(t.flat) < fabsf((float)levels[i]))) t.flat = levels[i];
        if (!i) continue;
        t.edges[i - 1] = (levels[i - 1] + levels[i]) * 0.5f;
        t.rises[i - 1] = (float)(levels[i] - levels[i - 1]);
    }
    if (isnan(t.flat)) t.flat = levels[LEVELS / 2];
    return t;
}
