/* labels.c - scalar, normative: see pe_top_k, pe_exp_sums and pe_draw in pyengine.h. */
#include "kernels.h"

#include <stdlib.h>

#define BLOCK PE_DRAW_BLOCK

int64_t pe_labels_scratch_bytes(int64_t vocab)
{
    return vocab * (int64_t)sizeof(float) + (vocab + BLOCK - 1) / BLOCK * (int64_t)sizeof(double);
}

static float greatest(const float *x, int64_t n)
{
    float lane[16], m = x[0];
    int64_t i = 0;
    if (n >= 16) {
        memcpy(lane, x, sizeof lane);
        for (i = 16; i + 16 <= n; i += 16)
            for (int j = 0; j < 16; j++)
                lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
        for (int j = 0; j < 16; j++)
            m = lane[j] > m ? lane[j] : m;
    }
    for (; i < n; i++)
        m = x[i] > m ? x[i] : m;
    return m;
}

/* ---- the greatest ---------------------------------------------------------------------------- */

typedef struct {
    float logit;
    int32_t id;
} entry;

static int by_falling_logit(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    if (x->logit != y->logit)
        return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

static int64_t count_above(const float *x, int64_t n, float least)
{
    int32_t count = 0;
    for (int64_t i = 0; i < n; i++)
        count += x[i] > least;
    return count;
}

typedef struct {
    const float *logits;
    int64_t vocab, top_k;
    int32_t *ids;
} top_k_args;

/* Entries are kept until there are this many times top_k of them; then the best top_k stay, and the
 * last of these is what a later logit must exceed: an equal one has a higher id. */
#define KEPT 4

static void top_k_row(const float *x, int64_t vocab, int64_t k, entry *kept, int32_t *ids)
{
    int64_t n = 0;
    float least = 0.0f;
    int known = 0; /* whether least is the k-th of those seen */
    for (int64_t start = 0; start < vocab; start += BLOCK) {
        const int64_t stop = pe_min(start + BLOCK, vocab);
        if (known && !count_above(x + start, stop - start, least))
            continue;
        for (int64_t i = start; i < stop; i++) {
            if (known && !(x[i] > least))
                continue;
            kept[n++] = (entry){x[i], (int32_t)i};
            if (n == KEPT * k) {
                qsort(kept, (size_t)n, sizeof *kept, by_falling_logit);
                n = k;
                least = kept[k - 1].logit;
                known = 1;
            }
        }
    }
    qsort(kept, (size_t)n, sizeof *kept, by_falling_logit);
    for (int64_t i = 0; i < k; i++)
        ids[i] = kept[i].id;
}

static int32_t top_k_rows(void *arg, int64_t begin, int64_t end)
{
    const top_k_args *a = arg;
    entry *kept = malloc((size_t)(KEPT * a->top_k) * sizeof *kept);
    if (!kept)
        return PE_ERROR_MEMORY;
    int32_t status = PE_OK;
    for (int64_t t = begin; t < end && !status; t++) {
        const float *x = a->logits + t * a->vocab;
        if (pe_all_finite(x, a->vocab))
            top_k_row(x, a->vocab, a->top_k, kept, a->ids + t * a->top_k);
        else
            status = PE_ERROR_NONFINITE;
    }
    free(kept);
    return status;
}

int32_t pe_top_k(pe_pool *pool, const float *logits, int64_t tokens, int64_t vocab, int64_t top_k,
                 int32_t *ids)
{
    if (tokens < 0 || vocab < 1 || vocab > INT32_MAX || top_k < 1 || top_k > vocab)
        return PE_ERROR_ARGUMENT;
    top_k_args a = {logits, vocab, top_k, ids};
    return pe_pool_run(pool, top_k_rows, &a, tokens, 1);
}

/* ---- sums ------------------------------------------------------------------------------------ */

static void exps(const float *x, int64_t n, float power, float *e)
{
    const float m = greatest(x, n);
    for (int64_t i = 0; i < n; i++)
        e[i] = x[i] - m;
    if (power != 1.0f)
        for (int64_t i = 0; i < n; i++)
            e[i] = power * e[i];
    pe_active.exp(e, n, e);
}

typedef struct {
    const float *logits;
    int64_t vocab;
    const int32_t *ids;
    int64_t n;
    double *total, *rest;
} sums_args;

static int32_t sums_row(const sums_args *a, int64_t t, float *e)
{
    const float *x = a->logits + t * a->vocab;
    if (!pe_all_finite(x, a->vocab))
        return PE_ERROR_NONFINITE;
    exps(x, a->vocab, 1.0f, e);
    a->total[t] = pe_active.sum(e, a->vocab);
    for (int64_t i = 0; i < a->n; i++) {
        const int32_t id = a->ids[t * a->n + i];
        if (id >= a->vocab)
            return PE_ERROR_ARGUMENT;
        if (id >= 0)
            e[id] = 0.0f;
    }
    a->rest[t] = pe_active.sum(e, a->vocab);
    return PE_OK;
}

static int32_t sums_rows(void *arg, int64_t begin, int64_t end)
{
    const sums_args *a = arg;
    float *e = malloc((size_t)a->vocab * sizeof *e);
    if (!e)
        return PE_ERROR_MEMORY;
    int32_t status = PE_OK;
    for (int64_t t = begin; t < end && !status; t++)
        status = sums_row(a, t, e);
    free(e);
    return status;
}

int32_t pe_exp_sums(pe_pool *pool, const float *logits, int64_t tokens, int64_t vocab,
                    const int32_t *ids, int64_t n, double *total, double *rest)
{
    if (tokens < 0 || vocab < 1 || vocab > INT32_MAX || n < 0)
        return PE_ERROR_ARGUMENT;
    sums_args a = {logits, vocab, ids, n, total, rest};
    return pe_pool_run(pool, sums_rows, &a, tokens, 1);
}

/* ---- draws ----------------------------------------------------------------------------------- */

typedef struct {
    const float *logits;
    int64_t vocab;
    float power;
    const double *uniforms;
    int64_t draws;
    int32_t *ids;
    double *total;
} draw_args;

static int32_t drawn(const float *e, const double *sum, int64_t vocab, int64_t blocks, double goal)
{
    int64_t low = 0, high = blocks - 1; /* sum[blocks - 1] > goal */
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (sum[middle] > goal)
            high = middle;
        else
            low = middle + 1;
    }
    double running = low ? sum[low - 1] : 0.0;
    int64_t last = low * BLOCK;
    for (int64_t i = low * BLOCK; i < pe_min((low + 1) * BLOCK, vocab); i++) {
        running += (double)e[i];
        if (running > goal)
            return (int32_t)i;
        last = e[i] > 0.0f ? i : last;
    }
    return (int32_t)last;
}

