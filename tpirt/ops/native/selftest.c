/* Compares the functions of a set with those of plain C, bit for bit, on small inputs.
 *
 * To check another function of kernel_set: write a ``check`` for it and add it to CHECKS.
 */
#include "native.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifndef TP_BUILD
#define TP_BUILD ""
#endif

/* What this library was compiled from: the hash that its loader expects. */
const char *tp_build(void) { return TP_BUILD; }

enum { BLOCKS = 3, ROWS = BLOCKS * TILE_ROWS, GROUPS = 3, INPUTS = GROUPS * GROUP, TOKENS = 9 };
enum { LDO = ROWS + 5 }; /* what lies between rows of output must stay as it is */

/* Whether the two sets agree. ``seed`` is of random numbers. */
typedef int check(const kernel_set *ours, const kernel_set *plain, uint64_t seed);

static uint32_t draw(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*seed >> 32);
}

static void draw_bytes(void *out, size_t n, uint64_t *seed)
{
    for (size_t i = 0; i < n; i++) ((uint8_t *)out)[i] = (uint8_t)draw(seed);
}

/* A float between -1 and 1, times 2^exponent. */
static float draw_float(int exponent, uint64_t *seed)
{
    return ldexpf((float)(int32_t)draw(seed), exponent - 31);
}

/* Inputs as the products are given, and worse: every group has its own magnitude. */
static void draw_inputs(float *x, long n, uint64_t *seed)
{
    static const int exponents[] = {0, 3, -7, 30, 127, -60, -101, -126, -148};
    const int kinds = sizeof exponents / sizeof *exponents;
    for (long i = 0, kind = 0; i < n; i++) {
        if (i % GROUP == 0) kind = draw(seed) % (kinds + 3);
        x[i] = draw_float(kind < kinds ? exponents[kind] : 0, seed);
        if (kind == kinds) x[i] = 0;
        if (kind > kinds && i % 16 == 5) x[i] = kind == kinds + 1 ? NAN : -INFINITY;
        if (draw(seed) % 8 == 0) x[i] = -0.0f;
    }
}

/* NaNs differ in bits that mean nothing. */
static int same(const float *a, const float *b, long n)
{
    for (long i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], sizeof *a) && !(isnan(a[i]) && isnan(b[i]))) return 0;
    return 1;
}

static int check_round(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    for (long inputs = 1; inputs <= INPUTS; inputs += 13) {
        const long groups = (inputs + GROUP - 1) / GROUP;
        float x[4 * INPUTS], scale[2][4 * GROUPS], sum[2][4 * GROUPS];
        int8_t q[2][4 * INPUTS];
        draw_inputs(x, 4 * inputs, &seed);
        for (int i = 0; i < 2; i++) (i ? plain : ours)->round(x, 4, inputs, q[i], scale[i], sum[i]);
        if (!same(scale[0], scale[1], 4 * groups) || !same(sum[0], sum[1], 4 * groups)) return 0;
        if (memcmp(q[0], q[1], 4 * groups * GROUP)) return 0;
    }
    return 1;
}

/* Rounded inputs whose codes take all values, -127 to 127, and a group of each extreme. */
typedef struct {
    int8_t q[TOKENS * INPUTS];
    float scale[TOKENS * GROUPS], sum[TOKENS * GROUPS];
} inputs_8bit;

static void draw_rounded(inputs_8bit *x, uint64_t *seed)
{
    for (long g = 0; g < TOKENS * GROUPS; g++) {
        int total = 0;
        for (int i = 0; i < GROUP; i++) {
            int code = (int)(draw(seed) % 255) - 127;
            if (g % 5 == 3) code = 127;
            if (g % 5 == 4) code = -127;
            total += x->q[g * GROUP + i] = (int8_t)code;
        }
        x->sum[g] = (float)total;
        x->scale[g] = g % 7 == 6 ? 0 : fabsf(draw_float(g % 4 * 20 - 30, seed));
    }
    x->scale[TOKENS * GROUPS - 1] = NAN;
}

/* Two outputs of a product, which begin with the same content. */
typedef struct { float of[2][TOKENS * LDO]; } outputs;

static void clear(outputs *out)
{
    for (long i = 0; i < TOKENS * LDO; i++) out->of[0][i] = out->of[1][i] = (float)i;
}

static int same_outputs(const outputs *out)
{
    return same(out->of[0], out->of[1], TOKENS * LDO);
}

/* The block ``full`` of a product has codes and inputs of the greatest magnitude. */
static int check_q4(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    static const uint8_t extremes[] = {0xff, 0x00, 0xf0, 0x0f};
    uint8_t codes[BLOCKS * GROUPS * Q4_TILE];
    uint16_t scales[BLOCKS * GROUPS * TILE_ROWS];
    inputs_8bit x;
    outputs out;
    draw_bytes(codes, sizeof codes, &seed);
    draw_bytes(scales, sizeof scales, &seed);
    for (long i = 0; i < GROUPS * Q4_TILE; i++) codes[i] = extremes[i / 4 % 4];
    for (int i = 0; i < 8; i++) scales[i] = (uint16_t)(i % 2 ? 0xffff - i : i);
    draw_rounded(&x, &seed);
    const rounded r = {x.q, x.scale, x.sum, GROUPS};
    for (long tokens = 1; tokens <= TOKENS; tokens++) {
        clear(&out);
        for (int i = 0; i < 2; i++)
            (i ? plain : ours)->q4(codes, scales, &r, tokens, tokens % 2, BLOCKS, out.of[i], LDO);
        if (!same_outputs(&out)) return 0;
    }
    return 1;
}

