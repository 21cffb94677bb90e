/* router.c - scalar, normative: see pe_router in pyengine.h. */
#include "kernels.h"

#include <stdlib.h>

typedef struct {
    const float *logits;
    int64_t experts, top_k;
    float *routing_weights;
    int32_t *selected_experts;
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

/* The greatest p, the lowest index among equals; its p becomes -1, so that it is not met again. */
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

static int32_t route(const router_args *r, int64_t t, float *p)
{
    float *weight = r->routing_weights + t * r->top_k;
    int32_t *expert = r->selected_experts + t * r->top_k;
    int32_t status = softmax(r->logits + t * r->experts, r->experts, p);
    if (status)
        return status;
    double total = 0.0;
    for (int64_t i = 0; i < r->top_k; i++) {
        expert[i] = take_greatest(p, r->experts, &weight[i]);
        total += (double)weight[i];
    }
    for (int64_t i = 0; i < r->top_k; i++)
        weight[i] = (float)((double)weight[i] / total);
    return PE_OK;
}

static int32_t route_tokens(void *arg, int64_t begin, int64_t end)
{
    const router_args *r = arg;
    int32_t status = PE_OK;
    float *p = malloc((size_t)r->experts * sizeof *p);
    if (!p)
        return PE_ERROR_MEMORY;
    for (int64_t t = begin; t < end && !status; t++)
        status = route(r, t, p);
    free(p);
    return status;
}

int32_t pe_router(pe_pool *pool, const float *logits, int64_t tokens, int64_t experts,
                  int64_t top_k, float *routing_weights, int32_t *selected_experts)
{
    if (tokens < 0 || experts < 1 || experts > 65536 || top_k < 1 || top_k > experts)
        return PE_ERROR_ARGUMENT;
    router_args r = {logits, experts, top_k, routing_weights, selected_experts};
    return pe_pool_run(pool, route_tokens, &r, tokens, 4);
}
