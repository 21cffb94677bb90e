/* delta_rule_x86.h - one step of the delta rule, a band of columns at a time.
 *
 * No column of a state depends on another, so the whole step is made for one band at a time, with
 * the sums of the band in registers.  The state is read twice and written once: the first pass
 * needs the decayed state only for kv_mem, and the second pass computes the same product again
 * rather than load it from memory.
 *
 * A band is as wide as the rows of the model (dv = 128), which is more than AVX2 has registers for.
 * A state that is not in cache is then read in the order of memory; half rows take 1.5 times as
 * long.
 */
#include "simd_x86.h"

#define STATE_BAND 8 /* f32x16 in a band */

/* delta of columns [j, j + 16 * (vectors - 1) + last). */
PE_INLINE void recall_band(const pe_delta_head *h, int64_t j, int vectors, int64_t last,
                           f32x16 delta[STATE_BAND])
{
    const f32x16 decay = f32x16_all(h->decay), beta = f32x16_all(h->beta);
    f32x16 kv_mem[STATE_BAND];
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

PE_INLINE void update_band(const pe_delta_head *h, int64_t j, int vectors, int64_t last,
                           const f32x16 delta[STATE_BAND])
{
    const f32x16 decay = f32x16_all(h->decay);
    f32x16 out[STATE_BAND];
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

PE_INLINE void delta_band(const pe_delta_head *h, int64_t j, int vectors, int64_t last)
{
    f32x16 delta[STATE_BAND];
    recall_band(h, j, vectors, last, delta);
    update_band(h, j, vectors, last, delta);
}

static void delta_step(const pe_delta_head *head)
{
    const pe_delta_head h = *head; /* a copy, which no store to the state can change */
    int64_t j = 0;
    for (; j + 16 * STATE_BAND <= h.dv; j += 16 * STATE_BAND)
        delta_band(&h, j, STATE_BAND, 16);
    for (; j < h.dv; j += 16)
        delta_band(&h, j, 1, pe_min(16, h.dv - j));
}

PE_INLINE void fill_delta_rule(pe_kernels *k) { k->delta_step = delta_step; }
