/* compensate.c - scalar, normative: see pe_add_products, pe_factor and pe_round_weights in pyengine.h.
 *
 * The loops below vectorise over independent outputs only: neighbours of a row, or rows of a matrix
 * side by side (LANES).  The terms of each sum keep the order that the contracts state. */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>

/* ---- products of activations ----------------------------------------------------------------- */

#define SIDE 8     /* neighbouring outputs of a row at a time */
#define TOKENS 256 /* tokens at a time: their part of b stays in the cache */

typedef struct {
    const double *a, *b;
    int64_t tokens, m, n;
    int32_t lower;
    double *out;
} products_args;

static void two_rows(const products_args *p, int64_t t0, int64_t t1, int64_t i, int64_t j)
{
    double first[SIDE], second[SIDE];
    double *out = p->out + i * p->n + j;
    memcpy(first, out, sizeof first);
    memcpy(second, out + p->n, sizeof second);
    for (int64_t t = t0; t < t1; t++) {
        const double x = p->a[t * p->m + i], y = p->a[t * p->m + i + 1];
        const double *b = p->b + t * p->n + j;
        for (int l = 0; l < SIDE; l++) {
            first[l] += x * b[l];
            second[l] += y * b[l];
        }
    }
    memcpy(out, first, sizeof first);
    memcpy(out + p->n, second, sizeof second);
}

static void one_row(const products_args *p, int64_t t0, int64_t t1, int64_t i, int64_t j0,
                    int64_t j1)
{
    for (int64_t j = j0; j < j1; j++) {
        double sum = p->out[i * p->n + j];
        for (int64_t t = t0; t < t1; t++)
            sum += p->a[t * p->m + i] * p->b[t * p->n + j];
        p->out[i * p->n + j] = sum;
    }
}

static int32_t add_rows(void *arg, int64_t begin, int64_t end)
{
    const products_args *p = arg;
    for (int64_t t0 = 0; t0 < p->tokens; t0 += TOKENS) {
        const int64_t t1 = pe_min(t0 + TOKENS, p->tokens);
        for (int64_t j = 0; j < p->n; j += SIDE) {
            const int64_t width = pe_min(SIDE, p->n - j);
            int64_t i = p->lower && j > begin ? j : begin;
            for (; width == SIDE && i + 1 < end; i += 2)
                two_rows(p, t0, t1, i, j);
            for (; i < end; i++)
                one_row(p, t0, t1, i, j, j + width);
        }
    }
    return PE_OK;
}

