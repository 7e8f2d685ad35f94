/* What the products with frozen weights share, whatever their precision: sizes of panels, the rounding of
 * activations that the original does, the adapter's end. */

enum {
    TILE_LANES = TILE_VECS * VL,
    LINE_STEPS = 16,                               /* steps of a reduction in a line of 64 bytes */
    CHUNK_TOKENS = 512,                            /* tokens worked on at a time: whole panels */
    RESULT_PANELS = CHUNK_TOKENS / TILE_LANES + 1, /* those of a chunk, and one that is leaving */
    BLOCKS_A_TILE = 2,  /* turned between two tiles; a panel has fewer than two a tile */
    BACK_COLUMNS = 320, /* columns of W decoded at a time on the way back, at most */
    BACK_TOKENS = 96,   /* tokens that meet them at a time: whole register and matrix tiles */
};

_Static_assert(
    (int)TILE_LANES <= (int)PANEL_TOKENS, "linear_packed_bytes() counts panels of PANEL_TOKENS");
_Static_assert(TILE_ROWS == 6, "tile.c names six heights");
/* pack_tokens: a rounded row, a vector of rows with their block sums, and codes with scale and sum. */
_Static_assert(
    (int64_t)(VL + 1) * 4 * (MAX_ROW + MAX_ROW / QUANT_BLOCK) + MAX_ROW / 4 * 5 <= WORKER_SCRATCH,
    "the longest row does not fit a worker's scratch");

/* n, but from 0 to `most`. */
V_INLINE int64_t at_most(int64_t n, int64_t most) { return n < 0 ? 0 : n < most ? n : most; }

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

V_INLINE int rounds(const struct linear_args *a)
{
    return a->partner && has_quant_dot((int)a->type);
}

/* One activation row as the tile takes it: code times scale, then the block sums if they are asked for. */
static void FN(round_row)(const struct linear_args *a, const float *x, float *y, char *scratch)
{
    int64_t blocks = a->n_in / QUANT_BLOCK;
    struct q8_row row = {(int8_t *)scratch + 8 * blocks, (float *)(void *)scratch,
        (float *)(void *)scratch + blocks, QUANT_BLOCK};
    FN(quantize_q8)(x, a->n_in, 1, row);
    for (int64_t i = 0; i < a->n_in; i += VL)
        v_store(y + i, v_mul(v_from_i8(row.q + i), v_set1(row.scale[i / QUANT_BLOCK])));
    if (reduction(a) > a->n_in)
        memcpy(y + a->n_in, row.sum, (size_t)blocks * sizeof *y);
}

/* Rows of activations and of results where they are floats, as they are for a few tokens. */
V_INLINE const float *token_row(const struct linear_args *a, int64_t t)
{
    return (const float *)a->x + t * a->n_in;
}
V_INLINE float *result_row(const struct linear_args *a, int64_t t)
{
    return (float *)a->y + t * a->n_out;
}

enum { DOWN_RANKS = 4, DOWN_SUMS = 4 };

/* Dots of one row of x with `ranks` rows of m, x loaded once: the sums of v_dot, bit by bit. */
V_INLINE void dot_ranks(const int ranks, const int x_type, const int m_type, const void *x,
    const void *m, int64_t n, float *dots)
{
    vf sum[DOWN_RANKS][DOWN_SUMS];
    int64_t i = 0;
#pragma GCC unroll 4
    for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
        for (int j = 0; j < DOWN_SUMS; j++)
            sum[r][j] = v_zero();
    for (; i + DOWN_SUMS * VL <= n; i += DOWN_SUMS * VL)
#pragma GCC unroll 4
        for (int j = 0; j < DOWN_SUMS; j++) {
            vf row = load_as(x_type, x, i + j * VL, VL);
#pragma GCC unroll 4
            for (int r = 0; r < ranks; r++)
                sum[r][j] = v_fma(row, load_as(m_type, m, r * n + i + j * VL, VL), sum[r][j]);
        }
    for (; i + VL <= n; i += VL)
#pragma GCC unroll 4
        for (int r = 0; r < ranks; r++)
            sum[r][0] =
                v_fma(load_as(x_type, x, i, VL), load_as(m_type, m, r * n + i, VL), sum[r][0]);
    if (i < n)
#pragma GCC unroll 4
        for (int r = 0; r < ranks; r++)
            sum[r][1] = v_fma(
                load_as(x_type, x, i, n - i), load_as(m_type, m, r * n + i, n - i), sum[r][1]);
#pragma GCC unroll 4
    for (int r = 0; r < ranks; r++)
        dots[r] = v_sum(v_add(v_add(sum[r][0], sum[r][1]), v_add(sum[r][2], sum[r][3])));
}

