/* compensate.c - scalar, normative: see pe_add_products, pe_factor and pe_round_weights in
 * pyengine.h. The loops are in compensate_steps.h, which every level compiles for its registers. */
#define _POSIX_C_SOURCE 200809L
#include "compensate_steps.h"

#include <stdlib.h>

void pe_fill_scalar_compensate(pe_kernels *k) { fill_compensate(k); }

/* ---- products of activations ----------------------------------------------------------------- */

static int32_t add_rows(void *arg, int64_t begin, int64_t end)
{
    pe_active.products_rows(arg, begin, end);
    return PE_OK;
}

int32_t pe_add_products(pe_pool *pool, const double *a, const double *b, int64_t tokens, int64_t m,
                        int64_t n, int32_t lower, double *out)
{
    if (tokens < 0 || m < 1 || n < 1 || (lower && m != n))
        return PE_ERROR_ARGUMENT;
    pe_products p = {a, b, tokens, m, n, lower, out};
    return pe_pool_run(pool, add_rows, &p, m, 64);
}

/* ---- sums of squares ------------------------------------------------------------------------- */

typedef struct {
    const float *x;
    int64_t tokens, n;
    double *sums;
} squares_args;

static int32_t add_squares(void *arg, int64_t begin, int64_t end)
{
    const squares_args *s = arg;
    pe_active.squares_columns(s->x, s->tokens, s->n, begin, end, s->sums);
    return PE_OK;
}

int32_t pe_add_squares(pe_pool *pool, const float *x, int64_t tokens, int64_t n, double *sums)
{
    if (tokens < 0 || n < 1)
        return PE_ERROR_ARGUMENT;
    squares_args s = {x, tokens, n, sums};
    return pe_pool_run(pool, add_squares, &s, n, 64);
}

/* ---- the factors ----------------------------------------------------------------------------- */

/* The panel's own rows, one after another: each needs those before it. */
static int32_t factor_block(pe_panel *f)
{
    const int64_t n = f->n;
    for (int64_t i = f->k0; i < f->k1; i++) {
        double *v = f->h + i * n + f->k0, *u = f->u + (i - f->k0) * PE_PANEL;
        for (int64_t k = 0; k <= i - f->k0; k++) {
            double sum = v[k];
            for (int64_t j = 0; j < k; j++)
                sum -= v[j] * f->u[k * PE_PANEL + j];
            v[k] = sum;
            if (k < i - f->k0)
                u[k] = f->h[(f->k0 + k) * n + i] = sum / f->h[(f->k0 + k) * (n + 1)];
        }
        if (!(f->h[i * n + i] > 0.0 && f->h[i * n + i] < INFINITY))
            return PE_ERROR_NONFINITE;
    }
    return PE_OK;
}

static int32_t panel_below(void *arg, int64_t begin, int64_t end)
{
    const pe_panel *f = arg;
    pe_active.factor_rows(f, f->k1 + begin, f->k1 + end);
    return PE_OK;
}

static int32_t panel_behind(void *arg, int64_t begin, int64_t end)
{
    const pe_panel *f = arg;
    pe_active.subtract_panel(f, f->k1 + begin, f->k1 + end);
    return PE_OK;
}

int32_t pe_factor(pe_pool *pool, double *h, int64_t n)
{
    if (n < 1)
        return PE_ERROR_ARGUMENT;
    pe_panel f = {.h = h, .n = n};
    for (f.k0 = 0; f.k0 < n; f.k0 = f.k1) {
        f.k1 = pe_min(f.k0 + PE_PANEL, n);
        int32_t status = factor_block(&f);
        if (!status)
            status = pe_pool_run(pool, panel_below, &f, n - f.k1, 32);
        if (!status)
            status = pe_pool_run(pool, panel_behind, &f, n - f.k1, 64);
        if (status)
            return status;
    }
    return PE_OK;
}

/* ---- rounding -------------------------------------------------------------------------------- */

static int32_t round_blocks(void *arg, int64_t begin, int64_t end)
{
    const pe_rounding *r = arg;
    const int64_t rows = pe_active.rows_rounded;
    int32_t status = PE_OK;
    void *memory;
    if (posix_memalign(&memory, 64, (size_t)((2 * r->n + 2 * r->group) * rows) * sizeof(double)))
        return PE_ERROR_MEMORY;
    for (int64_t block = begin; block < end && !status; block++)
        status = pe_active.round_rows(r, block * rows, memory);
    free(memory);
    return status;
}

int32_t pe_round_weights(pe_pool *pool, const float *w, const double *b, const double *f,
                         const double *d, int64_t rows, int64_t n, int64_t group_size,
                         int32_t largest, int8_t *codes, uint16_t *scales)
{
    if (rows < 0 || n < 1 || group_size < 1 || (largest != 127 && largest != 7) ||
        (!f && (b || !d)))
        return PE_ERROR_ARGUMENT;
    pe_rounding r = {w, b, f, d, rows, n, pe_min(group_size, n), largest, codes, scales};
    const int64_t at_once = pe_active.rows_rounded;
    return pe_pool_run(pool, round_blocks, &r, (rows + at_once - 1) / at_once, 1);
}