int32_t pe_add_products(pe_pool *pool, const double *a, const double *b, int64_t tokens, int64_t m,
                        int64_t n, int32_t lower, double *out)
{
    if (tokens < 0 || m < 1 || n < 1 || (lower && m != n))
        return PE_ERROR_ARGUMENT;
    products_args p = {a, b, tokens, m, n, lower, out};
    return pe_pool_run(pool, add_rows, &p, m, 16);
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
    for (int64_t t = 0; t < s->tokens; t++) {
        const float *x = s->x + t * s->n;
        for (int64_t j = begin; j < end; j++)
            s->sums[j] += (double)x[j] * x[j];
    }
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

#define PANEL 32 /* columns whose products are subtracted from the rest in one go */

typedef struct {
    double *h;
    int64_t n, k0, k1;
} factor_args;

/* v of one row in the panel's columns, from what the panels before have left of h. */
static void panel_of_row(const factor_args *f, int64_t i, int64_t stop)
{
    double *row = f->h + i * f->n;
    for (int64_t k = f->k0; k < stop; k++)
        for (int64_t j = f->k0; j < k; j++)
            row[k] -= row[j] * f->h[j * f->n + k];
}

static int32_t panel_below(void *arg, int64_t begin, int64_t end)
{
    const factor_args *f = arg;
    for (int64_t i = f->k1 + begin; i < f->k1 + end; i++) {
        panel_of_row(f, i, f->k1);
        for (int64_t k = f->k0; k < f->k1; k++)
            f->h[k * f->n + i] = f->h[i * f->n + k] / f->h[k * f->n + k];
    }
    return PE_OK;
}

static int32_t subtract_panel(void *arg, int64_t begin, int64_t end)
{
    const factor_args *f = arg;
    for (int64_t i = f->k1 + begin; i < f->k1 + end; i++) {
        double *row = f->h + i * f->n;
        for (int64_t j = f->k1; j <= i; j += SIDE) {
            const int64_t width = pe_min(SIDE, i + 1 - j);
            double part[SIDE] = {0};
            memcpy(part, row + j, (size_t)width * sizeof *part);
            if (width == SIDE) {
                for (int64_t k = f->k0; k < f->k1; k++)
                    for (int l = 0; l < SIDE; l++)
                        part[l] -= row[k] * f->h[k * f->n + j + l];
            } else {
                for (int64_t k = f->k0; k < f->k1; k++)
                    for (int64_t l = 0; l < width; l++)
                        part[l] -= row[k] * f->h[k * f->n + j + l];
            }
            memcpy(row + j, part, (size_t)width * sizeof *part);
        }
    }
    return PE_OK;
}

int32_t pe_factor(pe_pool *pool, double *h, int64_t n)
{
    if (n < 1)
        return PE_ERROR_ARGUMENT;
    for (int64_t k0 = 0; k0 < n; k0 += PANEL) {
        factor_args f = {h, n, k0, pe_min(k0 + PANEL, n)};
        for (int64_t i = k0; i < f.k1; i++) {
            for (int64_t k = k0; k < i; k++) {
                for (int64_t j = k0; j < k; j++)
                    h[i * n + k] -= h[i * n + j] * h[j * n + k];
                h[k * n + i] = h[i * n + k] / h[k * n + k];
            }
            for (int64_t j = k0; j < i; j++)
                h[i * n + i] -= h[i * n + j] * h[j * n + i];
            if (!(h[i * n + i] > 0.0 && h[i * n + i] < INFINITY))
                return PE_ERROR_NONFINITE;
        }
        int32_t status = pe_pool_run(pool, panel_below, &f, n - f.k1, 16);
        if (!status)
            status = pe_pool_run(pool, subtract_panel, &f, n - f.k1, 8);
        if (status)
            return status;
    }
    return PE_OK;
}

/* ---- rounding -------------------------------------------------------------------------------- */

#define LANES 16 /* rows at a time, side by side */
typedef double lanes[LANES];

typedef struct {
    const float *w;
    const double *b, *f, *d;
    int64_t rows, n, group;
    int32_t largest;
    int8_t *codes;
    uint16_t *scales;
} round_args;

/* sum + u[first] * e[first] + u[first - 1] * e[first - 1] + ... + u[last] * e[last] */
static void add_falling(const double *u, const lanes *e, int64_t first, int64_t last, double *sum)
{
    lanes s;
    memcpy(s, sum, sizeof s);
    for (int64_t j = first; j >= last; j--)
        for (int l = 0; l < LANES; l++)
            s[l] += u[j] * e[j][l];
    memcpy(sum, s, sizeof s);
}

static void subtract_falling(const double *u, const lanes *e, int64_t first, int64_t last,
                             double *sum)
{
    lanes s;
    memcpy(s, sum, sizeof s);
    for (int64_t j = first; j >= last; j--)
        for (int l = 0; l < LANES; l++)
            s[l] -= u[j] * e[j][l];
    memcpy(sum, s, sizeof s);
}

static void subtract_rising(const double *v, const lanes *p, int64_t stop, double *sum)
{
    lanes s;
    memcpy(s, sum, sizeof s);
    for (int64_t j = 0; j < stop; j++)
        for (int l = 0; l < LANES; l++)
            s[l] -= v[j] * p[j][l];
    memcpy(sum, s, sizeof s);
}

/* w + b H^-1: b becomes p, then z. */
static void add_correction(const round_args *r, lanes *b, lanes *w)
{
    const int64_t n = r->n;
    for (int64_t i = 0; i < n; i++) {
        subtract_rising(r->f + i * n, (const lanes *)b, i, b[i]);
        for (int l = 0; l < LANES; l++)
            b[i][l] /= r->f[i * n + i];
    }
    for (int64_t i = n - 1; i >= 0; i--) {
        subtract_falling(r->f + i * n, (const lanes *)b, n - 1, i + 1, b[i]);
        for (int l = 0; l < LANES; l++)
            w[i][l] += b[i][l];
    }
}

static double diagonal(const round_args *r, int64_t i) { return r->f ? r->f[i * r->n + i] : r->d[i]; }

/* The codes of columns [first, stop) of LANES rows with these scales: t is what each column is to
 * become when the columns from `stop` on are done, e what is left of w.  loss: see the contract. */
static void round_group(const round_args *r, const lanes *w, const lanes *t, int64_t first,
                        int64_t stop, const double *scale, lanes *e, lanes *codes, double *loss)
{
    const double round = 0x1.8p52, largest = r->largest;
    lanes divisor, used;
    for (int l = 0; l < LANES; l++) {
        used[l] = scale[l] != 0.0 ? 1.0 : 0.0;
        divisor[l] = scale[l] != 0.0 ? scale[l] : 1.0;
        loss[l] = 0.0;
    }
    for (int64_t i = stop - 1; i >= first; i--) {
        lanes goal;
        memcpy(goal, t[i - first], sizeof goal);
        if (r->f)
            add_falling(r->f + i * r->n, (const lanes *)e, stop - 1, i + 1, goal);
        const double d = diagonal(r, i);
        for (int l = 0; l < LANES; l++) {
            double code = goal[l] / divisor[l];
            code = code > largest ? largest : code;
            code = code < -largest ? -largest : code;
            code = ((code + round) - round) * used[l];
            const double value = code * scale[l], left = goal[l] - value;
            codes[i - first][l] = code;
            e[i][l] = w[i][l] - value;
            loss[l] += d * (left * left);
        }
    }
}

static int32_t first_scales(const round_args *r, const lanes *t, int64_t n, uint16_t *absmax)
{
    for (int l = 0; l < LANES; l++) {
        double amax = 0.0;
        for (int64_t i = 0; i < n; i++) {
            const double magnitude = fabs(t[i][l]);
            if (!(magnitude < INFINITY))
                return PE_ERROR_NONFINITE;
            amax = magnitude > amax ? magnitude : amax;
        }
        absmax[l] = pe_f16_nearest(amax / r->largest);
        if (absmax[l] == 0 && amax > 0.0)
            absmax[l] = 1;
        if (absmax[l] >= PE_F16_INFINITY)
            return PE_ERROR_NONFINITE;
    }
    return PE_OK;
}

static void best_scales(const round_args *r, const lanes *w, const lanes *t, int64_t first,
                        int64_t stop, const uint16_t *absmax, lanes *e, lanes *codes,
                        uint16_t *best)
{
    lanes least;
    for (int l = 0; l < LANES; l++)
        least[l] = INFINITY;
    for (int c = 0; c < PE_ROUND_CANDIDATES; c++) {
        uint16_t candidate[LANES];
        lanes scale, loss;
        for (int l = 0; l < LANES; l++) {
            const double whole = (double)pe_f16_to_float(absmax[l]);
            candidate[l] = pe_f16_nearest(whole * ((32 - c) / 32.0));
            scale[l] = (double)pe_f16_to_float(candidate[l]);
        }
        round_group(r, w, t, first, stop, scale, e, codes, loss);
        for (int l = 0; l < LANES; l++) {
            if (loss[l] < least[l] && (candidate[l] || !absmax[l])) {
                least[l] = loss[l];
                best[l] = candidate[l];
            }
        }
    }
}

static int32_t round_lanes(const round_args *r, int64_t row0, lanes *memory)
{
    const int64_t n = r->n, groups = (n + r->group - 1) / r->group;
    const int64_t rows = pe_min(LANES, r->rows - row0);
    lanes *w = memory, *e = w + n, *t = e + n, *codes = t + r->group;
    memset(memory, 0, (size_t)(2 * n + 2 * r->group) * sizeof *memory);
    for (int64_t l = 0; l < rows; l++)
        for (int64_t i = 0; i < n; i++)
            w[i][l] = (double)r->w[(row0 + l) * n + i];
    if (r->b) {
        for (int64_t l = 0; l < rows; l++)
            for (int64_t i = 0; i < n; i++)
                e[i][l] = r->b[(row0 + l) * n + i];
        add_correction(r, e, w);
    }
    for (int64_t g = groups - 1; g >= 0; g--) {
        const int64_t first = g * r->group, stop = pe_min(first + r->group, n);
        uint16_t absmax[LANES], best[LANES] = {0};
        lanes scale, loss;
        for (int64_t i = first; i < stop; i++) {
            memcpy(t[i - first], w[i], sizeof *t);
            if (r->f)
                add_falling(r->f + i * n, (const lanes *)e, n - 1, stop, t[i - first]);
        }
        const int32_t status = first_scales(r, (const lanes *)t, stop - first, absmax);
        if (status)
            return status;
        best_scales(r, (const lanes *)w, (const lanes *)t, first, stop, absmax, e, codes, best);
        for (int l = 0; l < LANES; l++)
            scale[l] = (double)pe_f16_to_float(best[l]);
        round_group(r, (const lanes *)w, (const lanes *)t, first, stop, scale, e, codes, loss);
        for (int64_t l = 0; l < rows; l++) {
            for (int64_t i = first; i < stop; i++)
                r->codes[(row0 + l) * n + i] = (int8_t)codes[i - first][l];
            r->scales[(row0 + l) * groups + g] = best[l];
        }
    }
    return PE_OK;
}

static int32_t round_blocks(void *arg, int64_t begin, int64_t end)
{
    const round_args *r = arg;
    int32_t status = PE_OK;
    lanes *memory = malloc((size_t)(2 * r->n + 2 * r->group) * sizeof *memory);
    if (!memory)
        return PE_ERROR_MEMORY;
    for (int64_t block = begin; block < end && !status; block++)
        status = round_lanes(r, block * LANES, memory);
    free(memory);
    return status;
}

int32_t pe_round_weights(pe_pool *pool, const float *w, const double *b, const double *f,
                         const double *d, int64_t rows, int64_t n, int64_t group_size,
                         int32_t largest, int8_t *codes, uint16_t *scales)
{
    if (rows < 0 || n < 1 || group_size < 1 || (largest != 127 && largest != 7) || (!f && (b || !d)))
        return PE_ERROR_ARGUMENT;
    round_args r = {w,     b,     f, d, rows, n, pe_min(group_size, n), largest,
                    codes, scales};
    return pe_pool_run(pool, round_blocks, &r, (rows + LANES - 1) / LANES, 1);
}
