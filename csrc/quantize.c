/* quantize.c - scalar, normative: see pe_quantize_activations in pyengine.h. */
#include "kernels.h"

#include <math.h>

/* The bits of a float32 without its sign have the order of the magnitudes; infinity and NaN are
 * above all finite values. */
static uint32_t greatest_magnitude(const float *x, int64_t n)
{
    int32_t most = 0; /* signed: SSE2 compares no other */
    for (int64_t i = 0; i < n; i++) {
        const int32_t magnitude = (int32_t)(pe_float_to_bits(x[i]) & 0x7fffffffu);
        most = magnitude > most ? magnitude : most;
    }
    return (uint32_t)most;
}

static int32_t quantize_group(const float *x, int64_t n, int16_t *q, float *scale)
{
    const uint32_t bits = greatest_magnitude(x, n);
    if (bits >= PE_INFINITY_BITS)
        return PE_ERROR_NONFINITE;
    const float a = pe_bits_to_float(bits);
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

void pe_fill_scalar_quantize(pe_kernels *k)
{
    k->greatest_magnitude = greatest_magnitude;
    k->quantize_group = quantize_group;
}

/* ---- the operation --------------------------------------------------------------------------- */

typedef struct {
    const float *x;
    int64_t cols, groups;
    int16_t *q;
    float *scales;
    int32_t *sums;
} quantize_args;

static void sum_parts(const int16_t *restrict q, int32_t *restrict sums)
{
    for (int p = 0; p < PE_GROUP / PE_PART; p++) {
        int32_t sum = 0;
        for (int i = 0; i < PE_PART; i++)
            sum += q[p * PE_PART + i];
        sums[p] = sum;
    }
}

static int32_t quantize_groups(void *arg, int64_t begin, int64_t end)
{
    const quantize_args *z = arg;
    for (int64_t i = begin; i < end; i++) {
        int64_t t = i / z->groups, g = i % z->groups;
        int64_t n = pe_min(PE_GROUP, z->cols - g * PE_GROUP);
        int16_t *q = z->q + i * PE_GROUP;
        int32_t status =
            pe_active.quantize_group(z->x + t * z->cols + g * PE_GROUP, n, q, z->scales + i);
        if (status)
            return status;
        memset(q + n, 0, (size_t)(PE_GROUP - n) * sizeof *q);
        sum_parts(q, z->sums + i * (PE_GROUP / PE_PART));
    }
    return PE_OK;
}

int32_t pe_quantize_activations(pe_pool *pool, const float *x, int64_t tokens, int64_t cols,
                                int16_t *q, float *scales, int32_t *sums)
{
    if (tokens < 0 || cols < 1)
        return PE_ERROR_ARGUMENT;
    quantize_args z = {x, cols, pe_groups(cols), q, scales, sums};
    return pe_pool_run(pool, quantize_groups, &z, tokens * z.groups, 64);
}
