/* Products of quantized weights with activations rounded to bytes, as the original makes them. A stored row is codes
 * of a byte or less, with scale and offset a group; whole products of codes are integers, and only a group's sum is
 * scaled: with code c, scale d, offset m of the weight and code q, scale e of the activation
 *     sum x w = sum over groups of  d e sum(c q) + m (e sum(q)).
 * Codes are unsigned; those of signed types are shifted by SIGNED_BIAS, which is taken back from the sum.
 *
 * A few tokens meet each row by dots: blocks of 32 as they stand, blocks of 256 once their codes are unpacked. Bound:
 * the bytes of W, once. Many tokens run along the lanes, four neighbours of the reduction to a lane, and W's codes are
 * broadcast. Bound: 2 n_tokens n_in n_out operations, and three more vectors for each 8 of codes. Matrix tiles of bytes
 * gain nothing: their sums leave by way of memory every 32 elements, and 330 G operations a second were less than these
 * vectors' 400. */

enum { DOT_BYTES = 4 * VL, DOT_BLOCKS = DOT_BYTES / QUANT_BLOCK, DOT_ROWS = 4 };

V_INLINE int is_signed(int type)
{
    return type == TYPE_Q8_0 || type == TYPE_IQ4_NL || type == TYPE_IQ4_XS;
}

/* What unpack_row adds to the codes of a type so that they are unsigned. */
V_INLINE int code_shift(int type)
{
    switch (type) {
    case TYPE_Q4_0:
        return 8;
    case TYPE_Q5_0:
        return 16;
    case TYPE_Q3_K:
        return 4;
    case TYPE_Q6_K:
        return 32;
    default:
        return is_signed(type) ? SIGNED_BIAS : 0;
    }
}

V_INLINE vi add_dot(int type, vi acc, vi u, vi s)
{
    return is_signed(type) ? v_dot_shifted(acc, u, s) : v_dot_bytes(acc, u, s);
}

V_INLINE __m128i iq4_shifted(void)
{
    return _mm_add_epi8(iq4_table(), _mm_set1_epi8((char)SIGNED_BIAS));
}

/* Elements that share a scale. */
V_INLINE int64_t scale_group(int type)
{
    return group_elements(type) ? group_elements(type) : QUANT_BLOCK;
}

/* Codes 32 at a time of one block. */
V_INLINE __m256i unsigned_codes(int type, const uint8_t *p, int g)
{
    switch (type) {
    case TYPE_Q4_0:
        return nibble_codes(p + 2);
    case TYPE_Q4_1:
        return nibble_codes(p + 4);
    case TYPE_Q5_0:
        return _mm256_or_si256(nibble_codes(p + 6), fifth_bits(p + 2));
    case TYPE_Q5_1:
        return _mm256_or_si256(nibble_codes(p + 8), fifth_bits(p + 4));
    case TYPE_Q8_0:
        return v_shift_signed(_mm256_loadu_si256((const __m256i *)(p + 2)));
    case TYPE_Q3_K:
        return _mm256_add_epi8(group_codes(type, p, g), _mm256_set1_epi8(4));
    case TYPE_Q6_K:
        return _mm256_add_epi8(group_codes(type, p, g), _mm256_set1_epi8(32));
    default:
        return is_signed(type) ? v_shift_signed(group_codes(type, p, g)) : group_codes(type, p, g);
    }
}

/* Scales and offsets of n elements from whole blocks of 32 on, a vector of blocks at a time. */
V_INLINE void simple_scales(int type, const uint8_t *w, int64_t n, float *d, float *m)
{
    int64_t bytes = block_bytes(type), blocks = n / QUANT_BLOCK;
    for (int64_t b = 0; b < blocks; b += VL) {
        int64_t some = blocks - b < VL ? blocks - b : VL;
        vi words = v_gather_words(w + b * bytes, bytes, some);
        vf scale = v_low_f16(words);
        v_store(d + b, scale);
        v_store(m + b,
            scale_fields(type) == 2 ? v_high_f16(words)
                                    : v_mul(v_set1(-(float)code_shift(type)), scale));
    }
}

