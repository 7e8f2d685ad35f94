/* Floats to stored blocks as llama.cpp's quantize of June 2024 encodes them, to the byte: scales are searched
 * (fit.c) for the K types and IQ4, and with an importance matrix for all but Q8_0; the rest is encode.c's.
 *
 * Some blocks go together. Inputs are finite; a scale beyond a half's range becomes infinite, which find_invalid()
 * sees. Bound: arithmetic. */

enum { FIT_CHUNK = 512 }; /* elements searched together: whole vectors of groups of every type */

/* A part of a row in front of and behind the search. importance: a weight an element, or NULL. */
struct chunk {
    int64_t n; /* elements; up to FIT_CHUNK there are zeros */
    float x[FIT_CHUNK], w[FIT_CHUNK];
    float codes[FIT_CHUNK];
    float scale[FIT_CHUNK / 16], minimum[FIT_CHUNK / 16];
    int has_importance;
};

/* ------------------------------------------------------------------ weights */

V_INLINE float square_sum(const float *x, int64_t n)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    return sum;
}

/* Weights of a search with an importance matrix: importance times the root of x^2 + spread. */
V_INLINE void important_weights(const float *x, const float *q, int64_t n, float spread, float *w)
{
    vf s = v_set1(spread);
    for (int64_t i = 0; i < n; i += VL) {
        vf y = v_load(x + i);
        v_store(w + i, v_mul(v_load(q + i), v_sqrt(v_add(s, v_mul(y, y)))));
    }
}

/* Weights of a search without one, for a block of 256 or 32 elements: |x|, x^2, or |x| and the group's root mean
 * square. */
V_INLINE void plain_weights(int type, const float *x, int64_t n, float *w)
{
    int wide = type == TYPE_Q4_K || type == TYPE_Q5_K;
    for (int64_t i = 0; i < n; i += QUANT_BLOCK) {
        vf root = v_set1(wide ? sqrtf(square_sum(x + i, QUANT_BLOCK) / QUANT_BLOCK) : 0.0f);
        for (int j = 0; j < QUANT_BLOCK; j += VL) {
            vf y = v_load(x + i + j), size = v_abs(y);
            y = wide ? v_add(root, size) : type == TYPE_Q2_K ? size : v_mul(y, y);
            v_store(w + i + j, y);
        }
    }
}

/* Mean square that is added under the root; for the types of 32 elements that of the row. */
V_INLINE float spread_of(int type, const float *block, float of_row)
{
    float sum = block_elements(type) == SUPER_BLOCK ? square_sum(block, SUPER_BLOCK) : 0;
    switch (type) {
    case TYPE_Q2_K:
        return sum / SUPER_BLOCK;
    case TYPE_Q3_K:
    case TYPE_Q4_K:
    case TYPE_Q5_K:
        return 2 * sum / SUPER_BLOCK;
    case TYPE_IQ4_XS:
        return sum * (2.0f / SUPER_BLOCK);
    case TYPE_IQ4_NL:
        return square_sum(block, QUANT_BLOCK) * (2.0f / QUANT_BLOCK);
    default:
        return of_row;
    }
}

