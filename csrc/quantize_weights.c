/* quantize_weights.c - see pe_quantize_weights in pyengine.h. */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>

static double f16_value(uint16_t bits) { return (double)pe_f16_to_float(bits); }

/* ---- one row --------------------------------------------------------------------------------- */

static uint16_t absmax_scale(float amax, int32_t largest)
{
    uint16_t scale = pe_f16_nearest((double)amax / largest);
    if (scale == 0)
        scale = 1;
    if ((double)amax >=
        (largest + 0.5) * f16_value(scale)) /* exact; the tie's even side is beyond */
        scale++;
    return scale;
}

/* The candidates of PE_SCALE_MSE, f16(absmax * (256 - i) / 256), are tried LANES at a time. */
#define CANDIDATES 65
#define LANES PE_SCALES_AT_ONCE

/* A quotient in float32 gives the same code: see quantize_weights_avx2.h.  Adding and subtracting
 * 1.5 * 2^23 is rint, except for the sign of a zero, which no square shows; sums vectorise. */
static void squared_errors(const float *x, int64_t n, const double *scale, float largest,
                           double *sum)
{
    const float round = 0x1.8p23f;
    float s[LANES];
    for (int j = 0; j < LANES; j++) {
        s[j] = (float)scale[j];
        sum[j] = 0.0;
    }
    for (int64_t i = 0; i < n; i++) {
        for (int j = 0; j < LANES; j++) {
            float code = (x[i] / s[j] + round) - round;
            code = code > largest ? largest : code;
            code = code < -largest ? -largest : code;
            const double error = (double)x[i] - (double)code * scale[j];
            sum[j] += error * error;
        }
    }
}

/* Whether clipping the greatest magnitude alone costs `least` or more.  Then it does so with any
 * smaller scale, and the rest of a group can only add to the cost. */
static int clips_too_much(double amax, double scale, double largest, double least)
{
    const double error = amax - largest * scale;
    return rint(amax / scale) > largest && error * error >= least;
}

static uint16_t mse_scale(const float *x, int64_t n, double amax, uint16_t absmax, int32_t largest)
{
    uint16_t best = absmax, candidate[LANES];
    double least = INFINITY, scale[LANES], sum[LANES];
    for (int first = 0; first < CANDIDATES && least > 0.0; first += LANES) {
        for (int j = 0; j < LANES; j++) {
            candidate[j] = pe_f16_nearest(f16_value(absmax) * ((256 - first - j) / 256.0));
            scale[j] = candidate[j] ? f16_value(candidate[j]) : 1.0;
        }
        if (!candidate[0] || clips_too_much(amax, scale[0], largest, least))
            break;
        pe_active.squared_errors(x, n, scale, (float)largest, sum);
        for (int j = 0; j < LANES && first + j < CANDIDATES && candidate[j]; j++) {
            if (sum[j] < least) {
                least = sum[j];
                best = candidate[j];
            }
        }
    }
    return best;
}

static int32_t quantize_weight_group(const float *x, int64_t n, int32_t largest, int32_t method,
                                     int8_t *codes, uint16_t *scale)
{
    const uint32_t bits = pe_active.greatest_magnitude(x, n);
    if (bits >= PE_INFINITY_BITS)
        return PE_ERROR_NONFINITE;
    const float amax = pe_bits_to_float(bits);
    if (amax == 0.0f) {
        *scale = 0;
        memset(codes, 0, (size_t)n);
        return PE_OK;
    }
    *scale = absmax_scale(amax, largest);
    if (*scale >= PE_F16_INFINITY)
        return PE_ERROR_NONFINITE;
    if (method == PE_SCALE_MSE)
        *scale = mse_scale(x, n, amax, *scale, largest);
    pe_active.encode_group(x, n, f16_value(*scale), largest, codes);
    return PE_OK;
}