/* A stored row of n elements: q: n codes; d, m: scale and offset of each group, with room for VL more. */
V_INLINE void unpack_row(int type, const uint8_t *w, int64_t n, uint8_t *q, float *d, float *m)
{
    int64_t bytes = block_bytes(type), elements = block_elements(type), group = scale_group(type);
    for (int64_t at = 0; at < row_offset(type, n); at += 64)
        prefetch_weights(w + at);
    if (elements == QUANT_BLOCK)
        simple_scales(type, w, n, d, m);
    for (int64_t i = 0; i < n; i += elements, w += bytes) {
        for (int64_t g = 0; g < elements / QUANT_BLOCK; g++)
            _mm256_storeu_si256(
                (__m256i *)(q + i + g * QUANT_BLOCK), unsigned_codes(type, w, (int)g));
        if (elements == QUANT_BLOCK)
            continue;
        float *scale = d + i / group, *offset = m + i / group;
        group_scales(type, w, scale, offset);
        for (int64_t g = 0; scale_fields(type) == 1 && g < elements / group; g++)
            offset[g] = -(float)code_shift(type) * scale[g];
    }
}

/* DOT_ROWS unpacked rows, one behind the other, and what belongs to a group of each: its scale and offset, and those
 * times an activation's. */
struct unpacked {
    uint8_t *q;
    float *d, *m, *scaled, *offset;
    int64_t q_stride, stride;
};

/* Some unpacked rows times one activation row: y[i]. Type and n_rows are constants where it is called; rows go side by
 * side because each sum is one chain. */
V_INLINE void dot_codes(
    int type, int n_rows, int64_t n, const struct unpacked *w, const int8_t *x, float *y)
{
    __m256 acc[DOT_ROWS];
    const int64_t per_block = QUANT_BLOCK / scale_group(type);
    for (int r = 0; r < n_rows; r++)
        acc[r] = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += DOT_BYTES) {
        vi s = v_load_bytes(x + i);
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++) {
            vi u = v_load_halves(w->q + r * w->q_stride + i);
            vf sums = v_from_i32(add_dot(type, v_zero_i(), u, s));
            for (int h = 0; h < DOT_BLOCKS; h++) {
                const float *scale = w->scaled + r * w->stride + (i / QUANT_BLOCK + h) * per_block;
                __m256 factor = _mm256_set1_ps(scale[0]);
                if (per_block == 2)
                    factor = _mm256_blend_ps(factor, _mm256_set1_ps(scale[1]), 0xF0);
                acc[r] = _mm256_fmadd_ps(v_half(sums, h), factor, acc[r]);
            }
        }
    }
    for (int r = 0; r < n_rows; r++) /* groups are whole vectors */
        for (int64_t g = 0; g < n / QUANT_BLOCK * per_block; g += 8)
            acc[r] = _mm256_add_ps(acc[r], _mm256_loadu_ps(w->offset + r * w->stride + g));
    for (int r = 0; r < n_rows; r++) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(acc[r]), _mm256_extractf128_ps(acc[r], 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        y[r] = _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
}

V_INLINE int64_t whole_dots(int64_t n) { return (n + DOT_BYTES - 1) / DOT_BYTES * DOT_BYTES; }

/* Bytes of an activation row of n elements, and the row there; its end beyond n is zero. */
V_INLINE int64_t q8_row_bytes(int64_t n, int64_t group)
{
    return whole_dots(n) + (n / QUANT_BLOCK + n / group + 2 * VL) * (int64_t)sizeof(float);
}

V_INLINE struct q8_row place_q8_row(char *p, int64_t n, int64_t group)
{
    struct q8_row row = {.scale = (float *)(void *)p, .group = group};
    row.sum = row.scale + n / QUANT_BLOCK + VL;
    row.q = (int8_t *)(row.sum + n / group + VL);
    memset(row.q + n, 0, (size_t)(whole_dots(n) - n));
    return row;
}

