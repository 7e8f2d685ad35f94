/* Layouts of the stored tensor types as GGUF files hold them (little-endian, unaligned).
 * A new type starts with its layout here, then a decoder in convert.c and a row in engine/dtypes.py. */
#ifndef CYLORA_BLOCKS_H
#define CYLORA_BLOCKS_H

#include <stddef.h>
#include <stdint.h>

/* Every stored type: its name, GGUF's tensor type id, elements of a block, bytes of a block. */
#define STORED_TYPES(TYPE)                                                                         \
    TYPE(F32, 0, 1, 4)                                                                             \
    TYPE(F16, 1, 1, 2)                                                                             \
    TYPE(Q4_0, 2, QUANT_BLOCK, sizeof(struct block_q4_0))                                          \
    TYPE(Q4_1, 3, QUANT_BLOCK, sizeof(struct block_q4_1))                                          \
    TYPE(Q5_0, 6, QUANT_BLOCK, sizeof(struct block_q5_0))                                          \
    TYPE(Q5_1, 7, QUANT_BLOCK, sizeof(struct block_q5_1))                                          \
    TYPE(Q8_0, 8, QUANT_BLOCK, sizeof(struct block_q8_0))                                          \
    TYPE(Q2_K, 10, SUPER_BLOCK, sizeof(struct block_q2_k))                                         \
    TYPE(Q3_K, 11, SUPER_BLOCK, sizeof(struct block_q3_k))                                         \
    TYPE(Q4_K, 12, SUPER_BLOCK, sizeof(struct block_q4_k))                                         \
    TYPE(Q5_K, 13, SUPER_BLOCK, sizeof(struct block_q5_k))                                         \
    TYPE(Q6_K, 14, SUPER_BLOCK, sizeof(struct block_q6_k))                                         \
    TYPE(IQ4_NL, 20, QUANT_BLOCK, sizeof(struct block_iq4_nl))                                     \
    TYPE(IQ4_XS, 23, SUPER_BLOCK, sizeof(struct block_iq4_xs))                                     \
    TYPE(BF16, 30, 1, 2)

enum stored_type {
#define TYPE(name, id, elements, bytes) TYPE_##name = (id),
    STORED_TYPES(TYPE)
#undef TYPE
};

enum {
    QUANT_BLOCK = 32,  /* elements of a small block, and of a group that meets activations */
    SUPER_BLOCK = 256, /* elements of a block whose groups have scales of their own */
};

/* d, m: half-precision scale and offset. qs: element e < 16 is the low nibble of byte e, e >= 16 the
 * high nibble of byte e - 16. qh: bit e is bit 4 of element e's code. */
struct block_q4_0 { /* x = (code - 8) d */
    uint8_t d[2], qs[16];
};
struct block_q4_1 { /* x = code d + m */
    uint8_t d[2], m[2], qs[16];
};
struct block_q5_0 { /* x = (code - 16) d */
    uint8_t d[2], qh[4], qs[16];
};
struct block_q5_1 { /* x = code d + m */
    uint8_t d[2], m[2], qh[4], qs[16];
};
struct block_q8_0 { /* x = code d */
    uint8_t d[2];
    int8_t qs[32];
};
struct block_iq4_nl { /* x = V[code] d, V the table in codes.h */
    uint8_t d[2], qs[16];
};

/* Blocks of 256: 16 groups of 16 or 8 groups of 32, each with a small scale (and minimum) of its own.
 * Codes lie in planes, so that a shift and a mask give 32 neighbours: of two bits, element e in byte
 * 32 (e / 128) + e % 32 from bit 2 (e / 32 % 4) on; of four bits, in byte 32 (e / 64) + e % 32 from bit
 * 4 (e / 32 % 2) on; a further bit, in byte e % 32 at bit e / 32. */
