/* Products of quantized weights with activations rounded to bytes, as the original makes them. A stored row is
 * unpacked to codes of a byte, with scale and offset a group; whole products of codes are integers, and only a
 * group's sum is scaled: with code c, scale d, offset m of the weight and code q, scale e of the activation
 *     sum x w = sum over groups of  d e sum(c q) + m (e sum(q)).
 * Codes are unsigned; those of signed types are shifted by SIGNED_BIAS, which the offset takes back.
 *
 * A few tokens meet each row by dots, once its codes are unpacked. Bound: the bytes of W, once. Many tokens run
 * along the lanes, four neighbours of the reduction to a lane, and W's codes are broadcast. Bound: 2 n_tokens n_in
 * n_out operations, and three more vectors for each 8 of codes. Matrix tiles of bytes gain nothing: their sums
 * leave by way of memory every 32 elements, and 330 G operations a second were less than these vectors' 400. */

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
    float total[DOT_ROWS] = {0};
    const int64_t per_block = QUANT_BLOCK / scale_group(type);
    for (int r = 0; r < n_rows; r++)
        acc[r] = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += DOT_BYTES) {
        vi s = v_load_bytes(x + i);
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; r++) {
            vi u = v_load_halves(w->q + r * w->q_stride + i);
            vf sums =
                v_from_i32(is_signed(type) ? v_dot_shifted(u, s) : v_dot_bytes(v_zero_i(), u, s));
            for (int h = 0; h < DOT_BLOCKS; h++) {
                const float *scale = w->scaled + r * w->stride + (i / QUANT_BLOCK + h) * per_block;
                __m256 factor = _mm256_set1_ps(scale[0]);
                if (per_block == 2)
                    factor = _mm256_blend_ps(factor, _mm256_set1_ps(scale[1]), 0xF0);
                acc[r] = _mm256_fmadd_ps(v_half(sums, h), factor, acc[r]);
            }
        }
    }
    if (block_elements(type) == SUPER_BLOCK) { /* groups are whole vectors */
        for (int r = 0; r < n_rows; r++)
            for (int64_t g = 0; g < n / QUANT_BLOCK * per_block; g += 8)
                acc[r] = _mm256_add_ps(acc[r], _mm256_loadu_ps(w->offset + r * w->stride + g));
    } else {
        for (int64_t g = 0; g < n / QUANT_BLOCK; g++)
#pragma GCC unroll 4
            for (int r = 0; r < n_rows; r++)
                total[r] += w->offset[r * w->stride + g];
    }
    for (int r = 0; r < n_rows; r++) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(acc[r]), _mm256_extractf128_ps(acc[r], 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        y[r] = _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half))) + total[r];
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
        dot_codes(type, n_rows, n, w, x[t].q, a->y + t * a->n_out + o);
    }
}

