/* kernels.h - what lies behind pyengine.h: the table of kernels that each instruction set fills, the
 * sharing out of work, and the few inline steps that several files need.
 *
 * A kernel works on one thread's part and never allocates.  The scalar table is complete; each
 * higher level starts as a copy of the one below and overwrites what it does better.
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

/* Rows [row0, row1) of w (already the chosen expert's matrix: data and scales point at it). */
typedef void pe_matmul_kernel(const pe_matrix *w, int64_t row0, int64_t row1,
                              const pe_activations *a, float *y, int64_t ldy);

#define PE_INFINITY_BITS 0x7f800000u
#define PE_SCALES_AT_ONCE 8

typedef struct pe_kernels {
    const char *name;

    /* One group of n <= PE_GROUP columns: q[0, n) and *scale; PE_OK or PE_ERROR_NONFINITE. */
    int32_t (*quantize_group)(const float *x, int64_t n, int16_t *q, float *scale);

    /* The bits of the greatest |x|; PE_INFINITY_BITS or more if a value is not finite. */
    uint32_t (*greatest_magnitude)(const float *x, int64_t n);
    /* One group of weights to codes: rint(x / scale), clipped to [-largest, largest]. */
    void (*encode_group)(const float *x, int64_t n, double scale, int32_t largest, int8_t *codes);
    /* sum[j] = the group's squared error with scale[j], ascending: see PE_SCALE_MSE. */
    void (*squared_errors)(const float *x, int64_t n, const double scale[PE_SCALES_AT_ONCE],
                           float largest, double sum[PE_SCALES_AT_ONCE]);
    /* n blocks of Q8_0 to float32 [n, PE_BLOCK], exact. */
    void (*load_q8_0)(const void *blocks, int64_t n, float *x);

    pe_matmul_kernel *matmul_q8_0;
    pe_matmul_kernel *matmul_int8;
    pe_matmul_kernel *matmul_int4;
    pe_matmul_kernel *matmul_f32;
    pe_matmul_kernel *matmul_f16;
    pe_matmul_kernel *matmul_bf16;

    void (*exp)(const float *x, int64_t n, float *y);
    void (*sigmoid)(const float *x, int64_t n, float *y);
    void (*silu)(const float *x, int64_t n, float *y);
    void (*softplus)(const float *x, int64_t n, float *y);

    double (*sum_squares)(const float *x, int64_t n);         /* sum8(x * x) */
    double (*sum)(const float *x, int64_t n);                 /* sum8(x) */
    void (*scale_by)(const float *x, double inv, const float *scale, int64_t n, float *y);
                                                              /* f32(x * inv) (*) scale[i] */

    /* Channels [c0, c1) of the convolution, before silu; input row j at rows[j], taps of them. */
    void (*conv_taps)(const float *const *rows, const float *weight, int64_t channels, int64_t taps,
                      int64_t c0, int64_t c1, float *y);
    /* One head, one token: pe_delta_rule's five lines; delta is scratch [dv]. */
    void (*delta_step)(float *state, const float *key, const float *query, const float *value,
                       float beta, float decay, int64_t dk, int64_t dv, float *delta, float *out);
    /* score[p] = dot16(query * key[p]) * scale for count positions, key rows ld apart. */
    void (*attention_scores)(const float *query, const float *key, int64_t ld, int64_t count,
                             int64_t n, float scale, float *score);
    /* out[j] = out[j] + e[p] * value[p, j], p ascending, value rows ld apart. */
    void (*attention_mix)(const float *e, const float *value, int64_t ld, int64_t count, int64_t n,
                          float *out);
    /* n halves to float32. */
    void (*load_f16)(const uint16_t *half, int64_t n, float *x);
} pe_kernels;

/* Rows are shared out in multiples of this, the height of the tallest tile. */
#define PE_ROW_GRAIN 32

/* The table in use. */
extern pe_kernels pe_active;

/* Each overwrites what its level does better. */
void pe_fill_scalar(pe_kernels *k);
void pe_fill_avx2(pe_kernels *k);
void pe_fill_avx512vnni(pe_kernels *k);
void pe_fill_neon(pe_kernels *k);
void pe_fill_neon_dotprod(pe_kernels *k);

/* Call task(arg, begin, end) on parts of [0, items), each a multiple of grain but the last; which
 * thread gets which part has no influence on any result.  Returns the greatest status. */
typedef int32_t pe_task(void *arg, int64_t begin, int64_t end);
int32_t pe_pool_run(pe_pool *pool, pe_task *task, void *arg, int64_t items, int64_t grain);

/* The same on the calling thread alone, in the floating-point environment of IEEE 754. */
int32_t pe_run_alone(pe_task *task, void *arg, int64_t items);

/* 64-byte aligned memory of the pool's, at least bytes long, until the next call; NULL if there is
 * none.  It grows and stays, so that a step of the model does not pay for fresh pages. */
void *pe_pool_scratch(pe_pool *pool, size_t bytes);

/* Several matmuls whose rows are shared out as one. */
typedef struct {
    pe_matrix w; /* a single matrix */
    pe_activations a;
    float *y;
    int64_t ldy;
} pe_matmul_job;
int32_t pe_matmul_many(pe_pool *pool, const pe_matmul_job *jobs, int64_t n_jobs);

/* The matrix of one expert of a stack. */
static inline pe_matrix pe_matrix_expert(const pe_matrix *w, int64_t expert)
{
    pe_matrix m = *w;
    m.data = (const char *)w->data + expert * w->expert_stride;
    if (w->scales)
        m.scales = w->scales + expert * w->scale_expert_stride;
    return m;
}

/* PE_OK if w may be multiplied: a known type whose cols it can hold. */
int32_t pe_matrix_check(const pe_matrix *w);
/* The kernel for w's type. */
pe_matmul_kernel *pe_matmul_kernel_for(int32_t type);

/* Whether a type reads float32 activations rather than quantised ones. */
static inline int pe_is_dense(int32_t type)
{
    return type == PE_F32 || type == PE_F16 || type == PE_BF16;
}

static inline int64_t pe_groups(int64_t cols) { return (cols + PE_GROUP - 1) / PE_GROUP; }

/* The correctly rounded value, slowly, of a finite x: what a fast path leaves undecided. */
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
