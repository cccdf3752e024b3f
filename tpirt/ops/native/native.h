/* Products of matrices in tpirt's tiles with vectors, for one set of instructions.
 *
 * Axes: N output rows, K inputs (a multiple of 32), G = K / 32 groups, T tokens (rows of input).
 * A tile is 16 rows x 32 inputs; a block is the G tiles of 16 rows.
 *
 * 4 bits.  codes uint8 (N / 16, G, 4, 16, 4): byte (j, r, i) of a tile holds the code of row r and
 *   input 8 j + i in its low and of input 8 j + 4 + i in its high half, so that a line of 64 bytes
 *   is one vector of 16 rows whose four neighbouring inputs are summed by one instruction.
 *   scales uint16 (N / 16, G, 16): exponent (5 bits), mantissa (4), offset (7), from the top.
 *     scale  s = 2^(exponent - 27) * (1 + mantissa / 16)
 *     weight   = s * (code - 8 + (offset - 64) / 12)           Q4, affine
 *              = s * (levels[code] + 2 * (offset - 64))        NL4, a codebook of 16 levels
 *   Levels are ascending integers from -127 to 127.
 * 8 bits.  codes int8 (N / 16, G, 8, 16, 4): byte (j, r, i) is the code of input 4 j + i.
 *   scales float (N).   weight = scale * code
 * 16 bits. bfloat16 or float16 (N, K), as in a checkpoint; any K.
 *
 * Inputs of the first two are rounded to 8 bits per group: x ~ d * q, d = max |x| / 127.
 * Sums within a group are exact integers; over groups they are float32, in ascending order, with
 * the same operations in every set. So a result's bits depend only on its row of weights and its
 * row of input.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum { TILE_ROWS = 16, GROUP = 32, Q4_TILE = 256, Q8_TILE = 512, LEVELS = 16, TREE = 64 };

/* Rounded inputs of T tokens. */
typedef struct {
    const int8_t *q;    /* (T, K) */
    const float *scale; /* (T, G): d */
    const float *sum;   /* (T, G): the sum of q of a group */
    long groups;
} rounded;

/* Attention of one sequence's new tokens. D, the size of a head, is a multiple of 16. */
typedef struct {
    float *qkv; /* (T, queries + 2 keys, D): queries, keys, values; turned in place */
    const float *cos, *sin;        /* (T, D); the first half of sin is negated */
    const float *q_norm, *k_norm;  /* (D,) or NULL */
    void *all_keys, *all_values;   /* (keys, capacity, D) bfloat16; with scales int8 */
    uint16_t *key_scales, *value_scales; /* (keys, capacity) bfloat16, or NULL; x ~ scale * code */
    const int32_t *groups;         /* (keys,): query heads of each KV head */
    const int32_t *parents; /* (T,), T <= TREE: a row follows the one so many rows before it, or, if
                             * there is none, what is cached. NULL: each follows the one before */
    float *out;                    /* (T, queries, D) */
    long tokens, past, capacity, queries, keys, dim;
    long window; /* a token sees itself and window - 1 before it; 0: all */
    float eps;
} attention;

enum { Q4, NL4, Q8, BF16, F16 }; /* how weights are kept */

/* A matrix, and the bias of its product or NULL. Products have ``blocks`` x 16 columns:
 * what is beyond column N is padding. */
typedef struct {
    const void *codes, *scales; /* 16 bits: the weights, and none */
    const float *bias;
    long rows, inputs, blocks, groups; /* N, K, N / 16 and K / 32, rounded up */
    int kind;
    int8_t levels[LEVELS]; /* of NL4 */
} matrix;

/* The keys and values of a sequence in a layer, as ``attention`` has them. */
typedef struct {
    void *keys, *values;
    uint16_t *key_scales, *value_scales;
    long capacity;
} kv_room;

/* A sequence's rows in a step: where each layer has its keys and values, the rotation of its first
 * row, how they follow each other, the number of rows, and of positions before them. */
typedef struct {
    const kv_room *rooms;
    const float *cos, *sin;
    const int32_t *parents;
    long tokens, past;
} sequence;

/* A block of a layer for some tokens; ``scratch`` is as large as the functions below say. */
typedef struct {
    const float *hidden; /* (T, H) */
    const float *norm;   /* (H,) */
    matrix qk, v, out; /* the first two both in 16 bits, or neither */
    attention heads; /* what all sequences share */
    float *partial;  /* (T, H) */
    void *scratch;
    const sequence *sequences; /* of the rows, in order */
    long count, tokens, layer; /* of sequences; T; number of the layer */
    float eps;
} attention_block;