static int check_q8(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    int8_t codes[BLOCKS * GROUPS * Q8_TILE];
    float scales[ROWS];
    inputs_8bit x;
    outputs out;
    for (size_t i = 0; i < sizeof codes; i++) codes[i] = (int8_t)(draw(&seed) % 255 - 127);
    for (long i = 0; i < GROUPS * Q8_TILE; i++) codes[i] = i / 4 % 2 ? 127 : -127;
    for (int i = 0; i < ROWS; i++) scales[i] = draw_float(i % 5 * 25 - 100, &seed);
    scales[ROWS - 1] = 0;
    draw_rounded(&x, &seed);
    const rounded r = {x.q, x.scale, x.sum, GROUPS};
    for (long tokens = 1; tokens <= TOKENS; tokens++) {
        clear(&out);
        for (int i = 0; i < 2; i++)
            (i ? plain : ours)->q8(codes, scales, &r, tokens, tokens % 2, BLOCKS, out.of[i], LDO);
        if (!same_outputs(&out)) return 0;
    }
    return 1;
}

typedef void dense(const uint16_t *w, const float *x, long tokens, long inputs, long first,
                   long last, float *out, long ldo);

/* ``w`` is (ROWS, INPUTS) 16-bit floats. Every number of inputs modulo 16, of tokens and of rows. */
static int check_dense(dense *ours, dense *plain, const uint16_t *w, uint64_t seed)
{
    float x[TOKENS * INPUTS];
    outputs out;
    for (long inputs = 1; inputs <= INPUTS; inputs += inputs < 34 ? 3 : 17) {
        const long tokens = 1 + inputs % TOKENS, first = inputs % 5, last = first + inputs % 8;
        for (long i = 0; i < tokens * inputs; i++) x[i] = draw_float((int)(i % 3) * 8, &seed);
        if (inputs % 4 == 0) x[draw(&seed) % (tokens * inputs)] = inputs % 8 ? INFINITY : 1e-40f;
        clear(&out);
        for (int i = 0; i < 2; i++)
            (i ? plain : ours)(w, x, tokens, inputs, first, last, out.of[i], LDO);
        if (!same_outputs(&out)) return 0;
    }
    return 1;
}

/* Random bits are floats of all magnitudes, infinities and NaN; most are to be like weights. */
static int check_bf16(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    uint16_t w[ROWS * INPUTS];
    draw_bytes(w, sizeof w, &seed);
    for (long i = 0; i < ROWS * INPUTS; i++)
        if (i % 61) w[i] = (w[i] & 0x83ff) | 0x3c00;
    return check_dense(ours->bf16, plain->bf16, w, seed);
}

static int check_f16(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    uint16_t w[ROWS * INPUTS];
    draw_bytes(w, sizeof w, &seed);
    for (long i = 0; i < ROWS * INPUTS; i++)
        if (i % 61) w[i] &= 0xbbff; /* subnormal to 2 */
    return check_dense(ours->f16, plain->f16, w, seed);
}

/* Every number of rows that a block can hold, and padding of inputs. */
static int check_fit4(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    float w[TILE_ROWS * INPUTS];
    uint8_t codes[2][GROUPS * Q4_TILE];
    uint16_t scales[2][GROUPS * TILE_ROWS];
    for (long i = 0; i < TILE_ROWS * INPUTS; i++) w[i] = draw_float(i % 97 ? -5 : -2, &seed);
    for (long rows = 1; rows <= TILE_ROWS; rows += 5) {
        for (int i = 0; i < 2; i++)
            (i ? plain : ours)->fit4(w, rows, INPUTS - rows, codes[i], scales[i]);
        if (memcmp(codes[0], codes[1], sizeof codes[0])) return 0;
        if (memcmp(scales[0], scales[1], sizeof scales[0])) return 0;
    }
    return 1;
}

static int check_tiles(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    uint8_t codes[BLOCKS * GROUPS * Q8_TILE];
    uint16_t scales[BLOCKS * GROUPS * TILE_ROWS];
    float out[2][ROWS * INPUTS];
    draw_bytes(codes, sizeof codes, &seed);
    draw_bytes(scales, sizeof scales, &seed);
    for (int kind = 0; kind < 4; kind++) {
        memset(out, 0, sizeof out);
        for (int i = 0; i < 2; i++) {
            const kernel_set *set = i ? plain : ours;
            if (kind < 2) set->dense4(codes, scales, GROUPS, kind, BLOCKS, out[i], kind % 2);
            else set->dense8((const int8_t *)codes, GROUPS, kind % 2, BLOCKS, out[i], kind % 2);
        }
        if (memcmp(out[0], out[1], sizeof out[0])) return 0;
    }
    return 1;
}

static const struct {
    const char *name;
    check *agrees;
} CHECKS[] = {
    {"round", check_round}, {"q4", check_q4},   {"q8", check_q8},
    {"bf16", check_bf16},   {"f16", check_f16},
    {"fit4", check_fit4},   {"tiles", check_tiles},
};

/* The name of the first function of a set that differs from plain C; NULL if none does. */
const char *tp_check(int set)
{
    const kernel_set *ours = native_set(set), *plain = native_set(0);
    for (size_t i = 0; ours != plain && i < sizeof CHECKS / sizeof *CHECKS; i++)
        if (!CHECKS[i].agrees(ours, plain, 0x5eed + i)) return CHECKS[i].name;
    return NULL;
}
