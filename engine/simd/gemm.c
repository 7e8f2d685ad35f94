/* Many tokens times frozen weights, both ways. Weights are decoded from their stored rows into a small
 * buffer of the worker, once per block of tokens, and never stand in memory as a whole. Included once for each
 * precision (precision.h); what does not depend on it is in linear.c.
 *
 * Forward, y = x W': the activations are packed with tokens along the lanes, panels of TILE_LANES, once and by
 * all workers; a tile takes rows of W as they are, broadcast. Its result has outputs along the rows and is turned
 * when it leaves. Backward, dx = dy W: rows of W are the lanes, dy is broadcast as it is. Either way no
 * transposed copy of a weight is made.
 * Bound: 2 n_tokens n_in n_out FLOPs; decoding costs each weight once for CHUNK_TOKENS. */

/* packed[panel][step][lane]: STEP neighbours of x[TILE_LANES panel + lane]; lanes without a token are zero. */
static void FP(pack_tokens)(const struct linear_args *a, const struct worker *worker)
{
    int64_t begin, end, k = reduction(a), steps = (k + STEP - 1) / STEP;
    LANE *packed = a->packed;
    float *rounded = (float *)(void *)worker->scratch;
    ELEM *rows = (ELEM *)(rounded + k);
    /* Rows that are what they must be. */
    const ELEM *ready =
        PP(stored_as_row)((int)a->x_type, a->x) && !rounds(a) && k % STEP == 0 ? a->x : NULL;
    worker_range(worker, a->n_tokens, VL, &begin, &end);
    for (int64_t t = begin; t < end; t += VL) {
        int64_t panel = t / TILE_LANES * TILE_LANES, lanes = panel_lanes(a->n_tokens, panel);
        int64_t tokens = a->n_tokens - t < VL ? a->n_tokens - t : VL;
        LANE *dst = packed + panel * steps + (t - panel);
        if (ready && tokens == VL) {
            FN(transpose)((const float *)(const void *)(ready + t * k), steps, VL, steps,
                (float *)(void *)dst, lanes);
            continue;
        }
        memset(rows, 0, (size_t)(VL * steps * STEP) * sizeof *rows);
        for (int64_t i = 0; i < tokens; i++) {
            ELEM *row = rows + i * steps * STEP;
            const ELEM *made;
            if (ready) {
                made = ready + (t + i) * k;
            } else {
                const float *x = token_row(a, t + i);
                if (rounds(a))
                    FN(round_row)(a, x, rounded, (char *)(rows + VL * steps * STEP));
                made = PP(as_row)(rounds(a) ? rounded : x, k, row);
            }
            if (made != row)
                memcpy(row, made, (size_t)k * sizeof *row);
        }
        FN(transpose)((const float *)(void *)rows, steps, VL, steps, (float *)(void *)dst, lanes);
    }
}

/* Part k0 ... k0 + depth of the reduction of rows first ... first + n of W: in place where they are stored so,
 * else decoded into `buffer`. Offsets follow the codes. */
static const ELEM *FP(weight_rows)(const struct linear_args *a, int64_t first, int64_t n,
    int64_t k0, int64_t depth, ELEM *buffer, int64_t *stride)
{
    int type = (int)a->type;
    int64_t row_bytes = row_offset(type, a->n_in);
    const char *w = (const char *)a->w + first * row_bytes;
    if (PP(stored_as_row)(type, w)) {
        *stride = a->n_in;
        return (const ELEM *)(const void *)w + k0;
    }
    *stride = PP(chunk_depth) +
        32; /* rows at a power of two would fall on one another in the first cache */
    float decoded[PP(chunk_depth)];
    for (int64_t i = 0; i < n; i++, w += row_bytes) {
        ELEM *row = buffer + i * *stride;
        float *y = STEP == 1 ? (float *)(void *)row : decoded;
        if (k0 >= a->n_in)
            FN(decode_offsets)(
                type, (const uint8_t *)w + (k0 - a->n_in) * block_bytes(type), depth, y);
        else if (reduction(a) > a->n_in)
            FN(decode_codes)(type, (const uint8_t *)w + row_offset(type, k0), depth, y);
        else
            FN(decode_row)(type, w + row_offset(type, k0), depth, y);
        PP(as_row)(y, depth, row);
    }
    return buffer;
}

