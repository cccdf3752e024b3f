/* AVX-512 with VNNI: a vector holds the 16 rows of a tile. */
#include "set.h"

#if defined(__x86_64__)

#define SET(name) avx512_##name
#define SET_NAME "avx512-vnni"
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define LANES 16
#define DENSE4 avx512_half4
#define DENSE8 avx512_half8
#define WIDE 16
#define VI __m512i
#define VF __m512
#define Q4_W avx512_nibbles
#define Q8_W avx512_bytes
#define LEVELS_V __m512i
#define BIAS 128
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef struct { __m512i low[4], high[4]; } avx512_nibbles; /* high of Q4: times 16 */
typedef struct { __m512i line[8]; } avx512_bytes;           /* plus 128 */

INLINE VF SET(zero)(void) { return _mm512_setzero_ps(); }
INLINE VF SET(set1)(const float *x) { return _mm512_set1_ps(*x); }
INLINE VF SET(load)(const float *x) { return _mm512_loadu_ps(x); }
INLINE void SET(store)(float *out, VF x) { _mm512_storeu_ps(out, x); }
INLINE VF SET(to_float)(VI x) { return _mm512_cvtepi32_ps(x); }
INLINE __m512i SET(widen)(const int8_t *x)
{
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x));
}
INLINE VF SET(mul)(VF a, VF b) { return _mm512_mul_ps(a, b); }
INLINE VF SET(fma)(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
INLINE void SET(prefetch)(const void *p)
{
    for (int i = 0; i < 4; i++) _mm_prefetch((const char *)p + 64 * i, _MM_HINT_T0);
}
INLINE __m512i avx512_four(const int8_t *x)
{
    int32_t four;
    memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

INLINE Q4_W SET(q4_load)(const uint8_t *tile)
{
    Q4_W w;
    for (int j = 0; j < 4; j++) {
        const __m512i line = _mm512_loadu_si512(tile + 64 * j);
        w.low[j] = _mm512_and_si512(line, _mm512_set1_epi8(0x0f));
        w.high[j] = _mm512_and_si512(line, _mm512_set1_epi8((char)0xf0));
    }
    return w;
}

/* The levels, four times, plus BIAS. */
INLINE LEVELS_V SET(nl4_levels)(const int8_t *levels)
{
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)levels));
    return _mm512_xor_si512(table, _mm512_set1_epi8((char)BIAS));
}

INLINE Q4_W SET(nl4_load)(const uint8_t *tile, LEVELS_V levels)
{
    const __m512i mask = _mm512_set1_epi8(0x0f);
    Q4_W w;
    for (int j = 0; j < 4; j++) {
        const __m512i line = _mm512_loadu_si512(tile + 64 * j);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(line, 4), mask);
        w.low[j] = _mm512_shuffle_epi8(levels, _mm512_and_si512(line, mask));
        w.high[j] = _mm512_shuffle_epi8(levels, high);
    }
    return w;
}

INLINE void SET(q4_scales)(const uint16_t *word, int zero, float step, VF *scale, VF *offset)
{
    const __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)word));
    const __m512i bits = _mm512_slli_epi32(_mm512_srli_epi32(w, 7), 19);
    *scale = _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(100 << 23)));
    const __m512i steps =
        _mm512_sub_epi32(_mm512_and_si512(w, _mm512_set1_epi32(127)), _mm512_set1_epi32(zero));
    *offset = _mm512_mul_ps(_mm512_cvtepi32_ps(steps), _mm512_set1_ps(step));
}

INLINE VI SET(q4_dot)(const Q4_W *w, const int8_t *x)
{
    __m512i low = _mm512_setzero_si512(), high = low;
    for (int j = 0; j < 4; j++) {
        low = _mm512_dpbusd_epi32(low, w->low[j], avx512_four(x + 8 * j));
        high = _mm512_dpbusd_epi32(high, w->high[j], avx512_four(x + 8 * j + 4));
    }
    return _mm512_add_epi32(low, _mm512_srai_epi32(high, 4));
}

INLINE VI SET(nl4_dot)(const Q4_W *w, const int8_t *x)
{
    __m512i low = _mm512_setzero_si512(), high = low;
    for (int j = 0; j < 4; j++) {
        low = _mm512_dpbusd_epi32(low, w->low[j], avx512_four(x + 8 * j));
        high = _mm512_dpbusd_epi32(high, w->high[j], avx512_four(x + 8 * j + 4));
    }
    return _mm512_add_epi32(low, high);
}

INLINE Q8_W SET(q8_load)(const int8_t *tile)
{
    Q8_W w;
    for (int j = 0; j < 8; j++)
        w.line[j] = _mm512_xor_si512(_mm512_loadu_si512(tile + 64 * j), _mm512_set1_epi8((char)0x80));
    return w;
}

INLINE VI SET(q8_dot)(const Q8_W *w, const int8_t *x)
{
    __m512i a = _mm512_setzero_si512(), b = a;
    for (int j = 0; j < 8; j += 2) {
        a = _mm512_dpbusd_epi32(a, w->line[j], avx512_four(x + 4 * j));
        b = _mm512_dpbusd_epi32(b, w->line[j + 1], avx512_four(x + 4 * j + 4));
    }
    return _mm512_add_epi32(a, b);
}

#define Q8_FLOAT(dot, sum) avx512_less_128(dot, sum)
INLINE VF avx512_less_128(VI dot, const float *sum)
{
    return _mm512_fmadd_ps(_mm512_set1_ps(-128), _mm512_set1_ps(*sum), _mm512_cvtepi32_ps(dot));
}

/* 16-bit weights: lane i of a vector sums the inputs k = i modulo 16. */
#define DOT_ROWS 4
#define DOT_TOKENS 4
#define VD __m512
INLINE VD SET(d_zero)(void) { return _mm512_setzero_ps(); }
INLINE VD SET(d_x)(const float *x) { return _mm512_loadu_ps(x); }
INLINE VD SET(d_fma)(VD a, VD b, VD c) { return _mm512_fmadd_ps(a, b, c); }
INLINE VD SET(d_bf16)(const uint16_t *w)
{
    const __m256i half = _mm256_loadu_si256((const __m256i *)w);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
INLINE VD SET(d_f16)(const uint16_t *w)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)w));
}
INLINE void SET(d_store)(float *lanes, VD x) { _mm512_storeu_ps(lanes, x); }
INLINE void SET(round_group)(const float *x, int8_t *q, float *scale, float *sum)
{
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    const __m512 nothing = _mm512_setzero_ps(); /* times x: NaN where x is not finite */
    const __m512 bad = _mm512_fmadd_ps(a, nothing, _mm512_mul_ps(b, nothing));
    const int finite = _mm512_cmp_ps_mask(bad, bad, _CMP_UNORD_Q) == 0;
    const __m512 inverse = _mm512_set1_ps(group_scale(most, finite, scale));
    const __m512i i = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
    const __m512i j = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
    _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(i));
    _mm_storeu_si128((__m128i *)(q + 16), _mm512_cvtepi32_epi8(j));
    *sum = (float)_mm512_reduce_add_epi32(_mm512_add_epi32(i, j));
}

#include "avx512_dense.inc"

#define TOKENS 8
#include "products.inc"

#if AMX_INT8
#include "amx.inc"
#endif

#endif
