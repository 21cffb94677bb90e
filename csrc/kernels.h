/* kernels.h - the internal interface: the table of kernels that each instruction set fills, the
 * sharing out of work, and the few inline steps that several files need.
 *
 * A kernel works on one thread's part and never allocates.  The scalar table is complete; the table
 * of each higher level starts as a copy of the table below it, and overwrites the entries that the
 * level computes faster.
 */
#ifndef PYENGINE_KERNELS_H
#define PYENGINE_KERNELS_H

#include "pyengine.h"

#include <stddef.h>
#include <string.h>

#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0
#error "float expressions must be rounded to float: build for SSE2 or better"
#endif
#ifdef __FAST_MATH__
#error "-ffast-math changes results: build without it"
#endif

/* Before a function whose constant arguments must be constants in its body. */
#define PE_INLINE static inline __attribute__((always_inline))

/* ---- weight types ---------------------------------------------------------------------------- */

/* What the operations must know of a weight type.  Each type has one row in the kernel table below;
 * the type's scalar file fills the row.  A row of zeros: the type does not exist. */
typedef struct {
    int64_t block_cols;  /* cols is a multiple of this */
    int64_t block_bytes; /* of block_cols columns of one row */
    int dense;           /* a matmul reads float32 activations; otherwise q and scales */
    int sums;            /* it reads sums too */
    int scaled;          /* the scales are an array beside data, one per row and PE_GROUP columns */
    /* One row at any address to float32 [cols], exact.  NULL: not for pe_quantize_weights. */
    void (*load)(const void *row, int64_t cols, float *x);
} pe_weight_type;

/* Rows [row0, row1) of w (already the chosen expert's matrix: data and scales point at it). */
typedef void pe_matmul_kernel(const pe_matrix *w, int64_t row0, int64_t row1,
                              const pe_activations *a, float *y, int64_t ldy);

/* The same from activations that split_tokens has rewritten.  next: rows of the same type and cols
 * that the thread will read after these, or NULL. */
typedef void pe_split_matmul_kernel(const pe_matrix *w, int64_t row0, int64_t row1, int64_t tokens,
                                    const void *split, float *y, int64_t ldy, const void *next);
#define PE_SPLIT_TOKENS 16 /* in a block of rewritten tokens */
#define PE_SPLIT_BYTES (PE_SPLIT_TOKENS * (2 * PE_GROUP + 5 * 4)) /* of a block and group */

/* The machines that can build the AMX level: its instructions are written as assembly, which an
 * assembler knows that comes with a compiler that has one of these headers. */
#if defined(PE_HAVE_AVX512AMX) || defined(PE_AVX512)
#if defined(__linux__) && (__has_include(<amxint8intrin.h>) || __has_include(<amxintrin.h>))
#define PE_AMX
#endif
#endif

#define PE_INFINITY_BITS 0x7f800000u
#define PE_SCALES_AT_ONCE 8
#define PE_F16_INFINITY 0x7c00

/* ---- the kernel table ------------------------------------------------------------------------ */

/* One value head of pe_delta_rule at one token. */
typedef struct {
    float *state; /* [dk, dv] */
    const float *key, *query, *value;
    float beta, decay;
    int64_t dk, dv;
    float *out;   /* [dv] */
    float *delta; /* scratch [dv], for levels that do not keep delta in registers */
} pe_delta_head;

/* pe_add_products. */
typedef struct {
    const double *a, *b;
    int64_t tokens, m, n;
    int32_t lower;
    double *out;
} pe_products;

/* Columns of pe_factor whose products are subtracted from the rest in one go. */
#define PE_PANEL 64

/* Columns [k0, k1) of pe_factor. */
typedef struct {
    double *h;
    int64_t n, k0, k1;
    double u[PE_PANEL * PE_PANEL]; /* u[j, k] of the panel's own rows at [k * PE_PANEL + j] */
} pe_panel;

/* pe_round_weights. */
typedef struct {
    const float *w;
    const double *b, *f, *d;
    int64_t rows, n, group;
    int32_t largest;
    int8_t *codes;
    uint16_t *scales;
} pe_rounding;

