#include "cpu.h"
#include "native.h"
#include "pool.h"

#include <math.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
/* Compilers that take instructions beyond the target's base for single functions. */
#if defined(__apple_build_version__)
#define NEON_DOT (__clang_major__ >= 15)
#elif defined(__clang__)
#define NEON_DOT (__clang_major__ >= 16)
#else
#define NEON_DOT (__GNUC__ >= 10)
#endif
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

#include "scalar.inc"
#if defined(__x86_64__)
#include "avx2.inc"
#include "avx512.inc"
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define AVX_VNNI
#include "avxvnni.inc"
#endif
#elif defined(__aarch64__)
#include "neon.inc"
#endif

static const kernel_set *const SETS[] = {
    &scalar_set,
#if defined(__x86_64__)
    &avx2_set,
#ifdef AVX_VNNI
    &avxvnni_set,
#endif
    &avx512_set,
#elif defined(__aarch64__)
    &neon_set,
#if NEON_DOT
    &dotprod_set,
    &i8mm_set,
#endif
#endif
};

const kernel_set *native_set(int set) { return SETS[set]; }
int tp_sets(void) { return sizeof SETS / sizeof *SETS; }
const char *tp_set_name(int set) { return SETS[set]->name; }

int tp_set_runs(int set)
{
    const kernel_set *s = SETS[set];
    if (s == &scalar_set) return 1;
#if defined(__x86_64__)
    if (s == &avx2_set) return cpu_runs_avx2();
#ifdef AVX_VNNI
    if (s == &avxvnni_set) return cpu_runs_avx_vnni();
#endif
    if (s == &avx512_set) return cpu_runs_avx512_vnni();
#elif defined(__aarch64__)
    if (s == &neon_set) return 1;
#if NEON_DOT
    if (s == &dotprod_set) return cpu_runs_dotprod();
    if (s == &i8mm_set) return cpu_runs_i8mm();
#endif
#endif
    return 0;
}

/* One product, shared out by rows. */
typedef struct {
    const kernel_set *set;
    const void *w, *scales;
    rounded x;
    const float *dense;
    long tokens, inputs;
    float *out;
    long ldo;
    int kind;
} product;

enum { Q4, Q8, BF16, F16 };

static void rows(void *arg, long first, long last)
{
    const product *p = arg;
    switch (p->kind) {
    case Q4: p->set->q4(p->w, p->scales, &p->x, p->tokens, first, last, p->out, p->ldo); break;
    case Q8: p->set->q8(p->w, p->scales, &p->x, p->tokens, first, last, p->out, p->ldo); break;
    case BF16: p->set->bf16(p->w, p->dense, p->tokens, p->inputs, first, last, p->out, p->ldo); break;
    case F16: p->set->f16(p->w, p->dense, p->tokens, p->inputs, first, last, p->out, p->ldo); break;
    }
}

pool *tp_pool_new(int threads) { return pool_new(threads); }
void tp_pool_free(pool *p) { pool_free(p); }
int tp_pool_threads(const pool *p) { return pool_threads(p); }

void tp_round(int set, const float *x, long tokens, long inputs, int8_t *q, float *scale, float *sum)
{
    SETS[set]->round(x, tokens, inputs, q, scale, sum);
}

/* Rows per piece of work: about 64 KB of weights, at most ``most``. */
static long piece(long row_bytes, long most)
{
    long n = (64 << 10) / (row_bytes ? row_bytes : 1);
    return n < 1 ? 1 : n > most ? most : n;
}

void tp_q4(int set, pool *p, const uint8_t *codes, const uint16_t *scales, long n, long groups,
           const int8_t *q, const float *xs, const float *sum, long tokens, float *out, long ldo)
{
    product a = {SETS[set], codes, scales, {q, xs, sum, groups}, 0, tokens, 0, out, ldo, Q4};
    pool_run(p, rows, &a, n / TILE_ROWS, piece(groups * Q4_TILE, 64));
}

void tp_q8(int set, pool *p, const int8_t *codes, const float *scales, long n, long groups,
           const int8_t *q, const float *xs, const float *sum, long tokens, float *out, long ldo)
{
    product a = {SETS[set], codes, scales, {q, xs, sum, groups}, 0, tokens, 0, out, ldo, Q8};
    pool_run(p, rows, &a, n / TILE_ROWS, piece(groups * Q8_TILE, 64));
}

