/* Many tokens times frozen weights, both ways. Weights are decoded from their stored rows into a small
 * buffer of the worker, once per block of tokens, and never stand in memory as a whole.
 *
 * Forward, y = x W': the activations are packed with tokens along the lanes (each panel k x TILE_LANES), once
 * and by all workers; a tile takes rows of W as they are, broadcast. Its result has outputs along the rows
 * and is turned when it leaves. Backward, dx = dy W: rows of W are the lanes, dy is broadcast as it is.
 * Either way no transposed copy of a weight is made.
 * Bound: 2 n_tokens n_in n_out FLOPs; decoding costs each weight once per call. */

enum {
    CHUNK_ROWS = 192,   /* rows of W worked on at a time: a multiple of TILE_ROWS and of VL */
    CHUNK_TOKENS = 512, /* tokens worked on at a time: whole panels */
    CHUNK_DEPTH = 256,  /* part of the reduction worked on at a time: whole blocks of every type */
    BACK_COLUMNS = 512, /* columns of W decoded at a time on the way back: whole blocks of every type */
    BACK_DEPTH = 192,   /* rows of W decoded at a time on the way back */
};

/* Distance of the rows of the panel that begins with token `first`. */
V_INLINE int64_t panel_lanes(int64_t n_tokens, int64_t first)
{
    int64_t left = n_tokens - first;
    return left < TILE_LANES ? (left + VL - 1) / VL * VL : TILE_LANES;
}

/* Length of the reduction: with partner rounding, offsets of W meet block sums of x in columns of their own. */
V_INLINE int64_t reduction(const struct linear_args *a)
{
    return a->partner && has_offset((int)a->type) ? a->n_in + a->n_in / QUANT_BLOCK : a->n_in;
}

V_INLINE int rounds(const struct linear_args *a) { return a->partner && block_elements((int)a->type) > 1; }

/* One activation row as the tile takes it: code times scale, then the block sums if they are asked for. */
static void FN(round_row)(const struct linear_args *a, const float *x, float *y, char *scratch)
{
    int64_t blocks = a->n_in / QUANT_BLOCK;
    struct q8_row row = {(int8_t *)scratch + 8 * blocks, (float *)(void *)scratch, (float *)(void *)scratch + blocks};
    FN(quantize_q8)(x, a->n_in, 1, row);
    for (int64_t i = 0; i < a->n_in; i += VL)
        v_store(y + i, v_mul(v_from_i8(row.q + i), v_set1(row.scale[i / QUANT_BLOCK])));
    if (reduction(a) > a->n_in)
        memcpy(y + a->n_in, row.sum, (size_t)blocks * sizeof *y);
}

/* packed[panel][i][lane] = x[64 panel + lane][i]; lanes without a token are zero. */
static void FN(pack_tokens)(const struct linear_args *a, const struct worker *worker)
{
    float *packed = a->packed, *rounded = (float *)(void *)worker->scratch;
    int64_t begin, end, k = reduction(a);
    char *codes = worker->scratch + VL * k * (int64_t)sizeof *rounded;
    worker_range(worker, a->n_tokens, VL, &begin, &end);
    for (int64_t t = begin; t < end; t += VL) {
        int64_t panel = t / TILE_LANES * TILE_LANES, lanes = panel_lanes(a->n_tokens, panel);
        float *dst = packed + panel * k + (t - panel);
        int64_t rows = a->n_tokens - t < VL ? a->n_tokens - t : VL;
        const float *x = a->x + t * a->n_in;
        for (int64_t i = 0; rounds(a) && i < rows; i++)
            FN(round_row)(a, x + i * a->n_in, rounded + i * k, codes);
        FN(transpose)(rounds(a) ? rounded : x, k, rows, k, dst, lanes);
        for (int64_t i = 0; rows < VL && i < k; i++)
            memset(dst + i * lanes + rows, 0, (size_t)(VL - rows) * sizeof *dst);
    }
}

/* Part k0 ... k0 + depth of the reduction of rows first ... first + n of W: decoded into `buffer` at distance
 * CHUNK_DEPTH; in place for F32. Offsets follow the codes. */
