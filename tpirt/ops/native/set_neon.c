/* NEON of any aarch64: a vector holds 4 rows of a tile. */
#include "set.h"

#if defined(__aarch64__)

#define SET(name) neon_##name
#define SET_NAME "neon"
#define TARGET
#include "neon_common.inc"

/* Products of two rows are summed in 16 bits: 8 of 0..15 and -127..127, or 2 of -128..127. */
INLINE int8x16_t SET(four)(const int8_t *x)
{
    int32_t four;
    memcpy(&four, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

INLINE VI SET(q4_dot)(const Q4_W *w, const int8_t *x)
{
    int16x8_t a = vdupq_n_s16(0), b = a; /* rows 0 and 1, rows 2 and 3 */
    for (int j = 0; j < 4; j++) {
        const int8x16_t p = SET(four)(x + 8 * j), q = SET(four)(x + 8 * j + 4);
        a = vmlal_s8(a, vget_low_s8(w->line[2 * j]), vget_low_s8(p));
        b = vmlal_high_s8(b, w->line[2 * j], p);
        a = vmlal_s8(a, vget_low_s8(w->line[2 * j + 1]), vget_low_s8(q));
        b = vmlal_high_s8(b, w->line[2 * j + 1], q);
    }
    return vpaddq_s32(vpaddlq_s16(a), vpaddlq_s16(b));
}

INLINE VI SET(q8_dot)(const Q8_W *w, const int8_t *x)
{
    int32x4_t a = vdupq_n_s32(0), b = a;
    for (int j = 0; j < 8; j += 2) {
        const int8x16_t p = SET(four)(x + 4 * j), q = SET(four)(x + 4 * j + 4);
        const int16x8_t low = vmull_s8(vget_low_s8(w->line[j]), vget_low_s8(p));
        const int16x8_t high = vmull_high_s8(w->line[j], p);
        a = vpadalq_s16(a, vmlal_s8(low, vget_low_s8(w->line[j + 1]), vget_low_s8(q)));
        b = vpadalq_s16(b, vmlal_high_s8(high, w->line[j + 1], q));
    }
    return vpaddq_s32(a, b);
}
INLINE VI SET(nl4_dot)(const Q4_W *w, const int8_t *x) { return SET(q8_dot)(w, x); }

#define TOKENS 4
#include "products.inc"

#endif