struct block_q2_k { /* x = (d low(scale)) code - dmin high(scale); a scale byte for 16 elements */
    uint8_t scales[16], qs[64], d[2], dmin[2];
};
struct
    block_q3_k { /* x = (d (scale - 32)) (code - 4); six-bit scales for 16 elements, code bit 2 in qh */
    uint8_t qh[32], qs[64], scales[12], d[2];
};
struct block_q4_k { /* x = (d scale) code - dmin min; six-bit scales and minima for 32 elements */
    uint8_t d[2], dmin[2], scales[12], qs[128];
};
struct block_q5_k { /* as q4_k, code bit 4 in qh */
    uint8_t d[2], dmin[2], scales[12], qh[32], qs[128];
};
struct
    block_q6_k { /* x = (d scale) (code - 32); two halves: 64 bytes of low nibbles, 32 of upper bits */
    uint8_t ql[128], qh[64];
    int8_t scales[16];
    uint8_t d[2];
};
struct block_iq4_xs { /* x = (d (scale - 32)) V[code]; 8 times the qs of iq4_nl */
    uint8_t d[2], scales_h[2], scales_l[4], qs[128];
};

_Static_assert(sizeof(struct block_q4_0) == 18, "q4_0");
_Static_assert(sizeof(struct block_q4_1) == 20, "q4_1");
_Static_assert(sizeof(struct block_q5_0) == 22, "q5_0");
_Static_assert(sizeof(struct block_q5_1) == 24, "q5_1");
_Static_assert(sizeof(struct block_q8_0) == 34, "q8_0");
_Static_assert(sizeof(struct block_q2_k) == 84, "q2_k");
_Static_assert(sizeof(struct block_q3_k) == 110, "q3_k");
_Static_assert(sizeof(struct block_q4_k) == 144, "q4_k");
_Static_assert(sizeof(struct block_q5_k) == 176, "q5_k");
_Static_assert(sizeof(struct block_q6_k) == 210, "q6_k");
_Static_assert(sizeof(struct block_iq4_nl) == 18, "iq4_nl");
_Static_assert(sizeof(struct block_iq4_xs) == 136, "iq4_xs");

/* Elements and bytes of a block; 0 elements for a type that no kernel knows. */
static inline int64_t block_elements(int type)
{
    switch (type) {
#define TYPE(name, id, elements, bytes)                                                            \
    case TYPE_##name:                                                                              \
        return (elements);
        STORED_TYPES(TYPE)
#undef TYPE
    default:
        return 0;
    }
}

static inline int64_t block_bytes(int type)
{
    switch (type) {
#define TYPE(name, id, elements, bytes)                                                            \
    case TYPE_##name:                                                                              \
        return (bytes);
        STORED_TYPES(TYPE)
#undef TYPE
    default:
        return 0;
    }
}

/* Elements that share a scale in a block of 256; 0 for other types. */
static inline int64_t group_elements(int type)
{
    if (block_elements(type) < SUPER_BLOCK)
        return 0;
    return type == TYPE_Q4_K || type == TYPE_Q5_K || type == TYPE_IQ4_XS ? 32 : 16;
}

/* Where a block's half-precision fields are: scale and, next to it, offset; how many there are. */
static inline int64_t scale_place(int type)
{
    switch (type) {
    case TYPE_Q2_K:
        return offsetof(struct block_q2_k, d);
    case TYPE_Q3_K:
        return offsetof(struct block_q3_k, d);
    case TYPE_Q6_K:
        return offsetof(struct block_q6_k, d);
    default:
        return 0;
    }
}

static inline int scale_fields(int type)
{
    return type == TYPE_Q4_1 || type == TYPE_Q5_1 || type == TYPE_Q2_K || type == TYPE_Q4_K ||
            type == TYPE_Q5_K
        ? 2
        : 1;
}

/* Bytes from the start of a row to element n, a multiple of the block. */
static inline int64_t row_offset(int type, int64_t n)
{
    return n / block_elements(type) * block_bytes(type);
}

/* Whether encode.c writes rows of a type. */
static inline int has_encoder(int type)
{
    return type == TYPE_F32 || type == TYPE_F16 || type == TYPE_BF16 || type == TYPE_Q4_0 ||
        type == TYPE_Q4_1 || type == TYPE_Q5_0 || type == TYPE_Q5_1 || type == TYPE_Q8_0 ||
        type == TYPE_IQ4_NL;
}

/* Whether a type meets activations rounded to bytes (quant.c): all that have scales. */
static inline int has_quant_dot(int type) { return block_elements(type) > 1; }

#endif