static const float *FN(weight_rows)(
    const struct linear_args *a, int64_t first, int64_t n, int64_t k0, int64_t depth, float *buffer, int64_t *stride)
{
    int type = (int)a->type;
    int64_t row_bytes = row_offset(type, a->n_in);
    const char *w = (const char *)a->w + first * row_bytes;
    *stride = CHUNK_DEPTH;
    if (type == TYPE_F32 && (uintptr_t)w % sizeof(float) == 0) {
        *stride = a->n_in;
        return (const float *)(const void *)w + k0;
    }
    for (int64_t i = 0; i < n; i++, w += row_bytes) {
        float *y = buffer + i * CHUNK_DEPTH;
        if (k0 >= a->n_in)
            FN(decode_offsets)(type, (const uint8_t *)w + (k0 - a->n_in) * block_bytes(type), depth, y);
        else if (reduction(a) > a->n_in)
            FN(decode_codes)(type, (const uint8_t *)w + row_offset(type, k0), depth, y);
        else
            FN(decode_row)(type, w + row_offset(type, k0), depth, y);
    }
    return buffer;
}

/* y[t][first + o] += scale sum_r u[t][r] b[r][first + o] for o < n, tokens t0 ... t1. */
static void FN(add_lora)(const struct linear_args *a, int64_t t0, int64_t t1, int64_t first, int64_t n)
{
    for (int64_t t = t0; t < t1; t++) {
        float *y = a->y + t * a->n_out + first;
        for (int64_t o = 0; o < n; o += VL) {
            int64_t lanes = n - o < VL ? n - o : VL;
            vf sum = v_load_n(y + o, lanes);
            for (int64_t r = 0; r < a->rank; r++) {
                vf b = v_load_n(a->b + r * a->n_out + first + o, lanes);
                sum = v_fma(v_set1(a->scale * a->u[t * a->rank + r]), b, sum);
            }
            v_store_n(y + o, sum, lanes);
        }
    }
}

/* How much of the reduction comes next: parts end where the codes end. */
V_INLINE int64_t next_depth(const struct linear_args *a, int64_t k0)
{
    int64_t left = (k0 < a->n_in ? a->n_in : reduction(a)) - k0;
    return left < CHUNK_DEPTH ? left : CHUNK_DEPTH;
}

/* Rows o ... o + rows of W times tokens t0 ... t1: results gather in `result`, panel by panel. */
static void FN(chunk_product)(
    const struct linear_args *a, int64_t o, int64_t rows, int64_t t0, int64_t t1, float *result, float *buffer)
{
    int64_t stride, k = reduction(a);
    for (int64_t k0 = 0, depth; k0 < k; k0 += depth) {
        depth = next_depth(a, k0);
        const float *w = FN(weight_rows)(a, o, rows, k0, depth, buffer, &stride);
        for (int64_t t = t0; t < t1; t += TILE_LANES) {
            int64_t lanes = panel_lanes(a->n_tokens, t);
            const float *panel = (const float *)a->packed + t * k + k0 * lanes;
            float *c = result + (t - t0) * CHUNK_ROWS;
            FN(block_product)(rows, lanes, depth, w, stride, panel, lanes, c, TILE_LANES, k0 > 0);
        }
    }
    for (int64_t t = t0; t < t1; t += TILE_LANES) {
        int64_t tokens = t1 - t < TILE_LANES ? t1 - t : TILE_LANES;
        const float *c = result + (t - t0) * CHUNK_ROWS;
        FN(transpose)(c, TILE_LANES, rows, tokens, a->y + t * a->n_out + o, a->n_out);
        if (a->rank > 0)
            FN(add_lora)(a, t, t + tokens, o, rows);
    }
}

