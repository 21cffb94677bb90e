/* delta_rule_neon.c - sibling of delta_rule.c: columns j of the state in lanes.
 *
 * No column depends on another, so a strip of columns goes through all five lines at a time, its
 * sums in registers.  The decayed state is computed twice rather than stored in between: it comes
 * out the same, and the strip is written once.  Sums start as -0: -0 (+) term is the term itself,
 * for +0 and -0 too, so that they start with their first term.
 */
#include "kernels.h"

#include <arm_neon.h>

#define WIDE 8 /* vectors of a wide strip: enough sums to hide the latency of an addition */

typedef struct {
    float *state;
    const float *key, *query, *value;
    float beta, decay;
    int64_t dk, dv;
    float *out;
} step_args;

/* 4 * vectors columns from j on; vectors is a constant at each call. */
static inline __attribute__((always_inline)) void strip(const step_args *a, int64_t j, int vectors)
{
    float32x4_t delta[WIDE], out[WIDE];
    for (int v = 0; v < vectors; v++)
        delta[v] = out[v] = vdupq_n_f32(-0.0f);
    for (int64_t i = 0; i < a->dk; i++) {
        const float *s = a->state + i * a->dv + j;
        const float key = a->key[i];
        for (int v = 0; v < vectors; v++) {
            float32x4_t decayed = vmulq_n_f32(vld1q_f32(s + 4 * v), a->decay);
            delta[v] = vaddq_f32(delta[v], vmulq_n_f32(decayed, key));
        }
    }
    for (int v = 0; v < vectors; v++)
        delta[v] = vmulq_n_f32(vsubq_f32(vld1q_f32(a->value + j + 4 * v), delta[v]), a->beta);
    for (int64_t i = 0; i < a->dk; i++) {
        float *s = a->state + i * a->dv + j;
        const float key = a->key[i], query = a->query[i];
        for (int v = 0; v < vectors; v++) {
            float32x4_t decayed = vmulq_n_f32(vld1q_f32(s + 4 * v), a->decay);
            float32x4_t now = vaddq_f32(decayed, vmulq_n_f32(delta[v], key));
            vst1q_f32(s + 4 * v, now);
            out[v] = vaddq_f32(out[v], vmulq_n_f32(now, query));
        }
    }
    for (int v = 0; v < vectors; v++)
        vst1q_f32(a->out + j + 4 * v, out[v]);
}

static void one_column(const step_args *a, int64_t j)
{
    float delta = -0.0f, out = -0.0f;
    for (int64_t i = 0; i < a->dk; i++)
        delta += a->state[i * a->dv + j] * a->decay * a->key[i];
    delta = (a->value[j] - delta) * a->beta;
    for (int64_t i = 0; i < a->dk; i++) {
        float *s = a->state + i * a->dv + j;
        *s = *s * a->decay + a->key[i] * delta;
        out += *s * a->query[i];
    }
    a->out[j] = out;
}

static void delta_step(float *state, const float *key, const float *query, const float *value,
                       float beta, float decay, int64_t dk, int64_t dv, float *delta, float *out)
{
    const step_args a = {state, key, query, value, beta, decay, dk, dv, out};
    int64_t j = 0;
    (void)delta;
    for (; j + 4 * WIDE <= dv; j += 4 * WIDE)
        strip(&a, j, WIDE);
    for (; j + 4 <= dv; j += 4)
        strip(&a, j, 1);
    for (; j < dv; j++)
        one_column(&a, j);
}

void pe_fill_neon_delta_rule(pe_kernels *k) { k->delta_step = delta_step; }
