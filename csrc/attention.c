/* attention.c - scalar, normative: see pe_attention in pyengine.h. */
#include "kernels.h"

#include <stdlib.h>

static void attention_scores(const float *query, const float *key, int64_t ld, int64_t count,
                             int64_t n, float scale, float *score)
{
    for (int64_t p = 0; p < count; p++) {
        float sum[16] = {0};
        for (int64_t i = 0; i < n; i++)
            sum[i % 16] += query[i] * key[p * ld + i];
        score[p] = pe_tree16(sum) * scale;
    }
}

static void attention_mix(const float *e, const float *value, int64_t ld, int64_t count, int64_t n,
                          float *out)
{
    for (int64_t p = 0; p < count; p++) {
        for (int64_t j = 0; j < n; j++) {
            out[j] += e[p] * value[p * ld + j];
        }
    }
}

static void load_f16(const uint16_t *half, int64_t n, float *x)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = pe_f16_to_float(half[i]);
}

void pe_fill_scalar_attention(pe_kernels *k)
{
    k->load_f16 = load_f16;
    k->attention_scores = attention_scores;
    k->attention_mix = attention_mix;
}

/* ---- the operation --------------------------------------------------------------------------- */

#define PIECE 32 /* positions that several heads use in turn, while they are in the nearest cache */
#define MAX_HEADS 16 /* that do so */

typedef struct {
    const float *query;
    const void *key_cache, *value_cache; /* float32, or float16 */
    int half;
    int64_t start, tokens, heads, kv_heads, n;
    float scale, *out;
    int64_t together; /* heads of one item, which read the same keys and values */
} attention_args;

typedef struct {
    float *score; /* [together, positions] */
    float *piece; /* [PIECE, n], for a float16 cache */
    int64_t positions;
} attention_scratch;

/* Positions [p0, p0 + count) of one head's cache as float32 rows, *ld apart. */
static const float *cache_rows(const attention_args *a, const void *cache, int64_t head, int64_t p0,
                               int64_t count, float *piece, int64_t *ld)
{
    const int64_t stride = a->kv_heads * a->n, at = p0 * stride + head * a->n;
    if (!a->half) {
        *ld = stride;
        return (const float *)cache + at;
    }
    for (int64_t p = 0; p < count; p++)
        pe_active.load_f16((const uint16_t *)cache + at + p * stride, a->n, piece + p * a->n);
    *ld = a->n;
    return piece;
}

/* score[0, count) to e; *total is their sum. */
static int32_t exponentials(float *score, int64_t count, float *total)
{
    if (!pe_all_finite(score, count))
        return PE_ERROR_NONFINITE;
    float m = score[0];
    for (int64_t p = 1; p < count; p++)
        m = score[p] > m ? score[p] : m;
    for (int64_t p = 0; p < count; p++)
        score[p] -= m;
    pe_active.exp(score, count, score);
    *total = (float)pe_active.sum(score, count);
    return PE_OK;
}

/* Token t, heads [h, h + a->together). */
static int32_t attend(const attention_args *a, int64_t t, int64_t h, attention_scratch *s)
{
    const int64_t at = (t * a->heads + h) * a->n, count = a->start + t + 1;
    const int64_t kv = h / (a->heads / a->kv_heads), heads = a->together;
    float total[MAX_HEADS], *out = a->out + at;
    int64_t ld;
    for (int64_t p = 0; p < count; p += PIECE) {
        int64_t n = pe_min(PIECE, count - p);
        const float *keys = cache_rows(a, a->key_cache, kv, p, n, s->piece, &ld);
        for (int64_t i = 0; i < heads; i++)
            pe_active.attention_scores(a->query + at + i * a->n, keys, ld, n, a->n, a->scale,
                                       s->score + i * s->positions + p);
    }
    for (int64_t i = 0; i < heads; i++) {
        int32_t status = exponentials(s->score + i * s->positions, count, &total[i]);
        if (status)
            return status;
    }
    for (int64_t j = 0; j < heads * a->n; j++)
        out[j] = -0.0f; /* -0 (+) x is x, for every x: the sum starts with its first term */
    for (int64_t p = 0; p < count; p += PIECE) {
        int64_t n = pe_min(PIECE, count - p);
        const float *values = cache_rows(a, a->value_cache, kv, p, n, s->piece, &ld);
        for (int64_t i = 0; i < heads; i++)
            pe_active.attention_mix(s->score + i * s->positions + p, values, ld, n, a->n,
                                    out + i * a->n);
    }
    for (int64_t i = 0; i < heads; i++)
        for (int64_t j = 0; j < a->n; j++)
            out[i * a->n + j] /= total[i];
    return PE_OK;
}

/* Head-major, so that neighbouring items read the same keys and values. */
static int32_t attention_items(void *arg, int64_t begin, int64_t end)
{
    const attention_args *a = arg;
    int32_t status = PE_OK;
    attention_scratch s = {.positions = a->start + a->tokens};
    s.score = malloc((size_t)(a->together * s.positions + PIECE * a->n) * sizeof *s.score);
    if (!s.score)
        return PE_ERROR_MEMORY;
    s.piece = s.score + a->together * s.positions;
    for (int64_t i = begin; i < end && !status; i++)
        status = attend(a, i % a->tokens, i / a->tokens * a->together, &s);
    free(s.score);
    return status;
}

/* As many heads in an item as share a cache, but enough items for the threads. */
static int64_t heads_together(const attention_args *a, int64_t threads)
{
    int64_t heads = a->heads / a->kv_heads;
    while (heads % 2 == 0 && (heads > MAX_HEADS || a->tokens * a->heads / heads < 2 * threads))
        heads /= 2;
    return heads > MAX_HEADS ? 1 : heads;
}

static int32_t attention(pe_pool *pool, const attention_args *a)
{
    if (a->start < 0 || a->tokens < 0 || a->heads < 1 || a->kv_heads < 1 ||
        a->heads % a->kv_heads || a->n < 1)
        return PE_ERROR_ARGUMENT;
    attention_args args = *a;
    args.together = heads_together(a, pe_pool_threads(pool));
    return pe_pool_run(pool, attention_items, &args, a->tokens * a->heads / args.together, 1);
}

int32_t pe_attention(pe_pool *pool, const float *query, const float *key_cache,
                     const float *value_cache, int64_t start, int64_t tokens, int64_t heads,
                     int64_t kv_heads, int64_t n, float scale, float *out)
{
    attention_args a = {query, key_cache, value_cache, 0, start, tokens, heads, kv_heads, n, scale,
                        out, 1};
    return attention(pool, &a);
}

int32_t pe_attention_f16(pe_pool *pool, const float *query, const uint16_t *key_cache,
                         const uint16_t *value_cache, int64_t start, int64_t tokens, int64_t heads,
                         int64_t kv_heads, int64_t n, float scale, float *out)
{
    attention_args a = {query, key_cache, value_cache, 1, start, tokens, heads, kv_heads, n, scale,
                        out, 1};
    return attention(pool, &a);
}
