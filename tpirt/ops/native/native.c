#include "cpu.h"
#include "native.h"
#include "pool.h"

#include <string.h>

static const kernel_set *const SETS[] = {
    &scalar_set,
#if defined(__x86_64__)
    &avx2_set,
#if AVX_VNNI
    &avxvnni_set,
#endif
    &avx512_set,
#if AMX_INT8
    &amx_set,
#endif
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
#if AVX_VNNI
    if (s == &avxvnni_set) return cpu_runs_avx_vnni();
#endif
    if (s == &avx512_set) return cpu_runs_avx512_vnni();
#if AMX_INT8
    if (s == &amx_set) return cpu_runs_amx();
#endif
#elif defined(__aarch64__)
    if (s == &neon_set) return 1;
#if NEON_DOT
    if (s == &dotprod_set) return cpu_runs_dotprod();
    if (s == &i8mm_set) return cpu_runs_i8mm();
#endif
#endif
    return 0;
}

enum { PIECES = 8, LEAST_PIECE = 64 << 10, MOST_PIECE = 1 << 20 }; /* per thread; bytes */

/* One product, shared out by rows. */
typedef struct {
    const kernel_set *set;
    const matrix *m;
    const float *x;
    const rounded *r;
    long tokens;
    float *out;
    long ldo; /* columns of ``out`` */
} product;

static void rows(void *arg, long first, long last)
{
    const product *p = arg;
    const kernel_set *s = p->set;
    const matrix *m = p->m;
    const long ldo = p->ldo;
    switch (m->kind) {
    case Q4:
    case NL4: s->q4(m, p->r, p->tokens, first, last, p->out, ldo); break;
    case Q8: s->q8(m, p->r, p->tokens, first, last, p->out, ldo); break;
    case BF16: s->bf16(m->codes, p->x, p->tokens, m->inputs, first, last, p->out, ldo); break;
    case F16: s->f16(m->codes, p->x, p->tokens, m->inputs, first, last, p->out, ldo); break;
    }
}

/* Rows, or blocks of them, per piece of work. Long pieces are read faster, many share out evenly. */
static long piece(const pool *p, long count, long row_bytes)
{
    long bytes = count * row_bytes / (PIECES * pool_threads(p));
    bytes = bytes < LEAST_PIECE ? LEAST_PIECE : bytes > MOST_PIECE ? MOST_PIECE : bytes;
    return row_bytes < bytes ? bytes / row_bytes : 1;
}

static long columns(const matrix *m) { return m->blocks * TILE_ROWS; }

/* x m^T + bias of ``x`` for 16-bit weights, else of ``r``: the first columns of (T, ldo). */
static void multiply(const kernel_set *set, pool *p, const matrix *m, const float *x,
                     const rounded *r, long tokens, float *out, long ldo)
{
    product a = {set, m, x, r, tokens, out, ldo};
    if (m->kind < BF16)
        pool_run(p, rows, &a, m->blocks,
                 piece(p, m->blocks, m->groups * (m->kind == Q8 ? Q8_TILE : Q4_TILE)));
    else
        pool_run(p, rows, &a, m->rows, piece(p, m->rows, m->inputs * 2) / 4 * 4 + 4);
    if (m->bias)
        for (long t = 0; t < tokens; t++)
            for (long n = 0; n < m->rows; n++) out[t * ldo + n] += m->bias[n];
}

pool *tp_pool_new(int threads) { return pool_new(threads); }
void tp_pool_free(pool *p) { pool_free(p); }
int tp_pool_threads(const pool *p) { return pool_threads(p); }

/* One function of rows, shared out by rows. */
typedef struct {
    const kernel_set *set;
    const float *x, *weight;
    float eps;
    long inputs; /* of a row of the result */
    float *out;
    const rounded *r;
} row_work;

static void round_rows(void *arg, long first, long last)
{
    const row_work *w = arg;
    const long groups = w->r->groups;
    w->set->round(w->x + first * w->inputs, last - first, w->inputs,
                  (int8_t *)w->r->q + first * groups * GROUP, (float *)w->r->scale + first * groups,
                  (float *)w->r->sum + first * groups);
}

