/* table_avx512vnni.c - what this level does better than AVX2; the rest stays as that left it. */
#include "kernels.h"

/* The parts, each in the file of its operation. */
void pe_fill_avx512vnni_matmul(pe_kernels *k);
void pe_fill_avx512vnni_activations(pe_kernels *k);
void pe_fill_avx512vnni_delta_rule(pe_kernels *k);
void pe_fill_avx512vnni_attention(pe_kernels *k);

void pe_fill_avx512vnni(pe_kernels *k)
{
    pe_fill_avx512vnni_matmul(k);
    pe_fill_avx512vnni_activations(k);
    pe_fill_avx512vnni_delta_rule(k);
    pe_fill_avx512vnni_attention(k);
}