void tp_bf16(int set, pool *p, const uint16_t *w, long n, long inputs, const float *x, long tokens,
             float *out, long ldo)
{
    product a = {SETS[set], w, 0, {0}, x, tokens, inputs, out, ldo, BF16};
    pool_run(p, rows, &a, n, piece(inputs * 2, 256) / 4 * 4 + 4);
}

void tp_f16(int set, pool *p, const uint16_t *w, long n, long inputs, const float *x, long tokens,
            float *out, long ldo)
{
    product a = {SETS[set], w, 0, {0}, x, tokens, inputs, out, ldo, F16};
    pool_run(p, rows, &a, n, piece(inputs * 2, 256) / 4 * 4 + 4);
}

void tp_fit4(int set, const float *w, long rows, long inputs, uint8_t *codes, uint16_t *scales)
{
    const long groups = (inputs + GROUP - 1) / GROUP;
    for (long r = 0; r < rows; r += TILE_ROWS) {
        const long held = rows - r < TILE_ROWS ? rows - r : TILE_ROWS, block = r / TILE_ROWS;
        SETS[set]->fit4(w + r * inputs, held, inputs, codes + block * groups * Q4_TILE,
                        scales + block * groups * TILE_ROWS);
    }
}

typedef struct {
    const kernel_set *set;
    const void *codes;
    const uint16_t *scales;
    long groups;
    uint8_t *out;
    int bits, half;
} densing;

static void dense_blocks(void *arg, long first, long last)
{
    const densing *d = arg;
    uint8_t *out = d->out + first * TILE_ROWS * d->groups * GROUP * (d->half ? 2 : 4);
    if (d->bits == 4) d->set->dense4(d->codes, d->scales, d->groups, first, last, out, d->half);
    else d->set->dense8(d->codes, d->groups, first, last, out, d->half);
}

void tp_dense(int set, pool *p, int bits, const void *codes, const uint16_t *scales, long blocks,
              long groups, void *out, int half)
{
    densing d = {SETS[set], codes, scales, groups, out, bits, half};
    pool_run(p, dense_blocks, &d, blocks, 1);
}

void tp_norm(int set, const float *x, const float *weight, float eps, long tokens, long n, int8_t *q,
             float *scale, float *sum)
{
    SETS[set]->norm(x, weight, eps, tokens, n, q, scale, sum);
}

void tp_gate(int set, const float *x, long tokens, long n, int8_t *q, float *scale, float *sum)
{
    SETS[set]->gate(x, tokens, n, q, scale, sum);
}

typedef struct {
    const kernel_set *set;
    const attention *attention;
} attending;

static void attend_heads(void *arg, long first, long last)
{
    const attending *a = arg;
    a->set->attend(a->attention, first, last);
}

/* Sharing it out costs a few microseconds. */
#define ALONE (32 << 10)

void tp_attend(int set, pool *p, const attention *a)
{
    attending arg = {SETS[set], a};
    SETS[set]->append(a);
    if (a->tokens * (a->past + a->tokens) * a->queries * a->dim < ALONE)
        attend_heads(&arg, 0, a->keys);
    else
        pool_run(p, attend_heads, &arg, a->keys, 1);
}

static void *take(uint8_t **scratch, long bytes)
{
    void *taken = *scratch;
    *scratch += (bytes + 63) / 64 * 64;
    return taken;
}

static float *take_floats(uint8_t **scratch, long count) { return take(scratch, 4 * count); }

static rounded take_rounded(uint8_t **scratch, long tokens, long groups)
{
    int8_t *q = take(scratch, tokens * groups * GROUP);
    float *scale = take_floats(scratch, tokens * groups);
    return (rounded){q, scale, take_floats(scratch, tokens * groups), groups};
}

static void multiply(const kernel_set *set, pool *p, const matrix *m, const rounded *x, long tokens,
                     float *out)
{
    const int kind = m->bits == 4 ? Q4 : Q8;
    const long ldo = m->blocks * TILE_ROWS;
    product a = {set, m->codes, m->scales, *x, 0, tokens, 0, out, ldo, kind};
    pool_run(p, rows, &a, m->blocks, piece(m->groups * (kind == Q4 ? Q4_TILE : Q8_TILE), 64));
    if (m->bias)
        for (long t = 0; t < tokens; t++)
            for (long n = 0; n < m->rows; n++) out[t * ldo + n] += from_bf16(m->bias[n]);
}

