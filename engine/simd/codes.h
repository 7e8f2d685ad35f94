/* The blocks of 256 and IQ4_NL as 8-bit codes: 32 elements at a time, and a scale (and offset) a group.
 *
 *     x[e] = d[e / group] code[e] + m[e / group]         group: group_elements(type); IQ4_NL: its 32
 * Codes are signed bytes, 0 ... 63 where the type has an offset. d is the product of the block's scale and the
 * group's own, rounded once; m is minus the product of the block's minimum scale and the group's minimum. */
#ifndef CYLORA_CODES_H
#define CYLORA_CODES_H

enum { MAX_GROUPS = SUPER_BLOCK / 16 };

V_INLINE float f16_value(const uint8_t *p)
{
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return _cvtsh_ss(h);
}

/* 32 four-bit codes, one a byte, in element order: low nibbles of 16 bytes, then the high ones. */
V_INLINE __m256i nibble_codes(const uint8_t *qs)
{
    __m128i packed = _mm_loadu_si128((const __m128i *)qs);
    __m256i both = _mm256_set_m128i(_mm_srli_epi16(packed, 4), packed);
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

/* The values that IQ4's codes stand for. */
V_INLINE __m128i iq4_table(void)
{
    return _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
}

V_INLINE __m256i iq4_values(const uint8_t *qs)
{
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(iq4_table()), nibble_codes(qs));
}

/* `bits` bits of each of 32 bytes, from bit `shift` on. */
V_INLINE __m256i plane(const uint8_t *bytes, int shift, int bits)
{
    __m256i x = _mm256_srli_epi16(_mm256_loadu_si256((const __m256i *)bytes), shift);
    return _mm256_and_si256(x, _mm256_set1_epi8((char)((1 << bits) - 1)));
}

/* `value` in each byte whose bit `n` is set in 32 bytes of further bits. */
V_INLINE __m256i where_bit(const uint8_t *bytes, int n, int value)
{
    __m256i bit = _mm256_set1_epi8((char)(1 << n));
    __m256i set = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)bytes), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(set, bit), _mm256_set1_epi8((char)value));
}

/* Codes of elements 32 g ... 32 g + 31 of a block. */
V_INLINE __m256i group_codes(int type, const uint8_t *p, int g)
{
    switch (type) {
    case TYPE_Q2_K: {
        const struct block_q2_k *b = (const void *)p;
        return plane(b->qs + g / 4 * 32, g % 4 * 2, 2);
    }
    case TYPE_Q3_K: {
        const struct block_q3_k *b = (const void *)p;
        __m256i code =
            _mm256_add_epi8(plane(b->qs + g / 4 * 32, g % 4 * 2, 2), where_bit(b->qh, g, 4));
        return _mm256_sub_epi8(code, _mm256_set1_epi8(4));
    }
    case TYPE_Q4_K: {
        const struct block_q4_k *b = (const void *)p;
        return plane(b->qs + g / 2 * 32, g % 2 * 4, 4);
    }
    case TYPE_Q5_K: {
        const struct block_q5_k *b = (const void *)p;
        return _mm256_add_epi8(plane(b->qs + g / 2 * 32, g % 2 * 4, 4), where_bit(b->qh, g, 16));
    }
    case TYPE_Q6_K: {
        const struct block_q6_k *b = (const void *)p;
        __m256i low = plane(b->ql + g / 4 * 64 + g % 2 * 32, g % 4 / 2 * 4, 4);
        __m256i upper = plane(b->qh + g / 4 * 32, g % 4 * 2, 2);
        __m256i code = _mm256_or_si256(low, _mm256_slli_epi16(upper, 4));
        return _mm256_sub_epi8(code, _mm256_set1_epi8(32));
    }
    case TYPE_IQ4_XS: {
        const struct block_iq4_xs *b = (const void *)p;
        return iq4_values(b->qs + g * 16);
    }
    default: {
        const struct block_iq4_nl *b = (const void *)p;
        return iq4_values(b->qs);
    }
    }
}

/* d[i] = scale (byte i - middle) for the eight bytes of a word. From registers alone: bytes that were just stored in
 * other widths would be waited for. */
V_INLINE void scaled_bytes(uint64_t bytes, int middle, float scale, float *d)
{
    __m256i codes = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)bytes));
    codes = _mm256_sub_epi32(codes, _mm256_set1_epi32(middle));
    _mm256_storeu_ps(d, _mm256_mul_ps(_mm256_cvtepi32_ps(codes), _mm256_set1_ps(scale)));
}