static void FN(load_chunk)(
    int type, const float *x, const float *importance, int64_t n, float of_row, struct chunk *c)
{
    int64_t block = block_elements(type);
    c->n = n;
    c->has_importance = importance != NULL;
    memset(c->x + n, 0, (size_t)(FIT_CHUNK - n) * sizeof *x);
    memset(c->w + n, 0, (size_t)(FIT_CHUNK - n) * sizeof *x);
    memcpy(c->x, x, (size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i += block) {
        if (importance && type == TYPE_Q6_K)
            memcpy(c->w + i, importance + i, (size_t)block * sizeof *x);
        else if (importance)
            important_weights(
                x + i, importance + i, block, spread_of(type, x + i, of_row), c->w + i);
        else
            plain_weights(type, x + i, block, c->w + i);
    }
}

/* ------------------------------------------------------------------ groups */

V_INLINE struct affine affine_attempts(int type, int important)
{
    int top = type == TYPE_Q2_K ? 3 : type == TYPE_Q4_K || type == TYPE_Q4_1 ? 15 : 31;
    if (important)
        return (struct affine){top, -0.9f, 0.05f, 36, 1};
    if (type == TYPE_Q4_K)
        return (struct affine){top, -1.0f, 0.1f, 20, 1};
    return (struct affine){top, -0.5f, 0.1f, 15, type != TYPE_Q2_K};
}

V_INLINE void fit_lanes(int type, int important, struct fit *f)
{
    if (scale_fields(type) == 2)
        FN(fit_affine)(f, affine_attempts(type, important));
    else if (type == TYPE_IQ4_NL || type == TYPE_IQ4_XS)
        FN(fit_iq4)(f);
    else if (type == TYPE_Q3_K && !important)
        FN(fit_descent)(f, 4);
    else
        FN(fit_symmetric)(f,
            type == TYPE_Q3_K       ? 4
                : type == TYPE_Q4_0 ? 8
                : type == TYPE_Q5_0 ? 16
                                    : 32);
}

/* Scale, minimum and codes of each group of a chunk. Codes of the types without an offset have their middle at 0. */
V_INLINE void fit_chunk(int type, struct chunk *c)
{
    const int group = block_elements(type) == SUPER_BLOCK ? (int)group_elements(type) : QUANT_BLOCK;
    struct fit f;
    f.n = group;
    for (int64_t i = 0; i < c->n; i += VL * group) {
        FN(transpose)(c->x + i, group, VL, group, f.x, VL);
        FN(transpose)(c->w + i, group, VL, group, f.w, VL);
        fit_lanes(type, c->has_importance, &f);
        v_store(c->scale + i / group, v_load(f.scale));
        if (scale_fields(type) == 2)
            v_store(c->minimum + i / group, v_load(f.minimum));
        if (type != TYPE_IQ4_NL && type != TYPE_IQ4_XS)
            FN(transpose)(f.codes, VL, group, VL, c->codes + i, group);
    }
}

/* ------------------------------------------------------------------ the groups' own */

/* Whole multiples 0 ... top of a scale that comes near n positive numbers: with weights the best of nine roundings,
 * changed one by one as fit_descent() does; without, from the largest. Returns the scale. */
static float FN(fit_positive)(int n, int top, const float *x, const float *w, int *codes)
{
    float largest = 0;
    for (int i = 0; i < n; i++)
        largest = x[i] > largest ? x[i] : largest;
    float step = largest / (float)top,
          inverse = reciprocal(&step) > 0 ? (float)top / largest : 0.0f;
    if (w && inverse > 0) {
        float best = 0;
        for (int s = 0; s <= 8; s++) { /* 0, then -4 ... -1, 1 ... 4 */
            int step = s == 0 ? 0 : s <= 4 ? s - 5 : s - 4;
            float tried = (0.1f * (float)step + (float)top) / largest, error = 0;
            float back = 1 / tried;
            for (int i = 0; i < n; i++) {
                float code = rintf(tried * x[i]);
                float difference = x[i] - back * (code < (float)top ? code : (float)top);
                error += w[i] * difference * difference;
            }
            if (s == 0 || error < best) {
                best = error;
                inverse = tried;
            }
        }
    }
    for (int i = 0; i < n; i++) {
        float code = rintf(inverse * x[i]);
        codes[i] = code > 0 ? code < (float)top ? (int)code : top : 0;
    }
    if (!w || inverse == 0)
        return inverse > 0 ? largest / (float)top : 0.0f;
    float cx = 0, cc = 0;
    for (int i = 0; i < n; i++) {
        cx += w[i] * x[i] * (float)codes[i];
        cc += w[i] * (float)codes[i] * (float)codes[i];
    }
    for (int i = 0; i < 5 * n; i++) {
        float xi = x[i % n], wi = w[i % n], code = (float)codes[i % n];
        float rest_cx = cx - wi * xi * code, rest_cc = cc - wi * code * code;
        if (!(rest_cx > 0 && rest_cc > 0))
            continue;
        float changed = rintf(xi * rest_cc / rest_cx);
        changed = changed > 0 ? changed < (float)top ? changed : (float)top : 0;
        rest_cx += wi * xi * changed;
        rest_cc += wi * changed * changed;
        if (changed != code && rest_cx * rest_cx * cc > cx * cx * rest_cc) {
            codes[i % n] = (int)changed;
            cx = rest_cx;
            cc = rest_cc;
        }
    }
    return cc > 0 ? cx / cc : 0.0f;
}

/* The scale of largest magnitude, with its sign; the first of several. NaN, of a group whose sums overflowed, wins:
 * it must not end as zeros. */
V_INLINE float largest_scale(const float *scale, int n)
{
    float largest = 0;
    for (int i = 0; i < n; i++)
        largest = fabsf(scale[i]) > fabsf(largest) || isnan(scale[i]) ? scale[i] : largest;
    return largest;
}

/* Multiples -top ... top - 1 of d for n scales, so that the largest becomes -top. Returns d, not yet rounded. */
V_INLINE float signed_multiples(const float *scale, int n, int top, int *codes)
{
    float largest = largest_scale(scale, n), inverse = largest != 0 ? (float)-top / largest : 0.0f;
    for (int i = 0; i < n; i++) {
        float code = rintf(inverse * scale[i]);
        codes[i] = code > (float)-top ? code < (float)top ? (int)code : top - 1 : -top;
    }
    return inverse != 0 ? 1 / inverse : largest; /* 0, or infinite */
}

/* Codes for the rounded scales: code = (x + m) / d; where d is 0 the search's codes stay. */
V_INLINE void codes_again(
    const float *x, int n, float d, float m, float low, float high, float *codes)
{
    for (int i = 0; d != 0 && i < n; i += VL) {
        vf y = v_div(v_add(v_load(x + i), v_set1(m)), v_set1(d));
        v_store(codes + i, v_clamped(y, low, high));
    }
}

/* Sums of weights of the groups of a block, or NULL without an importance matrix. */
V_INLINE const float *group_weights(const struct chunk *c, int64_t first, int group, float *sums)
{
    if (!c->has_importance)
        return NULL;
    for (int g = 0; g < SUPER_BLOCK / group; g++) {
        sums[g] = 0;
        for (int i = 0; i < group; i++)
            sums[g] += c->w[first + g * group + i];
    }
    return sums;
}

/* ------------------------------------------------------------------ packing */

/* bits bits of 256 codes from bit `from` on, in planes. */
V_INLINE void pack_planes(const uint8_t *codes, int from, int bits, uint8_t *out)
{
    const int parts = 8 / bits, mask = (1 << bits) - 1;
    for (int i = 0; i < SUPER_BLOCK; i += 32 * parts, out += 32) {
        for (int j = 0; j < 32; j++) {
            unsigned byte = 0;
            for (int k = 0; k < parts; k++)
                byte |= (unsigned)(codes[i + 32 * k + j] >> from & mask) << k * bits;
            out[j] = (uint8_t)byte;
        }
    }
}

/* Codes less `low` as bytes. */
V_INLINE void as_bytes(const float *codes, int n, int low, uint8_t *out)
{
    for (int i = 0; i < n; i++)
        out[i] = (uint8_t)((int)codes[i] - low);
}

/* Block and group scales of the types with minima; then the codes. */
V_INLINE void pack_with_minima(int type, struct chunk *c, int64_t first, uint8_t *p)
{
    const int group = (int)group_elements(type), n = SUPER_BLOCK / group;
    const int top = type == TYPE_Q2_K ? 15 : 63;
    const float codes_top = type == TYPE_Q2_K ? 3 : type == TYPE_Q4_K ? 15 : 31;
    int scales[MAX_GROUPS], minima[MAX_GROUPS];
    float sums[MAX_GROUPS], *codes = c->codes + first;
    const float *w = group_weights(c, first, group, sums);
    uint8_t *d = p + scale_place(type), *dmin = d + 2, bytes[SUPER_BLOCK];
    put_half(d, FN(fit_positive)(n, top, c->scale + first / group, w, scales));
    put_half(dmin, FN(fit_positive)(n, top, c->minimum + first / group, w, minima));
    for (int g = 0; g < n; g++)
        codes_again(c->x + first + g * group, group, f16_value(d) * (float)scales[g],
            f16_value(dmin) * (float)minima[g], 0.0f, codes_top, codes + g * group);
    as_bytes(codes, SUPER_BLOCK, 0, bytes);
    if (type == TYPE_Q2_K) {
        struct block_q2_k *b = (void *)p;
        for (int g = 0; g < 16; g++)
            b->scales[g] = (uint8_t)(scales[g] | minima[g] << 4);
        pack_planes(bytes, 0, 2, b->qs);
        return;
    }
    struct block_q4_k *b = (void *)p; /* q5_k begins alike */
    for (int g = 0; g < 4; g++) {
        b->scales[g] = (uint8_t)(scales[g] | scales[g + 4] >> 4 << 6);
        b->scales[g + 4] = (uint8_t)(minima[g] | minima[g + 4] >> 4 << 6);
        b->scales[g + 8] = (uint8_t)((scales[g + 4] & 15) | (minima[g + 4] & 15) << 4);
    }
    if (type == TYPE_Q4_K) {
        pack_planes(bytes, 0, 4, b->qs);
    } else {
        struct block_q5_k *five = (void *)p;
        pack_planes(bytes, 4, 1, five->qh);
        pack_planes(bytes, 0, 4, five->qs);
    }
}

/* Q3_K's block scale with an importance matrix: the groups' scales are searched as elements are. */
V_INLINE float important_multiples(
    const struct chunk *c, int64_t first, const float *w, int *multiples)
{
    struct fit f = {.n = MAX_GROUPS};
    for (int g = 0; g < MAX_GROUPS; g++) {
        f.x[g * VL] = c->scale[first / 16 + g];
        f.w[g * VL] = w[g];
    }
    FN(fit_symmetric)(&f, 32);
    for (int g = 0; g < MAX_GROUPS; g++)
        multiples[g] = (int)f.codes[g * VL];
    float largest = largest_scale(c->scale + first / 16, MAX_GROUPS);
    return isnan(largest) ? largest : f.scale[0];
}

V_INLINE void pack_q3_k(struct chunk *c, int64_t first, struct block_q3_k *b)
{
    int scales[16];
    float sums[16], *codes = c->codes + first, d;
    uint8_t bytes[SUPER_BLOCK];
    const float *w = group_weights(c, first, 16, sums);
    if (w)
        d = important_multiples(c, first, w, scales);
    else
        d = signed_multiples(c->scale + first / 16, 16, 32, scales);
    put_half(b->d, d);
    memset(b->scales, 0, sizeof b->scales);
    for (int g = 0; g < 16; g++) {
        codes_again(c->x + first + g * 16, 16, f16_value(b->d) * (float)scales[g], 0.0f, -4.0f,
            3.0f, codes + g * 16);
        int stored = !w && d == 0 ? 0 : scales[g] + 32; /* nothing but zeros is written as zeros */
        b->scales[g % 8] |= (uint8_t)((stored & 15) << g / 8 * 4);
        b->scales[8 + g % 4] |= (uint8_t)(stored >> 4 << g / 4 * 2);
    }
    as_bytes(codes, SUPER_BLOCK, -4, bytes);
    pack_planes(bytes, 2, 1, b->qh);
    pack_planes(bytes, 0, 2, b->qs);
}

V_INLINE void pack_q6_k(struct chunk *c, int64_t first, struct block_q6_k *b)
{
    int scales[16];
    float *codes = c->codes + first;
    uint8_t bytes[SUPER_BLOCK];
    if (fabsf(largest_scale(c->scale + first / 16, 16)) < FIT_NOTHING) {
        memset(b, 0, sizeof *b);
        return;
    }
    put_half(b->d, signed_multiples(c->scale + first / 16, 16, 128, scales));
    for (int g = 0; g < 16; g++) {
        b->scales[g] = (int8_t)scales[g];
        codes_again(c->x + first + g * 16, 16, f16_value(b->d) * (float)scales[g], 0.0f, -32.0f,
            31.0f, codes + g * 16);
    }
    as_bytes(codes, SUPER_BLOCK, -32, bytes);
    for (int i = 0; i < 128; i++) {
        const uint8_t *low = bytes + i / 64 * 128 + i % 64;
        b->ql[i] = (uint8_t)((low[0] & 15) | (low[64] & 15) << 4);
    }
    pack_planes(bytes, 4, 2, b->qh);
}

/* Numbers of the nearest of IQ4's values to x / d, 32 of them, as nibbles; of 0 where d is 0. */
V_INLINE void pack_iq4(const float *x, float d, uint8_t *qs)
{
    float numbers[QUANT_BLOCK];
    uint8_t bytes[QUANT_BLOCK];
    vf inverse = v_set1(reciprocal(&d)), number;
    for (int i = 0; i < QUANT_BLOCK; i += VL) {
        iq4_nearest(v_mul(inverse, v_load(x + i)), &number);
        v_store(numbers + i, number);
    }
    as_bytes(numbers, QUANT_BLOCK, 0, bytes);
    put_codes(bytes, qs, NULL);
}

/* The block's scale as the codes meet it is not rounded to a half. */
V_INLINE void pack_iq4_xs(struct chunk *c, int64_t first, struct block_iq4_xs *b)
{
    const float *scale = c->scale + first / QUANT_BLOCK;
    float d = -largest_scale(scale, 8) / 32;
    unsigned high = 0;
    put_half(b->d, d);
    float inverse = reciprocal(&d);
    memset(b->scales_l, 0, sizeof b->scales_l);
    for (int g = 0; g < 8; g++) {
        float multiple = rintf(inverse * scale[g]);
        multiple = multiple > -32 ? multiple < 31 ? multiple : 31 : -32;
        unsigned stored = (unsigned)((int)multiple + 32);
        b->scales_l[g / 2] |= (uint8_t)((stored & 15) << g % 2 * 4);
        high |= stored >> 4 << 2 * g;
        pack_iq4(c->x + first + g * QUANT_BLOCK, d * multiple, b->qs + g * 16);
    }
    b->scales_h[0] = (uint8_t)high;
    b->scales_h[1] = (uint8_t)(high >> 8);
}

/* A type of 32 elements. */
V_INLINE void pack_small(int type, struct chunk *c, int64_t first, uint8_t *p)
{
    float scale = c->scale[first / QUANT_BLOCK];
    const int middle = type == TYPE_Q4_0 ? 8 : type == TYPE_Q5_0 ? 16 : 0;
    const int five = type == TYPE_Q5_0 || type == TYPE_Q5_1;
    uint8_t bytes[QUANT_BLOCK];
    put_half(p, scale);
    p += 2;
    if (type == TYPE_IQ4_NL) {
        pack_iq4(c->x + first, scale, p);
        return;
    }
    if (scale_fields(type) == 2) {
        put_half(p, -c->minimum[first / QUANT_BLOCK]);
        p += 2;
    }
    as_bytes(c->codes + first, QUANT_BLOCK, -middle, bytes);
    put_codes(bytes, p + (five ? 4 : 0), five ? p : NULL);
}

V_INLINE void pack_searched(int type, struct chunk *c, int64_t first, uint8_t *p)
{
    if (type == TYPE_Q3_K)
        pack_q3_k(c, first, (void *)p);
    else if (type == TYPE_Q6_K)
        pack_q6_k(c, first, (void *)p);
    else if (type == TYPE_IQ4_XS)
        pack_iq4_xs(c, first, (void *)p);
    else if (block_elements(type) == SUPER_BLOCK)
        pack_with_minima(type, c, first, p);
    else
        pack_small(type, c, first, p);
}

static void FN(quantize_searched)(
    int type, const float *x, const float *importance, int64_t n, uint8_t *p)
{
    struct chunk c;
    float of_row = importance ? square_sum(x, n) / (float)n : 0;
    for (int64_t i = 0; i < n; i += FIT_CHUNK) {
        int64_t part = n - i < FIT_CHUNK ? n - i : FIT_CHUNK;
        FN(load_chunk)(type, x + i, importance ? importance + i : NULL, part, of_row, &c);
        fit_chunk(type, &c);
        for (int64_t j = 0; j < part; j += block_elements(type), p += block_bytes(type))
            pack_searched(type, &c, j, p);
    }
}

/* ------------------------------------------------------------------ a row */

/* y: n elements of a type, whole blocks, unaligned. importance: n weights, or NULL; types without a search ignore
 * it. */
static void FN(quantize_row)(int type, const float *x, const float *importance, int64_t n, void *y)
{
    if (type == TYPE_Q8_0 || block_elements(type) == 1 ||
        (!importance && type != TYPE_IQ4_NL && block_elements(type) == QUANT_BLOCK))
        FN(encode_row)(type, x, n, y);
    else
        FN(quantize_searched)(type, x, importance, n, y);
}
