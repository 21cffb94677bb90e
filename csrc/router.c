/* router.c - scalar, normative: see pe_router and pe_routing_weights in pyengine.h. */
#include "kernels.h"

#include <stdlib.h>

int64_t pe_router_scratch_bytes(int64_t experts) { return experts * (int64_t)sizeof(float); }

typedef struct {
    const float *logits;
    int64_t experts, top_k;
    float *routing_weights;
    int32_t *selected_experts;
    const int32_t *given; /* in place of the greatest; NULL: the greatest, to selected_experts */
} router_args;

static int32_t softmax(const float *logits, int64_t n, float *p)
{
    if (!pe_all_finite(logits, n))
        return PE_ERROR_NONFINITE;
    float m = logits[0];
    for (int64_t i = 1; i < n; i++)
        m = logits[i] > m ? logits[i] : m;
    for (int64_t i = 0; i < n; i++)
        p[i] = logits[i] - m;
    pe_active.exp(p, n, p);
    double total = pe_active.sum(p, n);
    for (int64_t i = 0; i < n; i++)
        p[i] = (float)((double)p[i] / total);
    return PE_OK;
}

/* The greatest p, the lowest index among equals; its p becomes -1: it is not found again. */
static int32_t take_greatest(float *p, int64_t n, float *value)
{
    int32_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (p[i] > p[best])
            best = (int32_t)i;
    *value = p[best];
    p[best] = -1.0f;
    return best;
}

static int32_t take_given(const router_args *r, int64_t t, const float *p, float *weight)
{
    for (int64_t i = 0; i < r->top_k; i++) {
        const int32_t expert = r->given[t * r->top_k + i];
        if (expert < 0 || expert >= r->experts)
            return PE_ERROR_ARGUMENT;
        weight[i] = p[expert];
    }
    return PE_OK;
}

static int32_t route(const router_args *r, int64_t t, float *p)
{
    float *weight = r->routing_weights + t * r->top_k;
    int32_t status = softmax(r->logits + t * r->experts, r->experts, p);
    if (!status && r->given)
        status = take_given(r, t, p, weight);
    if (status)
        return status;
    for (int64_t i = 0; i < r->top_k && !r->given; i++)
        r->selected_experts[t * r->top_k + i] = take_greatest(p, r->experts, &weight[i]);
    double total = 0.0;
    for (int64_t i = 0; i < r->top_k; i++)
        total += (double)weight[i];
    if (total == 0.0)
        return PE_ERROR_NONFINITE;
    for (int64_t i = 0; i < r->top_k; i++)
        weight[i] = (float)((double)weight[i] / total);
    return PE_OK;
}

static int32_t route_tokens(void *arg, int64_t begin, int64_t end)
{
    const router_args *r = arg;
    int32_t status = PE_OK;
    float *p = malloc((size_t)pe_router_scratch_bytes(r->experts));
    if (!p)
        return PE_ERROR_MEMORY;
    for (int64_t t = begin; t < end && !status; t++)
        status = route(r, t, p);
    free(p);
    return status;
}

static int32_t run(pe_pool *pool, router_args *r, int64_t tokens)
{
    if (tokens < 0 || r->experts < 1 || r->experts > 65536 || r->top_k < 1 || r->top_k > r->experts)
        return PE_ERROR_ARGUMENT;
    return pe_pool_run(pool, route_tokens, r, tokens, 4);
}

int32_t pe_router(pe_pool *pool, const float *logits, int64_t tokens, int64_t experts,
                  int64_t top_k, float *routing_weights, int32_t *selected_experts)
{
    router_args r = {logits, experts, top_k, routing_weights, selected_experts, NULL};
    return run(pool, &r, tokens);
}

int32_t pe_routing_weights(pe_pool *pool, const float *logits, int64_t tokens, int64_t experts,
                           int64_t top_k, const int32_t *selected_experts, float *routing_weights)
{
    router_args r = {logits, experts, top_k, routing_weights, NULL, selected_experts};
    return run(pool, &r, tokens);
}