/* Codes of one group; only a scale of the MSE method clips. */
static void encode_group(const float *x, int64_t n, double scale, int32_t largest, int8_t *codes)
{
    for (int64_t i = 0; i < n; i++) {
        double code = rint((double)x[i] / scale);
        codes[i] = (int8_t)(code > largest ? largest : code < -largest ? -largest : code);
    }
}

void pe_fill_scalar_quantize_weights(pe_kernels *k)
{
    k->encode_group = encode_group;
    k->squared_errors = squared_errors;
}

/* ---- the operation --------------------------------------------------------------------------- */

typedef struct {
    pe_matrix w;
    const int64_t *row_order, *col_order;
    int64_t row0, group_size;
    int32_t largest, method;
    int8_t *codes;
    uint16_t *scales;
} weights_args;

static int32_t quantize_row(const weights_args *q, int64_t i, float *x, float *ordered)
{
    const int64_t cols = q->w.cols, groups = (cols + q->group_size - 1) / q->group_size;
    const int64_t row = q->row0 + i;
    const pe_weight_type *type = pe_type(q->w.type);
    const int64_t stored = q->row_order ? q->row_order[row] : row;
    type->load((const char *)q->w.data + stored * (cols / type->block_cols) * type->block_bytes,
               cols, x);
    if (q->col_order) {
        for (int64_t c = 0; c < cols; c++)
            ordered[c] = x[q->col_order[c]];
        x = ordered;
    }
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = g * q->group_size;
        int32_t status = quantize_weight_group(x + first, pe_min(q->group_size, cols - first),
                                               q->largest, q->method, q->codes + i * cols + first,
                                               q->scales + i * groups + g);
        if (status)
            return status;
    }
    return PE_OK;
}

static int32_t quantize_rows(void *arg, int64_t begin, int64_t end)
{
    const weights_args *q = arg;
    int32_t status = PE_OK;
    float *x = malloc((size_t)q->w.cols * 2 * sizeof *x);
    if (!x)
        return PE_ERROR_MEMORY;
    for (int64_t i = begin; i < end && !status; i++)
        status = quantize_row(q, i, x, x + q->w.cols);
    free(x);
    return status;
}

int32_t pe_quantize_weights(pe_pool *pool, const pe_matrix *w, int64_t expert,
                            const int64_t *row_order, const int64_t *col_order, int64_t row0,
                            int64_t row1, int32_t largest, int64_t group_size, int32_t method,
                            int8_t *codes, uint16_t *scales)
{
    int32_t status = pe_matrix_check(w);
    if (status)
        return status;
    if (!pe_type(w->type)->load || row0 < 0 || row1 > w->rows || row0 > row1 ||
        (largest != 127 && largest != 7) || group_size < 1 ||
        (method != PE_SCALE_ABSMAX && method != PE_SCALE_MSE))
        return PE_ERROR_ARGUMENT;
    weights_args q = {pe_matrix_expert(w, expert),
                      row_order,
                      col_order,
                      row0,
                      group_size,
                      largest,
                      method,
                      codes,
                      scales};
    return pe_pool_run(pool, quantize_rows, &q, row1 - row0, 8);
}

/* ---- packing --------------------------------------------------------------------------------- */

typedef struct {
    const int8_t *codes;
    uint8_t *packed;
} pack_args;

static void pack(const int8_t *restrict codes, int64_t n, uint8_t *restrict packed)
{
    for (int64_t i = 0; i < n; i++)
        packed[i] = (uint8_t)(((codes[2 * i] + 8) & 15) | (codes[2 * i + 1] + 8) << 4);
}

static int32_t pack_part(void *arg, int64_t begin, int64_t end)
{
    const pack_args *a = arg;
    pack(a->codes + 2 * begin, end - begin, a->packed + begin);
    return PE_OK;
}

int32_t pe_pack_int4(pe_pool *pool, const int8_t *codes, int64_t n, uint8_t *packed)
{
    pack_args a = {codes, packed};
    return pe_pool_run(pool, pack_part, &a, n, 1 << 16);
}