/* u[r] (+)= scale times the dot of x and row r of m. */
V_INLINE void down_row(const int x_type, const int m_type, const void *x, const void *m, int64_t n,
    int64_t rank, float scale, int64_t accumulate, float *u)
{
    float dots[DOWN_RANKS];
    for (int64_t r = 0, some; r < rank; r += some) {
        const char *rows = (const char *)m + row_offset(m_type, r * n);
        some = rank - r < DOWN_RANKS ? 1 : DOWN_RANKS;
        if (some == 1)
            dot_ranks(1, x_type, m_type, x, rows, n, dots);
        else
            dot_ranks(DOWN_RANKS, x_type, m_type, x, rows, n, dots);
        for (int64_t i = 0; i < some; i++)
            u[r + i] = accumulate ? u[r + i] + scale * dots[i] : scale * dots[i];
    }
}

/* An adapter is met once a token, like the weights, and its rows are short. What a worker needs of it, all of A and
 * columns begin ... end of B, is asked for while it multiplies the first half of its rows: lines at a step. */
struct adapter_lines {
    int64_t begin, end, size; /* size: bytes of a number */
    int64_t of_a, a_step, of_b, b_step;
};

V_INLINE struct adapter_lines adapter_lines(
    const struct linear_args *a, int64_t begin, int64_t end, int64_t rows)
{
    int64_t size = row_offset((int)a->factor_type, 1);
    int64_t steps = (end - begin + 2 * rows - 1) / (2 * rows);
    int64_t lines_a = a->u ? 0 : a->rank * a->n_in * size / 64 + 1;
    int64_t lines_b = (end - begin) * size / 64 + 1;
    return (struct adapter_lines){
        begin, end, size, 0, (lines_a + steps - 1) / steps, 0, (lines_b + steps - 1) / steps};
}

V_INLINE void ask_for_adapter(struct adapter_lines *l, const struct linear_args *a)
{
    int64_t bytes_b = (l->end - l->begin) * l->size;
    for (int64_t i = 0; i < l->a_step && 64 * l->of_a < a->rank * a->n_in * l->size; i++)
        prefetch_row(a->a, 64 * l->of_a++);
    for (int64_t i = 0; i < l->b_step && 64 * l->of_b < bytes_b; i++, l->of_b++)
        for (int64_t r = 0; r < a->rank; r++)
            prefetch_row(a->b, (r * a->n_out + l->begin) * l->size + 64 * l->of_b);
}

enum { UP_COLUMNS = TILE_LANES, UP_TOKENS = 4 }; /* whose sums stay in registers */

/* `vecs` vectors of `tokens` rows, a factor loaded once for all of these; `lanes` of the last vector. */
V_INLINE void up_block(const int tokens, const int vecs, const struct lora_up_args *a, int64_t t,
    int64_t first, int64_t lanes)
{
    vf sum[UP_TOKENS][TILE_VECS];
    int64_t n = a->n_cols, at = t * n + first;
#pragma GCC unroll 4
    for (int k = 0; k < tokens; k++)
#pragma GCC unroll 4
        for (int j = 0; j < vecs; j++)
            sum[k][j] = a->base ? v_load_some(a->base + at + k * n + j * VL, lanes) : v_zero();
    for (int64_t i = 0; i < a->n_parts; i++) {
        const struct lora_part *part = &a->parts[i];
        const float *m = part->m + first, *u = part->u + t * part->rank;
        for (int64_t r = 0; r < part->rank; r++, m += n) {
            vf row[TILE_VECS];
#pragma GCC unroll 4
            for (int j = 0; j < vecs; j++)
                row[j] = v_load_some(m + j * VL, lanes);
#pragma GCC unroll 4
            for (int k = 0; k < tokens; k++) {
                vf factor = v_set1(a->scale * u[k * part->rank + r]);
#pragma GCC unroll 4
                for (int j = 0; j < vecs; j++)
                    sum[k][j] = v_fma(factor, row[j], sum[k][j]);
            }
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < tokens; k++)
#pragma GCC unroll 4
        for (int j = 0; j < vecs; j++)
            v_store_some(a->y + at + k * n + j * VL, sum[k][j], lanes);
}

/* n columns of some rows. */
V_INLINE void up_rows(
    const int tokens, const struct lora_up_args *a, int64_t t, int64_t first, int64_t n)
{
    for (; n >= UP_COLUMNS; n -= UP_COLUMNS, first += UP_COLUMNS)
        up_block(tokens, TILE_VECS, a, t, first, VL);
    for (; n > 0; n -= VL, first += VL)
        up_block(tokens, 1, a, t, first, at_most(n, VL));
}

/* n columns of rows t ... end. */
static void FN(up_columns)(
    const struct lora_up_args *a, int64_t t, int64_t end, int64_t first, int64_t n)
{
    for (; t + UP_TOKENS <= end; t += UP_TOKENS)
        up_rows(UP_TOKENS, a, t, first, n);
    for (; t < end; t++)
        up_rows(1, a, t, first, n);
}

/* Whether nothing comes on top of the products. */
V_INLINE int is_finished(const struct linear_args *a) { return a->rank == 0 && !a->base; }

/* y[t][first + o] for o < n, tokens t0 ... t1, from the products: the adapter's comes on top, then the base. `sums`,
 * a row a token, may be y's own. */
V_INLINE void finish_lanes(const struct linear_args *a, int64_t t, int64_t o, int64_t lanes, vf sum)
{
    int64_t at = t * a->n_out + o;
    for (int64_t r = 0; r < a->rank; r++) {
        vf b = v_load_some(a->b + r * a->n_out + o, lanes);
        sum = v_fma(v_set1(a->scale * a->u[t * a->rank + r]), b, sum);
    }
    if (a->base)
        sum = v_add(v_load_some(a->base + at, lanes), sum);
    if (a->y_type == TYPE_BF16)
        store_as(TYPE_BF16, a->y, at, sum, lanes);
    else
        store_as(TYPE_F32, a->y, at, sum, lanes);
}

static void FN(finish_rows)(const struct linear_args *a, int64_t t0, int64_t t1, int64_t first,
    int64_t n, const float *sums, int64_t stride)
{
    for (int64_t t = t0; t < t1; t++, sums += stride)
        for (int64_t o = 0; o < n; o += VL) {
            int64_t lanes = at_most(n - o, VL);
            finish_lanes(a, t, first + o, lanes, v_load_some(sums + o, lanes));
        }
}

/* A panel of results, rows of outputs with tokens along the lanes, on its way to rows of y. It is turned a block of
 * VL x VL at a time between the tiles of the next panel: stores to y miss the caches, and when they come all at
 * once they are waited for. In one go they took a tenth of a product of 512 x 576 x 1536. */
struct leaving {
    const struct linear_args *a; /* NULL: results stay in panels */
    const float *c;
    int64_t o, rows, t, tokens;
    int64_t block, n_blocks; /* the next one, and all */
};

/* Panels of results, used in turn. Those of a chunk are needed together while its reduction goes on in parts. */
struct results {
    float *panels;
    int64_t size, count, first;
    struct leaving leaving;
};

V_INLINE float *panel_of(const struct results *out, int64_t i)
{
    return out->panels + (out->first + i) % out->count * out->size;
}

V_INLINE void next_chunk(struct results *out, int64_t n_panels)
{
    out->first = (out->first + n_panels) % out->count;
}

/* Whole blocks stay in registers: what was stored and loaded again took five times as long. */
V_INLINE void turn_whole_block(
    const int y_type, const struct linear_args *a, const float *c, int64_t t, int64_t o)
{
    vf sums[VL];
    v_turn(c, TILE_LANES, sums);
    for (int64_t r = 0; r < a->rank; r++) {
        vf b = v_load(a->b + r * a->n_out + o);
        const float *u = a->u + t * a->rank + r;
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++, u += a->rank)
            sums[i] = v_fma(v_set1(a->scale * *u), b, sums[i]);
    }
    int64_t at = t * a->n_out + o;
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++, at += a->n_out)
        store_as(y_type, a->y, at, a->base ? v_add(v_load(a->base + at), sums[i]) : sums[i], VL);
}

