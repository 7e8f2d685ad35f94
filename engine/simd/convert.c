/* Stored rows to floats and back.
 *
 * Decoding is exact arithmetic of the format (a product, or a product and a sum, each rounded once and
 * never fused), so every variant gives the same bits. Bound: the bytes written. */

/* Bit e of qh as 16 in byte e, to be joined with the nibbles. */
V_INLINE __m256i fifth_bits(const uint8_t *qh)
{
    uint32_t bits;
    memcpy(&bits, qh, sizeof bits);
    __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits),
        _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    __m256i own = _mm256_set1_epi64x((long long)0x8040201008040201);
    __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, own), own);
    return _mm256_and_si256(set, _mm256_set1_epi8(16));
}

/* A quantized block as unsigned codes, scale and offset: x = code d + m. Q8_0 keeps its signed codes. */
struct codes {
    __m256i q;
    float d, m;
};

V_INLINE struct codes block_codes(int type, const uint8_t *p)
{
    struct codes c = {.d = f16_value(p), .m = 0};
    switch (type) {
    case TYPE_Q4_0:
        c.q = nibble_codes(p + 2);
        c.m = -8.0f * c.d;
        break;
    case TYPE_Q4_1:
        c.q = nibble_codes(p + 4);
        c.m = f16_value(p + 2);
        break;
    case TYPE_Q5_0:
        c.q = _mm256_or_si256(nibble_codes(p + 6), fifth_bits(p + 2));
        c.m = -16.0f * c.d;
        break;
    case TYPE_Q5_1:
        c.q = _mm256_or_si256(nibble_codes(p + 8), fifth_bits(p + 4));
        c.m = f16_value(p + 2);
        break;
    default:
        c.q = _mm256_loadu_si256((const __m256i *)(p + 2));
        break;
    }
    return c;
}

V_INLINE int has_offset(int type) { return type == TYPE_Q4_1 || type == TYPE_Q5_1; }

/* Codes less their middle for the types without a stored offset: (code - 8) d must be one product. */
V_INLINE void decode_block(int type, const uint8_t *p, float *y)
{
    struct codes c = block_codes(type, p);
    if (type == TYPE_Q4_0)
        c.q = _mm256_sub_epi8(c.q, _mm256_set1_epi8(8));
    if (type == TYPE_Q5_0)
        c.q = _mm256_sub_epi8(c.q, _mm256_set1_epi8(16));
    int8_t codes[QUANT_BLOCK];
    _mm256_storeu_si256((__m256i *)codes, c.q);
    for (int i = 0; i < QUANT_BLOCK; i += VL) {
        vf x = v_mul(v_from_i8(codes + i), v_set1(c.d));
        if (has_offset(type))
            x = v_add(x, v_set1(c.m));
        v_store(y + i, x);
    }
}

V_INLINE void decode_blocks(int type, const uint8_t *p, int64_t n, float *y)
{
    int64_t bytes = block_bytes(type);
    for (int64_t i = 0; i < n; i += QUANT_BLOCK, p += bytes) {
        prefetch_weights(p);
        decode_block(type, p, y + i);
    }
}

/* Types whose codes codes.h unpacks: a block's groups one after another. */
V_INLINE void decode_groups(int type, const uint8_t *p, int64_t n, float *y)
{
    const int block = (int)block_elements(type), bytes = (int)block_bytes(type);
    const int group = block == SUPER_BLOCK ? (int)group_elements(type) : block;
    float d[MAX_GROUPS], m[MAX_GROUPS];
    int8_t codes[QUANT_BLOCK];
    for (int64_t i = 0; i < n; i += block, p += bytes) {
        for (int ahead = 0; ahead < bytes; ahead += 64)
            prefetch_weights(p + ahead);
        group_scales(type, p, d, m);
        for (int e = 0; e < block; e += QUANT_BLOCK, y += QUANT_BLOCK) {
            _mm256_storeu_si256((__m256i *)codes, group_codes(type, p, e / QUANT_BLOCK));
            for (int j = 0; j < QUANT_BLOCK; j += VL) {
                vf x = v_mul(v_from_i8(codes + j), v_set1(d[(e + j) / group]));
                if (scale_fields(type) == 2)
                    x = v_add(x, v_set1(m[(e + j) / group]));
                v_store(y + j, x);
            }
        }
    }
}

