/* matmul_blocks_neon.c - the types of blocks for every 64-bit ARM processor. */
#include "matmul_neon_smlal.h"

#include "matmul_blocks_neon.h"

void pe_fill_neon_blocks(pe_kernels *k) { fill_blocks(k); }