typedef struct pe_kernels {
    const char *name;

    /* By PE_F32, PE_F16, ... */
    pe_weight_type type[PE_TYPES];
    pe_matmul_kernel *matmul[PE_TYPES];
    /* split_least tokens or more, whose q, scales and (only with_sums) sums are rewritten once for
     * all rows: blocks [block0, block1) of PE_SPLIT_TOKENS tokens -> to, 64-byte aligned,
     * PE_SPLIT_BYTES for each block and group.  NULL: matmul reads any number as they are. */
    pe_split_matmul_kernel *split_matmul[PE_TYPES];
    int64_t split_least[PE_TYPES];
    void (*split_tokens)(const pe_activations *a, int with_sums, int64_t block0, int64_t block1,
                         void *to);

    /* One group of n <= PE_GROUP columns: q[0, n) and *scale; PE_OK or PE_ERROR_NONFINITE. */
    int32_t (*quantize_group)(const float *x, int64_t n, int16_t *q, float *scale);

    /* The bits of the greatest |x|; PE_INFINITY_BITS or more if a value is not finite. */
    uint32_t (*greatest_magnitude)(const float *x, int64_t n);
    /* One group of weights to codes: rint(x / scale), clipped to [-largest, largest]. */
    void (*encode_group)(const float *x, int64_t n, double scale, int32_t largest, int8_t *codes);
    /* sum[j] = the group's squared error with scale[j], ascending: see PE_SCALE_MSE. */
    void (*squared_errors)(const float *x, int64_t n, const double scale[PE_SCALES_AT_ONCE],
                           float largest, double sum[PE_SCALES_AT_ONCE]);

    void (*exp)(const float *x, int64_t n, float *y);
    void (*sigmoid)(const float *x, int64_t n, float *y);
    void (*silu)(const float *x, int64_t n, float *y);
    void (*softplus)(const float *x, int64_t n, float *y);

    double (*sum_squares)(const float *x, int64_t n); /* sum8(x * x) */
    double (*sum)(const float *x, int64_t n);         /* sum8(x) */
    /* f32(x * inv) (*) scale[i] */
    void (*scale_by)(const float *x, double inv, const float *scale, int64_t n, float *y);

    /* Channels [c0, c1) of the convolution, before silu; input row j at rows[j], taps of them. */
    void (*conv_taps)(const float *const *rows, const float *weight, int64_t channels, int64_t taps,
                      int64_t c0, int64_t c1, float *y);
    /* The five lines of pe_delta_rule. */
    void (*delta_step)(const pe_delta_head *head);
    /* score[p * ld_score + r] = dot16(query[r] * key[p]) * scale for some keys p and rows r; key
     * rows ld apart. */
    void (*attention_scores)(const float *const *query, int64_t rows, const float *key, int64_t ld,
                             int64_t keys, int64_t n, float scale, float *score, int64_t ld_score);
    /* greatest[r] = the greatest of it and the scores of row r; 0 if a score is not finite. */
    int (*attention_greatest)(const float *score, int64_t ld, int64_t rows, int64_t keys,
                              float *greatest);
    /* score to e = exp(score - greatest[r]), in place; e of key p is added to sum[(first + p) % 8][r].
     * The rows of sum are ld_sum apart; up to 7 elements past its `rows` get +0 added. */
    void (*attention_weigh)(float *score, int64_t ld, int64_t rows, int64_t keys,
                            const float *greatest, int64_t first, double *sum, int64_t ld_sum);
    /* out[r][j] = out[r][j] + e[p * ld_e + r] * value[p, j], p ascending, value rows ld apart. */
    void (*attention_mix)(const float *e, int64_t ld_e, int64_t rows, const float *value,
                          int64_t ld, int64_t keys, int64_t n, float *const *out);
    /* n halves to float32. */
    void (*load_f16)(const uint16_t *half, int64_t n, float *x);

    /* Rows [row0, row1) of out. */
    void (*products_rows)(const pe_products *p, int64_t row0, int64_t row1);
    /* sums[j0, j1) of pe_add_squares. */
    void (*squares_columns)(const float *x, int64_t tokens, int64_t n, int64_t j0, int64_t j1,
                            double *sums);
    /* Of rows [row0, row1) below the panel: v in its columns, and u beside it. */
    void (*factor_rows)(const pe_panel *f, int64_t row0, int64_t row1);
    /* Their columns behind the panel, up to the diagonal, less the panel's terms. */
    void (*subtract_panel)(const pe_panel *f, int64_t row0, int64_t row1);
    /* Rows [row0, row0 + rows_rounded) of pe_round_weights, as far as there are; PE_OK or
     * PE_ERROR_NONFINITE.  memory: scratch [2 n + 2 group, rows_rounded], 64-byte aligned. */
    int64_t rows_rounded;
    int32_t (*round_rows)(const pe_rounding *r, int64_t row0, double *memory);
} pe_kernels;