static void FN(decode_f16)(const uint8_t *p, int64_t n, float *y)
{
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        prefetch_weights(p + 2 * i);
        v_store(y + i, v_load_f16((const uint16_t *)(p + 2 * i)));
    }
    for (; i < n; i++)
        y[i] = f16_value(p + 2 * i);
}

static void FN(decode_bf16)(const uint8_t *p, int64_t n, float *y)
{
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        prefetch_weights(p + 2 * i);
        v_store(y + i, v_load_bf16((const uint16_t *)(p + 2 * i)));
    }
    for (; i < n; i++) {
        uint32_t bits = ((uint32_t)p[2 * i] | (uint32_t)p[2 * i + 1] << 8) << 16;
        memcpy(y + i, &bits, sizeof bits);
    }
}

/* The parts of a type with offsets: y[i] = code d for n elements, and m for n blocks. */
V_INLINE void decode_codes(int type, const uint8_t *p, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i += QUANT_BLOCK, p += block_bytes(type)) {
        struct codes c = block_codes(type, p);
        uint8_t codes[QUANT_BLOCK];
        _mm256_storeu_si256((__m256i *)codes, c.q);
        for (int j = 0; j < QUANT_BLOCK; j += VL)
            v_store(y + i + j, v_mul(v_from_u8(codes + j), v_set1(c.d)));
    }
}

static void FN(decode_codes)(int type, const uint8_t *p, int64_t n, float *y)
{
    if (type == TYPE_Q4_1)
        decode_codes(TYPE_Q4_1, p, n, y);
    else
        decode_codes(TYPE_Q5_1, p, n, y);
}

static void FN(decode_offsets)(int type, const uint8_t *p, int64_t n_blocks, float *y)
{
    for (int64_t b = 0; b < n_blocks; b++, p += block_bytes(type))
        y[b] = f16_value(p + 2);
}

/* y: n floats; p: n stored elements, whole blocks, unaligned. */
static void FN(decode_row)(int type, const void *p, int64_t n, float *y)
{
    switch (type) {
    case TYPE_F32:
        memcpy(y, p, (size_t)n * sizeof *y);
        break;
    case TYPE_F16:
        FN(decode_f16)(p, n, y);
        break;
    case TYPE_BF16:
        FN(decode_bf16)(p, n, y);
        break;
    case TYPE_Q4_0:
        decode_blocks(TYPE_Q4_0, p, n, y);
        break;
    case TYPE_Q4_1:
        decode_blocks(TYPE_Q4_1, p, n, y);
        break;
    case TYPE_Q5_0:
        decode_blocks(TYPE_Q5_0, p, n, y);
        break;
    case TYPE_Q5_1:
        decode_blocks(TYPE_Q5_1, p, n, y);
        break;
    case TYPE_Q8_0:
        decode_blocks(TYPE_Q8_0, p, n, y);
        break;
    case TYPE_Q2_K:
        decode_groups(TYPE_Q2_K, p, n, y);
        break;
    case TYPE_Q3_K:
        decode_groups(TYPE_Q3_K, p, n, y);
        break;
    case TYPE_Q4_K:
        decode_groups(TYPE_Q4_K, p, n, y);
        break;
    case TYPE_Q5_K:
        decode_groups(TYPE_Q5_K, p, n, y);
        break;
    case TYPE_Q6_K:
        decode_groups(TYPE_Q6_K, p, n, y);
        break;
    case TYPE_IQ4_NL:
        decode_groups(TYPE_IQ4_NL, p, n, y);
        break;
    case TYPE_IQ4_XS:
        decode_groups(TYPE_IQ4_XS, p, n, y);
        break;
    }
}