/* scaled[g] = d[g] e, offset[g] = m[g] sum[g], zero beyond the row. */
V_INLINE void meet_scales(
    int64_t n, struct q8_row x, const float *d, const float *m, float *scaled, float *offset)
{
    int64_t groups = n / x.group;
    for (int64_t g = 0; g < groups; g += VL) {
        vf e = x.group == QUANT_BLOCK ? v_load(x.scale + g) : v_load_twice(x.scale + g / 2);
        v_store(scaled + g, v_mul(v_load(d + g), e));
        v_store(offset + g, v_mul(v_load(m + g), v_load(x.sum + g)));
    }
    for (int64_t g = groups; g < groups + 2 * DOT_BLOCKS; g++)
        scaled[g] = 0;
}

/* Rows o ... o + n_rows of W times all tokens. */
V_INLINE void quant_some(int type, int n_rows, const struct linear_args *a, const struct q8_row *x,
    const struct unpacked *w, int64_t o)
{
    int64_t n = a->n_in, row_bytes = row_offset(type, n);
    for (int r = 0; r < n_rows; r++)
        unpack_row(type, (const uint8_t *)a->w + (o + r) * row_bytes, n, w->q + r * w->q_stride,
            w->d + r * w->stride, w->m + r * w->stride);
    for (int64_t t = 0; t < a->n_tokens; t++) {
        for (int r = 0; r < n_rows; r++) {
            int64_t at = r * w->stride;
            meet_scales(n, x[t], w->d + at, w->m + at, w->scaled + at, w->offset + at);
        }
        dot_codes(type, n_rows, n, w, x[t].q, result_row(a, t) + o);
    }
}

V_INLINE void quant_rows(
    int type, const struct linear_args *a, char *scratch, int64_t begin, int64_t end)
{
    struct q8_row x[GEMV_TOKENS];
    int64_t group = scale_group(type);
    for (int64_t t = 0; t < a->n_tokens; t++, scratch += q8_row_bytes(a->n_in, group)) {
        x[t] = place_q8_row(scratch, a->n_in, group);
        FN(quantize_q8)(token_row(a, t), a->n_in, has_offset(type), x[t]);
    }
    struct unpacked w = {.stride = a->n_in / group + 2 * VL, .q_stride = whole_dots(a->n_in)};
    int64_t floats = DOT_ROWS * w.stride, o = begin;
    w.d = (float *)(void *)scratch;
    w.m = w.d + floats;
    w.scaled = w.m + floats;
    w.offset = w.scaled + floats;
    w.q = (uint8_t *)(w.offset + floats);
    for (; o + DOT_ROWS <= end; o += DOT_ROWS)
        quant_some(type, DOT_ROWS, a, x, &w, o);
    for (; o < end; o++)
        quant_some(type, 1, a, x, &w, o);
}

/* ------------------------------------------------------------------ a few tokens, blocks of 32 as they stand */

/* Blocks of 32 go from the file to the products in registers: a vector holds 16 code bytes of the same block of some
 * rows, four lanes a row. Scales of a row's VL blocks are picked out of the vectors that these blocks are, then mixed so
 * that one permutation gives the rows' scales of a block. Sums are added as the original's AVX2 kernels add them: a lane
 * of eight for each four of a block's codes, block after block, and offsets in a sum of their own. Activations are
 * rounded to bytes, so the last bits of another order grow to tenths of a logit within some layers. */
enum { ROWS = VL / 4, STREAM_TOKENS = 4, STREAM_VECTORS = 9 };

/* Vectors that hold VL blocks. */
V_INLINE int stream_vectors(int type) { return (int)(block_bytes(type) + 3) / 4; }

V_INLINE int64_t code_bytes(int type) { return type == TYPE_Q8_0 ? 32 : 16; }

/* A rounded activation row; start: minus the shift of the weights' codes times the four codes that meet a lane. The next
 * token's row is `stride` bytes behind. */
struct stream_row {
    const char *q, *start, *scale, *sum;
    int64_t stride;
};

V_INLINE int64_t stream_row_bytes(int64_t n)
{
    return (2 * n + 2 * (n / QUANT_BLOCK) * (int64_t)sizeof(float) + 63) / 64 * 64;
}

V_INLINE struct stream_row stream_row_at(char *p, int64_t n)
{
    return (struct stream_row){
        p, p + n, p + 2 * n, p + 2 * n + n / QUANT_BLOCK * 4, stream_row_bytes(n)};
}

