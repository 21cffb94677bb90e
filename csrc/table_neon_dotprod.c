/* table_neon_dotprod.c - NEON with sdot, which only the quantised matmuls have a use for. */
#include "kernels.h"

void pe_fill_neon_dotprod_matmul(pe_kernels *k);

void pe_fill_neon_dotprod(pe_kernels *k) { pe_fill_neon_dotprod_matmul(k); }
