/* What the kinds of attention share: which rows of queries, keys and values belong to a head, and how they come
 * into a worker's buffers.
 *
 * Query heads that share a key head stand side by side, so that each loaded key serves them all: lane l of a
 * block is query token first + l / group, head group head + l % group. */

enum {
    KEYS = 64,         /* keys that pass at a time */
    QUERY_LANES = 256, /* queries of a block in the forward pass */
    BACK_LANES = 1024, /* and on the way back, where they stand in four forms */
};

_Static_assert(
    (int)TILE_LANES <= (int)KEYS, "a panel of queries and a block of keys share a buffer");

struct query_block {
    int64_t seq, head, first, tokens, group, lanes;
};

/* Query tokens of a block of at most `lanes` lanes. */
V_INLINE int64_t query_tokens(int64_t group, int64_t lanes)
{
    return group < lanes ? lanes / group : 1;
}

V_INLINE int64_t whole_panels(int64_t lanes)
{
    return (lanes + TILE_LANES - 1) / TILE_LANES * TILE_LANES;
}

/* Element offset of a lane's row in a matrix of n_head * dim columns. */
V_INLINE int64_t query_offset(
    const struct query_block *b, int64_t n_query, int64_t n_head, int64_t dim, int64_t lane)
{
    int64_t token = b->seq * n_query + b->first + lane / b->group;
    return (token * n_head + b->head * b->group + lane % b->group) * dim;
}

/* dst[i] = scale times the row of lane first + i, for n lanes; zero up to `stride` columns, and where there is no
 * such lane. */
static void FN(load_queries)(const struct query_block *b, const float *src, int64_t n_query,
    int64_t n_head, int64_t dim, float scale, int64_t first, int64_t n, float *dst, int64_t stride)
{
    for (int64_t i = 0; i < n; i++, dst += stride) {
        if (first + i >= b->lanes) {
            memset(dst, 0, (size_t)stride * sizeof *dst);
            continue;
        }
        const float *x = src + query_offset(b, n_query, n_head, dim, first + i);
        for (int64_t j = 0; j < stride; j += VL) {
            int64_t lanes = dim - j < 0 ? 0 : dim - j < VL ? dim - j : VL;
            v_store(dst + j, v_mul(v_set1(scale), v_load_some(x + j, lanes)));
        }
    }
}

/* Keys or values of one head, n rows from `row` on, as KEYS rows of `stride` floats, zero beyond. The matrix has
 * rows of `width` elements, of which the head's begin at `column`. */
static void FN(load_keys)(const void *src, int type, int64_t row, int64_t n, int64_t width,
    int64_t column, int64_t dim, float *dst, int64_t stride)
{
    if (n < KEYS || stride > dim)
        memset(dst, 0, (size_t)(KEYS * stride) * sizeof *dst);
    for (int64_t j = 0; j < n; j++)
        FN(decode_row)(type, (const char *)src + row_offset(type, (row + j) * width + column), dim,
            dst + j * stride);
}

/* For each of n lanes: limit, one above the last visible key, and start, the first, both counted from key 0. Lanes
 * without a query see nothing. */
static void FN(visible_keys)(const struct query_block *b, int64_t n_query, int64_t n_past,
    const int32_t *first_key, int64_t n, float *limit, float *start)
{
    for (int64_t l = 0; l < n; l++) {
        int64_t token = b->first + l / b->group;
        limit[l] = l < b->lanes ? (float)(n_past + token + 1) : 0.0f;
        start[l] = l < b->lanes && first_key ? (float)first_key[b->seq * n_query + token] : 0.0f;
    }
}

/* The first key that any query of the block sees. */
V_INLINE int64_t first_visible(
    const struct query_block *b, int64_t n_query, const int32_t *first_key)
{
    if (!first_key)
        return 0;
    const int32_t *start = first_key + b->seq * n_query + b->first;
    int64_t least = start[0];
    for (int64_t t = 1; t < b->tokens; t++)
        least = start[t] < least ? start[t] : least;
    return least;
}