/* Length of n's parts that are about equal, multiples of grain and no longer than `most`. */
V_INLINE int64_t PP(equal_part)(int64_t n, int64_t most, int64_t grain)
{
    int64_t longest = most / grain * grain, parts = (n + longest - 1) / longest;
    return parts == 0 ? longest : ((n + parts - 1) / parts + grain - 1) / grain * grain;
}

/* How much of the reduction comes next: parts are about equal, and end where the codes end. */
V_INLINE int64_t PP(next_depth)(const struct linear_args *a, int64_t k0)
{
    int64_t left = (k0 < a->n_in ? a->n_in : reduction(a)) - k0, depth = PP(chunk_depth);
    int64_t block = block_elements((int)a->type);
    if (a->n_in > depth)
        depth = PP(equal_part)(a->n_in, PP(part_depth), block < 32 ? 32 : block);
    return left < depth ? left : depth;
}

/* Tokens worked on at a time, so that what is packed of them stays in the second cache. On tiles, 2048 x 5632 took place
 * at 1370 GFLOP/s a core with 256 tokens, at 860 with 512; from some length on it is the reduction that is cut. */
V_INLINE int64_t PP(chunk_tokens)(const struct linear_args *a)
{
    return a->n_in > PP(short_depth) && a->n_in <= PP(chunk_depth) ? CHUNK_TOKENS / 2
                                                                   : CHUNK_TOKENS;
}

/* Rows o ... o + rows of W times tokens t0 ... t1, panel by panel. Finished panels leave, where y is wanted. */
static void FP(chunk_product)(const struct linear_args *a, int64_t o, int64_t rows, int64_t t0,
    int64_t t1, struct results *out, ELEM *buffer)
{
    struct leaving *leaving = &out->leaving;
    int64_t stride, k = reduction(a), steps = (k + STEP - 1) / STEP;
    int64_t panels = (t1 - t0 + TILE_LANES - 1) / TILE_LANES;
    for (int64_t k0 = 0, depth; k0 < k; k0 += depth) {
        depth = PP(next_depth)(a, k0);
        const ELEM *w = FP(weight_rows)(a, o, rows, k0, depth, buffer, &stride);
        for (int64_t i = 0, t = t0; i < panels; i++, t += TILE_LANES) {
            int64_t lanes = panel_lanes(a->n_tokens, t);
            const LANE *panel = (const LANE *)a->packed + t * steps + k0 / STEP * lanes;
            float *c = panel_of(out, i);
            FP(block_product)(
                rows, lanes, depth / STEP, w, stride, panel, lanes, c, TILE_LANES, k0 > 0, leaving);
            if (k0 + depth >= k && leaving->a)
                FN(leave)(leaving, c, o, rows, t, at_most(t1 - t, TILE_LANES));
        }
    }
    next_chunk(out, panels);
}

static void FP(linear_gemm)(const struct linear_args *a, const struct worker *worker)
{
    int64_t begin, end;
    worker_range(worker, a->n_out, PP(row_grain), &begin, &end);
    struct results out = {.panels = (float *)(void *)worker->scratch,
        .size = PP(chunk_rows) * TILE_LANES,
        .count = RESULT_PANELS,
        .leaving = {.a = a}};
    ELEM *buffer = (ELEM *)(out.panels + out.size * out.count);
    PP(matrix_begin)();
    int64_t chunk = PP(chunk_tokens)(a);
    for (int64_t t = 0; t < a->n_tokens; t += chunk) {
        int64_t t1 = t + at_most(a->n_tokens - t, chunk);
        for (int64_t o = begin; o < end; o += PP(chunk_rows))
            FP(chunk_product)(a, o, at_most(end - o, PP(chunk_rows)), t, t1, &out, buffer);
    }
    FN(turn_rest)(&out.leaving);
    PP(matrix_end)();
}

