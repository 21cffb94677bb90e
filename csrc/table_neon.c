/* table_neon.c - the NEON level, for every 64-bit ARM processor; each part in the sibling of its
 * operation's file.  softplus stays scalar: the model takes one per head and token. */
#include "kernels.h"

void pe_fill_neon_matmul(pe_kernels *k);
void pe_fill_neon_quantize(pe_kernels *k);
void pe_fill_neon_activations(pe_kernels *k);
void pe_fill_neon_norm(pe_kernels *k);
void pe_fill_neon_causal_conv1d(pe_kernels *k);
void pe_fill_neon_delta_rule(pe_kernels *k);
void pe_fill_neon_attention(pe_kernels *k);

void pe_fill_neon(pe_kernels *k)
{
    pe_fill_neon_matmul(k);
    pe_fill_neon_quantize(k);
    pe_fill_neon_activations(k);
    pe_fill_neon_norm(k);
    pe_fill_neon_causal_conv1d(k);
    pe_fill_neon_delta_rule(k);
    pe_fill_neon_attention(k);
}
