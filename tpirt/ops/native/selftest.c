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

enum { BLOCKS = 3, ROWS = BLOCKS * TILE_ROWS, GROUPS = 3, INPUTS = GROUPS * GROUP };
enum { TOKENS = 18, FEW = 9, SOME = 4 };
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

/* Rows rounded by the two sets. */
typedef struct {
    int8_t q[2][SOME * INPUTS];
    float scale[2][SOME * GROUPS], sum[2][SOME * GROUPS];
} codes_8bit;

static int same_codes(const codes_8bit *c, long groups)
{
    return same(c->scale[0], c->scale[1], SOME * groups) &&
           same(c->sum[0], c->sum[1], SOME * groups) &&
           !memcmp(c->q[0], c->q[1], SOME * groups * GROUP);
}

static long groups_of(long inputs) { return (inputs + GROUP - 1) / GROUP; }

static int check_round(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    float x[SOME * INPUTS];
    codes_8bit c;
    for (long inputs = 1; inputs <= INPUTS; inputs += 13) {
        draw_inputs(x, SOME * inputs, &seed);
        for (int i = 0; i < 2; i++)
            (i ? plain : ours)->round(x, SOME, inputs, c.q[i], c.scale[i], c.sum[i]);
        if (!same_codes(&c, groups_of(inputs))) return 0;
    }
    return 1;
}

/* Half of the rows are as they are in a model. */
static int check_norm(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    float x[SOME * INPUTS], weight[INPUTS], out[2][SOME * INPUTS];
    for (long inputs = 1; inputs <= INPUTS; inputs += 13) {
        draw_inputs(x, SOME / 2 * inputs, &seed);
        for (long i = SOME / 2 * inputs; i < SOME * inputs; i++) x[i] = draw_float(3, &seed);
        for (long i = 0; i < inputs; i++) weight[i] = draw_float(1, &seed);
        for (int i = 0; i < 2; i++)
            (i ? plain : ours)->norm(x, weight, 1e-5f, SOME, inputs, out[i]);
        if (!same(out[0], out[1], SOME * inputs)) return 0;
    }
    return 1;
}

