/* NEON with sdot and, for several tokens, smmla. */
#include "set.h"

#if defined(__aarch64__) && NEON_DOT

#define SET(name) i8mm_##name
#define SET_NAME "neon-i8mm"
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#include "neon_common.inc"
#include "neon_sdot.inc"

/* Sums of 4 rows for two tokens: 2 rows x 8 inputs by 8 inputs x 2 tokens. */
#define PAIRS
INLINE void SET(pair)(const SET(tile) *w, const int8_t *x, long next, VI *sums)
{
    int32x4_t a = vdupq_n_s32(0), b = a; /* rows 0 and 1, rows 2 and 3 */
    for (int j = 0; j < 4; j++) {
        const int32x4_t p = vreinterpretq_s32_s8(w->line[2 * j]);
        const int32x4_t q = vreinterpretq_s32_s8(w->line[2 * j + 1]);
        const int8x16_t v = vcombine_s8(vld1_s8(x + 8 * j), vld1_s8(x + next + 8 * j));
        a = vmmlaq_s32(a, vreinterpretq_s8_s32(vzip1q_s32(p, q)), v);
        b = vmmlaq_s32(b, vreinterpretq_s8_s32(vzip2q_s32(p, q)), v);
    }
    sums[0] = vuzp1q_s32(a, b);
    sums[1] = vuzp2q_s32(a, b);
}
#define TOKENS 4
#include "products.inc"

#endif
