/* Compares every set of instructions that this CPU has with the scalar one, bit for bit.
 * Prints the names of the sets compared, or what differs. */
#include "native.h"
#include "pool.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int tp_sets(void);
const char *tp_set_name(int set);
int tp_set_runs(int set);
pool *tp_pool_new(int threads);
void tp_pool_free(pool *p);
void tp_round(int set, const float *x, long tokens, long inputs, int8_t *q, float *scale, float *sum);
void tp_q4(int set, pool *p, const uint8_t *codes, const uint16_t *scales, long n, long groups,
           const int8_t *q, const float *xs, const float *sum, long tokens, float *out, long ldo);
void tp_q8(int set, pool *p, const int8_t *codes, const float *scales, long n, long groups,
           const int8_t *q, const float *xs, const float *sum, long tokens, float *out, long ldo);
void tp_bf16(int set, pool *p, const uint16_t *w, long n, long inputs, const float *x, long tokens,
             float *out, long ldo);
void tp_f16(int set, pool *p, const uint16_t *w, long n, long inputs, const float *x, long tokens,
            float *out, long ldo);

enum { MOST_TOKENS = 9, MOST_GROUPS = 7, MOST_ROWS = 48, WIDTH = MOST_ROWS + 3 };
enum { MOST_INPUTS = MOST_GROUPS * GROUP, CELLS = MOST_TOKENS * MOST_INPUTS };
enum { ALL_FINITE, WITH_NAN, WITH_INF, TINY, INPUT_KINDS };

static uint32_t state = 1;
static uint32_t any(void) { return state = state * 1664525u + 1013904223u, state >> 8; }
static float any_float(void) { return (float)((int)(any() & 0xffff) - 0x8000) / 0x2000; }

static float x[CELLS];
static uint8_t codes[MOST_ROWS * MOST_INPUTS];
static uint16_t q4_scales[MOST_ROWS * MOST_GROUPS], half[MOST_ROWS * MOST_INPUTS];
static float q8_scales[MOST_ROWS];

typedef struct {
    int8_t q[CELLS];
    float scale[CELLS / GROUP], sum[CELLS / GROUP];
    float out[MOST_TOKENS * WIDTH];
} results;
static results expected, actual;

static void fill_inputs(int kind)
{
    for (int i = 0; i < CELLS; i++) x[i] = any_float() * (kind == TINY ? 1e-34f : 1.0f);
    for (int i = 0; i < CELLS; i += 3 * GROUP + 1) {
        if (kind == WITH_NAN) x[i] = NAN;
        if (kind == WITH_INF) x[i] = -INFINITY;
    }
}

/* Weights of all codes; 16-bit ones: of all exponents that leave sums finite, and subnormals. */
static void fill_weights(void)
{
    for (size_t i = 0; i < sizeof codes; i++) codes[i] = (uint8_t)any();
    for (int i = 0; i < MOST_ROWS * MOST_GROUPS; i++) q4_scales[i] = (uint16_t)any();
    for (int i = 0; i < MOST_ROWS * MOST_INPUTS; i++) half[i] = (uint16_t)(any() & 0xbfff);
    for (int i = 0; i < MOST_ROWS; i++) q8_scales[i] = any_float();
}

/* Bits, except those of a NaN: no instruction set says which of two it passes on. */
static int same(const float *a, const float *b, long n)
{
    for (long i = 0; i < n; i++)
        if (memcmp(a + i, b + i, sizeof *a) && !(isnan(a[i]) && isnan(b[i]))) return 0;
    return 1;
}

static void product(int set, pool *p, int kind, long tokens, long groups, long inputs, long n,
                    results *r)
{
    memset(r->out, 0x5a, sizeof r->out); /* what no function may touch stays so */
    switch (kind) {
    case 0: tp_q4(set, p, codes, q4_scales, n, groups, expected.q, expected.scale, expected.sum,
                  tokens, r->out, WIDTH); break;
    case 1: tp_q8(set, p, (const int8_t *)codes, q8_scales, n, groups, expected.q, expected.scale,
                  expected.sum, tokens, r->out, WIDTH); break;
    case 2: tp_bf16(set, p, half, n - 1, inputs, x, tokens, r->out, WIDTH); break;
    case 3: tp_f16(set, p, half, n - 1, inputs, x, tokens, r->out, WIDTH); break;
    }
}

static void compare(int set, pool *p, long tokens, long inputs, long n)
{
    static const char *const names[] = {"q4", "q8", "bf16", "f16"};
    const long groups = (inputs + GROUP - 1) / GROUP;
    const char *wrong = NULL;
    memset(&expected, 0, sizeof expected);
    memset(&actual, 0, sizeof actual);
    tp_round(0, x, tokens, inputs, expected.q, expected.scale, expected.sum);
    tp_round(set, x, tokens, inputs, actual.q, actual.scale, actual.sum);
    if (memcmp(expected.q, actual.q, sizeof actual.q) ||
        !same(expected.scale, actual.scale, CELLS / GROUP) ||
        !same(expected.sum, actual.sum, CELLS / GROUP))
        wrong = "round";
    for (int kind = 0; kind < 4 && !wrong; kind++) {
        product(0, p, kind, tokens, groups, inputs, n, &expected);
        product(set, p, kind, tokens, groups, inputs, n, &actual);
        if (!same(expected.out, actual.out, MOST_TOKENS * WIDTH)) wrong = names[kind];
    }
    if (!wrong) return;
    printf("%s differs in %s: %ld tokens, %ld inputs, %ld rows\n", tp_set_name(set), wrong, tokens,
           inputs, n);
    exit(1);
}

static void compare_all(int set, pool *p)
{
    static const long inputs[] = {1, 15, 32, 33, 80, 96, 200, MOST_INPUTS};
    for (int kind = 0; kind < INPUT_KINDS; kind++) {
        fill_inputs(kind);
        for (long tokens = 1; tokens <= MOST_TOKENS; tokens++)
            for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
                for (long n = TILE_ROWS; n <= MOST_ROWS; n += TILE_ROWS)
                    compare(set, p, tokens, inputs[i], n);
    }
}

int main(void)
{
    pool *p = tp_pool_new(2);
    fill_weights();
    for (int set = 1; set < tp_sets(); set++) {
        if (!tp_set_runs(set)) continue;
        compare_all(set, p);
        puts(tp_set_name(set));
    }
    tp_pool_free(p);
    return 0;
}
