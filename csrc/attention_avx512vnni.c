/* attention_avx512vnni.c - see attention_x86.h. */
#define PE_AVX512
#include "attention_x86.h"

void pe_fill_avx512vnni_attention(pe_kernels *k)
{
    k->load_f16 = load_f16;
    k->attention_scores = attention_scores;
    k->attention_mix = attention_mix;
}
