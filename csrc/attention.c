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
            float term = e[p] * value[p * ld + j];
            out[j] = p == 0 ? term : out[j] + term;
        }
    }
}

void pe_fill_scalar_attention(pe_kernels *k)
{
    k->attention_scores = attention_scores;
    k->attention_mix = attention_mix;
}

/* ---- the operation --------------------------------------------------------------------------- */

typedef struct {
    const float *query, *key_cache, *value_cache;
    int64_t start, tokens, heads, kv_heads, n;
    float scale, *out;
} attention_args;

static int32_t attend(const attention_args *a, int64_t t, int64_t h, float *score)
{
    const int64_t ld = a->kv_heads * a->n, at = (t * a->heads + h) * a->n;
    const int64_t kv = h / (a->heads / a->kv_heads) * a->n, count = a->start + t + 1;
    float *out = a->out + at;
    pe_active.attention_scores(a->query + at, a->key_cache + kv, ld, count, a->n, a->scale, score);
    if (!pe_all_finite(score, count))
        return PE_ERROR_NONFINITE;
    float m = score[0];
    for (int64_t p = 1; p < count; p++)
        m = score[p] > m ? score[p] : m;
    for (int64_t p = 0; p < count; p++)
        score[p] -= m;
    pe_active.exp(score, count, score);
    float total = (float)pe_active.sum(score, count);
    pe_active.attention_mix(score, a->value_cache + kv, ld, count, a->n, out);
    for (int64_t j = 0; j < a->n; j++)
        out[j] /= total;
    return PE_OK;
}

/* Head-major, so that neighbouring items read the same keys and values. */
static int32_t attention_items(void *arg, int64_t begin, int64_t end)
{
    const attention_args *a = arg;
    int32_t status = PE_OK;
    float *score = malloc((size_t)(a->start + a->tokens) * sizeof *score);
    if (!score)
        return PE_ERROR_MEMORY;
    for (int64_t i = begin; i < end && !status; i++)
        status = attend(a, i % a->tokens, i / a->tokens, score);
    free(score);
    return status;
}

int32_t pe_attention(pe_pool *pool, const float *query, const float *key_cache,
                     const float *value_cache, int64_t start, int64_t tokens, int64_t heads,
                     int64_t kv_heads, int64_t n, float scale, float *out)
{
    if (start < 0 || tokens < 0 || heads < 1 || kv_heads < 1 || heads % kv_heads || n < 1)
        return PE_ERROR_ARGUMENT;
    attention_args a = {query, key_cache, value_cache, start, tokens, heads, kv_heads, n, scale,
                        out};
    return pe_pool_run(pool, attention_items, &a, tokens * heads, 1);
}