V_INLINE void quant_rows(int type, const struct linear_args *a, const struct q8_row *x,
    char *scratch, int64_t begin, int64_t end)
{
    struct unpacked w = {
        .stride = a->n_in / scale_group(type) + 2 * VL, .q_stride = whole_dots(a->n_in)};
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
    struct q8_row x[GEMV_TOKENS];
    int64_t group = scale_group((int)a->type);
    for (int64_t t = 0; t < a->n_tokens; t++) {
        x[t] = place_q8_row(scratch, a->n_in, group);
        scratch += q8_row_bytes(a->n_in, group);
        FN(quantize_q8)(a->x + t * a->n_in, a->n_in, has_offset((int)a->type), x[t]);
    }
#define ROWS(type) quant_rows(type, a, x, scratch, begin, end)
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

/* Types whose groups are as long as the activations' blocks go by bytes; others are decoded, and so are all where
 * half of a panel would stay empty. */
V_INLINE int multiplies_bytes(const struct linear_args *a)
{
    return rounds(a) && scale_group((int)a->type) == QUANT_BLOCK && a->n_tokens > VL;
}

/* A panel of activations: codes [n_in / 4][QUANT_LANES] of four bytes, then scales and sums [block][QUANT_LANES].
 * Lanes without a token are zero. */
struct quant_panel {
    uint32_t *codes;
    float *scale, *sum;
};

V_INLINE struct quant_panel quant_panel_of(const struct linear_args *a, int64_t token)
{
    struct quant_panel p;
    int64_t blocks = a->n_in / QUANT_BLOCK, size = (a->n_in / 4 + 2 * blocks) * QUANT_LANES;
    p.codes = (uint32_t *)a->packed + token / QUANT_LANES * size;
    p.scale = (float *)(void *)(p.codes + a->n_in / 4 * QUANT_LANES);
    p.sum = p.scale + blocks * QUANT_LANES;
    return p;
}

static void FN(pack_bytes)(const struct linear_args *a, const struct worker *worker)
{
    int64_t begin, end, n = a->n_in, blocks = n / QUANT_BLOCK;
    int64_t lanes = (a->n_tokens + QUANT_LANES - 1) / QUANT_LANES * QUANT_LANES;
    int64_t floats = blocks + VL;
    float *scale = (float *)(void *)worker->scratch, *sum = scale + VL * floats;
    int8_t *codes = (int8_t *)(sum + VL * floats);
    worker_range(worker, lanes, VL, &begin, &end);
    for (int64_t t = begin; t < end; t += VL) {
        for (int64_t i = 0; i < VL; i++) {
            struct q8_row row = {codes + i * n, scale + i * floats, sum + i * floats, QUANT_BLOCK};
            if (t + i < a->n_tokens) {
                FN(quantize_q8)(a->x + (t + i) * n, n, has_offset((int)a->type), row);
                continue;
            }
            memset(row.q, 0, (size_t)n);
            memset(row.scale, 0, (size_t)blocks * sizeof *row.scale);
            memset(row.sum, 0, (size_t)blocks * sizeof *row.sum);
        }
        struct quant_panel p = quant_panel_of(a, t);
        int64_t lane = t % QUANT_LANES;
        FN(transpose)((const float *)(const void *)codes, n / 4, VL, n / 4,
            (float *)(void *)(p.codes + lane), QUANT_LANES);
        FN(transpose)(scale, floats, VL, blocks, p.scale + lane, QUANT_LANES);
        FN(transpose)(sum, floats, VL, blocks, p.sum + lane, QUANT_LANES);
    }
}

/* QUANT_ROWS unpacked rows: codes at distance `stride`, scales and offsets at `floats`. */
struct quant_matrix {
    uint8_t *q;
    float *d, *m;
    int64_t stride, floats;
};

/* c[i][j] = sum over blocks of d[i] (e[j] sum of codes) + m[i] sum[j] for QUANT_TILE rows from `first` on. */
static void FN(quant_tile)(
    int64_t blocks, const struct quant_matrix *w, int64_t first, struct quant_panel x, float *c)
{
    const uint8_t *q = w->q + first * w->stride;
    const float *d = w->d + first * w->floats, *m = w->m + first * w->floats;
    vf acc[QUANT_TILE][2];
    for (int i = 0; i < QUANT_TILE; i++)
        acc[i][0] = acc[i][1] = v_zero();
    for (int64_t b = 0; b < blocks; b++) {
        vi sums[QUANT_TILE][2];
        for (int i = 0; i < QUANT_TILE; i++)
            sums[i][0] = sums[i][1] = v_zero_i();
#pragma GCC unroll 8
        for (int64_t l = 0; l < QUANT_BLOCK / 4; l++) {
            const uint32_t *lanes = x.codes + (b * (QUANT_BLOCK / 4) + l) * QUANT_LANES;
            vi x0 = v_load_bytes(lanes), x1 = v_load_bytes(lanes + VL);
#pragma GCC unroll 6
            for (int i = 0; i < QUANT_TILE; i++) {
                vi four = v_set_four(q + i * w->stride + b * QUANT_BLOCK + l * 4);
                sums[i][0] = v_dot_bytes(sums[i][0], four, x0);
                sums[i][1] = v_dot_bytes(sums[i][1], four, x1);
            }
        }
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            vf e = v_load(x.scale + b * QUANT_LANES + j * VL);
            vf s = v_load(x.sum + b * QUANT_LANES + j * VL);
#pragma GCC unroll 6
            for (int i = 0; i < QUANT_TILE; i++) {
                vf part = v_mul(v_from_i32(sums[i][j]), e);
                acc[i][j] = v_fma(part, v_set1(d[i * w->floats + b]), acc[i][j]);
                acc[i][j] = v_fma(s, v_set1(m[i * w->floats + b]), acc[i][j]);
            }
        }
    }
    for (int i = 0; i < QUANT_TILE; i++)
        for (int j = 0; j < 2; j++)
            v_store(c + (first + i) * QUANT_LANES + j * VL, acc[i][j]);
}

static void FN(quant_block)(
    int64_t rows, int64_t blocks, const struct quant_matrix *w, struct quant_panel x, float *c)
{
    for (int64_t i = 0; i < rows; i += QUANT_TILE)
        FN(quant_tile)(blocks, w, i, x, c);
}
/* Rows begin ... end of W times all tokens, QUANT_ROWS rows at a time. */
V_INLINE void quant_chunks(
    int type, const struct linear_args *a, char *scratch, int64_t begin, int64_t end)
{
    int64_t n = a->n_in, blocks = n / QUANT_BLOCK, row_bytes = row_offset(type, n);
    struct quant_matrix w = {.stride = n + 64, .floats = blocks + 2 * VL};
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
            FN(quant_block)(rows, blocks, &w, quant_panel_of(a, t), result);
            FN(transpose)(result, QUANT_LANES, rows, tokens, a->y + t * a->n_out + o, a->n_out);
            if (!is_finished(a))
                FN(finish_rows)(a, t, t + tokens, o, rows, a->y + t * a->n_out + o, a->n_out);
        }
    }
}

_Static_assert((int64_t)QUANT_ROWS *(MAX_ROW + 64 + (MAX_ROW / QUANT_BLOCK + 2 * VL) * 8) +
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
