/* matmul_nibbles_avx2.h - few tokens times the types of nibbles with AVX2; see matmul_x86.h.
 *
 * The nibbles of two blocks are one vector: each 128 bits are the 16 bytes of one block, so that
 * the sums of ROWS rows, folded within the 128 bits, become the ROWS sums of one block.
 *
 * vpmaddubsw multiplies unsigned by signed bytes and adds two products, saturating at 16 bits: q is
 * 256 high + low, high signed and low unsigned, and codes with an excess stay unsigned.  Codes of
 * at most 31 cannot saturate: 2 * 2 * 31 * 128 and 2 * 2 * 31 * 255 = 31,620 are below 2^15, two of
 * the instruction's sums added.  IQ4_NL's codes could, and are widened to int16 instead.
 */

/* What is added to a code so that it is unsigned. */
PE_INLINE int added_to(int type) { return type == PE_MXFP4 ? 12 : excess_of(type); }

/* 16 bytes of block 0 and of block 1. */
PE_INLINE __m256i load_two(const uint8_t *block0, const uint8_t *block1)
{
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const void *)block0)),
                                   _mm_loadu_si128((const void *)block1), 1);
}

/* code + added_to (IQ4_NL: the code) of two blocks: columns 0 to 15, and 16 to 31. */
PE_INLINE void codes_of_two(int type, const uint8_t *block0, const uint8_t *block1, __m256i code[2])
{
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i pairs = load_two(block0 + nibbles_at(type), block1 + nibbles_at(type));
    code[0] = _mm256_and_si256(pairs, mask);
    code[1] = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), mask);
    if (has_fifth_bits(type)) {
        const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
        /* The nibbles follow: 16 bytes from the fifth bits on are within the block. */
        const __m256i bits = load_two(block0 + fifth_bits_at(type), block1 + fifth_bits_at(type));
        UNROLL
        for (int i = 0; i < 2; i++) {
            const __m256i byte = _mm256_broadcastsi128_si256(
                _mm_set_epi64x(0x0101010101010101 * (2 * i + 1), 0x0101010101010101 * (2 * i)));
            __m256i set = _mm256_and_si256(_mm256_shuffle_epi8(bits, byte), bit);
            set = _mm256_and_si256(_mm256_cmpeq_epi8(set, bit), _mm256_set1_epi8(16));
            code[i] = _mm256_or_si256(code[i], set);
        }
    }
    if (has_table(type)) {
        __m256i table = _mm256_broadcastsi128_si256(code_table(type));
        table = _mm256_add_epi8(table, _mm256_set1_epi8((char)added_to(type)));
        code[0] = _mm256_shuffle_epi8(table, code[0]);
        code[1] = _mm256_shuffle_epi8(table, code[1]);
    }
}

PE_INLINE __m256i load_split(const int16_t *split, int i)
{
    return _mm256_loadu_si256((const void *)(split + 16 * i));
}

/* The sums over two blocks: in each 128 bits four sums over parts of one block. */
PE_INLINE __m256i dots_of_two(int type, const uint8_t *block0, const uint8_t *block1,
                              const int16_t *split)
{
    __m256i code[2];
    codes_of_two(type, block0, block1, code);
    if (type == PE_IQ4_NL) {
        __m256i sum[2];
        UNROLL
        for (int i = 0; i < 2; i++) {
            __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(code[i], 8), 8);
            __m256i odd = _mm256_srai_epi16(code[i], 8);
            sum[i] = _mm256_add_epi32(_mm256_madd_epi16(even, load_split(split, 2 * i)),
                                      _mm256_madd_epi16(odd, load_split(split, 2 * i + 1)));
        }
        return _mm256_add_epi32(sum[0], sum[1]);
    }
    __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(code[0], load_split(split, 0)),
                                    _mm256_maddubs_epi16(code[1], load_split(split, 2)));
    __m256i low = _mm256_add_epi16(_mm256_maddubs_epi16(load_split(split, 1), code[0]),
                                   _mm256_maddubs_epi16(load_split(split, 3), code[1]));
    return _mm256_add_epi32(_mm256_madd_epi16(high, _mm256_set1_epi16(256)),
                            _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
}

/* ---- scales: of two blocks, at bytes `at` and at + step of ROWS rows --------------------------
 */

PE_INLINE __m256 halves_of_two(const uint8_t *const *row, int64_t at, int64_t step)
{
    __m128i h = _mm_cvtsi32_si128(pe_load_u16(row[0] + at));
    h = _mm_insert_epi16(h, pe_load_u16(row[1] + at), 1);
    h = _mm_insert_epi16(h, pe_load_u16(row[2] + at), 2);
    h = _mm_insert_epi16(h, pe_load_u16(row[3] + at), 3);
    h = _mm_insert_epi16(h, pe_load_u16(row[0] + at + step), 4);
    h = _mm_insert_epi16(h, pe_load_u16(row[1] + at + step), 5);
    h = _mm_insert_epi16(h, pe_load_u16(row[2] + at + step), 6);
    return _mm256_cvtph_ps(_mm_insert_epi16(h, pe_load_u16(row[3] + at + step), 7));
}