/* Rows are shared out in multiples of this, the height of the tallest tile. */
#define PE_ROW_GRAIN 32

/* The table in use. */
extern pe_kernels pe_active;

/* Each overwrites the entries that its level computes faster. */
void pe_fill_scalar(pe_kernels *k);
void pe_fill_avx2(pe_kernels *k);
void pe_fill_avx512vnni(pe_kernels *k);
void pe_fill_avx512amx(pe_kernels *k);
void pe_fill_neon(pe_kernels *k);
void pe_fill_neon_dotprod(pe_kernels *k);

/* A weight type may have files of its own: matmul_TYPE.c (scalar: its row and its kernel) and
 * matmul_TYPE_LEVEL.c, with the functions pe_fill_scalar_TYPE(k) and pe_fill_LEVEL_TYPE(k).  A
 * level without a file for the type uses the kernel of the level below.  Files of both x86 levels
 * can share their code in matmul_TYPE_x86.h: see simd_x86.h.
 *
 * No list names these files.  csrc/build.py finds them and compiles each level with PE_TYPE_FILES,
 * which is PE_TYPE_FILE(TYPE) for each file of the level.  The fill function of a level defines
 * PE_TYPE_FILE as PE_FILL_TYPE of the level; PE_TYPE_FILES then calls the functions. */
#ifndef PE_TYPE_FILES
#error "compile with the flags of csrc/build.py"
#endif
#define PE_FILL_TYPE(level, type, k)                                                               \
    {                                                                                              \
        void pe_fill_##level##_##type(pe_kernels *);                                               \
        pe_fill_##level##_##type(k);                                                               \
    }

/* ---- work ------------------------------------------------------------------------------------ */

/* Call task(arg, begin, end) on parts of [0, items), each a multiple of grain except the last.  The
 * thread that computes a part has no influence on any result.  Returns the greatest status. */
typedef int32_t pe_task(void *arg, int64_t begin, int64_t end);
int32_t pe_pool_run(pe_pool *pool, pe_task *task, void *arg, int64_t items, int64_t grain);

/* The same on the calling thread alone, in the floating-point environment of IEEE 754. */
int32_t pe_run_alone(pe_task *task, void *arg, int64_t items);

/* 64-byte aligned memory of the pool, at least bytes long, valid until the next call; NULL if there
 * is not enough memory.  The block grows and is kept, so that a step of the model does not pay for
 * fresh pages. */
void *pe_pool_scratch(pe_pool *pool, size_t bytes);

/* Memory of the pool for PE_POOL_SPLIT bytes of rewritten tokens, 64-byte aligned; NULL if there is
 * none.  It is beside the scratch. */
#define PE_POOL_SPLIT ((int64_t)4 << 20)
void *pe_pool_split(pe_pool *pool);

/* Several matmuls whose rows are shared out as one. */
typedef struct {
    pe_matrix w; /* a single matrix */
    pe_activations a;
    float *y;
    int64_t ldy;
} pe_matmul_job;
int32_t pe_matmul_jobs(pe_pool *pool, const pe_matmul_job *jobs, int64_t n_jobs);

/* The matrix of one expert of a stack. */
static inline pe_matrix pe_matrix_expert(const pe_matrix *w, int64_t expert)
{
    pe_matrix m = *w;
    m.data = (const char *)w->data + expert * w->expert_stride;
    if (w->scales)
        m.scales = w->scales + expert * w->scale_expert_stride;
    return m;
}

/* The row of a type; for any other number a row of zeros. */
const pe_weight_type *pe_type(int32_t type);

/* PE_OK if w may be multiplied: the type is known and can hold w's cols. */
int32_t pe_matrix_check(const pe_matrix *w);

/* Whether a has the arrays that a matrix of this type reads. */
static inline int pe_has_form_for(const pe_activations *a, int32_t type)
{
    const pe_weight_type *t = pe_type(type);
    return t->dense ? a->x != NULL : a->q && a->scales && (!t->sums || a->sums);
}

/* ---- a call of pe_experts and its cache ------------------------------------------------------- */

/* tokens of a call, and the number of them that chose each expert, uses [experts] -> order: the n
 * experts in use, first those that are in memory, as many as the result.  The others are asked for.
 * order must live until the end of the call. */
