/* AVX-VNNI: AVX2 with one instruction for four products, on CPUs that have no AVX-512. */
#include "set.h"

#if defined(__x86_64__) && AVX_VNNI

#define SET(name) avxvnni_##name
#define SET_NAME "avx-vnni"
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define BIAS 128
#include "avx2_common.inc"

INLINE VI SET(q4_dot)(const Q4_W *w, const int8_t *x)
{
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int j = 0; j < 4; j++) {
        low = _mm256_dpbusd_avx_epi32(low, w->low[j], SET(four)(x + 8 * j));
        high = _mm256_dpbusd_avx_epi32(high, w->high[j], SET(four)(x + 8 * j + 4));
    }
    return _mm256_add_epi32(low, high);
}

INLINE VI SET(nl4_dot)(const Q4_W *w, const int8_t *x) { return SET(q4_dot)(w, x); }

INLINE Q8_W SET(q8_load)(const int8_t *tile) { return (Q8_W){tile}; }

/* One factor must be unsigned: 128 is added to the weights. */
INLINE VI SET(q8_dot)(const Q8_W *w, const int8_t *x)
{
    __m256i a = _mm256_setzero_si256(), b = a;
    for (int j = 0; j < 8; j += 2) {
        const __m256i *line = (const __m256i *)(w->tile + 64 * j);
        const __m256i top = _mm256_set1_epi8((char)0x80);
        const __m256i u = _mm256_xor_si256(_mm256_loadu_si256(line), top);
        const __m256i v = _mm256_xor_si256(_mm256_loadu_si256(line + 2), top);
        a = _mm256_dpbusd_avx_epi32(a, u, SET(four)(x + 4 * j));
        b = _mm256_dpbusd_avx_epi32(b, v, SET(four)(x + 4 * j + 4));
    }
    return _mm256_add_epi32(a, b);
}

#define Q8_FLOAT(dot, sum) avxvnni_less_128(dot, sum)
INLINE VF avxvnni_less_128(VI dot, const float *sum)
{
    return _mm256_fmadd_ps(_mm256_set1_ps(-128), _mm256_set1_ps(*sum), _mm256_cvtepi32_ps(dot));
}

#define TOKENS 4
#include "products.inc"

#endif
