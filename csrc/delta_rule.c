/* delta_rule.c - scalar, normative: see pe_delta_rule and pe_delta_gates in pyengine.h. */
#include "kernels.h"

#define MAX_DV 1024

static void step(float *state, const float *key, const float *query, const float *value, float beta,
                 float decay, int64_t dk, int64_t dv, float *delta, float *out)
{
    for (int64_t i = 0; i < dk; i++) {
        float *s = state + i * dv;
        for (int64_t j = 0; j < dv; j++) {
            s[j] *= decay;
            float term = s[j] * key[i];
            delta[j] = i == 0 ? term : delta[j] + term;
        }
    }
    for (int64_t j = 0; j < dv; j++)
        delta[j] = (value[j] - delta[j]) * beta;
    for (int64_t i = 0; i < dk; i++) {
        float *s = state + i * dv;
        for (int64_t j = 0; j < dv; j++) {
            s[j] += key[i] * delta[j];
            float term = s[j] * query[i];
            out[j] = i == 0 ? term : out[j] + term;
        }
    }
}

static void delta_step(const pe_delta_head *h)
{
    step(h->state, h->key, h->query, h->value, h->beta, h->decay, h->dk, h->dv, h->delta, h->out);
}

void pe_fill_scalar_delta_rule(pe_kernels *k) { k->delta_step = delta_step; }

/* ---- the operations -------------------------------------------------------------------------- */

typedef struct {
    const float *query, *key, *value, *beta, *decay;
    int64_t ld_value, tokens, key_heads, value_heads, dk, dv;
    const int32_t *key_head;
    float *state, *out;
} delta_args;

/* Head by head, all tokens: the head's state stays in cache. */
static int32_t delta_heads(void *arg, int64_t begin, int64_t end)
{
    const delta_args *d = arg;
    float delta[MAX_DV];
    for (int64_t h = begin; h < end; h++) {
        float *state = d->state + h * d->dk * d->dv;
        for (int64_t t = 0; t < d->tokens; t++) {
            int64_t key = (t * d->key_heads + d->key_head[h]) * d->dk;
            int64_t gate = t * d->value_heads + h;
            const pe_delta_head head = {
                .state = state,
                .key = d->key + key,
                .query = d->query + key,
                .value = d->value + t * d->ld_value + h * d->dv,
                .beta = d->beta[gate],
                .decay = d->decay[gate],
                .dk = d->dk,
                .dv = d->dv,
                .out = d->out + gate * d->dv,
                .delta = delta,
            };
            pe_active.delta_step(&head);
        }
    }
    return PE_OK;
}

int32_t pe_delta_rule(pe_pool *pool, const float *query, const float *key, const float *value,
                      int64_t ld_value, const float *beta, const float *decay, int64_t tokens,
                      int64_t key_heads, int64_t value_heads, int64_t dk, int64_t dv,
                      const int32_t *key_head, float *recurrent_state, float *out)
{
    if (tokens < 0 || key_heads < 1 || value_heads < 1 || dk < 1 || dv < 1 || dv > MAX_DV)
        return PE_ERROR_ARGUMENT;
    for (int64_t h = 0; h < value_heads; h++)
        if (key_head[h] < 0 || key_head[h] >= key_heads)
            return PE_ERROR_ARGUMENT;
    delta_args d = {query,     key,         value, beta, decay,    ld_value,        tokens,
                    key_heads, value_heads, dk,    dv,   key_head, recurrent_state, out};
    return pe_pool_run(pool, delta_heads, &d, value_heads, 1);
}

typedef struct {
    const float *a, *b, *neg_exp_a_log, *dt_bias;
    int64_t heads;
    float *beta, *decay;
} gate_args;

static int32_t gate_tokens(void *arg, int64_t begin, int64_t end)
{
    const gate_args *g = arg;
    const int64_t n = g->heads;
    for (int64_t t = begin; t < end; t++) {
        float *decay = g->decay + t * n;
        for (int64_t h = 0; h < n; h++)
            decay[h] = g->a[t * n + h] + g->dt_bias[h];
        pe_active.softplus(decay, n, decay);
        for (int64_t h = 0; h < n; h++)
            decay[h] = g->neg_exp_a_log[h] * decay[h];
        pe_active.exp(decay, n, decay);
        pe_active.sigmoid(g->b + t * n, n, g->beta + t * n);
    }
    return PE_OK;
}

int32_t pe_delta_gates(pe_pool *pool, const float *a, const float *b, const float *neg_exp_a_log,
                       const float *dt_bias, int64_t tokens, int64_t heads, float *beta,
                       float *decay)
{
    if (tokens < 0 || heads < 1)
        return PE_ERROR_ARGUMENT;
    gate_args g = {a, b, neg_exp_a_log, dt_bias, heads, beta, decay};
    return pe_pool_run(pool, gate_tokens, &g, tokens, 4);
}
