/* Plain C, for any CPU: what the others are compared with. */
#include "set.h"

#define SET(name) scalar_##name
#define SET_NAME "scalar"
#define TARGET
#define LANES 16
#define WIDE 4
#define VI scalar_int
#define VF scalar_float
#define Q4_W scalar_tile
#define Q8_W scalar_tile
#define LEVELS_V const int8_t *
#define INLINE static inline __attribute__((always_inline))

typedef struct { int32_t v[16]; } scalar_int;
typedef struct { float v[16]; } scalar_float;
typedef struct { const uint8_t *tile; const int8_t *levels; } scalar_tile; /* of NL4 */
typedef int32_t scalar_four __attribute__((vector_size(16)));
#define EACH for (int i = 0; i < 16; i++)

INLINE VF SET(zero)(void) { return (VF){{0}}; }
INLINE VF SET(set1)(const float *x) { VF r; EACH r.v[i] = *x; return r; }
INLINE VF SET(load)(const float *x) { VF r; EACH r.v[i] = x[i]; return r; }
INLINE void SET(store)(float *out, VF x) { EACH out[i] = x.v[i]; }
INLINE VF SET(to_float)(VI x) { VF r; EACH r.v[i] = (float)x.v[i]; return r; }
/* The WIDE integers of a vector from bytes. */
INLINE scalar_four SET(widen)(const int8_t *x) { return (scalar_four){x[0], x[1], x[2], x[3]}; }
INLINE VF SET(mul)(VF a, VF b) { EACH a.v[i] *= b.v[i]; return a; }
INLINE VF SET(fma)(VF a, VF b, VF c) { EACH a.v[i] = fmaf(a.v[i], b.v[i], c.v[i]); return a; }
INLINE void SET(prefetch)(const void *p) { (void)p; }
INLINE LEVELS_V SET(nl4_levels)(const int8_t *levels) { return levels; }
INLINE Q4_W SET(q4_load)(const uint8_t *tile) { return (Q4_W){tile, NULL}; }
INLINE Q4_W SET(nl4_load)(const uint8_t *tile, LEVELS_V levels) { return (Q4_W){tile, levels}; }
INLINE Q8_W SET(q8_load)(const int8_t *tile) { return (Q8_W){(const uint8_t *)tile, NULL}; }

INLINE void SET(q4_scales)(const uint16_t *word, int zero, float step, VF *scale, VF *offset)
{
    EACH {
        const uint32_t bits = ((uint32_t)(word[i] >> 7) << 19) + (100u << 23);
        memcpy(&scale->v[i], &bits, 4);
        offset->v[i] = (float)((word[i] & 127) - zero) * step;
    }
}

INLINE VI SET(q4_dot)(const Q4_W *w, const int8_t *x)
{
    VI r = {{0}};
    EACH for (int j = 0; j < 4; j++) for (int k = 0; k < 4; k++) {
        const uint8_t code = w->tile[64 * j + 4 * i + k];
        r.v[i] += (code & 15) * x[8 * j + k] + (code >> 4) * x[8 * j + 4 + k];
    }
    return r;
}

INLINE VI SET(nl4_dot)(const Q4_W *w, const int8_t *x)
{
    VI r = {{0}};
    EACH for (int j = 0; j < 4; j++) for (int k = 0; k < 4; k++) {
        const uint8_t code = w->tile[64 * j + 4 * i + k];
        r.v[i] += w->levels[code & 15] * x[8 * j + k] + w->levels[code >> 4] * x[8 * j + 4 + k];
    }
    return r;
}

INLINE VI SET(q8_dot)(const Q8_W *w, const int8_t *x)
{
    VI r = {{0}};
    EACH for (int j = 0; j < 8; j++) for (int k = 0; k < 4; k++)
        r.v[i] += (int8_t)w->tile[64 * j + 4 * i + k] * x[4 * j + k];
    return r;
}

#define DOT_ROWS 1
#define DOT_TOKENS 1
#define VD scalar_float
INLINE VD SET(d_zero)(void) { return SET(zero)(); }
INLINE VD SET(d_x)(const float *x) { return SET(load)(x); }
INLINE VD SET(d_fma)(VD a, VD b, VD c) { return SET(fma)(a, b, c); }
INLINE VD SET(d_bf16)(const uint16_t *w) { VD r; EACH r.v[i] = from_bf16(w[i]); return r; }
INLINE VD SET(d_f16)(const uint16_t *w) { VD r; EACH r.v[i] = from_f16(w[i]); return r; }
INLINE void SET(d_store)(float *lanes, VD x) { SET(store)(lanes, x); }

INLINE void SET(round_group)(const float *x, int8_t *q, float *scale, float *sum)
{
    float most = 0;
    int finite = 1, total = 0;
    for (int i = 0; i < GROUP; i++) {
        if (!isfinite(x[i])) finite = 0;
        if (fabsf(x[i]) > most) most = fabsf(x[i]);
    }
    const float inverse = group_scale(most, finite, scale);
    for (int i = 0; i < GROUP; i++) {
        q[i] = (int8_t)(finite ? nearbyintf(x[i] * inverse) : 0);
        total += q[i];
    }
    *sum = (float)total;
}

#define TOKENS 4
#include "products.inc"
#undef EACH
