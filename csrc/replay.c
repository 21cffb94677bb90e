/* replay.c - recorded calls, made again: see pe_replay in pyengine.h. */
#include "kernels.h"

/* Each operation with its arguments taken from the words of a call. */
#define OPERATIONS(OP)                                                                              \
    OP(pe_add, w[0].p, w[1].p, w[2].i, w[3].p)                                                      \
    OP(pe_quantize_activations, w[0].p, w[1].i, w[2].i, w[3].p, w[4].p)                             \
    OP(pe_matmul, w[0].p, w[1].i, w[2].p, w[3].p, w[4].i)                                           \
    OP(pe_matmul_each, w[0].p, w[1].i, w[2].p, w[3].p)                                              \
    OP(pe_sigmoid_mul, w[0].p, w[1].p, w[2].i, w[3].i, w[4].i, w[5].p)                              \
    OP(pe_delta_gates, w[0].p, w[1].p, w[2].p, w[3].p, w[4].i, w[5].i, w[6].p, w[7].p)              \
    OP(pe_rms_norm, w[0].p, w[1].i, w[2].i, w[3].i, w[4].i, w[5].i, w[6].p, w[7].d, w[8].p)         \
    OP(pe_rms_norm_gated, w[0].p, w[1].p, w[2].i, w[3].i, w[4].p, w[5].d, w[6].p)                   \
    OP(pe_l2_norm, w[0].p, w[1].i, w[2].i, w[3].i, w[4].i, (float)w[5].d, w[6].p)                   \
    OP(pe_rope, w[0].p, w[1].i, w[2].i, w[3].i, w[4].i, w[5].p, w[6].p)                             \
    OP(pe_causal_conv1d, w[0].p, w[1].i, w[2].i, w[3].p, w[4].i, w[5].p, w[6].p)                    \
    OP(pe_delta_rule, w[0].p, w[1].p, w[2].p, w[3].i, w[4].p, w[5].p, w[6].i, w[7].i, w[8].i,       \
       w[9].i, w[10].i, w[11].p, w[12].p, w[13].p)                                                  \
    OP(pe_router, w[0].p, w[1].i, w[2].i, w[3].i, w[4].p, w[5].p)                                   \
    OP(pe_experts, w[0].p, w[1].p, w[2].p, w[3].p, w[4].i, w[5].p, w[6].p, w[7].p)

#define DEFINE(name, ...)                                                                           \
    static int32_t call_##name(pe_pool *pool, const pe_word *w) { return name(pool, __VA_ARGS__); }
OPERATIONS(DEFINE)

static const struct {
    const char *name;
    int32_t (*call)(pe_pool *pool, const pe_word *w);
} operations[] = {
#define ENTRY(name, ...) {#name, call_##name},
    OPERATIONS(ENTRY)};

#define N_OPERATIONS ((int32_t)(sizeof operations / sizeof operations[0]))

int32_t pe_operation(const char *name)
{
    for (int32_t i = 0; i < N_OPERATIONS; i++)
        if (!strcmp(operations[i].name, name))
            return i;
    return -1;
}

int32_t pe_replay(pe_pool *pool, const pe_call *calls, int64_t n, int64_t *failed)
{
    for (int64_t i = 0; i < n; i++) {
        int32_t status = PE_ERROR_ARGUMENT;
        if (calls[i].operation >= 0 && calls[i].operation < N_OPERATIONS)
            status = operations[calls[i].operation].call(pool, calls[i].words);
        if (status) {
            *failed = i;
            return status;
        }
    }
    return PE_OK;
}