/* silu(gate) up of one panel, as a panel of the next product: `rows` neighbours of its reduction from o on. */
static void FP(store_gated)(const struct linear_args *down, const float *gate, const float *up,
    int64_t o, int64_t rows, int64_t t)
{
    int64_t lanes = panel_lanes(down->n_tokens, t), steps = down->n_in / STEP;
    LANE *dst = (LANE *)down->packed + t * steps + o / STEP * lanes;
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t j = 0; j < lanes; j += VL) {
            vf y[2];
            for (int i = 0; i < 2; i++) {
                int64_t at = (r + i) * TILE_LANES + j;
                y[i] = v_silu_mul(v_load(gate + at), v_load(up + at));
            }
            PP(v_store_two)(dst + r / STEP * lanes + j, lanes, y[0], y[1]);
        }
}

/* The product of gate and up, of which both factors stay in panels: what comes out is packed already. */
static void FP(gated)(const struct feed_forward_args *f, const struct worker *worker)
{
    int64_t begin, end, size = PP(gated_rows) * TILE_LANES;
    worker_range(worker, f->gate.n_out, PP(row_grain), &begin, &end);
    struct results gate = {
        .panels = (float *)(void *)worker->scratch, .size = size, .count = RESULT_PANELS};
    struct results up = gate;
    up.panels += size * RESULT_PANELS;
    ELEM *buffer = (ELEM *)(up.panels + size * RESULT_PANELS);
    PP(matrix_begin)();
    int64_t chunk = PP(chunk_tokens)(&f->gate), n_tokens = f->gate.n_tokens;
    for (int64_t t = 0; t < n_tokens; t += chunk) {
        int64_t t1 = t + at_most(n_tokens - t, chunk);
        for (int64_t o = begin; o < end; o += PP(gated_rows)) {
            int64_t rows = at_most(end - o, PP(gated_rows));
            gate.first = up.first = 0;
            FP(chunk_product)(&f->gate, o, rows, t, t1, &gate, buffer);
            FP(chunk_product)(&f->up, o, rows, t, t1, &up, buffer);
            for (int64_t i = 0; t + i * TILE_LANES < t1; i++)
                FP(store_gated)(&f->down, gate.panels + i * size, up.panels + i * size, o, rows,
                    t + i * TILE_LANES);
        }
    }
    PP(matrix_end)();
}

/* A step of n columns in panels, from rows as they are stored; the same columns of rows `ahead` bytes on are asked for. */
V_INLINE void FP(store_panels)(
    const ELEM *const *row, int64_t n, int64_t steps, int64_t ahead, LANE *dst)
{
    for (int64_t j = 0; j < n; j += TILE_LANES) {
        const ELEM *part[STEP];
        for (int64_t i = 0; i < STEP; i++) {
            part[i] = row[i] + j;
            for (int64_t l = 0; l < TILE_LANES * (int64_t)sizeof(ELEM); l += 64)
                prefetch_row(part[i], ahead + l);
        }
        PP(interleave_stored)(part, at_most(n - j, TILE_LANES), dst + j * steps);
    }
}

/* Columns first ... first + n of rows o ... o + rows of W, in panels of TILE_LANES columns: [panel][step][lane]. */
static void FP(weight_panels)(const struct linear_back_args *a, int64_t o, int64_t rows,
    int64_t first, int64_t n, LANE *panels)
{
    int type = (int)a->type;
    int64_t row_bytes = row_offset(type, a->n_in), steps = (rows + STEP - 1) / STEP;
    const char *w = (const char *)a->w + o * row_bytes + row_offset(type, first);
    int stored = PP(stored_as_row)(type, w) && n % VL == 0;
    int64_t ahead = (WEIGHTS_AHEAD + row_bytes - 1) / row_bytes * row_bytes;
    float segment[STEP][BACK_COLUMNS + VL];
    memset(segment, 0, sizeof segment);
    for (int64_t l = 0; l < rows; l += STEP, w += STEP * row_bytes) {
        LANE *dst = panels + l / STEP * TILE_LANES;
        if (stored && l + STEP <= rows) {
            const ELEM *row[STEP];
            for (int64_t i = 0; i < STEP; i++)
                row[i] = (const ELEM *)(const void *)(w + i * row_bytes);
            FP(store_panels)(row, n, steps, ahead, dst);
            continue;
        }
        for (int64_t i = 0; i < STEP; i++) {
            if (l + i < rows)
                FN(decode_row)(type, w + i * row_bytes, n, segment[i]);
            else
                memset(segment[i], 0, sizeof segment[i]);
        }
        for (int64_t j = 0; j < n; j += TILE_LANES)
            PP(interleave)(segment[0] + j, BACK_COLUMNS + VL, at_most(padded(n - j), TILE_LANES),
                dst + j * steps);
    }
}

