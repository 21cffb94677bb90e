/* blocks.h - where things are in a block of the types of blocks, for the levels' kernels: see the
 * types in pyengine.h.  A type is a constant wherever a function is inlined. */
#ifndef PYENGINE_BLOCKS_H
#define PYENGINE_BLOCKS_H

#include "kernels.h"

/* ---- blocks of 32 columns -------------------------------------------------------------------- */

PE_INLINE int is_blocks(int type)
{
    return type == PE_Q8_0 || (type >= PE_Q4_0 && type <= PE_MXFP4);
}

/* Codes of less than a byte: 16 bytes of nibbles, which end a block. */
PE_INLINE int has_nibbles(int type) { return is_blocks(type) && type != PE_Q8_0; }
PE_INLINE int has_fifth_bits(int type) { return type == PE_Q5_0 || type == PE_Q5_1; }
PE_INLINE int has_minimum(int type) { return type == PE_Q4_1 || type == PE_Q5_1; }

PE_INLINE int64_t block_bytes(int type)
{
    return type == PE_Q8_0    ? 2 + PE_BLOCK
           : type == PE_MXFP4 ? 17
                              : 18 + 4 * has_fifth_bits(type) + 2 * has_minimum(type);
}

/* Of the types whose codes are a table of nibbles. */
PE_INLINE int has_table(int type) { return type == PE_IQ4_NL || type == PE_MXFP4; }
/* What a nibble and its fifth bit are more than the code, in the types without a table. */
PE_INLINE int excess_of(int type) { return type == PE_Q4_0 ? 8 : type == PE_Q5_0 ? 16 : 0; }

/* Where the nibbles of a block start, and its fifth bits. */
PE_INLINE int64_t nibbles_at(int type) { return block_bytes(type) - 16; }
PE_INLINE int64_t fifth_bits_at(int type) { return nibbles_at(type) - 4; }

/* ---- blocks of 256 columns ------------------------------------------------------------------- */

#define BLOCK256 256

PE_INLINE int64_t block256_bytes(int type)
{
    return type == PE_Q2_K   ? 84
           : type == PE_Q3_K ? 110
           : type == PE_Q4_K ? 144
           : type == PE_Q5_K ? 176
           : type == PE_Q6_K ? 210
                             : 136;
}

/* Sub-blocks of 32 columns, with six bits for a scale and for a minimum. */
PE_INLINE int has_wide_subs(int type) { return type == PE_Q4_K || type == PE_Q5_K; }
PE_INLINE int has_minimums(int type) { return type == PE_Q2_K || has_wide_subs(type); }

/* Where d is in a block; dmin follows. */
PE_INLINE int64_t d_at(int type)
{
    return type == PE_Q2_K ? 80 : type == PE_Q3_K ? 108 : type == PE_Q6_K ? 208 : 0;
}

/* Terms of D: the sums that are rounded to float32. */
PE_INLINE int terms_of(int type)
{
    return type == PE_Q2_K || type == PE_Q3_K ? 1 : type == PE_Q4_K ? 2 : type == PE_Q5_K ? 4 : 8;
}

#endif