static void norm_rows(void *arg, long first, long last)
{
    const row_work *w = arg;
    w->set->norm(w->x + first * w->inputs, w->weight, w->eps, last - first, w->inputs,
                 w->out + first * w->inputs);
}

static void gate_rows(void *arg, long first, long last)
{
    const row_work *w = arg;
    w->set->gate(w->x + 2 * first * w->inputs, last - first, w->inputs, w->out + first * w->inputs);
}

/* Rows per piece of work: sharing out fewer costs more than it saves. */
#define ROWS_AT_ONCE 8

void tp_round(int set, pool *p, const float *x, long tokens, long inputs, int8_t *q, float *scale,
              float *sum)
{
    const rounded r = {q, scale, sum, (inputs + GROUP - 1) / GROUP};
    row_work w = {SETS[set], x, NULL, 0, inputs, NULL, &r};
    pool_run(p, round_rows, &w, tokens, ROWS_AT_ONCE);
}

void tp_norm(int set, pool *p, const float *x, const float *weight, float eps, long tokens, long inputs,
             float *out)
{
    row_work w = {SETS[set], x, weight, eps, inputs, out, NULL};
    pool_run(p, norm_rows, &w, tokens, ROWS_AT_ONCE);
}

void tp_gate(int set, pool *p, const float *x, long tokens, long inputs, float *out)
{
    row_work w = {SETS[set], x, NULL, 0, inputs, out, NULL};
    pool_run(p, gate_rows, &w, tokens, ROWS_AT_ONCE);
}

void tp_product(int set, pool *p, const matrix *m, const float *x, const int8_t *q,
                const float *scale, const float *sum, long tokens, float *out)
{
    const rounded r = {q, scale, sum, m->groups};
    multiply(SETS[set], p, m, x, &r, tokens, out, columns(m));
}

void tp_fit4(int set, const float *w, long rows, long inputs, const int8_t *levels, uint8_t *codes,
             uint16_t *scales)
{
    const long groups = (inputs + GROUP - 1) / GROUP;
    for (long r = 0; r < rows; r += TILE_ROWS) {
        const long held = rows - r < TILE_ROWS ? rows - r : TILE_ROWS, block = r / TILE_ROWS;
        SETS[set]->fit4(w + r * inputs, held, inputs, levels, codes + block * groups * Q4_TILE,
                        scales + block * groups * TILE_ROWS);
    }
}

typedef struct {
    const kernel_set *set;
    const matrix *m;
    long start; /* the first block */
    uint8_t *out;
    int half;
} densing;

static void dense_blocks(void *arg, long first, long last)
{
    const densing *d = arg;
    uint8_t *out = d->out + first * TILE_ROWS * d->m->groups * GROUP * (d->half ? 2 : 4);
    if (d->m->kind == Q8) d->set->dense8(d->m, d->start + first, d->start + last, out, d->half);
    else d->set->dense4(d->m, d->start + first, d->start + last, out, d->half);
}

void tp_dense(int set, pool *p, const matrix *m, long first, long last, void *out, int half)
{
    densing d = {SETS[set], m, first, out, half};
    pool_run(p, dense_blocks, &d, last - first, 1);
}

typedef struct {
    const kernel_set *set;
    const uint16_t *w;
    uint16_t *out;
} narrowing;

enum { NARROWED = 1 << 14 }; /* at once */

static void narrow_some(void *arg, long first, long last)
{
    const narrowing *n = arg;
    n->set->narrow(n->w + first, last - first, n->out + first);
}