static void FN(linear_gemm)(const struct linear_args *a, const struct worker *worker)
{
    FN(pack_tokens)(a, worker);
    team_barrier(worker);
    int64_t begin, end;
    worker_range(worker, a->n_out, TILE_ROWS, &begin, &end);
    float *result = (float *)(void *)worker->scratch, *buffer = result + CHUNK_ROWS * CHUNK_TOKENS;
    for (int64_t t = 0; t < a->n_tokens; t += CHUNK_TOKENS) {
        int64_t t1 = t + CHUNK_TOKENS < a->n_tokens ? t + CHUNK_TOKENS : a->n_tokens;
        for (int64_t o = begin; o < end; o += CHUNK_ROWS) {
            int64_t rows = end - o < CHUNK_ROWS ? end - o : CHUNK_ROWS;
            FN(chunk_product)(a, o, rows, t, t1, result, buffer);
        }
    }
}

/* Columns first ... first + n of rows o ... o + rows of W, in panels of TILE_LANES columns. */
static void FN(weight_panels)(
    const struct linear_back_args *a, int64_t o, int64_t rows, int64_t first, int64_t n, float *panels)
{
    int64_t row_bytes = row_offset((int)a->type, a->n_in), start = row_offset((int)a->type, first);
    float segment[BACK_COLUMNS + VL];
    memset(segment + n, 0, VL * sizeof *segment);
    for (int64_t l = 0; l < rows; l++) {
        FN(decode_row)((int)a->type, (const char *)a->w + (o + l) * row_bytes + start, n, segment);
        for (int64_t j = 0; j < n; j += VL) {
            int64_t panel = j / TILE_LANES * TILE_LANES;
            v_store(panels + panel * rows + l * TILE_LANES + (j - panel), v_load(segment + j));
        }
    }
}

/* One tile's worth of dx: straight into place when the lanes are whole, else by way of a buffer. */
static void FN(back_tile)(
    const struct linear_back_args *a, int64_t t, int64_t tokens, const float *dy, int64_t rows, const float *panel,
    int64_t col, int64_t cols, int accumulate)
{
    float *dx = a->dx + t * a->n_in + col, edge[TILE_ROWS * TILE_LANES];
    int64_t vecs = (cols + VL - 1) / VL;
    tile_fn tile = FN(tiles)[vecs - 1][tokens - 1];
    if (cols == vecs * VL) {
        tile(rows, dy, a->n_out, panel, TILE_LANES, dx, a->n_in, accumulate);
        return;
    }
    for (int64_t i = 0; accumulate && i < tokens; i++)
        memcpy(edge + i * TILE_LANES, dx + i * a->n_in, (size_t)cols * sizeof *dx);
    tile(rows, dy, a->n_out, panel, TILE_LANES, edge, TILE_LANES, accumulate);
    for (int64_t i = 0; i < tokens; i++)
        memcpy(dx + i * a->n_in, edge + i * TILE_LANES, (size_t)cols * sizeof *dx);
}

static void FN(linear_back)(const void *p, const struct worker *worker)
{
    const struct linear_back_args *a = p;
    float *panels = (float *)(void *)worker->scratch;
    int64_t begin, end, grain = block_elements((int)a->type);
    worker_range(worker, a->n_in, grain < 32 ? 32 : grain, &begin, &end);
    for (int64_t col = begin; col < end; col += BACK_COLUMNS) {
        int64_t cols = end - col < BACK_COLUMNS ? end - col : BACK_COLUMNS;
        for (int64_t o = 0; o < a->n_out; o += BACK_DEPTH) {
            int64_t rows = a->n_out - o < BACK_DEPTH ? a->n_out - o : BACK_DEPTH;
            FN(weight_panels)(a, o, rows, col, cols, panels);
            for (int64_t j = 0; j < cols; j += TILE_LANES) {
                int64_t width = cols - j < TILE_LANES ? cols - j : TILE_LANES;
                for (int64_t t = 0; t < a->n_tokens; t += TILE_ROWS) {
                    int64_t tokens = a->n_tokens - t < TILE_ROWS ? a->n_tokens - t : TILE_ROWS;
                    const float *dy = a->dy + t * a->n_out + o;
                    FN(back_tile)
                    (a, t, tokens, dy, rows, panels + j * rows, col + j, width, o > 0 || a->accumulate);
                }
            }
        }
    }
}
