/* quantize.c - scalar, normative: see pe_quantize_activations in pyengine.h. */
#include "kernels.h"

#include <math.h>

static int32_t quantize_group(const float *x, int64_t n, int16_t *q, float *scale)
{
    float a = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(x[i]))
            return PE_ERROR_NONFINITE;
        a = fmaxf(a, fabsf(x[i]));
    }
    if (a < 0x1p-100f) { /* so that no scale, and no product with one, is subnormal */
        *scale = 0.0f;
        memset(q, 0, (size_t)n * sizeof *q);
        return PE_OK;
    }
    float s = a / 32767.0f;
    *scale = s;
    for (int64_t i = 0; i < n; i++)
        q[i] = (int16_t)rintf(x[i] / s);
    return PE_OK;
}

void pe_fill_scalar_quantize(pe_kernels *k) { k->quantize_group = quantize_group; }

/* ---- the operation --------------------------------------------------------------------------- */

typedef struct {
    const float *x;
    int64_t cols, groups;
    int16_t *q;
    float *scales;
} quantize_args;

static int32_t quantize_groups(void *arg, int64_t begin, int64_t end)
{
    const quantize_args *z = arg;
    for (int64_t i = begin; i < end; i++) {
        int64_t t = i / z->groups, g = i % z->groups;
        int64_t n = pe_min(PE_GROUP, z->cols - g * PE_GROUP);
        int16_t *q = z->q + i * PE_GROUP;
        int32_t status = pe_active.quantize_group(z->x + t * z->cols + g * PE_GROUP, n, q,
                                                  z->scales + i);
        if (status)
            return status;
        memset(q + n, 0, (size_t)(PE_GROUP - n) * sizeof *q);
    }
    return PE_OK;
}

int32_t pe_quantize_activations(pe_pool *pool, const float *x, int64_t tokens, int64_t cols,
                                int16_t *q, float *scales)
{
    if (tokens < 0 || cols < 1)
        return PE_ERROR_ARGUMENT;
    quantize_args z = {x, cols, pe_groups(cols), q, scales};
    return pe_pool_run(pool, quantize_groups, &z, tokens * z.groups, 64);
}
