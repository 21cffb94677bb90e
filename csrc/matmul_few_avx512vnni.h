/* matmul_few_avx512vnni.h - few tokens with AVX-512 and VNNI; see matmul_x86.h.
 *
 * The codes of a group are two vectors.  vpdpbusd multiplies unsigned by signed bytes, so that
 * codes need no widening: q is 256 high + low, high signed and low unsigned.  A code that fits both
 * is multiplied as it is; one that may be negative is made unsigned for the high bytes.  The codes
 * of ROWS rows are unpacked once and stay in registers for all tokens.  For each token, the sums
 * over four columns of ROWS rows are folded together within the 128 bits.  In types of blocks, the
 * b-th 128 bits of both vectors are block b: its columns 0 to 15, and 16 to 31.
 */

/* The most tokens, by measurement. */
PE_INLINE int64_t few_tokens(int type)
{
    (void)type;
    return FEW_AT_ONCE;
}

/* One number, or one for each lane of the folded sums. */
PE_INLINE int64_t sums_of(int type) { return is_blocks(type) ? SUMS : 1; }

/* Whether codes can be negative: then 128 is added for the high bytes alone. */
PE_INLINE int is_signed(int type)
{
    return type == PE_Q8_0 || type == PE_INT8 || type == PE_IQ4_NL;
}

/* What is added to a code so that it is unsigned. */
PE_INLINE int added_to(int type)
{
    return is_signed(type)    ? 128
           : type == PE_MXFP4 ? 12
           : type == PE_INT4  ? 8
                              : excess_of(type);
}

/* ---- where things are in a group ------------------------------------------------------------- */

/* A group of 68 to 96 bytes is read as two vectors, one from its first byte and one to its last.
 * Both are seen as 32 words; MXFP4's blocks have an odd length, which its own steps deal with. */
PE_INLINE int block_words(int type) { return (int)block_bytes(type) / 2; }
PE_INLINE int words_ahead(int type) { return BLOCKS * block_words(type) - 32; }

PE_INLINE __m512i first_words(const uint8_t *group) { return _mm512_loadu_si512(group); }

PE_INLINE __m512i last_words(int type, const uint8_t *group)
{
    return _mm512_loadu_si512(group + 2 * words_ahead(type));
}

/* Words [at, at + 8) of the four blocks, those of block b in the b-th 128 bits. */
PE_INLINE __m512i words_of_blocks(int type, const uint8_t *group, int at)
{
    const __m512i step = _mm512_set1_epi16((short)block_words(type));
    const __m512i block = _mm512_set_epi32(0x30003, 0x30003, 0x30003, 0x30003, 0x20002, 0x20002,
                                           0x20002, 0x20002, 0x10001, 0x10001, 0x10001, 0x10001, //
                                           0, 0, 0, 0);
    const __m512i ascending = _mm512_set4_epi32(0x70006, 0x50004, 0x30002, 0x10000);
    const __m512i index = _mm512_add_epi16(
        _mm512_mullo_epi16(block, step), _mm512_add_epi16(ascending, _mm512_set1_epi16((short)at)));
    const __m512i ahead = _mm512_set1_epi16((short)words_ahead(type));
    uint32_t last = 0;
    for (int b = 0; b < BLOCKS; b++)
        if (b * block_words(type) + block_words(type) > 32)
            last |= UINT32_C(0xff) << 8 * b;
    __m512i words = _mm512_permutexvar_epi16(index, first_words(group));
    return _mm512_mask_permutexvar_epi16(words, last, _mm512_sub_epi16(index, ahead),
                                         last_words(type, group));
}

/* The nibbles of the four blocks. */
PE_INLINE __m512i nibbles_of_group(int type, const uint8_t *group)
{
    if (type == PE_Q4_0 ||
        type == PE_IQ4_NL) { /* all but the last 8 bytes lie in the first words */
        const __m512i index =
            _mm512_set_epi16(0, 0, 0, 0, 31, 30, 29, 28, 26, 25, 24, 23, 22, 21, 20, 19, //
                             17, 16, 15, 14, 13, 12, 11, 10, 8, 7, 6, 5, 4, 3, 2, 1);
        long long last;
        memcpy(&last, group + 64, sizeof last);
        __m512i v = _mm512_permutexvar_epi16(index, first_words(group));
        return _mm512_mask_set1_epi64(v, 0x80, last);
    }
    if (type != PE_MXFP4)
        return words_of_blocks(type, group, (int)nibbles_at(type) / 2);
    const uint8_t *p = group + nibbles_at(type);
    const int64_t step = block_bytes(type);
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const void *)p));
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const void *)(p + step)), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const void *)(p + 2 * step)), 2);
    return _mm512_inserti32x4(v, _mm_loadu_si128((const void *)(p + 3 * step)), 3);
}

