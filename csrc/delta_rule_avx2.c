/* delta_rule_avx2.c - see delta_rule_x86.h. */
#include "delta_rule_x86.h"

void pe_fill_avx2_delta_rule(pe_kernels *k) { k->delta_step = delta_step; }
