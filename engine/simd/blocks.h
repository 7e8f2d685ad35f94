/* Layouts of the stored tensor types as GGUF files hold them (little-endian, unaligned).
 * A new type starts with its layout here, then a decoder in convert.c and a row in engine/dtypes.py. */
#ifndef CYLORA_BLOCKS_H
#define CYLORA_BLOCKS_H

#include <stdint.h>

/* The numbers are GGUF's tensor type ids. */
enum stored_type {
    TYPE_F32 = 0,
    TYPE_F16 = 1,
    TYPE_Q4_0 = 2,
    TYPE_Q4_1 = 3,
    TYPE_Q5_0 = 6,
    TYPE_Q5_1 = 7,
    TYPE_Q8_0 = 8,
    TYPE_BF16 = 30,
};

enum { QUANT_BLOCK = 32 }; /* elements of a block in every quantized type below */

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

_Static_assert(sizeof(struct block_q4_0) == 18, "q4_0");
_Static_assert(sizeof(struct block_q4_1) == 20, "q4_1");
_Static_assert(sizeof(struct block_q5_0) == 22, "q5_0");
_Static_assert(sizeof(struct block_q5_1) == 24, "q5_1");
_Static_assert(sizeof(struct block_q8_0) == 34, "q8_0");

/* Elements and bytes of a block; 0 elements for a type that no kernel knows. */
static inline int64_t block_elements(int type)
{
    switch (type) {
    case TYPE_F32:
    case TYPE_F16:
    case TYPE_BF16:
        return 1;
    case TYPE_Q4_0:
    case TYPE_Q4_1:
    case TYPE_Q5_0:
    case TYPE_Q5_1:
    case TYPE_Q8_0:
        return QUANT_BLOCK;
    default:
        return 0;
    }
}

static inline int64_t block_bytes(int type)
{
    switch (type) {
    case TYPE_F32:
        return 4;
    case TYPE_F16:
    case TYPE_BF16:
        return 2;
    case TYPE_Q4_0:
        return sizeof(struct block_q4_0);
    case TYPE_Q4_1:
        return sizeof(struct block_q4_1);
    case TYPE_Q5_0:
        return sizeof(struct block_q5_0);
    case TYPE_Q5_1:
        return sizeof(struct block_q5_1);
    case TYPE_Q8_0:
        return sizeof(struct block_q8_0);
    default:
        return 0;
    }
}

/* Bytes from the start of a row to element n, a multiple of the block. */
static inline int64_t row_offset(int type, int64_t n)
{
    return n / block_elements(type) * block_bytes(type);
}

/* Whether a type meets activations rounded to bytes (gemv.c has its dot product). */
static inline int has_quant_dot(int type)
{
    return type == TYPE_Q4_0 || type == TYPE_Q4_1 || type == TYPE_Q5_0 || type == TYPE_Q5_1 ||
        type == TYPE_Q8_0;
}

#endif