/* ---- scales ---------------------------------------------------------------------------------- */

/* 2^(e - 128) of the first byte of each block. */
PE_INLINE __m512 e8m0_scales(const uint8_t *const *row, int64_t at)
{
    /* Byte b of the b-th 128 bits of the first vector, in the 32 bits of its row. */
    const __m512i byte =
        _mm512_set_epi32((int)0x80808003, (int)0x80808003, (int)0x80808003, (int)0x80808003,
                         (int)0x80808002, (int)0x80808002, (int)0x80808002, (int)0x80808002,
                         (int)0x80808001, (int)0x80808001, (int)0x80808001, (int)0x80808001,
                         (int)0x80808000, (int)0x80808000, (int)0x80808000, (int)0x80808000);
    __m512i e = _mm512_setzero_si512();
    UNROLL
    for (int i = 0; i < ROWS; i++)
        e = _mm512_mask_shuffle_epi8(e, UINT64_C(0x000f000f000f000f) << 4 * i,
                                     first_words(row[i] + at), byte);
    __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    __m512i subnormal = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
    __mmask16 small = _mm512_cmplt_epu32_mask(e, _mm512_set1_epi32(2));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, small, subnormal));
}

/* Where unit 0 of each block is, in units of one or two words, once for each row; block 3 may be in
 * the last words instead of the first. */
PE_INLINE int last_unit(int type, int words)
{
    return (3 * block_words(type) - (3 * block_words(type) > 31 ? words_ahead(type) : 0)) / words;
}

PE_INLINE __m512i unit_index(int type, int words)
{
    const int step = block_words(type) / words, last = last_unit(type, words);
    return _mm512_setr_epi32(0, 0, 0, 0, step, step, step, step, 2 * step, 2 * step, 2 * step,
                             2 * step, last, last, last, last);
}

/* The first half of each block of ROWS rows, in the order of the folded sums. */
PE_INLINE __m512 half_scales(int type, const uint8_t *const *row, int64_t at)
{
    if (type == PE_Q8_0) { /* in integer registers: the vector units have more to do */
        uint64_t v[BLOCKS] = {0};
        UNROLL
        for (int b = 0; b < BLOCKS; b++) {
            UNROLL
            for (int i = 0; i < ROWS; i++)
                v[b] |= (uint64_t)pe_load_u16(row[i] + at + b * Q8_BYTES) << 16 * i;
        }
        return _mm512_cvtph_ps(_mm256_set_epi64x((long long)v[3], (long long)v[2], (long long)v[1],
                                                 (long long)v[0]));
    }
    const __m512i index = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(unit_index(type, 1)));
    const int split = 3 * block_words(type) > 31;
    __m512i s = _mm512_setzero_si512();
    UNROLL
    for (int i = 0; i < ROWS; i++) {
        s = _mm512_mask_permutexvar_epi16(s, (__mmask32)(0x1111 << i), index,
                                          first_words(row[i] + at));
        if (split)
            s = _mm512_mask_permutexvar_epi16(s, (__mmask32)(0x1000 << i), index,
                                              last_words(type, row[i] + at));
    }
    return _mm512_cvtph_ps(_mm512_castsi512_si256(s));
}

/* The first two halves of each block of ROWS rows: scales and minimums. */
PE_INLINE void half_pairs(int type, const uint8_t *const *row, int64_t at, __m512 pair[2])
{
    const __m512i index = unit_index(type, 2);
    const int split = 3 * block_words(type) > 31;
    __m512i s = _mm512_setzero_si512();
    UNROLL
    for (int i = 0; i < ROWS; i++) {
        s = _mm512_mask_permutexvar_epi32(s, (__mmask16)(0x1111 << i), index,
                                          first_words(row[i] + at));
        if (split)
            s = _mm512_mask_permutexvar_epi32(s, (__mmask16)(0x1000 << i), index,
                                              last_words(type, row[i] + at));
    }
    pair[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(s));
    pair[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(s, 16)));
}

/* ---- codes ----------------------------------------------------------------------------------- */

/* The codes of columns 0 to 15, or 16 to 31, of the four blocks of a group of Q8_0.  Two loads
 * within the group hold two blocks each, at the same distances. */
