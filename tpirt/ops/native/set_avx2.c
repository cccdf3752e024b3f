/* AVX2: a vector holds 8 rows of a tile. */
#include "set.h"

#if defined(__x86_64__)

#define SET(name) avx2_##name
#define SET_NAME "avx2"
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define BIAS 0
#include "avx2_common.inc"

/* 8 sums of two products of 0..15 and -127..127: below 2^15. */
INLINE VI SET(q4_dot)(const Q4_W *w, const int8_t *x)
{
    __m256i low = _mm256_maddubs_epi16(w->low[0], SET(four)(x));
    __m256i high = _mm256_maddubs_epi16(w->high[0], SET(four)(x + 4));
    for (int j = 1; j < 4; j++) {
        low = _mm256_add_epi16(low, _mm256_maddubs_epi16(w->low[j], SET(four)(x + 8 * j)));
        high = _mm256_add_epi16(high, _mm256_maddubs_epi16(w->high[j], SET(four)(x + 8 * j + 4)));
    }
    return _mm256_madd_epi16(_mm256_add_epi16(low, high), _mm256_set1_epi16(1));
}

INLINE Q8_W SET(q8_load)(const int8_t *tile) { return (Q8_W){tile}; }

/* Add the products of signed weights to the sums. The weights' signs go to the inputs, because one
 * factor must be unsigned. */
INLINE VI SET(add_signed)(VI sums, __m256i weights, const int8_t *x)
{
    const __m256i products =
        _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(SET(four)(x), weights));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
}

INLINE VI SET(nl4_dot)(const Q4_W *w, const int8_t *x)
{
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int j = 0; j < 4; j++) {
        low = SET(add_signed)(low, w->low[j], x + 8 * j);
        high = SET(add_signed)(high, w->high[j], x + 8 * j + 4);
    }
    return _mm256_add_epi32(low, high);
}

INLINE VI SET(q8_dot)(const Q8_W *w, const int8_t *x)
{
    __m256i total = _mm256_setzero_si256();
    for (int j = 0; j < 8; j++) {
        const __m256i line = _mm256_loadu_si256((const __m256i *)(w->tile + 64 * j));
        total = SET(add_signed)(total, line, x + 4 * j);
    }
    return total;
}

#define TOKENS 4
#include "products.inc"

#endif