PE_INLINE __m256 e8m0_of_two(const uint8_t *const *row, int64_t at, int64_t step)
{
    uint64_t bytes = 0;
    UNROLL
    for (int i = 0; i < ROWS; i++)
        bytes |= (uint64_t)row[i][at] << 8 * i | (uint64_t)row[i][at + step] << (32 + 8 * i);
    const __m256i e = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    const __m256i subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
    const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(normal, subnormal, small));
}

/* ---- a group --------------------------------------------------------------------------------- */

/* The group at byte `at` of ROWS rows: ((p[0] + p[1]) + (p[2] + p[3])). */
PE_INLINE __m128 nibbles_part(int type, const uint8_t *const *row, int64_t at, const int16_t *split,
                              const int32_t *sums)
{
    const int64_t step = block_bytes(type);
    __m256 p[2];
    UNROLL
    for (int b = 0; b < 2; b++, at += 2 * step) {
        __m256i v[ROWS];
        UNROLL
        for (int i = 0; i < ROWS; i++)
            v[i] = dots_of_two(type, row[i] + at, row[i] + at + step, split + 64 * b);
        __m256i d = fold4(v[0], v[1], v[2], v[3]);
        if (added_to(type))
            d = _mm256_sub_epi32(d, _mm256_loadu_si256((const void *)(sums + 8 * b)));
        p[b] =
            _mm256_mul_ps(_mm256_cvtepi32_ps(d), type == PE_MXFP4 ? e8m0_of_two(row, at, step)
                                                                  : halves_of_two(row, at, step));
        if (has_minimum(type))
            p[b] = _mm256_add_ps(p[b], _mm256_mul_ps(_mm256_loadu_ps((const float *)sums + 8 * b),
                                                     halves_of_two(row, at + 2, step)));
    }
    __m256 even = _mm256_permute2f128_ps(p[0], p[1], 0x20);
    __m256 odd = _mm256_permute2f128_ps(p[0], p[1], 0x31);
    __m256 sum = _mm256_add_ps(even, odd); /* p[0] + p[1], p[2] + p[3] */
    return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
}

/* ---- splitting ------------------------------------------------------------------------------- */

/* The bytes of a block, high and low, columns 0 to 15 and 16 to 31, each into its 128 bits. */
PE_INLINE void split_bytes(const int16_t *q, uint8_t *to)
{
    const __m256i x0 = _mm256_loadu_si256((const void *)q);
    const __m256i x1 = _mm256_loadu_si256((const void *)(q + 16));
    const __m256i byte = _mm256_set1_epi16(255);
    __m256i high = _mm256_packs_epi16(_mm256_srai_epi16(x0, 8), _mm256_srai_epi16(x1, 8));
    __m256i low = _mm256_packus_epi16(_mm256_and_si256(x0, byte), _mm256_and_si256(x1, byte));
    high = _mm256_permute4x64_epi64(high, 0xd8);
    low = _mm256_permute4x64_epi64(low, 0xd8);
    _mm_storeu_si128((void *)to, _mm256_castsi256_si128(high));
    _mm_storeu_si128((void *)(to + 32), _mm256_castsi256_si128(low));
    _mm_storeu_si128((void *)(to + 64), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128((void *)(to + 96), _mm256_extracti128_si256(low, 1));
}

/* The even and odd ones of columns 0 to 15 of a block, then of the others, likewise. */
PE_INLINE void split_words(const int16_t *q, uint8_t *to)
{
    const __m256i apart = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    for (int i = 0; i < 2; i++) {
        __m256i x = _mm256_loadu_si256((const void *)(q + 16 * i));
        x = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(x, apart), 0xd8);
        _mm_storeu_si128((void *)(to + 64 * i), _mm256_castsi256_si128(x));
        _mm_storeu_si128((void *)(to + 64 * i + 32), _mm256_extracti128_si256(x, 1));
    }
}

/* INT8, Q8_0: split is q.  sums: what added_to adds to the sums of each block, once for each row;
 * with a minimum, the sum of q as float32. */
PE_INLINE void split_token(int type, const int16_t *q, const int32_t *parts, int64_t groups,
                           int16_t *split, int32_t *sums)
{
    if (type == PE_INT4) {
        split_pairs(q, groups, split, sums);
        return;
    }
    if (type == PE_INT8 || type == PE_Q8_0) {
        memcpy(split, q, (size_t)(groups * PE_GROUP) * sizeof q[0]);
        return;
    }
    const __m256i factor = _mm256_set1_epi16((short)added_to(type));
    for (int64_t b = 0; b < groups * BLOCKS; b++, q += PE_BLOCK, sums += ROWS) {
        uint8_t *to = (uint8_t *)split + b / 2 * 128 + b % 2 * 16;
        if (type == PE_IQ4_NL)
            split_words(q, to);
        else
            split_bytes(q, to);
        if (has_minimum(type)) {
            _mm_storeu_ps((float *)sums, _mm_set1_ps((float)(parts[2 * b] + parts[2 * b + 1])));
        } else if (added_to(type)) {
            __m128i sum = fold_lanes(_mm256_add_epi32(dot16(factor, q), dot16(factor, q + 16)));
            sum = _mm_hadd_epi32(sum, sum);
            _mm_storeu_si128((void *)sums, _mm_hadd_epi32(sum, sum));
        }
    }
}