/* Copy or add rows without their padding. */
static void put_rows(const float *x, long tokens, const matrix *m, float *out, int add)
{
    const long ldo = m->blocks * TILE_ROWS;
    for (long t = 0; t < tokens; t++)
        for (long n = 0; n < m->rows; n++)
            out[t * m->rows + n] = add ? out[t * m->rows + n] + x[t * ldo + n] : x[t * ldo + n];
}

/* Bytes of scratch for a block with these matrices. */
static long scratch_bytes(const matrix *first, const matrix *second, long tokens)
{
    const long groups = first->groups + second->groups, rows = first->blocks + second->blocks;
    return tokens * (groups * (GROUP + 8) + rows * TILE_ROWS * 4 + second->groups * GROUP * 4) + 1024;
}

long tp_attention_scratch(const attention_block *b)
{
    return scratch_bytes(&b->qkv, &b->out, b->heads.tokens);
}

long tp_mlp_scratch(const mlp_block *b) { return scratch_bytes(&b->gate_up, &b->down, b->tokens); }

/* Norm, product, attention, product: (T, H) of the local heads. */
void tp_attention(int set, pool *p, attention_block *b)
{
    const kernel_set *s = SETS[set];
    const long tokens = b->heads.tokens;
    uint8_t *at = b->scratch;
    const rounded x = take_rounded(&at, tokens, b->qkv.groups);
    s->norm(b->hidden, b->norm, b->eps, tokens, b->out.rows, (int8_t *)x.q, (float *)x.scale,
            (float *)x.sum);
    b->heads.qkv = take_floats(&at, tokens * b->qkv.blocks * TILE_ROWS);
    multiply(s, p, &b->qkv, &x, tokens, b->heads.qkv);
    b->heads.out = take_floats(&at, tokens * b->out.groups * GROUP);
    tp_attend(set, p, &b->heads);
    const rounded y = take_rounded(&at, tokens, b->out.groups);
    s->round(b->heads.out, tokens, b->heads.queries * b->heads.dim, (int8_t *)y.q, (float *)y.scale,
             (float *)y.sum);
    float *out = take_floats(&at, tokens * b->out.blocks * TILE_ROWS);
    multiply(s, p, &b->out, &y, tokens, out);
    put_rows(out, tokens, &b->out, b->partial, 0);
}

/* Norm, product, activation, product: (T, H) of the local columns. */
void tp_mlp(int set, pool *p, mlp_block *b)
{
    const kernel_set *s = SETS[set];
    const long tokens = b->tokens;
    uint8_t *at = b->scratch;
    if (b->norm)
        s->norm(b->hidden, b->norm, b->eps, tokens, b->down.rows, (int8_t *)b->x.q,
                (float *)b->x.scale, (float *)b->x.sum);
    float *gate_up = take_floats(&at, tokens * b->gate_up.blocks * TILE_ROWS);
    multiply(s, p, &b->gate_up, &b->x, tokens, gate_up);
    const rounded y = take_rounded(&at, tokens, b->down.groups);
    s->gate(gate_up, tokens, b->gate_up.rows / 2, (int8_t *)y.q, (float *)y.scale, (float *)y.sum);
    float *out = take_floats(&at, tokens * b->down.blocks * TILE_ROWS);
    multiply(s, p, &b->down, &y, tokens, out);
    put_rows(out, tokens, &b->down, b->partial, b->add);
}

/* The read bandwidth to compare with: sums of memory. */
#if defined(__x86_64__)
__attribute__((target("avx2")))
#endif
static void read_lines(void *arg, long first, long last)
{
    const uint64_t *m = (const uint64_t *)arg + first * 8, *end = (const uint64_t *)arg + last * 8;
    uint64_t s[16] = {0};
    for (; m + 16 <= end; m += 16)
        for (int i = 0; i < 16; i++) s[i] += m[i];
    volatile uint64_t sink = 0;
    for (int i = 0; i < 16; i++) sink += s[i];
}
void tp_read(pool *p, const void *m, long lines) { pool_run(p, read_lines, (void *)m, lines, 1024); }
