/* table_avx2.c - what this level does better than the scalar one. */
#include "kernels.h"

/* The parts, each in the file of its operation. */
void pe_fill_avx2_matmul(pe_kernels *k);
void pe_fill_avx2_quantize(pe_kernels *k);
void pe_fill_avx2_quantize_weights(pe_kernels *k);
void pe_fill_avx2_activations(pe_kernels *k);
void pe_fill_avx2_norm(pe_kernels *k);
void pe_fill_avx2_causal_conv1d(pe_kernels *k);
void pe_fill_avx2_delta_rule(pe_kernels *k);
void pe_fill_avx2_attention(pe_kernels *k);

void pe_fill_avx2(pe_kernels *k)
{
    pe_fill_avx2_matmul(k);
    pe_fill_avx2_quantize(k);
    pe_fill_avx2_quantize_weights(k);
    pe_fill_avx2_activations(k);
    pe_fill_avx2_norm(k);
    pe_fill_avx2_causal_conv1d(k);
    pe_fill_avx2_delta_rule(k);
    pe_fill_avx2_attention(k);
}