typedef struct mlp_block {
    struct mlp_block *next; /* with further columns, and the same rows; or NULL */
    const float *hidden;
    const float *norm; /* NULL: the normalised rows are there already */
    float *normed;     /* (T, H) */
    rounded x;         /* of them; not for 16-bit weights */
    matrix gate_up, down;
    float *partial; /* (T, H) */
    void *scratch;
    long tokens;
    int add; /* to what is in ``partial`` */
    float eps;
} mlp_block;

/* A layer of tp_layers: its attention, the first block of its MLP, and how far a token sees. */
typedef struct {
    attention_block *attention;
    mlp_block *mlp;
    long window;
} layer;

/* The LM head for some tokens: norm, and the products of its pieces beside each other. */
typedef struct {
    const float *hidden, *norm; /* (T, H), (H,) */
    const matrix *pieces;       /* of equal inputs; all but the last one of whole blocks */
    float *out;                 /* (T, width) */
    void *scratch;
    long count, tokens, width; /* of pieces; T; the rows of all blocks */
    float eps;
} head_block;

/* What one set of instructions provides. ``first`` and ``last`` are blocks of 16 rows in q4, q8 and
 * dense, single rows in bf16 and f16, KV heads in attend. */
typedef struct {
    const char *name;
    /* Round x (T, K) float32 per 32 inputs; K need not be a multiple, the rest is 0. */
    void (*round)(const float *x, long tokens, long inputs, int8_t *q, float *scale, float *sum);
    /* out (T, ldo) float32 of blocks of 16 rows; q4 of both forms of 4 bits. */
    void (*q4)(const matrix *m, const rounded *x, long tokens, long first, long last, float *out,
               long ldo);
    void (*q8)(const matrix *m, const rounded *x, long tokens, long first, long last, float *out,
               long ldo);
    /* Single rows of (N, K) bfloat16 or float16 with x (T, K) float32. */
    void (*bf16)(const uint16_t *w, const float *x, long tokens, long inputs, long first,
                 long last, float *out, long ldo);
    void (*f16)(const uint16_t *w, const float *x, long tokens, long inputs, long first,
                long last, float *out, long ldo);
    /* Round w (rows <= 16, inputs) to a block of 4-bit tiles, of a codebook where ``levels`` are not
     * NULL; padding rows are 0. */
    void (*fit4)(const float *w, long rows, long inputs, const int8_t *levels, uint8_t *codes,
                 uint16_t *scales);
    /* Blocks of tiles to (rows, K), float32 or (half) bfloat16; 8 bits without scales. */
    void (*dense4)(const matrix *m, long first, long last, void *out, int half);
    void (*dense8)(const matrix *m, long first, long last, void *out, int half);
    /* n float16 to bfloat16. */
    void (*narrow)(const uint16_t *w, long n, uint16_t *out);
    /* x / rms(x) * weight of rows (T, n), and silu(gate) * up of rows (T, 2 n). */
    void (*norm)(const float *x, const float *weight, float eps, long tokens, long n, float *out);
    void (*gate)(const float *x, long tokens, long n, float *out);
    void (*append)(const attention *a);
    void (*attend)(const attention *a, long first, long last); /* of the KV heads */
} kernel_set;

/* Whether the compiler takes these instructions for single functions. */
#if defined(__apple_build_version__)
#define AVX_VNNI (__clang_major__ >= 13)
#define AMX_INT8 0 /* no Mac has it */
#define NEON_DOT (__clang_major__ >= 15)
#elif defined(__clang__)
#define AVX_VNNI (__clang_major__ >= 12)
#define AMX_INT8 (__clang_major__ >= 13)
#define NEON_DOT (__clang_major__ >= 16)
#else
#define AVX_VNNI (__GNUC__ >= 11)
#define AMX_INT8 (__GNUC__ >= 11)
#define NEON_DOT (__GNUC__ >= 10)
#endif

/* Each has a file of its own, set_*.c, which is empty for other CPUs. */
extern const kernel_set scalar_set;
extern const kernel_set avx2_set, avxvnni_set, avx512_set, amx_set;
extern const kernel_set neon_set, dotprod_set, i8mm_set;

const kernel_set *native_set(int set); /* 0: plain C; better ones follow */