V_INLINE uint64_t word_at(const void *p)
{
    uint64_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

V_INLINE uint32_t half_word_at(const void *p)
{
    uint32_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

/* Each byte's low two, four, six bits. */
#define LOW_2 0x0303030303030303u
#define LOW_4 0x0F0F0F0F0F0F0F0Fu
#define LOW_6 0x3F3F3F3F3F3F3F3Fu

/* The eight scales and eight minima of six bits in q4_k and q5_k: four of each lie in the low bits of the first
 * eight bytes, whose upper two bits complete the others' nibbles in the last four. */
V_INLINE void six_bit_pairs(const uint8_t *packed, uint64_t *scales, uint64_t *minima)
{
    uint64_t first = word_at(packed), last = half_word_at(packed + 8);
    uint64_t low = first & LOW_6;
    uint64_t high = ((last | last >> 4 << 32) & LOW_4) | (first >> 6 & LOW_2) << 4;
    *scales = (low & 0xFFFFFFFFu) | high << 32;
    *minima = low >> 32 | (high & 0xFFFFFFFF00000000u);
}

/* The sixteen scales of six bits in q3_k: nibbles of eight bytes, upper bits in the last four. */
V_INLINE void six_bit_scales(const uint8_t *packed, uint64_t scales[2])
{
    uint64_t nibbles = word_at(packed), upper = half_word_at(packed + 8);
    uint64_t both = (upper & 0xFFFFFFFFu) | upper >> 2 << 32;
    scales[0] = (nibbles & LOW_4) | (both & LOW_2) << 4;
    scales[1] = (nibbles >> 4 & LOW_4) | (both >> 4 & LOW_2) << 4;
}

/* The eight scales of six bits in iq4_xs: nibbles of four bytes, upper bits in the two before. */
V_INLINE void iq4_scales(const struct block_iq4_xs *b, float scale, float *d)
{
    __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i low = _mm256_srlv_epi32(
        _mm256_set1_epi32((int)half_word_at(b->scales_l)), _mm256_slli_epi32(place, 2));
    __m256i high = _mm256_srlv_epi32(
        _mm256_set1_epi32(b->scales_h[0] | b->scales_h[1] << 8), _mm256_slli_epi32(place, 1));
    low = _mm256_and_si256(low, _mm256_set1_epi32(15));
    high = _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4);
    __m256i codes = _mm256_sub_epi32(_mm256_or_si256(low, high), _mm256_set1_epi32(32));
    _mm256_storeu_ps(d, _mm256_mul_ps(_mm256_cvtepi32_ps(codes), _mm256_set1_ps(scale)));
}

/* Scale and offset of each group of a block: d and m above; m where scale_fields() is 2, else untouched. */
V_INLINE void group_scales(int type, const uint8_t *p, float *d, float *m)
{
    uint64_t scales[2], minima;
    switch (type) {
    case TYPE_Q2_K: {
        const struct block_q2_k *b = (const void *)p;
        for (int i = 0; i < 16; i += 8) {
            uint64_t both = word_at(b->scales + i);
            scaled_bytes(both & LOW_4, 0, f16_value(b->d), d + i);
            scaled_bytes(both >> 4 & LOW_4, 0, -f16_value(b->dmin), m + i);
        }
        break;
    }
    case TYPE_Q3_K: {
        const struct block_q3_k *b = (const void *)p;
        six_bit_scales(b->scales, scales);
        scaled_bytes(scales[0], 32, f16_value(b->d), d);
        scaled_bytes(scales[1], 32, f16_value(b->d), d + 8);
        break;
    }
    case TYPE_Q4_K:
    case TYPE_Q5_K: {
        const struct block_q4_k *b = (const void *)p; /* q5_k begins alike */
        six_bit_pairs(b->scales, scales, &minima);
        scaled_bytes(scales[0], 0, f16_value(b->d), d);
        scaled_bytes(minima, 0, -f16_value(b->dmin), m);
        break;
    }
    case TYPE_Q6_K: {
        const struct block_q6_k *b = (const void *)p;
        scaled_bytes(word_at(b->scales), 0, f16_value(b->d), d);
        scaled_bytes(word_at(b->scales + 8), 0, f16_value(b->d), d + 8);
        break;
    }
    case TYPE_IQ4_XS: {
        const struct block_iq4_xs *b = (const void *)p;
        iq4_scales(b, f16_value(b->d), d);
        break;
    }
    default:
        d[0] = f16_value(p);
        break;
    }
}

#undef LOW_2
#undef LOW_4
#undef LOW_6

#endif