static int32_t draw_row(const draw_args *a, int64_t t, double *sum, float *e)
{
    const float *x = a->logits + t * a->vocab;
    const int64_t blocks = (a->vocab + BLOCK - 1) / BLOCK;
    if (!pe_all_finite(x, a->vocab))
        return PE_ERROR_NONFINITE;
    exps(x, a->vocab, a->power, e);
    for (int64_t j = 0; j < blocks; j++) {
        sum[j] = pe_active.sum(e + j * BLOCK, pe_min(BLOCK, a->vocab - j * BLOCK));
        if (j)
            sum[j] = sum[j - 1] + sum[j];
    }
    a->total[t] = sum[blocks - 1];
    for (int64_t d = 0; d < a->draws; d++) {
        const double u = a->uniforms[t * a->draws + d];
        if (!(u >= 0.0 && u < 1.0))
            return PE_ERROR_ARGUMENT;
        a->ids[t * a->draws + d] = drawn(e, sum, a->vocab, blocks, u * sum[blocks - 1]);
    }
    return PE_OK;
}

static int32_t draw_rows(void *arg, int64_t begin, int64_t end)
{
    const draw_args *a = arg;
    double *sum = malloc((size_t)pe_labels_scratch_bytes(a->vocab));
    if (!sum)
        return PE_ERROR_MEMORY;
    float *e = (float *)(sum + (a->vocab + BLOCK - 1) / BLOCK);
    int32_t status = PE_OK;
    for (int64_t t = begin; t < end && !status; t++)
        status = draw_row(a, t, sum, e);
    free(sum);
    return status;
}

int32_t pe_draw(pe_pool *pool, const float *logits, int64_t tokens, int64_t vocab, float power,
                const double *uniforms, int64_t draws, int32_t *ids, double *total)
{
    if (tokens < 0 || vocab < 1 || vocab > INT32_MAX || draws < 0 || !(power > 0.0f) ||
        power > 3.4028234e38f)
        return PE_ERROR_ARGUMENT;
    draw_args a = {logits, vocab, power, uniforms, draws, ids, total};
    return pe_pool_run(pool, draw_rows, &a, tokens, 1);
}