/* The t-th row behind x. */
V_INLINE struct stream_row later(struct stream_row x, int64_t t)
{
    int64_t at = t * x.stride;
    return (struct stream_row){x.q + at, x.start + at, x.scale + at, x.sum + at, x.stride};
}

V_INLINE void round_stream(int type, const float *x, int64_t n, char *p)
{
    int64_t blocks = n / QUANT_BLOCK;
    struct q8_row row = {
        .q = (int8_t *)p, .scale = (float *)(void *)(p + 2 * n), .group = QUANT_BLOCK};
    row.sum = row.scale + blocks;
    FN(quantize_q8)(x, n, has_offset(type), row);
    for (int64_t i = 0; code_shift(type) && i < n; i += 16) {
        vi sums = v_dot_bytes(v_zero_i(), v_set_bytes(code_shift(type)), v_load_same(p + i));
        v_store_same(p + n + i, v_sub_i(v_zero_i(), sums));
    }
}

/* Of a row of weights: places of the scales; blocks beyond whole groups, in so many vectors, of which the last one ends
 * with the row. */
struct stream {
    vi halves;
    int64_t rest, rest_vectors;
    v_first rest_end;
};

V_INLINE struct stream stream_of(int type, int64_t n)
{
    const int64_t stride = block_bytes(type);
    struct stream s = {.halves = v_half_places(stride), .rest = n / QUANT_BLOCK % VL};
    s.rest_vectors = (s.rest * stride + 4 * VL - 1) / (4 * VL);
    s.rest_end = v_first_bytes(s.rest * stride - (s.rest_vectors - 1) * 4 * VL);
    return s;
}

/* Scales and offsets of VL blocks of a row, or of those at its end: that is a constant. */
V_INLINE vi stream_fields(int type, int end, const struct stream *s, const uint8_t *w)
{
    const int64_t stride = block_bytes(type);
    const int vectors = stream_vectors(type);
    vi z[STREAM_VECTORS];
#pragma GCC unroll 9
    for (int v = 0; v < vectors; v++) {
        const uint8_t *p = w + 4 * VL * v;
        if (!end)
            z[v] = 4 * VL * (v + 1) > VL * stride
                ? v_load_first(p, v_first_bytes(VL * stride - 4 * VL * v))
                : v_load_bytes(p);
        else if (v < s->rest_vectors)
            z[v] = v + 1 < s->rest_vectors ? v_load_bytes(p) : v_load_first(p, s->rest_end);
        else
            z[v] = v_zero_i();
    }
    return v_fields(w, stride, end ? s->rest : VL, z, vectors, s->halves);
}