void tp_narrow(int set, pool *p, const uint16_t *w, long count, uint16_t *out)
{
    narrowing n = {SETS[set], w, out};
    pool_run(p, narrow_some, &n, count, NARROWED);
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

/* Room for rows (T, K) as the product with ``m`` needs them rounded. */
static rounded room_for_rounded(uint8_t **scratch, const matrix *m, long tokens)
{
    if (m->kind >= BF16) return (rounded){0};
    int8_t *q = take(scratch, tokens * m->groups * GROUP);
    float *scale = take_floats(scratch, tokens * m->groups);
    float *sum = take_floats(scratch, tokens * m->groups);
    return (rounded){q, scale, sum, m->groups};
}

static void round_into(int set, pool *p, const matrix *m, const float *x, long tokens, rounded r)
{
    if (m->kind < BF16)
        tp_round(set, p, x, tokens, m->inputs, (int8_t *)r.q, (float *)r.scale, (float *)r.sum);
}

static rounded take_rounded(int set, pool *p, uint8_t **scratch, const matrix *m, const float *x,
                            long tokens)
{
    const rounded r = room_for_rounded(scratch, m, tokens);
    round_into(set, p, m, x, tokens, r);
    return r;
}

/* Copy or add rows without their padding. */
static void put_rows(const float *x, long tokens, const matrix *m, float *out, int add)
{
    const long ldo = columns(m);
    for (long t = 0; t < tokens; t++)
        for (long n = 0; n < m->rows; n++)
            out[t * m->rows + n] = add ? out[t * m->rows + n] + x[t * ldo + n] : x[t * ldo + n];
}

/* Bytes of scratch for a block: its rows between two products, rounded rows, and the products. */
static long scratch_bytes(const matrix *first, const matrix *second, long tokens)
{
    const long groups = first->groups + second->groups;
    return tokens * (groups * (GROUP * 5 + 8) + (columns(first) + columns(second)) * 4) + 1024;
}

long tp_attention_scratch(const attention_block *b)
{
    return scratch_bytes(&b->qk, &b->out, b->tokens) + b->tokens * columns(&b->v) * 4;
}

static long most(long a, long b) { return a > b ? a : b; }

/* Of all blocks in turn. */
long tp_mlp_scratch(const mlp_block *first)
{
    long bytes = 0;
    for (const mlp_block *b = first; b; b = b->next)
        bytes = most(bytes, scratch_bytes(&b->gate_up, &b->down, first->tokens));
    return bytes;
}

/* Attend within each sequence: ``qkv`` (T, heads, D) to ``out`` (T, queries, D). What the sequences
 * share is in ``heads``. */
void tp_attend_each(int set, pool *p, const attention *heads, const sequence *sequences, long count,
                    long layer, float *qkv, float *out)
{
    const long queries = heads->queries * heads->dim;
    const long width = queries + 2 * heads->keys * heads->dim;
    for (long i = 0; i < count; i++) {
        const sequence *s = sequences + i;
        const kv_room *room = s->rooms + layer;
        attention a = *heads;
        a.qkv = qkv, a.out = out;
        a.cos = s->cos, a.sin = s->sin, a.tokens = s->tokens, a.past = s->past;
        a.parents = s->parents;
        a.all_keys = room->keys, a.all_values = room->values;
        a.key_scales = room->key_scales, a.value_scales = room->value_scales;
        a.capacity = room->capacity;
        tp_attend(set, p, &a);
        qkv += s->tokens * width, out += s->tokens * queries;
    }
}

/* Norm, products, attention, product: (T, H) of the local heads. Heads are whole tiles of rows. */
void tp_attention(int set, pool *p, attention_block *b)
{
    const kernel_set *s = SETS[set];
    const long tokens = b->tokens, width = b->qk.rows + b->v.rows;
    uint8_t *at = b->scratch;
    float *x = take_floats(&at, tokens * b->qk.inputs);
    tp_norm(set, p, b->hidden, b->norm, b->eps, tokens, b->qk.inputs, x);
    rounded r = take_rounded(set, p, &at, &b->qk, x, tokens);
    float *qkv = take_floats(&at, tokens * width);
    multiply(s, p, &b->qk, x, &r, tokens, qkv, width);
    multiply(s, p, &b->v, x, &r, tokens, qkv + b->qk.rows, width);
    float *y = take_floats(&at, tokens * b->out.inputs);
    tp_attend_each(set, p, &b->heads, b->sequences, b->count, b->layer, qkv, y);
    r = take_rounded(set, p, &at, &b->out, y, tokens);
    float *out = take_floats(&at, tokens * columns(&b->out));
    multiply(s, p, &b->out, y, &r, tokens, out, columns(&b->out));
    put_rows(out, tokens, &b->out, b->partial, 0);
}

static void mlp(int set, pool *p, mlp_block *b)
{
    const kernel_set *s = SETS[set];
    const long tokens = b->tokens;
    uint8_t *at = b->scratch;
    if (b->norm) {
        tp_norm(set, p, b->hidden, b->norm, b->eps, tokens, b->gate_up.inputs, b->normed);
        round_into(set, p, &b->gate_up, b->normed, tokens, b->x);
    }
    float *gate_up = take_floats(&at, tokens * columns(&b->gate_up));
    multiply(s, p, &b->gate_up, b->normed, &b->x, tokens, gate_up, columns(&b->gate_up));
    float *y = take_floats(&at, tokens * b->down.inputs);
    tp_gate(set, p, gate_up, tokens, b->down.inputs, y);
    const rounded r = take_rounded(set, p, &at, &b->down, y, tokens);
    float *out = take_floats(&at, tokens * columns(&b->down));
    multiply(s, p, &b->down, y, &r, tokens, out, columns(&b->down));
    put_rows(out, tokens, &b->down, b->partial, b->add);
}

/* Norm, product, activation, product: (T, H) of the local columns, of this block and the next. */
void tp_mlp(int set, pool *p, mlp_block *first)
{
    mlp(set, p, first);
    for (mlp_block *b = first->next; b; b = b->next) {
        b->normed = first->normed, b->x = first->x, b->tokens = first->tokens;
        b->partial = first->partial, b->scratch = first->scratch, b->add = 1;
        mlp(set, p, b);
    }
}

static void add(const float *x, long count, float *out)
{
    for (long i = 0; i < count; i++) out[i] += x[i];
}

/* For tp_layers: normalised rows, plain and rounded, beside what a block needs. */
long tp_layers_scratch(const layer *layers, long count)
{
    const matrix *m = &layers->mlp->gate_up;
    const long tokens = layers->attention->tokens;
    long block = 0;
    for (long i = 0; i < count; i++) {
        layers[i].attention->tokens = layers[i].mlp->tokens = tokens;
        block = most(block, tp_attention_scratch(layers[i].attention));
        block = most(block, tp_mlp_scratch(layers[i].mlp));
    }
    return block + tokens * (m->inputs * 4 + m->groups * (GROUP + 8)) + 1024;
}

/* Layers in turn, where no sum over ranks lies between their blocks: what a block computes is added
 * to the residual stream ``hidden`` (T, H), but for the last one's, which is in ``partial``. That,
 * the scratch, the sequences and the first layer's number are those of the first attention. */
void tp_layers(int set, pool *p, const layer *layers, long count, float *hidden)
{
    const attention_block *first = layers->attention;
    const matrix *gate_up = &layers->mlp->gate_up;
    const long tokens = first->tokens, size = tokens * gate_up->inputs;
    float *partial = first->partial;
    uint8_t *at = first->scratch;
    float *normed = take_floats(&at, size);
    const rounded x = room_for_rounded(&at, gate_up, tokens);
    for (long i = 0; i < count; i++) {
        attention_block *a = layers[i].attention;
        a->tokens = tokens, a->count = first->count, a->sequences = first->sequences;
        a->layer = first->layer + i, a->heads.window = layers[i].window;
        a->hidden = hidden, a->partial = partial, a->scratch = at;
        tp_attention(set, p, a);
        add(partial, size, hidden);
        mlp_block *m = layers[i].mlp;
        m->hidden = hidden, m->normed = normed, m->x = x, m->tokens = tokens;
        m->partial = partial, m->scratch = at, m->add = 0;
        tp_mlp(set, p, m);
        if (i + 1 < count) add(partial, size, hidden);
    }
}

long tp_head_scratch(const head_block *h)
{
    return h->tokens * (h->pieces->inputs * 4 + h->pieces->groups * (GROUP + 8)) + 1024;
}

void tp_head(int set, pool *p, const head_block *h)
{
    const matrix *m = h->pieces;
    uint8_t *at = h->scratch;
    float *x = take_floats(&at, h->tokens * m->inputs), *out = h->out;
    tp_norm(set, p, h->hidden, h->norm, h->eps, h->tokens, m->inputs, x);
    const rounded r = take_rounded(set, p, &at, m, x, h->tokens);
    for (; m < h->pieces + h->count; out += m->rows, m++)
        multiply(SETS[set], p, m, x, &r, h->tokens, out, h->width);
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
void tp_read(pool *p, const void *m, long lines) { pool_run(p, read_lines, (void *)m, lines, MOST_PIECE / 64); }