/* dx for one panel of columns and some tokens: into place when the lanes are whole, else by way of a buffer. */
static void FP(back_panel)(const struct linear_back_args *a, const ELEM *dy, int64_t stride,
    int64_t steps, const LANE *panel, int64_t t0, int64_t n_tokens, int64_t col, int64_t cols,
    int accumulate)
{
    enum { TOKENS = 16 };
    float *rows = a->dx + t0 * a->n_in + col;
    if (cols % VL == 0) {
        FP(block_product)(
            n_tokens, cols, steps, dy, stride, panel, TILE_LANES, rows, a->n_in, accumulate, NULL);
        return;
    }
    float edge[TOKENS * TILE_LANES];
    for (int64_t t = 0; t < n_tokens; t += TOKENS) {
        int64_t tokens = at_most(n_tokens - t, TOKENS);
        float *dx = rows + t * a->n_in;
        for (int64_t i = 0; accumulate && i < tokens; i++)
            memcpy(edge + i * TILE_LANES, dx + i * a->n_in, (size_t)cols * sizeof *dx);
        FP(block_product)(tokens, cols, steps, dy + t * stride, stride, panel, TILE_LANES, edge,
            TILE_LANES, accumulate, NULL);
        for (int64_t i = 0; i < tokens; i++)
            memcpy(dx + i * a->n_in, edge + i * TILE_LANES, (size_t)cols * sizeof *dx);
    }
}

/* dy as rows that can be broadcast: itself, or rounded into the shared buffer in whole steps. */
static const ELEM *FP(gradient_rows)(
    const struct linear_back_args *a, const struct worker *worker, int64_t *stride)
{
    if (PP(stored_as_row)((int)a->dy_type, a->dy) && a->n_out % STEP == 0) {
        *stride = a->dy_stride;
        return a->dy;
    }
    ELEM *rows = a->packed;
    int64_t begin, end;
    *stride = (a->n_out + STEP - 1) / STEP * STEP;
    worker_range(worker, a->n_tokens, 1, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        rows[t * *stride + *stride - 1] = 0;
        PP(as_row)((const float *)a->dy + t * a->n_out, a->n_out, rows + t * *stride);
    }
    team_barrier(worker);
    return rows;
}

static void FP(linear_back_gemm)(const struct linear_back_args *a, const struct worker *worker)
{
    LANE *panels = (LANE *)(void *)worker->scratch;
    int64_t begin, end, stride, block = block_elements((int)a->type),
                                grain = block < 32 ? 32 : block;
    const ELEM *dy = FP(gradient_rows)(a, worker, &stride);
    worker_range(worker, a->n_in, grain, &begin, &end);
    int64_t width =
        PP(equal_part)(end - begin, BACK_COLUMNS, grain < TILE_LANES ? TILE_LANES : grain);
    int64_t depth = PP(equal_part)(a->n_out, PP(back_depth), 32);
    PP(matrix_begin)();
    for (int64_t col = begin; col < end; col += width) {
        int64_t cols = at_most(end - col, width);
        for (int64_t o = 0; o < a->n_out; o += depth) {
            int64_t rows = at_most(a->n_out - o, depth), steps = (rows + STEP - 1) / STEP;
            FP(weight_panels)(a, o, rows, col, cols, panels);
            for (int64_t t = 0; t < a->n_tokens; t += BACK_TOKENS)
                for (int64_t j = 0; j < cols; j += TILE_LANES) {
                    int64_t tokens = at_most(a->n_tokens - t, BACK_TOKENS);
                    int64_t lanes = at_most(cols - j, TILE_LANES);
                    FP(back_panel)(a, dy + t * stride + o, stride, steps, panels + j * steps, t,
                        tokens, col + j, lanes, o > 0 || a->accumulate);
                    if (o + rows == a->n_out && a->up.n_parts > 0)
                        FN(up_columns)(&a->up, t, t + tokens, col + j, lanes);
                }
        }
    }
    PP(matrix_end)();
}