static int check_gate(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    float x[SOME * 2 * INPUTS], out[2][SOME * INPUTS];
    for (long inputs = 1; inputs <= INPUTS; inputs += 13) {
        draw_inputs(x, SOME * inputs, &seed);
        for (long i = SOME * inputs; i < 2 * SOME * inputs; i++) x[i] = draw_float(7, &seed);
        for (int i = 0; i < 2; i++)
            (i ? plain : ours)->gate(x, SOME, inputs, out[i]);
        if (!same(out[0], out[1], SOME * inputs)) return 0;
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

/* A matrix in 4 bits. The codes of the first block are the least and the greatest. */
typedef struct {
    uint8_t codes[BLOCKS * GROUPS * Q4_TILE];
    uint16_t scales[BLOCKS * GROUPS * TILE_ROWS];
} weights_4bit;

static void draw_4bit(weights_4bit *w, uint64_t *seed)
{
    static const uint8_t extremes[] = {0xff, 0x00, 0xf0, 0x0f};
    draw_bytes(w->codes, sizeof w->codes, seed);
    draw_bytes(w->scales, sizeof w->scales, seed);
    for (long i = 0; i < GROUPS * Q4_TILE; i++) w->codes[i] = extremes[i / 4 % 4];
    for (int i = 0; i < 8; i++) w->scales[i] = (uint16_t)(i % 2 ? 0xffff - i : i);
}

/* Of both forms; the levels of a codebook are any. */
static matrix matrix_4bit(const weights_4bit *w, int kind, uint64_t *seed)
{
    matrix m = {.codes = w->codes, .scales = w->scales, .groups = GROUPS, .kind = kind};
    for (int i = 0; i < LEVELS; i++)
        m.levels[i] = (int8_t)(i == 0 ? -127 : i == LEVELS - 1 ? 127 : (int)(draw(seed) % 255) - 127);
    return m;
}

typedef void product_8bit(const matrix *m, const rounded *x, long tokens, long first, long last,
                          float *out, long ldo);

static int check_product(product_8bit *ours, product_8bit *plain, const matrix *m, uint64_t *seed)
{
    inputs_8bit x;
    outputs out;
    draw_rounded(&x, seed);
    const rounded r = {x.q, x.scale, x.sum, GROUPS};
    for (long tokens = 1; tokens <= TOKENS; tokens += tokens < FEW ? 1 : FEW) {
        clear(&out);
        for (int i = 0; i < 2; i++)
            (i ? plain : ours)(m, &r, tokens, tokens % 2, BLOCKS, out.of[i], LDO);
        if (!same_outputs(&out)) return 0;
    }
    return 1;
}

static int check_q4(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    weights_4bit w;
    draw_4bit(&w, &seed);
    for (int kind = Q4; kind <= NL4; kind++) {
        const matrix m = matrix_4bit(&w, kind, &seed);
        if (!check_product(ours->q4, plain->q4, &m, &seed)) return 0;
    }
    return 1;
}

static void draw_8bit(int8_t *codes, uint64_t *seed)
{
    for (long i = 0; i < BLOCKS * GROUPS * Q8_TILE; i++)
        codes[i] = i >= GROUPS * Q8_TILE ? (int8_t)(draw(seed) % 255 - 127) : i / 4 % 2 ? 127 : -127;
}

static int check_q8(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    int8_t codes[BLOCKS * GROUPS * Q8_TILE];
    float scales[ROWS];
    draw_8bit(codes, &seed);
    for (int i = 0; i < ROWS; i++) scales[i] = draw_float(i % 5 * 25 - 100, &seed);
    scales[ROWS - 1] = 0;
    const matrix m = {.codes = codes, .scales = scales, .groups = GROUPS, .kind = Q8};
    return check_product(ours->q8, plain->q8, &m, &seed);
}

typedef void product_16bit(const uint16_t *w, const float *x, long tokens, long inputs, long first,
                           long last, float *out, long ldo);

/* ``w`` is (ROWS, INPUTS) 16-bit floats. Every number of inputs modulo 16, of tokens and of rows. */
static int check_16bit(product_16bit *ours, product_16bit *plain, const uint16_t *w,
                       uint64_t seed)
{
    float x[TOKENS * INPUTS];
    outputs out;
    for (long inputs = 1; inputs <= INPUTS; inputs += inputs < 34 ? 3 : 17) {
        const long tokens = 1 + inputs % FEW, first = inputs % 5, last = first + inputs % 8;
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
    return check_16bit(ours->bf16, plain->bf16, w, seed);
}

static int check_f16(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    uint16_t w[ROWS * INPUTS];
    draw_bytes(w, sizeof w, &seed);
    for (long i = 0; i < ROWS * INPUTS; i++)
        if (i % 61) w[i] &= 0xbbff; /* subnormal to 2 */
    return check_16bit(ours->f16, plain->f16, w, seed);
}

static const int8_t UNEVEN[LEVELS] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                      1,    13,   25,  38,  53,  69,  89,  113};

/* Weights of all magnitudes, rows of zeros, and single ones that stand out. */
static int check_fit4(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    float w[TILE_ROWS * INPUTS];
    for (long rows = 1; rows <= TILE_ROWS; rows += 5) {
        const long inputs = INPUTS - rows;
        weights_4bit out[2];
        memset(out, 0x5a, sizeof out);
        for (long i = 0; i < rows * inputs; i++) {
            w[i] = draw_float((int)(i / inputs % 7) * 9 - 30, &seed);
            if (i % 47 == 0) w[i] *= 20;
            if (i / inputs == 3) w[i] = i % 2 ? 0 : -0.0f;
        }
        const int8_t *levels = rows % 2 ? UNEVEN : NULL;
        for (int i = 0; i < 2; i++)
            (i ? plain : ours)->fit4(w, rows, inputs, levels, out[i].codes, out[i].scales);
        if (memcmp(&out[0], &out[1], sizeof out[0])) return 0;
    }
    return 1;
}

typedef struct { float of[2][ROWS * INPUTS]; } matrices;

static int same_matrices(const matrices *out, int half)
{
    if (half) return !memcmp(out->of[0], out->of[1], sizeof out->of[0]);
    return same(out->of[0], out->of[1], ROWS * INPUTS);
}

typedef void dense(const matrix *m, long first, long last, void *out, int half);

static int same_dense(dense *ours, dense *plain, const matrix *m)
{
    matrices out;
    for (int half = 0; half < 2; half++) {
        memset(&out, 0, sizeof out);
        for (int i = 0; i < 2; i++) (i ? plain : ours)(m, half, BLOCKS, out.of[i], half);
        if (!same_matrices(&out, half)) return 0;
    }
    return 1;
}

static int check_dense4(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    weights_4bit w;
    draw_4bit(&w, &seed);
    for (int kind = Q4; kind <= NL4; kind++) {
        const matrix m = matrix_4bit(&w, kind, &seed);
        if (!same_dense(ours->dense4, plain->dense4, &m)) return 0;
    }
    return 1;
}

static int check_narrow(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    enum { COUNT = ROWS * INPUTS - 3 }; /* not a multiple of 16 */
    uint16_t w[COUNT], out[2][COUNT] = {{0}};
    draw_bytes(w, sizeof w, &seed);
    for (int i = 0; i < 2; i++) (i ? plain : ours)->narrow(w, COUNT, out[i]);
    return !memcmp(out[0], out[1], sizeof out[0]);
}

static int check_dense8(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    int8_t codes[BLOCKS * GROUPS * Q8_TILE];
    draw_8bit(codes, &seed);
    const matrix m = {.codes = codes, .groups = GROUPS, .kind = Q8};
    return same_dense(ours->dense8, plain->dense8, &m);
}

enum { DIM = 32, QUERIES = 5, KEYS = 2, PAST = 70, NEW = 4, CAPACITY = PAST + NEW + 2 };
enum { HEADS = QUERIES + 2 * KEYS, CACHE = KEYS * CAPACITY * DIM };

/* What attention reads and writes, for one set. */
typedef struct {
    float qkv[NEW * HEADS * DIM], out[NEW * QUERIES * DIM];
    uint16_t keys[CACHE], values[CACHE]; /* int8 takes half of each */
    uint16_t key_scales[KEYS * CAPACITY], value_scales[KEYS * CAPACITY];
} attention_data;

static void draw_halves(uint16_t *out, long n, uint64_t *seed)
{
    for (long i = 0; i < n; i++) out[i] = (uint16_t)(draw(seed) & 0x83ff) | 0x3c00;
}

/* The same for both sets. Cached values and scales are below 2, as bfloat16; as int8 they are any. */
static void draw_attention(attention_data data[2], uint64_t *seed)
{
    memset(data, 0, 2 * sizeof *data);
    for (long i = 0; i < NEW * HEADS * DIM; i++) data->qkv[i] = draw_float((int)(i % 5), seed);
    for (long i = 0; i < DIM; i++) /* a value that is all zeros, and a tiny one */
        data->qkv[(HEADS - 1) * DIM + i] = 0, data->qkv[(HEADS - 2) * DIM + i] *= 1e-33f;
    draw_halves(data->keys, CACHE, seed);
    draw_halves(data->values, CACHE, seed);
    draw_halves(data->key_scales, KEYS * CAPACITY, seed);
    draw_halves(data->value_scales, KEYS * CAPACITY, seed);
    data[1] = data[0];
}

/* Without a norm of queries and a window, and with both; in bfloat16, then in int8; then as a tree. */
enum { VARIANTS = 8 };
static attention attention_of(attention_data *data, const float *tables, int variant)
{
    static const int32_t groups[KEYS] = {2, 3}, parents[NEW] = {1, 1, 2, 2};
    attention a = {0};
    a.qkv = data->qkv, a.out = data->out, a.all_keys = data->keys, a.all_values = data->values;
    a.cos = tables, a.sin = tables + NEW * DIM, a.groups = groups;
    const int both = variant % 2;
    if (variant / 4) a.parents = parents;
    if (variant / 2 % 2) a.key_scales = data->key_scales, a.value_scales = data->value_scales;
    a.q_norm = both ? tables : NULL, a.k_norm = both ? tables + DIM : NULL;
    a.tokens = NEW, a.past = PAST, a.capacity = CAPACITY, a.dim = DIM;
    a.queries = QUERIES, a.keys = KEYS, a.window = both ? 40 : 0, a.eps = 1e-6f;
    return a;
}

typedef void use(const kernel_set *set, const attention *a);

static int check_attention(use *call, const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    float tables[2 * NEW * DIM];
    attention_data data[2];
    for (long i = 0; i < 2 * NEW * DIM; i++) tables[i] = draw_float(0, &seed);
    for (int variant = 0; variant < VARIANTS; variant++) {
        draw_attention(data, &seed);
        for (int i = 0; i < 2; i++) {
            const attention a = attention_of(&data[i], tables, variant);
            call(i ? plain : ours, &a);
        }
        if (memcmp(&data[0], &data[1], sizeof *data)) return 0;
    }
    return 1;
}

static void append(const kernel_set *set, const attention *a) { set->append(a); }
static void attend(const kernel_set *set, const attention *a)
{
    set->attend(a, 0, 1);
    set->attend(a, 1, KEYS);
}

static int check_append(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    return check_attention(append, ours, plain, seed);
}

static int check_attend(const kernel_set *ours, const kernel_set *plain, uint64_t seed)
{
    return check_attention(attend, ours, plain, seed);
}

static const struct {
    const char *name;
    check *agrees;
} CHECKS[] = {
    {"round", check_round},
    {"q4", check_q4},
    {"q8", check_q8},
    {"bf16", check_bf16},
    {"f16", check_f16},
    {"fit4", check_fit4},
    {"dense4", check_dense4},
    {"dense8", check_dense8},
    {"narrow", check_narrow},
    {"norm", check_norm},
    {"gate", check_gate},
    {"append", check_append},
    {"attend", check_attend},
};

/* The name of the first function of a set that differs from plain C; NULL if none does. */
const char *tp_check(int set)
{
    const kernel_set *ours = native_set(set), *plain = native_set(0);
    for (size_t i = 0; ours != plain && i < sizeof CHECKS / sizeof *CHECKS; i++)
        if (!CHECKS[i].agrees(ours, plain, 0x5eed + i)) return CHECKS[i].name;
    return NULL;
}
