/* What the kinds of attention share: which rows of queries, keys and values belong to a head, and how they come
 * into a worker's buffers.
 *
 * Query heads that share a key head stand side by side, so that each loaded key serves them all: lane l of a key
 * head is query token l / group, head group head + l % group; a block is some neighbours of these lanes. */

enum {
    KEYS = 64,         /* keys that pass at a time */
    QUERY_LANES = 512, /* lanes of a block in the forward pass, of heads up to */
    QUERY_DIM = 128,
    WIDE_LANES = 256,  /* of larger heads, and where a few queries are taken */
    LOAD_AHEAD = 32,   /* lanes */
    BACK_LANES = 1024, /* and on the way back, where they stand in four forms */
};

_Static_assert(
    (int)TILE_LANES <= (int)KEYS, "a panel of queries and a block of keys share a buffer");

struct query_block {
    int64_t seq, head, group, first, lanes;
};

/* The query token of a lane of the block. */
V_INLINE int64_t lane_token(const struct query_block *b, int64_t lane)
{
    return (b->first + lane) / b->group;
}

V_INLINE int64_t whole_panels(int64_t lanes)
{
    return (lanes + TILE_LANES - 1) / TILE_LANES * TILE_LANES;
}

/* A lane's query token, and its head among those of the group. Lanes are met in order, without a division for each. */
struct query {
    int64_t token, head;
};

V_INLINE struct query query_at(const struct query_block *b, int64_t lane)
{
    return (struct query){(b->first + lane) / b->group, (b->first + lane) % b->group};
}

V_INLINE struct query next_query(const struct query_block *b, struct query q)
{
    return q.head + 1 < b->group ? (struct query){q.token, q.head + 1}
                                 : (struct query){q.token + 1, 0};
}

/* Its row, of n_head rows a token. */
V_INLINE int64_t query_row(
    const struct query_block *b, int64_t n_query, int64_t n_head, struct query q)
{
    return (b->seq * n_query + q.token) * n_head + b->head * b->group + q.head;
}

/* dst[i] = scale times the row of lane first + i, for n lanes; zero up to `stride` columns, and where there is no
 * such lane. Rows come from memory, a few at a time from each token, so those of later lanes are asked for. */
V_INLINE void load_query_rows(const int type, const struct query_block *b, const void *src,
    int64_t n_query, int64_t n_head, int64_t dim, float scale, int64_t first, int64_t n, float *dst,
    int64_t stride)
{
    int64_t some = at_most(b->lanes - first, n);
    int64_t ahead = row_offset(type, (LOAD_AHEAD / b->group + 1) * n_head * dim);
    struct query q = query_at(b, first);
    for (int64_t i = 0; i < some; i++, dst += stride, q = next_query(b, q)) {
        int64_t at = query_row(b, n_query, n_head, q) * dim;
        for (int64_t j = 0; j < stride; j += VL) {
            prefetch_row(src, row_offset(type, at + j) + ahead);
            vf x = load_as(type, src, at + j, at_most(dim - j, VL));
            v_store(dst + j, v_mul(v_set1(scale), x));
        }
    }
    memset(dst, 0, (size_t)((n - some) * stride) * sizeof *dst);
}

static void FN(load_queries)(const struct query_block *b, const void *src, int type,
    int64_t n_query, int64_t n_head, int64_t dim, float scale, int64_t first, int64_t n, float *dst,
    int64_t stride)
{
    if (type == TYPE_BF16)
        load_query_rows(TYPE_BF16, b, src, n_query, n_head, dim, scale, first, n, dst, stride);
    else
        load_query_rows(TYPE_F32, b, src, n_query, n_head, dim, scale, first, n, dst, stride);
}

/* n floats to elements `at` ... of a matrix of F32 or BF16. */
static void FN(store_row)(const float *row, int64_t n, void *dst, int type, int64_t at)
{
    for (int64_t j = 0; j < n; j += VL) {
        int64_t lanes = at_most(n - j, VL);
        if (type == TYPE_BF16)
            store_as(TYPE_BF16, dst, at + j, v_load_some(row + j, lanes), lanes);
        else
            store_as(TYPE_F32, dst, at + j, v_load_some(row + j, lanes), lanes);
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
    struct query q = query_at(b, 0);
    for (int64_t l = 0; l < n; l++, q = next_query(b, q)) {
        limit[l] = l < b->lanes ? (float)(n_past + q.token + 1) : 0.0f;
        start[l] = l < b->lanes && first_key ? (float)first_key[b->seq * n_query + q.token] : 0.0f;
    }
}

/* The first key that any query of the block sees. */
V_INLINE int64_t first_visible(
    const struct query_block *b, int64_t n_query, const int32_t *first_key)
{
    if (!first_key)
        return 0;
    const int32_t *start = first_key + b->seq * n_query;
    int64_t least = start[lane_token(b, 0)];
    for (int64_t t = lane_token(b, 0); t <= lane_token(b, b->lanes - 1); t++)
        least = start[t] < least ? start[t] : least;
    return least;
}