PE_INLINE __m512i bytes_of_group(const uint8_t *group, int half)
{
    const __m512i index =
        _mm512_set_epi16(63, 62, 61, 60, 59, 58, 57, 56, 46, 45, 44, 43, 42, 41, 40, 39, //
                         24, 23, 22, 21, 20, 19, 18, 17, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_permutex2var_epi16(_mm512_loadu_si512(group + 2 + 16 * half), index,
                                     _mm512_loadu_si512(group + 56 + 16 * half));
}

/* code + added_to of a group; of signed codes the code. */
PE_INLINE void codes_of_row(int type, const uint8_t *group, __m512i code[2])
{
    const __m512i mask = _mm512_set1_epi8(15);
    if (type == PE_Q8_0 || type == PE_INT8) {
        UNROLL
        for (int i = 0; i < 2; i++)
            code[i] =
                type == PE_Q8_0 ? bytes_of_group(group, i) : _mm512_loadu_si512(group + 64 * i);
        return;
    }
    __m512i pairs = type == PE_INT4 ? _mm512_loadu_si512(group) : nibbles_of_group(type, group);
    code[0] = _mm512_and_si512(pairs, mask);
    code[1] = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), mask);
    if (has_fifth_bits(type)) {
        const __m512i bit = _mm512_set1_epi64((long long)0x8040201008040201);
        __m512i bits = words_of_blocks(type, group, (int)fifth_bits_at(type) / 2);
        UNROLL
        for (int i = 0; i < 2; i++) {
            const __m512i byte =
                _mm512_set4_epi32(0x01010101 * (2 * i + 1), 0x01010101 * (2 * i + 1),
                                  0x01010101 * (2 * i), 0x01010101 * (2 * i));
            __mmask64 set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(bits, byte), bit);
            code[i] = _mm512_mask_add_epi8(code[i], set, code[i], _mm512_set1_epi8(16));
        }
    }
    if (has_table(type)) {
        __m512i table = _mm512_broadcast_i32x4(code_table(type));
        if (type == PE_MXFP4)
            table = _mm512_add_epi8(table, _mm512_set1_epi8((char)added_to(type)));
        code[0] = _mm512_shuffle_epi8(table, code[0]);
        code[1] = _mm512_shuffle_epi8(table, code[1]);
    }
}

/* ---- sums ------------------------------------------------------------------------------------ */

/* Each 128-bit lane of the result is (a, b, c, d); the 128-bit lanes are not summed yet. */
PE_INLINE __m512i fold4(__m512i a, __m512i b, __m512i c, __m512i d)
{
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

PE_INLINE __m128i fold_lanes(__m512i v)
{
    __m256i sum =
        _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
}

/* ROWS rows of a group. */
typedef struct {
    __m512i code[ROWS][2], positive[ROWS][2];
    __m512 scales[2]; /* types of blocks: and minimums */
    __m128 s_w;       /* INT8, INT4 */
} few_codes;

/* The codes of a group as codes_of_row, and unsigned. */
PE_INLINE void code_and_positive(int type, const uint8_t *group, __m512i code[2],
                                 __m512i positive[2])
{
    codes_of_row(type, group, code);
    UNROLL
    for (int k = 0; k < 2; k++)
        positive[k] = is_signed(type)
                          ? _mm512_xor_si512(code[k], _mm512_set1_epi8((char)0x80))
                          : code[k];
}

PE_INLINE few_codes unpack_group(int type, const few *f, int64_t g, int64_t at)
{
    few_codes c;
    UNROLL
    for (int i = 0; i < ROWS; i++)
        code_and_positive(type, f->row[i] + at, c.code[i], c.positive[i]);
    if (!is_blocks(type))
        c.s_w = load_scales(f->scales + g * f->scale_ld, f->n);
    else if (has_minimum(type))
        half_pairs(type, f->row, at, c.scales);
    else
        c.scales[0] = type == PE_MXFP4 ? e8m0_scales(f->row, at) : half_scales(type, f->row, at);
    return c;
}

/* q * (code + added_to), added to the high bytes alone where codes are signed. */
PE_INLINE __m512i dots_of_group(const few_codes *c, const int16_t *q)
{
    const __m512i high0 = _mm512_loadu_si512(q), low0 = _mm512_loadu_si512(q + 32);
    const __m512i high1 = _mm512_loadu_si512(q + 64), low1 = _mm512_loadu_si512(q + 96);
    __m512i v[ROWS];
    UNROLL
    for (int i = 0; i < ROWS; i++) {
        __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), c->positive[i][0], high0);
        sum = _mm512_slli_epi32(_mm512_dpbusd_epi32(sum, c->positive[i][1], high1), 8);
        sum = _mm512_dpbusd_epi32(sum, low0, c->code[i][0]);
        v[i] = _mm512_dpbusd_epi32(sum, low1, c->code[i][1]);
    }
    return fold4(v[0], v[1], v[2], v[3]);
}

