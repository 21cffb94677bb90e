/* files.c - see pe_first_refused and pe_string_ends in pyengine.h. */
#include "kernels.h"

#define AT_ONCE 64 /* words between two looks at what was found */

static uint32_t word_at(const char *p, int32_t width)
{
    uint32_t word = 0; /* memcpy: a word may lie at any address */
    if (width == 1)
        return *(const uint8_t *)p;
    if (width == 2)
        return pe_load_u16(p);
    memcpy(&word, p, sizeof word);
    return word;
}

PE_INLINE int64_t first_refused(const char *data, int64_t count, int64_t stride, int32_t width,
                                uint32_t bits)
{
    for (int64_t first = 0; first < count; first += AT_ONCE) {
        const int64_t end = pe_min(first + AT_ONCE, count);
        int refused = 0;
        for (int64_t i = first; i < end; i++)
            refused |= (word_at(data + i * stride, width) & bits) == bits;
        for (int64_t i = first; refused && i < end; i++)
            if ((word_at(data + i * stride, width) & bits) == bits)
                return i;
    }
    return -1;
}

int64_t pe_first_refused(const void *data, int64_t count, int64_t stride, int32_t width,
                         uint32_t bits)
{
    if (width == stride && width == 2)
        return first_refused(data, count, 2, 2, bits);
    if (width == stride && width == 4)
        return first_refused(data, count, 4, 4, bits);
    if (width == 2)
        return first_refused(data, count, stride, 2, bits);
    return first_refused(data, count, stride, width, bits);
}

int64_t pe_string_ends(const void *data, int64_t size, int64_t count, int64_t *ends)
{
    int64_t position = 0;
    for (int64_t i = 0; i < count; i++) {
        uint64_t length;
        if (size - position < (int64_t)sizeof length)
            return i;
        memcpy(&length, (const char *)data + position, sizeof length);
        position += (int64_t)sizeof length;
        if (length > (uint64_t)(size - position))
            return i;
        position += (int64_t)length;
        ends[i] = position;
    }
    return count;
}
