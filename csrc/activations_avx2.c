/* activations_avx2.c - see activations_x86.h. */
#include "activations_x86.h"

void pe_fill_avx2_activations(pe_kernels *k)
{
    k->exp = exp_each;
    k->sigmoid = sigmoid_each;
    k->silu = silu_each;
}