int64_t pe_expert_cache_begin(pe_expert_cache *cache, int64_t layer, int64_t tokens,
                              const int64_t *uses, int32_t *order, int64_t *n);
/* Waits for order[from]; order[from, *to) are in memory then.  Everything before `from` has been
 * released.  PE_ERROR_READ, PE_ERROR_NONFINITE. */
int32_t pe_expert_cache_wait(pe_expert_cache *cache, int64_t from, int64_t *to);
/* order[from, to) are computed: their slots may be used for what was not asked for yet. */
void pe_expert_cache_release(pe_expert_cache *cache, int64_t from, int64_t to);
/* After every begin, also after an error. */
void pe_expert_cache_end(pe_expert_cache *cache);
/* Where an expert is that is in memory and not released. */
pe_expert_place pe_expert_cache_place(const pe_expert_cache *cache, int64_t layer, int64_t expert);

/* ---- small steps ----------------------------------------------------------------------------- */

static inline int64_t pe_groups(int64_t cols) { return (cols + PE_GROUP - 1) / PE_GROUP; }

/* The correctly rounded value for a finite x, slowly: for arguments that fast paths leave open. */
float pe_exp_exact(float x);
float pe_sigmoid_exact(float x);
float pe_silu_exact(float x);

static inline int64_t pe_min(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float pe_bits_to_float(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint32_t pe_float_to_bits(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static inline float pe_bf16_to_float(uint16_t h) { return pe_bits_to_float((uint32_t)h << 16); }

/* Exact: every half is a float32.  A subnormal half is a small integer times 2^-24. */
static inline float pe_f16_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = (h >> 10) & 0x1fu;
    uint32_t mantissa = h & 0x3ffu;
    if (exponent == 0) {
        float magnitude = (float)mantissa * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    if (exponent == 31)
        return pe_bits_to_float(sign | 0x7f800000u | (mantissa << 13));
    return pe_bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

/* The nearest float16 to v >= 0, ties to even, as bits; infinity from 65520 on. */
static inline uint16_t pe_f16_nearest(double v)
{
    if (v >= 65520.0)
        return PE_F16_INFINITY;
    if (v < 0x1p-14) /* subnormal: multiples of 2^-24, to which a sum with 2^28 is rounded */
        return (uint16_t)(((v + 0x1p28) - 0x1p28) * 0x1p24);
    /* 42 of the 52 bits of the mantissa are dropped; a carry out of it increases the exponent. */
    uint64_t bits;
    memcpy(&bits, &v, sizeof bits);
    bits += ((UINT64_C(1) << 41) - 1) + ((bits >> 42) & 1);
    return (uint16_t)((bits >> 42) - ((1023 - 15) << 10));
}

/* 2^(e - 128), exact: a subnormal for e < 2. */
static inline float pe_e8m0_half_to_float(uint8_t e)
{
    return pe_bits_to_float(e < 2 ? UINT32_C(0x00200000) << e : (uint32_t)(e - 1) << 23);
}

/* The codes of nibbles, of the types that have a table. */
static const int8_t pe_iq4_nl_codes[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                           1,    13,   25,  38,  53,  69,  89,  113};
static const int8_t pe_mxfp4_codes[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* Exponents of all ones are NaN and infinity; without a branch, so that it vectorises. */
static inline int pe_all_finite(const float *x, int64_t n)
{
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++)
        bad |= (pe_float_to_bits(x[i]) & PE_INFINITY_BITS) == PE_INFINITY_BITS;
    return !bad;
}

static inline uint16_t pe_load_u16(const void *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* The tree of sum8. */
static inline double pe_tree8(const double a[8])
{
    double b[4], c[2];
    for (int i = 0; i < 4; i++)
        b[i] = a[i] + a[i + 4];
    for (int i = 0; i < 2; i++)
        c[i] = b[i] + b[i + 2];
    return c[0] + c[1];
}

/* The tree of dot16. */
static inline float pe_tree16(const float a[16])
{
    float b[8], c[4], d[2];
    for (int i = 0; i < 8; i++)
        b[i] = a[i] + a[i + 8];
    for (int i = 0; i < 4; i++)
        c[i] = b[i] + b[i + 4];
    for (int i = 0; i < 2; i++)
        d[i] = c[i] + c[i + 2];
    return d[0] + d[1];
}

#endif
