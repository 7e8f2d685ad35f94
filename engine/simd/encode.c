/* Floats to stored rows, by the rules of each type's reference: one rounding an operation, never fused, so every
 * variant gives the same bytes. A block that holds an infinity or NaN gets NaN for its scale and decodes to NaN. A
 * scale whose reciprocal is not finite is zero. Bound: the bytes read. */

/* What a block needs to be cut into codes. */
struct extremes {
    float largest; /* the first element of the largest magnitude, with its sign */
    float low, high;
    int finite;
};

V_INLINE struct extremes extremes_of(const float *x)
{
    vf top = v_zero(), nothing = v_zero(); /* 0 x: NaN from NaN or infinity */
    for (int i = 0; i < QUANT_BLOCK; i += VL) {
        top = v_max(top, v_abs(v_load(x + i)));
        nothing = v_fma(v_load(x + i), v_zero(), nothing);
    }
    float magnitude = v_max_lane(top);
    struct extremes e = {.low = x[0], .high = x[0], .finite = v_sum(nothing) == 0.0f};
    for (int i = QUANT_BLOCK - 1; i >= 0; i--)
        e.largest = fabsf(x[i]) == magnitude && magnitude > 0.0f ? x[i] : e.largest;
    for (int i = 1; i < QUANT_BLOCK; i++) {
        e.low = x[i] < e.low ? x[i] : e.low;
        e.high = x[i] > e.high ? x[i] : e.high;
    }
    return e;
}

V_INLINE void put_half(uint8_t *p, float x)
{
    uint16_t h = (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
    memcpy(p, &h, sizeof h);
}

/* The reciprocal of a scale; the scale itself becomes zero where it has none. */
V_INLINE float reciprocal(float *d)
{
    float inverse = *d != 0.0f ? 1.0f / *d : 0.0f;
    if (!isfinite(inverse)) {
        *d = 0.0f;
        inverse = 0.0f;
    }
    return inverse;
}

/* 32 codes of up to 5 bits: low nibbles at qs, bit 4 of each at qh unless that is NULL. */
V_INLINE void put_codes(const uint8_t *code, uint8_t *qs, uint8_t *qh)
{
    uint32_t high = 0;
    for (int i = 0; i < QUANT_BLOCK / 2; i++)
        qs[i] = (uint8_t)((code[i] & 15) | (code[i + QUANT_BLOCK / 2] & 15) << 4);
    if (qh) {
        for (int i = 0; i < QUANT_BLOCK; i++)
            high |= (uint32_t)(code[i] >> 4 & 1) << i;
        memcpy(qh, &high, sizeof high);
    }
}

/* Nearest, ties away from zero; |x| < 2^23. */
V_INLINE float round_away(float x)
{
    float whole = (float)(int32_t)x;
    return whole + (fabsf(x - whole) >= 0.5f ? copysignf(1.0f, x) : 0.0f);
}

V_INLINE void encode_q8_0(const float *x, uint8_t *p)
{
    struct extremes e = extremes_of(x);
    float d = e.finite ? fabsf(e.largest) / 127.0f : 0.0f, inverse = reciprocal(&d);
    put_half(p, e.finite ? d : NAN);
    for (int i = 0; i < QUANT_BLOCK; i++)
        p[2 + i] = (uint8_t)(int8_t)round_away(e.finite ? x[i] * inverse : 0.0f);
}

/* Types whose middle code stands for zero. */
V_INLINE void encode_symmetric(const float *x, int middle, uint8_t *p)
{
    struct extremes e = extremes_of(x);
    float d = e.finite ? e.largest / (float)-middle : 0.0f, inverse = reciprocal(&d);
    uint8_t code[QUANT_BLOCK];
    put_half(p, e.finite ? d : NAN);
    for (int i = 0; i < QUANT_BLOCK; i++) {
        int c = (int)((e.finite ? x[i] * inverse : 0.0f) + ((float)middle + 0.5f));
        code[i] = (uint8_t)(c < 2 * middle ? c : 2 * middle - 1);
    }
    put_codes(code, p + (middle == 16 ? 6 : 2), middle == 16 ? p + 2 : NULL);
}

/* Types that store their minimum. */
V_INLINE void encode_affine(const float *x, int top, uint8_t *p)
{
    struct extremes e = extremes_of(x);
    float span = e.high - e.low;
    int finite = e.finite && isfinite(span);
    float d = finite ? span / (float)top : 0.0f, inverse = reciprocal(&d);
    uint8_t code[QUANT_BLOCK];
    put_half(p, finite ? d : NAN);
    put_half(p + 2, finite ? e.low : NAN);
    for (int i = 0; i < QUANT_BLOCK; i++) {
        int c = (int)((finite ? (x[i] - e.low) * inverse : 0.0f) + 0.5f);
        code[i] = (uint8_t)(c < top ? c : top);
    }
    put_codes(code, p + (top == 31 ? 8 : 4), top == 31 ? p + 4 : NULL);
}

static const float FN(iq4_value)[] = {
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* The code of the value next to x, the upper one of two. */
V_INLINE uint8_t nearest_iq4(float x)
{
    const float *value = FN(iq4_value);
    uint8_t code = 0;
    while (code < 15 && x - value[code] >= value[code + 1] - x)
        code++;
    return code;
}

/* The scale of least squares, weighted by x^2, for the codes that the largest element's scale gives. */
V_INLINE void encode_iq4_nl(const float *x, uint8_t *p)
{
    struct extremes e = extremes_of(x);
    int some = e.finite && fabsf(e.largest) >= 1e-15f;
    float inverse = some ? 1.0f / (e.largest / -127.0f) : 0.0f, product = 0, square = 0;
    uint8_t code[QUANT_BLOCK];
    for (int i = 0; i < QUANT_BLOCK; i++) {
        code[i] = nearest_iq4(some ? x[i] * inverse : 0.0f);
        float q = FN(iq4_value)[code[i]], w = some ? x[i] * x[i] : 0.0f;
        product += w * q * x[i];
        square += w * q * q;
    }
    put_half(p, some ? product / square : e.finite ? 0.0f : NAN);
    put_codes(code, p + 2, NULL);
}

V_INLINE void encode_block(int type, const float *x, uint8_t *p)
{
    switch (type) {
    case TYPE_Q4_0:
        encode_symmetric(x, 8, p);
        break;
    case TYPE_Q4_1:
        encode_affine(x, 15, p);
        break;
    case TYPE_Q5_0:
        encode_symmetric(x, 16, p);
        break;
    case TYPE_Q5_1:
        encode_affine(x, 31, p);
        break;
    case TYPE_IQ4_NL:
        encode_iq4_nl(x, p);
        break;
    default:
        encode_q8_0(x, p);
        break;
    }
}

/* y: n stored elements, whole blocks, of a type that has_encoder; blocks may be unaligned. x: n floats. */
static void FN(encode_row)(int type, const float *x, int64_t n, void *y)
{
    uint8_t *p = y;
    switch (type) {
    case TYPE_F32:
        memcpy(y, x, (size_t)n * sizeof *x);
        break;
    case TYPE_F16:
        FN(encode_f16)(x, n, y);
        break;
    case TYPE_BF16:
        FN(encode_bf16)(x, n, y);
        break;
    default:
        for (int64_t i = 0; i < n; i += QUANT_BLOCK, p += block_bytes(type))
            encode_block(type, x + i, p);
        break;
    }
}