/* Asks for what the block's results are added to: a line of each of VL rows, which lie far apart. */
V_INLINE void ask_for_base(const struct leaving *l, int64_t block)
{
    int64_t across = (l->rows + VL - 1) / VL;
    int64_t t = l->t + block / across * VL, o = l->o + block % across * VL;
    for (int64_t i = 0; l->a->base && i < VL; i++)
        prefetch_row(l->a->base, ((t + i) * l->a->n_out + o) * (int64_t)sizeof(float));
}

static void FN(turn_block)(const struct leaving *l, int64_t block)
{
    int64_t across = (l->rows + VL - 1) / VL, row = block % across * VL,
            token = block / across * VL;
    ask_for_base(l, block + 2 * BLOCKS_A_TILE);
    int64_t tokens = at_most(l->tokens - token, VL), rows = at_most(l->rows - row, VL);
    int64_t t = l->t + token, o = l->o + row;
    const float *c = l->c + row * TILE_LANES + token;
    if (tokens == VL && rows == VL) {
        if (l->a->y_type == TYPE_BF16)
            turn_whole_block(TYPE_BF16, l->a, c, t, o);
        else
            turn_whole_block(TYPE_F32, l->a, c, t, o);
        return;
    }
    float turned[VL * VL];
    FN(transpose)(c, TILE_LANES, rows, tokens, turned, VL);
    FN(finish_rows)(l->a, t, t + tokens, o, rows, turned, VL);
}

/* As much as belongs between n tiles. */
static void FN(turn_some)(struct leaving *l, int64_t n)
{
    for (int64_t i = 0; i < n * BLOCKS_A_TILE && l->block < l->n_blocks; i++)
        FN(turn_block)(l, l->block++);
}

static void FN(turn_rest)(struct leaving *l)
{
    while (l->block < l->n_blocks)
        FN(turn_block)(l, l->block++);
}

/* A finished panel begins to leave, once the one before it has left. */
static void FN(leave)(
    struct leaving *l, const float *c, int64_t o, int64_t rows, int64_t t, int64_t tokens)
{
    FN(turn_rest)(l);
    l->c = c;
    l->o = o;
    l->rows = rows;
    l->t = t;
    l->tokens = tokens;
    l->block = 0;
    l->n_blocks = (rows + VL - 1) / VL * ((tokens + VL - 1) / VL);
}
