/* norm.c - scalar, normative: see pe_rms_norm, pe_rms_norm_gated and pe_l2_norm in pyengine.h. */
#include "kernels.h"

#include <math.h>

static double sum_squares(const float *x, int64_t n)
{
    double sum[8] = {0};
    for (int64_t i = 0; i < n; i++)
        sum[i % 8] += (double)x[i] * (double)x[i];
    return pe_tree8(sum);
}

static double sum(const float *x, int64_t n)
{
    double sum[8] = {0};
    for (int64_t i = 0; i < n; i++)
        sum[i % 8] += (double)x[i];
    return pe_tree8(sum);
}

static void scale_by(const float *x, double inv, const float *scale, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = (float)((double)x[i] * inv) * scale[i];
}

void pe_fill_scalar_norm(pe_kernels *k)
{
    k->sum_squares = sum_squares;
    k->sum = sum;
    k->scale_by = scale_by;
}

/* ---- the operations -------------------------------------------------------------------------- */

typedef struct {
    const float *x;
    int64_t ldx, heads, head_ld, n;
    const float *scale;
    double eps;
    const float *z;
    float *y;
    float l2_scale;
} norm_args;

static const float *vector_of(const norm_args *m, int64_t i)
{
    return m->x + i / m->heads * m->ldx + i % m->heads * m->head_ld;
}

static double inverse_rms(const float *x, int64_t n, double eps)
{
    return 1.0 / sqrt(pe_active.sum_squares(x, n) / (double)n + eps);
}

static int32_t rms_vectors(void *arg, int64_t begin, int64_t end)
{
    const norm_args *m = arg;
    for (int64_t i = begin; i < end; i++) {
        const float *x = vector_of(m, i);
        pe_active.scale_by(x, inverse_rms(x, m->n, m->eps), m->scale, m->n, m->y + i * m->n);
    }
    return PE_OK;
}

int32_t pe_rms_norm(pe_pool *pool, const float *x, int64_t tokens, int64_t ldx, int64_t heads,
                    int64_t head_ld, int64_t n, const float *scale, double eps, float *y)
{
    if (tokens < 0 || heads < 1 || n < 1)
        return PE_ERROR_ARGUMENT;
    norm_args m = {.x = x,
                   .ldx = ldx,
                   .heads = heads,
                   .head_ld = head_ld,
                   .n = n,
                   .scale = scale,
                   .eps = eps,
                   .y = y};
    return pe_pool_run(pool, rms_vectors, &m, tokens * heads, 8);
}

static int32_t gated_vectors(void *arg, int64_t begin, int64_t end)
{
    const norm_args *m = arg;
    float gate[256];
    for (int64_t i = begin; i < end; i++) {
        const float *x = vector_of(m, i), *z = m->z + i * m->n;
        float *y = m->y + i * m->n;
        pe_active.scale_by(x, inverse_rms(x, m->n, m->eps), m->scale, m->n, y);
        for (int64_t j = 0; j < m->n; j += 256) {
            int64_t count = pe_min(256, m->n - j);
            pe_active.silu(z + j, count, gate);
            for (int64_t c = 0; c < count; c++)
                y[j + c] *= gate[c];
        }
    }
    return PE_OK;
}

int32_t pe_rms_norm_gated(pe_pool *pool, const float *x, const float *z, int64_t rows, int64_t n,
                          const float *weight, double eps, float *y)
{
    if (rows < 0 || n < 1)
        return PE_ERROR_ARGUMENT;
    norm_args m = {
        .x = x, .ldx = n, .heads = 1, .n = n, .scale = weight, .eps = eps, .z = z, .y = y};
    return pe_pool_run(pool, gated_vectors, &m, rows, 8);
}

static int32_t l2_vectors(void *arg, int64_t begin, int64_t end)
{
    const norm_args *m = arg;
    for (int64_t i = begin; i < end; i++) {
        const float *x = vector_of(m, i);
        float *y = m->y + i * m->n;
        double inv = 1.0 / sqrt(pe_active.sum_squares(x, m->n) + 1e-6);
        for (int64_t j = 0; j < m->n; j++)
            y[j] = (float)((double)x[j] * inv) * m->l2_scale;
    }
    return PE_OK;
}

int32_t pe_l2_norm(pe_pool *pool, const float *x, int64_t tokens, int64_t ldx, int64_t heads,
                   int64_t n, float scale, float *y)
{
    if (tokens < 0 || heads < 1 || n < 1)
        return PE_ERROR_ARGUMENT;
    norm_args m = {
        .x = x, .ldx = ldx, .heads = heads, .head_ld = n, .n = n, .y = y, .l2_scale = scale};
    return pe_pool_run(pool, l2_vectors, &m, tokens * heads, 8);
}
