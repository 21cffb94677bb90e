/* replay.c - recorded calls, made again: see pe_replay in pyengine.h.
 *
 * OPERATIONS is the list of the operations that can be replayed: one row per operation, with the
 * types of its parameters after the pool.  The compiler checks each row against the prototype in
 * pyengine.h: a wrong type, or too many or too few types, does not compile.  The member of each
 * word (pe_word) follows from the parameter's type, the word's index from the parameter's place.
 */
#include "kernels.h"

#define OPERATIONS(OP)                                                                             \
    OP(pe_add, const float *, const float *, int64_t, float *)                                     \
    OP(pe_quantize_activations, const float *, int64_t, int64_t, int16_t *, float *, int32_t *)    \
    OP(pe_matmul, const pe_matrix *, int64_t, const pe_activations *, float *, int64_t)            \
    OP(pe_matmul_shared_input, const pe_matrix *const *, int64_t, const pe_activations *, float *) \
    OP(pe_silu_mul, const float *, const float *, int64_t, float *)                                \
    OP(pe_sigmoid_mul, const float *, const float *, int64_t, int64_t, int64_t, float *)           \
    OP(pe_delta_gates, const float *, const float *, const float *, const float *, int64_t,        \
       int64_t, float *, float *)                                                                  \
    OP(pe_rms_norm, const float *, int64_t, int64_t, int64_t, int64_t, int64_t, const float *,     \
       double, float *)                                                                            \
    OP(pe_rms_norm_gated, const float *, const float *, int64_t, int64_t, const float *, double,   \
       float *)                                                                                    \
    OP(pe_l2_norm, const float *, int64_t, int64_t, int64_t, int64_t, float, float *)              \
    OP(pe_rope, float *, int64_t, int64_t, int64_t, int64_t, const float *, const float *)         \
    OP(pe_causal_conv1d, const float *, int64_t, int64_t, const float *, int64_t, float *,         \
       float *)                                                                                    \
    OP(pe_delta_rule, const float *, const float *, const float *, int64_t, const float *,         \
       const float *, int64_t, int64_t, int64_t, int64_t, int64_t, const int32_t *, float *,       \
       float *)                                                                                    \
    OP(pe_router, const float *, int64_t, int64_t, int64_t, float *, int32_t *)                    \
    OP(pe_experts, const pe_experts_weights *, const pe_activations *, const int32_t *,            \
       const float *, int64_t, const float *, float *, const pe_experts_trace *)

/* ---- from words to arguments ----------------------------------------------------------------- */

/* Word `at` of w as an argument of a type: an integer, a float, a double, else a pointer. */
#define WORD(at, type)                                                                             \
    _Generic((type){0},                                                                            \
        int64_t: w[at].i,                                                                          \
        int32_t: (int32_t)w[at].i,                                                                 \
        float: (float)w[at].d,                                                                     \
        double: w[at].d,                                                                           \
        default: w[at].p)

/* WORDS(type, type, ...) is WORD(0, type), WORD(1, type), ... */
#define WORDS_1(a) WORD(0, a)
#define WORDS_2(a, b) WORDS_1(a), WORD(1, b)
#define WORDS_3(a, b, c) WORDS_2(a, b), WORD(2, c)
#define WORDS_4(a, b, c, d) WORDS_3(a, b, c), WORD(3, d)
#define WORDS_5(a, b, c, d, e) WORDS_4(a, b, c, d), WORD(4, e)
#define WORDS_6(a, b, c, d, e, f) WORDS_5(a, b, c, d, e), WORD(5, f)
#define WORDS_7(a, b, c, d, e, f, g) WORDS_6(a, b, c, d, e, f), WORD(6, g)
#define WORDS_8(a, b, c, d, e, f, g, h) WORDS_7(a, b, c, d, e, f, g), WORD(7, h)
#define WORDS_9(a, b, c, d, e, f, g, h, i) WORDS_8(a, b, c, d, e, f, g, h), WORD(8, i)
#define WORDS_10(a, b, c, d, e, f, g, h, i, j) WORDS_9(a, b, c, d, e, f, g, h, i), WORD(9, j)
#define WORDS_11(a, b, c, d, e, f, g, h, i, j, k)                                                  \
    WORDS_10(a, b, c, d, e, f, g, h, i, j), WORD(10, k)
#define WORDS_12(a, b, c, d, e, f, g, h, i, j, k, l)                                               \
    WORDS_11(a, b, c, d, e, f, g, h, i, j, k), WORD(11, l)
#define WORDS_13(a, b, c, d, e, f, g, h, i, j, k, l, m)                                            \
    WORDS_12(a, b, c, d, e, f, g, h, i, j, k, l), WORD(12, m)
#define WORDS_14(a, b, c, d, e, f, g, h, i, j, k, l, m, n)                                         \
    WORDS_13(a, b, c, d, e, f, g, h, i, j, k, l, m), WORD(13, n)
#define FIFTEENTH(a, b, c, d, e, f, g, h, i, j, k, l, m, n, result, ...) result
#define WORDS(...)                                                                                 \
    FIFTEENTH(__VA_ARGS__, WORDS_14, WORDS_13, WORDS_12, WORDS_11, WORDS_10, WORDS_9, WORDS_8,     \
              WORDS_7, WORDS_6, WORDS_5, WORDS_4, WORDS_3, WORDS_2, WORDS_1, )                     \
    (__VA_ARGS__)
_Static_assert(PE_CALL_WORDS == 14, "one WORDS_n per word of a call");

#define DEFINE(name, ...)                                                                          \
    _Static_assert(_Generic(&name, int32_t (*)(pe_pool *, __VA_ARGS__): 1, default: 0),            \
                   #name ": the row in replay.c differs from the prototype in pyengine.h");        \
    static int32_t call_##name(pe_pool *pool, const pe_word *w)                                    \
    {                                                                                              \
        return name(pool, WORDS(__VA_ARGS__));                                                     \
    }
OPERATIONS(DEFINE)

/* ---- the list at run time -------------------------------------------------------------------- */

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
