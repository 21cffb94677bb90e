/* delta_rule_x86.h - one step of the delta rule, a band of columns at a time.
 *
 * The columns of a state never meet, so a band goes through the whole step with its sums at hand.
 * The state is read twice and written once: the first pass needs the decayed state only for kv_mem,
 * and the second makes the same product again rather than fetch it from memory.
 *
 * A band is as wide as the model's rows (dv = 128), more than AVX2 has registers for.  A state that
 * is not in cache is then read as it lies in memory; with half rows that takes half as long again.
 */
#include "simd_x86.h"

#define BAND 8 /* f32x16 in a band */

typedef struct {
    float *state;
    const float *key, *query, *value;
    float beta, decay;
    int64_t dk, dv;
    float *out;
} delta_head;

/* delta of columns [j, j + 16 * (vectors - 1) + last). */
PE_INLINE void recall_band(const delta_head *h, int64_t j, int vectors, int64_t last,
                           f32x16 delta[BAND])
{
    const f32x16 decay = f32x16_all(h->decay), beta = f32x16_all(h->beta);
    f32x16 kv_mem[BAND];
    for (int v = 0; v < vectors; v++)
        kv_mem[v] = f32x16_nothing();
    for (int64_t i = 0; i < h->dk; i++) {
        const float *s = h->state + i * h->dv + j;
        const f32x16 key = f32x16_all(h->key[i]);
        for (int v = 0; v < vectors; v++) {
            f32x16 old = f32x16_load(s + 16 * v, lanes_of(v, vectors, last));
            kv_mem[v] = f32x16_add(kv_mem[v], f32x16_mul(f32x16_mul(old, decay), key));
        }
    }
    for (int v = 0; v < vectors; v++) {
        f32x16 value = f32x16_load(h->value + j + 16 * v, lanes_of(v, vectors, last));
        delta[v] = f32x16_mul(f32x16_sub(value, kv_mem[v]), beta);
    }
}

PE_INLINE void update_band(const delta_head *h, int64_t j, int vectors, int64_t last,
                           const f32x16 delta[BAND])
{
    const f32x16 decay = f32x16_all(h->decay);
    f32x16 out[BAND];
    for (int v = 0; v < vectors; v++)
        out[v] = f32x16_nothing();
    for (int64_t i = 0; i < h->dk; i++) {
        float *s = h->state + i * h->dv + j;
        const f32x16 key = f32x16_all(h->key[i]), query = f32x16_all(h->query[i]);
        for (int v = 0; v < vectors; v++) {
            const int64_t lanes = lanes_of(v, vectors, last);
            f32x16 decayed = f32x16_mul(f32x16_load(s + 16 * v, lanes), decay);
            f32x16 next = f32x16_add(decayed, f32x16_mul(key, delta[v]));
            f32x16_store(s + 16 * v, next, lanes);
            out[v] = f32x16_add(out[v], f32x16_mul(next, query));
        }
    }
    for (int v = 0; v < vectors; v++)
        f32x16_store(h->out + j + 16 * v, out[v], lanes_of(v, vectors, last));
}

PE_INLINE void delta_band(const delta_head *h, int64_t j, int vectors, int64_t last)
{
    f32x16 delta[BAND];
    recall_band(h, j, vectors, last, delta);
    update_band(h, j, vectors, last, delta);
}

static void delta_step(float *state, const float *key, const float *query, const float *value,
                       float beta, float decay, int64_t dk, int64_t dv, float *delta, float *out)
{
    (void)delta;
    const delta_head h = {state, key, query, value, beta, decay, dk, dv, out};
    int64_t j = 0;
    for (; j + 16 * BAND <= dv; j += 16 * BAND)
        delta_band(&h, j, BAND, 16);
    for (; j < dv; j += 16)
        delta_band(&h, j, 1, pe_min(16, dv - j));
}