PE_INLINE void add_group(int type, const few *f, int64_t tokens, int64_t g, int64_t at, __m128 *sum)
{
    const few_codes c = unpack_group(type, f, g, at);
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t group = t * f->groups + g;
        const int32_t *sums = f->sums + group * sums_of(type);
        const __m128 s_x = _mm_set1_ps(f->s_x[group]);
        __m512i d = dots_of_group(&c, f->q + group * PE_GROUP);
        if (!is_blocks(type)) {
            __m128i four = _mm_sub_epi32(fold_lanes(d), _mm_set1_epi32(sums[0]));
            sum[t] = _mm_add_ps(sum[t], _mm_mul_ps(_mm_cvtepi32_ps(four), _mm_mul_ps(c.s_w, s_x)));
            continue;
        }
        __m512 p;
        if (has_minimum(type)) {
            p = _mm512_mul_ps(_mm512_cvtepi32_ps(d), c.scales[0]);
            p = _mm512_add_ps(p, _mm512_mul_ps(_mm512_loadu_ps(sums), c.scales[1]));
        } else {
            if (added_to(type))
                d = _mm512_sub_epi32(d, _mm512_loadu_si512(sums));
            p = _mm512_mul_ps(_mm512_cvtepi32_ps(d), c.scales[0]);
        }
        p = _mm512_add_ps(p, _mm512_shuffle_f32x4(p, p, 0xb1)); /* p[0] + p[1], ., p[2] + p[3], . */
        __m128 four = _mm_add_ps(_mm512_castps512_ps128(p), _mm512_extractf32x4_ps(p, 2));
        sum[t] = _mm_add_ps(sum[t], _mm_mul_ps(four, s_x));
    }
}

/* ---- splitting ------------------------------------------------------------------------------- */

/* A group becomes four times 64 bytes: high and low of the columns of the first vector of codes,
 * then of the second.  sums: what added_to adds to the sums of each block, once for each row, or to
 * the sum of the group; with a minimum, the sum of q as float32. */
PE_INLINE void split_token(int type, const int16_t *q, const int32_t *parts, int64_t groups,
                           int16_t *split, int32_t *sums)
{
    (void)parts; /* the sums are a few instructions here */
    const __m512i one = _mm512_set1_epi16(1);
    const __m512i added = _mm512_set1_epi32(added_to(type) * (is_signed(type) ? 256 : 1));
    const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    for (int64_t g = 0; g < groups; g++, q += PE_GROUP) {
        uint8_t *to = (uint8_t *)(split + g * PE_GROUP);
        __m512i v[BLOCKS];
        UNROLL
        for (int b = 0; b < BLOCKS; b++) {
            __m512i x = _mm512_loadu_si512(q + b * PE_BLOCK), high = _mm512_srai_epi16(x, 8);
            v[b] = _mm512_madd_epi16(is_signed(type) ? high : x, one);
            if (type == PE_INT4) { /* the even columns, then the odd ones */
                __m512i odd = _mm512_srai_epi32(x, 16);
                uint8_t *part = to + 16 * b;
                _mm_storeu_si128((void *)part, _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8)));
                _mm_storeu_si128((void *)(part + 64), _mm512_cvtepi32_epi8(x));
                _mm_storeu_si128((void *)(part + 128),
                                 _mm512_cvtepi32_epi8(_mm512_srli_epi32(odd, 8)));
                _mm_storeu_si128((void *)(part + 192), _mm512_cvtepi32_epi8(odd));
                continue;
            }
            __m256i h = _mm512_cvtepi16_epi8(high), l = _mm512_cvtepi16_epi8(x);
            if (type == PE_INT8) {
                uint8_t *part = to + 128 * (b / 2) + 32 * (b % 2);
                _mm256_storeu_si256((void *)part, h);
                _mm256_storeu_si256((void *)(part + 64), l);
                continue;
            }
            uint8_t *part = to + 16 * b;
            _mm_storeu_si128((void *)part, _mm256_castsi256_si128(h));
            _mm_storeu_si128((void *)(part + 64), _mm256_castsi256_si128(l));
            _mm_storeu_si128((void *)(part + 128), _mm256_extracti128_si256(h, 1));
            _mm_storeu_si128((void *)(part + 192), _mm256_extracti128_si256(l, 1));
        }
        if (!is_blocks(type)) {
            __m512i all =
                _mm512_add_epi32(_mm512_add_epi32(v[0], v[1]), _mm512_add_epi32(v[2], v[3]));
            sums[g] = added_to(type) * (is_signed(type) ? 256 : 1) * _mm512_reduce_add_epi32(all);
            continue;
        }
        __m128i sum = fold_lanes(fold4(v[0], v[1], v[2], v[3]));
        __m512i each = _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(sum));
        if (has_minimum(type))
            _mm512_storeu_ps(sums + g * SUMS, _mm512_cvtepi32_ps(each));
        else
            _mm512_storeu_si512(sums + g * SUMS, _mm512_mullo_epi32(each, added));
    }
}