/* The codes of a block of ROWS rows: of elements 0 ... 15, and of 16 ... 31. */
V_INLINE void stream_codes(int type, const uint8_t *w, int64_t row_bytes, vi *low, vi *high)
{
    const uint8_t *codes = w + block_bytes(type) - code_bytes(type);
    vi x = v_load_rows(codes, row_bytes);
    if (type == TYPE_Q8_0) {
        *low = v_flip_signs(x);
        *high = v_flip_signs(v_load_rows(codes + 16, row_bytes));
        return;
    }
    *low = v_low_nibbles(x);
    *high = v_high_nibbles(x);
    if (type == TYPE_IQ4_NL) {
        *low = v_lookup_bytes(iq4_shifted(), *low);
        *high = v_lookup_bytes(iq4_shifted(), *high);
    }
    if (type == TYPE_Q5_0 || type == TYPE_Q5_1) {
        const __m128i first = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        const __m128i second = _mm_setr_epi8(2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
        const __m128i bits = _mm_set1_epi64x((long long)0x8040201008040201u);
        vi fifths = v_load_rows(codes - 4, row_bytes);
        *low = v_add_fifth(*low, fifths, v_same(first), v_same(bits));
        *high = v_add_fifth(*high, fifths, v_same(second), v_same(bits));
    }
}

V_INLINE float number_at(const char *p)
{
    float x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* Sums of a token: of a block's first and last 16 products, and of the offsets, which is the same in a row's lanes. */
struct stream_sums {
    vf low, high, offsets;
};

/* Adds some blocks of ROWS rows times some tokens. Type, tokens and end are constants. */
V_INLINE void stream_group(int type, int n_tokens, int end, const struct stream *s,
    const uint8_t *w, int64_t row_bytes, struct stream_row x, struct stream_sums *sums)
{
    vf d[ROWS], m[ROWS], scales[ROWS], offsets[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
        vi fields = stream_fields(type, end, s, w + r * row_bytes);
        d[r] = v_first_f16(fields);
        m[r] = v_second_f16(fields);
    }
    v_mix_rows(d, scales);
    if (has_offset(type))
        v_mix_rows(m, offsets);
    const int64_t blocks = end ? s->rest : VL;
    for (int64_t b = 0; b < blocks; b += 4) {
        vi at = v_places(b);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            if (end && b + i >= blocks)
                break;
            vi low, high;
            stream_codes(type, w + (b + i) * block_bytes(type), row_bytes, &low, &high);
            vf scale = v_mixed(scales, i, at);
#pragma GCC unroll 4
            for (int t = 0; t < n_tokens; t++) {
                const int64_t codes = t * x.stride + (b + i) * QUANT_BLOCK;
                const int64_t number = t * x.stride + (b + i) * (int64_t)sizeof(float);
                vi low_sums = v_zero_i(), high_sums = v_zero_i();
                if (code_shift(type)) {
                    low_sums = v_load_same(x.start + codes);
                    high_sums = v_load_same(x.start + codes + 16);
                }
                low_sums = add_dot(type, low_sums, low, v_load_same(x.q + codes));
                high_sums = add_dot(type, high_sums, high, v_load_same(x.q + codes + 16));
                vf factor = v_mul(scale, v_set1(number_at(x.scale + number)));
                sums[t].low = v_fma(v_from_i32(low_sums), factor, sums[t].low);
                sums[t].high = v_fma(v_from_i32(high_sums), factor, sums[t].high);
                if (has_offset(type))
                    sums[t].offsets = v_add(sums[t].offsets,
                        v_mul(v_mixed(offsets, i, at), v_set1(number_at(x.sum + number))));
            }
        }
    }
}

/* ROWS rows of W times some tokens. */
V_INLINE void stream_dots(int type, int n_tokens, int64_t n, const struct stream *s,
    const uint8_t *w, int64_t row_bytes, struct stream_row x, float *y, int64_t y_stride)
{
    const int64_t stride = block_bytes(type);
    struct stream_sums sums[STREAM_TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < n_tokens; t++)
        sums[t] = (struct stream_sums){v_zero(), v_zero(), v_zero()};
    for (int64_t b = VL; b <= n / QUANT_BLOCK; b += VL) {
        stream_group(type, n_tokens, 0, s, w, row_bytes, x, sums);
        w += VL * stride;
        x.q += VL * QUANT_BLOCK;
        x.start += VL * QUANT_BLOCK;
        x.scale += VL * sizeof(float);
        x.sum += VL * sizeof(float);
    }
    if (s->rest > 0)
        stream_group(type, n_tokens, 1, s, w, row_bytes, x, sums);
#pragma GCC unroll 4
    for (int t = 0; t < n_tokens; t++) {
        vf y_rows = v_sum_rows(v_add(sums[t].low, sums[t].high));
        v_store_rows(y + t * y_stride, v_add(y_rows, sums[t].offsets));
    }
}

V_INLINE void stream_tokens(int type, const struct linear_args *a, const struct stream *s,
    const uint8_t *w, int64_t row_bytes, struct stream_row x, float *y, int64_t y_stride)
{
    int64_t t = 0, n = a->n_in;
    for (; t + 4 <= a->n_tokens; t += 4)
        stream_dots(type, 4, n, s, w, row_bytes, later(x, t), y + t * y_stride, y_stride);
    for (; t + 2 <= a->n_tokens; t += 2)
        stream_dots(type, 2, n, s, w, row_bytes, later(x, t), y + t * y_stride, y_stride);
    if (t < a->n_tokens)
        stream_dots(type, 1, n, s, w, row_bytes, later(x, t), y + t * y_stride, y_stride);
}

V_INLINE void stream_rows(
    int type, const struct linear_args *a, char *scratch, int64_t begin, int64_t end)
{
    int64_t n = a->n_in, row_bytes = row_offset(type, n);
    const uint8_t *w = a->w;
    for (int64_t t = 0; t < a->n_tokens; t++)
        round_stream(type, token_row(a, t), n, scratch + t * stream_row_bytes(n));
    struct stream_row x = stream_row_at(scratch, n);
    struct stream s = stream_of(type, n);
    if (end - begin < ROWS) { /* ROWS times the same one */
        float y[GEMV_TOKENS * ROWS];
        for (int64_t o = begin; o < end; o++) {
            stream_tokens(type, a, &s, w + o * row_bytes, 0, x, y, ROWS);
            for (int64_t t = 0; t < a->n_tokens; t++)
                result_row(a, t)[o] = y[t * ROWS];
        }
        return;
    }
    struct adapter_lines adapter = adapter_lines(a, begin, end, ROWS);
    for (int64_t o = begin; o < end; o += ROWS) {
        ask_for_adapter(&adapter, a);
        if (o > end - ROWS)
            o = end - ROWS; /* some rows once more */
        for (int64_t at = 0; at < ROWS * row_bytes; at += 64)
            prefetch_weights(w + o * row_bytes + at);
        stream_tokens(type, a, &s, w + o * row_bytes, row_bytes, x, result_row(a, 0) + o, a->n_out);
    }
}

_Static_assert(
    (GEMV_TOKENS + 1) * (2 * MAX_ROW + 2 * (MAX_ROW / QUANT_BLOCK) * 4 + 64) <= WORKER_SCRATCH,
    "rounded rows do not fit a worker's scratch");

/* Calls `what` with the type as a constant. */
#define BY_QUANTIZED_TYPE(type, what)                                                              \
    switch (type) {                                                                                \
        QUANTIZED(Q4_0, what)                                                                      \
        QUANTIZED(Q4_1, what)                                                                      \
        QUANTIZED(Q5_0, what)                                                                      \
        QUANTIZED(Q5_1, what)                                                                      \
        QUANTIZED(Q8_0, what)                                                                      \
        QUANTIZED(Q2_K, what)                                                                      \
        QUANTIZED(Q3_K, what)                                                                      \
        QUANTIZED(Q4_K, what)                                                                      \
        QUANTIZED(Q5_K, what)                                                                      \
        QUANTIZED(Q6_K, what)                                                                      \
        QUANTIZED(IQ4_NL, what)                                                                    \
        QUANTIZED(IQ4_XS, what)                                                                    \
    }
#define QUANTIZED(name, what)                                                                      \
    case TYPE_##name:                                                                              \
        what(TYPE_##name);                                                                         \
        break;

static void FN(linear_quant)(const struct linear_args *a, char *scratch, int64_t begin, int64_t end)
{
#define ROWS(type)                                                                                 \
    if (block_elements(type) == QUANT_BLOCK)                                                       \
        stream_rows(type, a, scratch, begin, end);                                                 \
    else                                                                                           \
        quant_rows(type, a, scratch, begin, end)
    BY_QUANTIZED_TYPE(a->type, ROWS)
#undef ROWS
}

/* ------------------------------------------------------------------ many tokens */

#ifdef HAVE_BYTE_PRODUCT

enum {
    QUANT_LANES = 2 * VL,
    QUANT_ROWS = 48, /* rows of W at a time: whole register and matrix tiles */
    QUANT_TILE = 6,  /* rows of a register tile: 12 sums of codes and 12 results */
};

/* Where half of a panel would stay empty, weights are decoded. */
V_INLINE int multiplies_bytes(const struct linear_args *a) { return rounds(a) && a->n_tokens > VL; }

/* A panel of activations: codes [n_in / 4][QUANT_LANES] of four bytes, then scales [block][QUANT_LANES] and sums
 * [group][QUANT_LANES]. Lanes without a token are zero. */
struct quant_panel {
    uint32_t *codes;
    float *scale, *sum;
};

V_INLINE struct quant_panel quant_panel_of(const struct linear_args *a, int64_t token)
{
    struct quant_panel p;
    int64_t blocks = a->n_in / QUANT_BLOCK, groups = a->n_in / scale_group((int)a->type);
    int64_t size = (a->n_in / 4 + blocks + groups) * QUANT_LANES;
    p.codes = (uint32_t *)a->packed + token / QUANT_LANES * size;
    p.scale = (float *)(void *)(p.codes + a->n_in / 4 * QUANT_LANES);
    p.sum = p.scale + blocks * QUANT_LANES;
    return p;
}

static void FN(pack_bytes)(const struct linear_args *a, const struct worker *worker)
{
    int64_t begin, end, n = a->n_in, blocks = n / QUANT_BLOCK;
    int64_t group = scale_group((int)a->type), groups = n / group;
    int64_t lanes = (a->n_tokens + QUANT_LANES - 1) / QUANT_LANES * QUANT_LANES;
    int64_t floats = groups + VL;
    float *scale = (float *)(void *)worker->scratch, *sum = scale + VL * floats;
    int8_t *codes = (int8_t *)(sum + VL * floats);
    worker_range(worker, lanes, VL, &begin, &end);
    for (int64_t t = begin; t < end; t += VL) {
        for (int64_t i = 0; i < VL; i++) {
            struct q8_row row = {codes + i * n, scale + i * floats, sum + i * floats, group};
            if (t + i < a->n_tokens) {
                FN(quantize_q8)(token_row(a, t + i), n, has_offset((int)a->type), row);
                continue;
            }
            memset(row.q, 0, (size_t)n);
            memset(row.scale, 0, (size_t)blocks * sizeof *row.scale);
            memset(row.sum, 0, (size_t)groups * sizeof *row.sum);
        }
        struct quant_panel p = quant_panel_of(a, t);
        int64_t lane = t % QUANT_LANES;
        FN(transpose)((const float *)(const void *)codes, n / 4, VL, n / 4,
            (float *)(void *)(p.codes + lane), QUANT_LANES);
        FN(transpose)(scale, floats, VL, blocks, p.scale + lane, QUANT_LANES);
        FN(transpose)(sum, floats, VL, groups, p.sum + lane, QUANT_LANES);
    }
}

/* QUANT_ROWS unpacked rows: codes at distance `stride`, scales and offsets at `floats`. */
struct quant_matrix {
    uint8_t *q;
    float *d, *m;
    int64_t stride, floats;
};

/* c[i][j] = sum over groups of d[i] (e[j] sum of codes) + m[i] sum[j] for QUANT_TILE rows from `first` on; a block of
 * activations has `per_block` groups, a constant where it is called. */
V_INLINE void quant_tile(const int per_block, int64_t blocks, const struct quant_matrix *w,
    int64_t first, struct quant_panel x, float *c)
{
    const int64_t fours = QUANT_BLOCK / 4 / per_block;
    const uint8_t *q = w->q + first * w->stride;
    const float *d = w->d + first * w->floats, *m = w->m + first * w->floats;
    vf acc[QUANT_TILE][2];
    c += first * QUANT_LANES;
    for (int i = 0; i < QUANT_TILE; i++)
        acc[i][0] = acc[i][1] = v_zero();
    for (int64_t g = 0; g < blocks * per_block;
        g++) /* offsets in a sum of their own, as in the original */
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            vf s = v_load(x.sum + g * QUANT_LANES + j * VL);
#pragma GCC unroll 6
            for (int i = 0; i < QUANT_TILE; i++)
                acc[i][j] = v_fma(s, v_set1(m[i * w->floats + g]), acc[i][j]);
        }
    for (int i = 0; i < QUANT_TILE; i++)
        for (int j = 0; j < 2; j++) {
            v_store(c + i * QUANT_LANES + j * VL, acc[i][j]);
            acc[i][j] = v_zero();
        }
    for (int64_t g = 0; g < blocks * per_block; g++) {
        vi sums[QUANT_TILE][2];
        for (int i = 0; i < QUANT_TILE; i++)
            sums[i][0] = sums[i][1] = v_zero_i();
#pragma GCC unroll 8
        for (int64_t l = 0; l < fours; l++) {
            const uint32_t *lanes = x.codes + (g * fours + l) * QUANT_LANES;
            vi x0 = v_load_bytes(lanes), x1 = v_load_bytes(lanes + VL);
#pragma GCC unroll 6
            for (int i = 0; i < QUANT_TILE; i++) {
                vi four = v_set_four(q + i * w->stride + (g * fours + l) * 4);
                sums[i][0] = v_dot_bytes(sums[i][0], four, x0);
                sums[i][1] = v_dot_bytes(sums[i][1], four, x1);
            }
        }
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            vf e = v_load(x.scale + g / per_block * QUANT_LANES + j * VL);
#pragma GCC unroll 6
            for (int i = 0; i < QUANT_TILE; i++) {
                vf part = v_mul(v_from_i32(sums[i][j]), e);
                acc[i][j] = v_fma(part, v_set1(d[i * w->floats + g]), acc[i][j]);
            }
        }
    }
    for (int i = 0; i < QUANT_TILE; i++)
        for (int j = 0; j < 2; j++) {
            float *sum = c + i * QUANT_LANES + j * VL;
            v_store(sum, v_add(acc[i][j], v_load(sum)));
        }
}