/* Nearest bf16, ties to even; subnormals are rounded like the rest, NaN is made quiet. y: n bf16. */
static void FN(encode_bf16)(const float *x, int64_t n, uint16_t *y)
{
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        v_store_bf16(y + i, v_load(x + i));
    if (i < n) {
        uint16_t tail[VL];
        v_store_bf16(tail, v_load_n(x + i, n - i));
        memcpy(y + i, tail, (size_t)(n - i) * sizeof *y);
    }
}

/* Nearest half, ties to even. y: n halves. */
static void FN(encode_f16)(const float *x, int64_t n, uint16_t *y)
{
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        v_store_f16(y + i, v_load(x + i));
    if (i < n) {
        uint16_t tail[VL];
        v_store_f16(tail, v_load_n(x + i, n - i));
        memcpy(y + i, tail, (size_t)(n - i) * sizeof *y);
    }
}

/* An activation row in blocks of 32: signed codes, scale, and scale times the codes' sum. The scale is rounded to
 * half precision, for the original stores it so, and so is the sum that meets a stored offset; codes and that
 * sum come from the scale before it is rounded. Other sums, which undo a shift of codes, are exact. */
struct q8_row {
    int8_t *q;
    float *scale, *sum;
    int64_t group; /* elements of a sum: QUANT_BLOCK, or half of it */
};

V_INLINE float round_half(float x) { return _cvtsh_ss(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }

static void FN(quantize_q8)(const float *x, int64_t n, int half_sums, struct q8_row row)
{
    for (int64_t i = 0; i < n; i += QUANT_BLOCK) {
        vf top = v_zero();
        vf nothing = v_zero(); /* 0 x: NaN from NaN or infinity, which the maximum drops */
        for (int j = 0; j < QUANT_BLOCK; j += VL) {
            top = v_max(top, v_abs(v_load(x + i + j)));
            nothing = v_fma(v_load(x + i + j), v_zero(), nothing);
        }
        float largest = v_max_lane(top) + v_sum(nothing);
        float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f; /* finite */
        float scale = round_half(largest / 127.0f);
        row.scale[i / QUANT_BLOCK] = scale;
        for (int64_t g = 0; g < QUANT_BLOCK; g += row.group) {
            vf total = v_zero(); /* of small integers: exact */
            for (int64_t j = g; j < g + row.group; j += VL) {
                vf code = v_round(v_mul(v_load(x + i + j), v_set1(inverse)));
                v_store_i8(row.q + i + j, code);
                total = v_add(total, code);
            }
            float sum = v_sum(total);
            row.sum[(i + g) / row.group] =
                half_sums ? round_half(sum * (largest / 127.0f)) : sum * scale;
        }
    }
}

/* First element (F32, F16, BF16) or block whose value or scale is infinite or NaN; -1 if there is none. */
static int64_t FN(find_invalid)(int type, const void *p, int64_t n)
{
    const uint8_t *bytes = p;
    int64_t size = block_bytes(type), blocks = n / block_elements(type);
    int fields = scale_fields(type);
    bytes += scale_place(type);
    for (int64_t i = 0; i < blocks; i++, bytes += size) {
        int bad = 0;
        if (type == TYPE_F32) {
            uint32_t bits;
            memcpy(&bits, bytes, sizeof bits);
            bad = (bits & 0x7F800000u) == 0x7F800000u;
        } else {
            unsigned exponent = type == TYPE_BF16 ? 0x7F80u : 0x7C00u;
            for (int f = 0; f < fields; f++)
                bad |= ((unsigned)(bytes[2 * f] | bytes[2 * f + 1] << 8) & exponent) == exponent;
        }
        if (bad)
            return i;
    }
    return -1;
}

/* y[t] = row ids[t] of a stored matrix                                     embedding
 * ids: n_tokens, each below the matrix's rows; y: n_tokens rows of n_cols floats. */
static void FN(embed)(const void *p, const struct worker *worker)
{
    const struct embed_args *a = p;
    const char *w = a->w;
    int64_t begin, end, row_bytes = row_offset(a->type, a->n_cols);
    worker_range(worker, a->n_tokens, 1, &begin, &end);
    for (int64_t t = begin; t < end; t++)
        FN(decode_row)(a->type, w + a->ids[t] * row_bytes, a->n_cols, a->y + t * a->n_cols);
}
