/* activations_avx512vnni.c - see activations_x86.h. */
#define PE_AVX512
#include "activations_x86.h"

void pe_fill_avx512vnni_activations(pe_kernels *k)
{
    k->exp = exp_each;
    k->sigmoid = sigmoid_each;
    k->silu = silu_each;
}