static void FN(quant_block)(
    int64_t rows, int64_t blocks, const struct quant_matrix *w, struct quant_panel x, float *c)
{
    for (int64_t i = 0; i < rows; i += QUANT_TILE)
        quant_tile(1, blocks, w, i, x, c);
}

static void FN(quant_half_block)(
    int64_t rows, int64_t blocks, const struct quant_matrix *w, struct quant_panel x, float *c)
{
    for (int64_t i = 0; i < rows; i += QUANT_TILE)
        quant_tile(2, blocks, w, i, x, c);
}

/* Rows begin ... end of W times all tokens, QUANT_ROWS rows at a time. */
V_INLINE void quant_chunks(
    int type, const struct linear_args *a, char *scratch, int64_t begin, int64_t end)
{
    int64_t n = a->n_in, blocks = n / QUANT_BLOCK, row_bytes = row_offset(type, n);
    struct quant_matrix w = {.stride = n + 64, .floats = n / scale_group(type) + 2 * VL};
    float *result = (float *)(void *)scratch;
    w.d = result + QUANT_ROWS * QUANT_LANES;
    w.m = w.d + QUANT_ROWS * w.floats;
    w.q = (uint8_t *)(w.m + QUANT_ROWS * w.floats);
    for (int64_t o = begin; o < end; o += QUANT_ROWS) {
        int64_t rows = end - o < QUANT_ROWS ? end - o : QUANT_ROWS;
        for (int64_t i = 0; i < rows; i++)
            unpack_row(type, (const uint8_t *)a->w + (o + i) * row_bytes, n, w.q + i * w.stride,
                w.d + i * w.floats, w.m + i * w.floats);
        for (int64_t t = 0; t < a->n_tokens; t += QUANT_LANES) {
            int64_t tokens = a->n_tokens - t < QUANT_LANES ? a->n_tokens - t : QUANT_LANES;
            if (scale_group(type) == QUANT_BLOCK)
                FN(quant_block)(rows, blocks, &w, quant_panel_of(a, t), result);
            else
                FN(quant_half_block)(rows, blocks, &w, quant_panel_of(a, t), result);
            FN(transpose)(result, QUANT_LANES, rows, tokens, result_row(a, t) + o, a->n_out);
            if (!is_finished(a))
                FN(finish_rows)(a, t, t + tokens, o, rows, result_row(a, t) + o, a->n_out);
        }
    }
}

_Static_assert((int64_t)QUANT_ROWS *(MAX_ROW + 64 + (2 * MAX_ROW / QUANT_BLOCK + 2 * VL) * 8) +
            QUANT_ROWS * QUANT_LANES * 4 <=
        WORKER_SCRATCH,
    "unpacked rows do not fit a worker's scratch");

static void FN(linear_bytes)(const struct linear_args *a, const struct worker *worker)
{
    int64_t begin, end;
    worker_range(worker, a->n_out, 16, &begin, &end);
#define CHUNKS(type) quant_chunks(type, a, worker->scratch, begin, end)
    BY_QUANTIZED_TYPE(a->type, CHUNKS)
#undef CHUNKS
}

#endif
