/* delta_rule_neon.h - delta_rule.c for NEON: columns j of the state in lanes.
 *
 * No column depends on another, so the five lines are computed for a strip of columns at a time,
 * with the sums in registers.  The decayed state is computed twice rather than stored in between:
 * the result is the same, and the strip is written once.  Sums start as -0: -0 (+) term is the term
 * itself, for +0 and -0 too, so that a sum starts with its first term.
 */
#include "simd_neon.h"

#define STATE_WIDE 8 /* vectors of a wide strip: enough sums to hide the latency of an addition */

/* 4 * vectors columns from j on; vectors is a constant at each call. */
PE_INLINE void strip(const pe_delta_head *a, int64_t j, int vectors)
{
    float32x4_t delta[STATE_WIDE], out[STATE_WIDE];
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

PE_INLINE void one_column(const pe_delta_head *a, int64_t j)
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

static void delta_step(const pe_delta_head *head)
{
    const pe_delta_head a = *head; /* a copy, which no store to the state can change */
    int64_t j = 0;
    for (; j + 4 * STATE_WIDE <= a.dv; j += 4 * STATE_WIDE)
        strip(&a, j, STATE_WIDE);
    for (; j + 4 <= a.dv; j += 4)
        strip(&a, j, 1);
    for (; j < a.dv; j++)
        one_column(&a, j);
}

PE_INLINE void fill_delta_rule(pe_kernels *k) { k->delta_step = delta_step; }
