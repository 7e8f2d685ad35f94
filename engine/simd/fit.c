/* Scales that fit groups of elements best, as llama.cpp's quantize of June 2024 searches them.
 *
 * A lane is a group: VL groups are searched at once, and element e of all of them is one vector, so that every
 * sum runs in the order of its group's elements. Each operation rounds once and none is fused, so results have
 * the bits of a search group by group, in every variant. Inputs are finite. Where two values are compared and
 * one is NaN (a flat group, an overflow), the second choice of v_if_less() is taken.
 * Bound: arithmetic, some 20 attempts of 10 operations an element. */

enum { MAX_GROUP = 32 };

/* x, w: n vectors of elements and weights; results a lane each, codes as floats. */
struct fit {
    int n;
    float x[MAX_GROUP * VL], w[MAX_GROUP * VL], codes[MAX_GROUP * VL];
    float scale[VL], minimum[VL];
};

/* A group whose largest element is smaller counts as zeros. */
#define FIT_NOTHING 1e-15f

V_INLINE vf v_clamped(vf x, float low, float high)
{
    return v_max(v_min(v_round(x), v_set1(high)), v_set1(low));
}

/* a / b where b is positive, else 0. */
V_INLINE vf v_ratio(vf a, vf b) { return v_if_less(v_zero(), b, v_div(a, b), v_zero()); }

/* The first element of largest magnitude, with its sign. */
V_INLINE vf first_largest(const struct fit *f)
{
    vf largest = v_zero(), reach = v_zero();
    for (int i = 0; i < f->n; i++) {
        vf x = v_load(f->x + i * VL), a = v_abs(x);
        largest = v_if_less(reach, a, x, largest);
        reach = v_max(reach, a);
    }
    return largest;
}

/* sum w (scale code + low - x), by magnitude or squared. */
V_INLINE vf affine_error(const struct fit *f, const float *codes, vf scale, vf low, int square)
{
    vf error = v_zero();
    for (int i = 0; i < f->n; i++) {
        vf difference =
            v_sub(v_add(v_mul(scale, v_load(codes + i * VL)), low), v_load(f->x + i * VL));
        difference = square ? v_mul(difference, difference) : v_abs(difference);
        error = v_add(error, v_mul(v_load(f->w + i * VL), difference));
    }
    return error;
}

V_INLINE void affine_codes(const struct fit *f, vf inverse, vf low, int top, float *codes)
{
    for (int i = 0; i < f->n; i++) {
        vf x = v_mul(inverse, v_sub(v_load(f->x + i * VL), low));
        v_store(codes + i * VL, v_clamped(x, 0.0f, (float)top));
    }
}

/* The least-squares scale and offset for given codes; offsets are at most 0. Returns the determinant, without
 * whose being positive there are none. */
V_INLINE vf affine_fit(
    const struct fit *f, const float *codes, vf sum_w, vf sum_x, vf *scale, vf *low)
{
    vf sum_c = v_zero(), sum_cc = v_zero(), sum_cx = v_zero();
    for (int i = 0; i < f->n; i++) {
        vf c = v_load(codes + i * VL), wc = v_mul(v_load(f->w + i * VL), c);
        sum_c = v_add(sum_c, wc);
        sum_cc = v_add(sum_cc, v_mul(wc, c));
        sum_cx = v_add(sum_cx, v_mul(wc, v_load(f->x + i * VL)));
    }
    vf determinant = v_sub(v_mul(sum_w, sum_cc), v_mul(sum_c, sum_c));
    *scale = v_div(v_sub(v_mul(sum_w, sum_cx), v_mul(sum_x, sum_c)), determinant);
    *low = v_div(v_sub(v_mul(sum_cc, sum_x), v_mul(sum_c, sum_cx)), determinant);
    *scale = v_if_less(v_zero(), *low, v_div(sum_cx, sum_cc), *scale);
    *low = v_if_less(v_zero(), *low, v_zero(), *low);
    return determinant;
}

struct affine {
    int top;             /* the largest code */
    float first, change; /* attempt s divides the range by top + first + change s */
    int steps, square;
};

/* x ~ scale code - minimum with codes 0 ... top: of several divisions of the range the one whose least-squares fit
 * has the least weighted error. A group without a range gets scale 0 and codes 0. */
static void FN(fit_affine)(struct fit *f, struct affine a)
{
    vf low = v_load(f->x), high = low, sum_w = v_load(f->w), sum_x = v_mul(sum_w, low);
    for (int i = 1; i < f->n; i++) {
        vf x = v_load(f->x + i * VL), w = v_load(f->w + i * VL);
        low = v_min(low, x);
        high = v_max(high, x);
        sum_w = v_add(sum_w, w);
        sum_x = v_add(sum_x, v_mul(w, x));
    }
    low = v_min(low, v_zero());
    vf lowest = low;
    vf first = v_div(v_set1((float)a.top), v_sub(high, low));
    vf scale = v_div(v_set1(1.0f), first);
    affine_codes(f, first, low, a.top, f->codes);
    vf best = affine_error(f, f->codes, scale, low, a.square);
    for (int s = 0; s <= a.steps; s++) {
        float codes[MAX_GROUP * VL], parts = a.first + a.change * (float)s + (float)a.top;
        vf fitted, offset;
        affine_codes(f, v_div(v_set1(parts), v_sub(high, low)), low, a.top, codes);
        vf determinant = affine_fit(f, codes, sum_w, sum_x, &fitted, &offset);
        vf error = affine_error(f, codes, fitted, offset, a.square);
        error = v_if_less(v_zero(), determinant, error, best);
        for (int i = 0; i < f->n; i++) {
            vf c = v_if_less(error, best, v_load(codes + i * VL), v_load(f->codes + i * VL));
            v_store(f->codes + i * VL, c);
        }
        scale = v_if_less(error, best, fitted, scale);
        low = v_if_less(error, best, offset, low);
        best = v_if_less(error, best, error, best);
    }
    /* No range, or one so small that its inverse is infinite. */
    vf limit = v_set1(3.4028234e38f);
    for (int i = 0; i < f->n; i++)
        v_store(f->codes + i * VL, v_if_less(first, limit, v_load(f->codes + i * VL), v_zero()));
    v_store(f->scale, v_if_less(first, limit, scale, v_zero()));
    low = v_if_less(first, limit, low, lowest);
    v_store(
        f->minimum, v_sub(v_set1(-0.0f), low)); /* 0 becomes -0, and 0 again where it is negated */
}

/* Sums of w x c and w c c. */
V_INLINE void symmetric_sums(const struct fit *f, const float *codes, vf *cx, vf *cc)
{
    *cx = *cc = v_zero();
    for (int i = 0; i < f->n; i++) {
        vf c = v_load(codes + i * VL), w = v_load(f->w + i * VL);
        *cx = v_add(*cx, v_mul(v_mul(w, v_load(f->x + i * VL)), c));
        *cc = v_add(*cc, v_mul(v_mul(w, c), c));
    }
}

V_INLINE void symmetric_codes(const struct fit *f, vf inverse, int top, float *codes)
{
    for (int i = 0; i < f->n; i++) {
        vf x = v_mul(inverse, v_load(f->x + i * VL));
        v_store(codes + i * VL, v_clamped(x, (float)-top, (float)(top - 1)));
    }
}

/* Lanes of zeros: scale 0, and the lowest code. */
V_INLINE void symmetric_end(struct fit *f, vf largest, vf scale, int top)
{
    vf reach = v_abs(largest), nothing = v_set1(FIT_NOTHING), lowest = v_set1((float)-top);
    for (int i = 0; i < f->n; i++)
        v_store(f->codes + i * VL, v_if_less(reach, nothing, lowest, v_load(f->codes + i * VL)));
    v_store(f->scale, v_if_less(reach, nothing, v_zero(), scale));
}

/* x ~ scale code with codes -top ... top - 1: of 19 roundings the one that points most nearly along x. */
static void FN(fit_symmetric)(struct fit *f, int top)
{
    vf largest = first_largest(f), cx, cc;
    symmetric_codes(f, v_div(v_set1((float)-top), largest), top, f->codes);
    symmetric_sums(f, f->codes, &cx, &cc);
    vf scale = v_ratio(cx, cc), best = v_mul(scale, cx);
    for (int s = -9; s <= 9; s++) {
        float codes[MAX_GROUP * VL], part = -((float)top + 0.1f * (float)s);
        if (s == 0)
            continue;
        symmetric_codes(f, v_div(v_set1(part), largest), top, codes);
        symmetric_sums(f, codes, &cx, &cc);
        vf old = v_mul(best, cc), better = v_if_less(v_zero(), cc, v_mul(cx, cx), old);
        for (int i = 0; i < f->n; i++) {
            vf c = v_if_less(old, better, v_load(codes + i * VL), v_load(f->codes + i * VL));
            v_store(f->codes + i * VL, c);
        }
        vf fitted = v_ratio(cx, cc);
        scale = v_if_less(old, better, fitted, scale);
        best = v_if_less(old, better, v_mul(fitted, cx), best);
    }
    symmetric_end(f, largest, scale, top);
}

/* The same from one rounding on: five times over, each code in turn changes where that points more nearly along
 * x. Lanes in which nothing changes have come to their end. */
static void FN(fit_descent)(struct fit *f, int top)
{
    vf largest = first_largest(f), cx, cc;
    symmetric_codes(f, v_div(v_set1((float)-top), largest), top, f->codes);
    symmetric_sums(f, f->codes, &cx, &cc);
    for (int i = 0; i < 5 * f->n; i++) {
        float *code = f->codes + i % f->n * VL;
        vf x = v_load(f->x + i % f->n * VL), w = v_load(f->w + i % f->n * VL), c = v_load(code);
        vf wx = v_mul(w, x);
        vf rest_cx = v_sub(cx, v_mul(wx, c)), rest_cc = v_sub(cc, v_mul(v_mul(w, c), c));
        vf changed = v_clamped(v_div(v_mul(x, rest_cc), rest_cx), (float)-top, (float)(top - 1));
        vf new_cx = v_add(rest_cx, v_mul(wx, changed));
        vf new_cc = v_add(rest_cc, v_mul(v_mul(w, changed), changed));
        vf now = v_mul(v_mul(cx, cx), new_cc), then = v_mul(v_mul(new_cx, new_cx), cc);
        then = v_if_less(v_zero(), rest_cx, then, now);
        then = v_if_less(v_zero(), new_cc, then, now);
        then = v_if_less(v_abs(v_sub(changed, c)), v_set1(0.5f), now, then);
        v_store(code, v_if_less(now, then, changed, c));
        cx = v_if_less(now, then, new_cx, cx);
        cc = v_if_less(now, then, new_cc, cc);
    }
    symmetric_end(f, largest, v_ratio(cx, cc), top);
}

/* The value of IQ4 nearest to x, the upper of two, and its number. */
V_INLINE vf iq4_nearest(vf x, vf *number)
{
    vf value = v_set1(FN(iq4_value)[0]), n = v_zero();
    for (int i = 0; i < 15; i++) {
        vf middle = v_set1((FN(iq4_value)[i] + FN(iq4_value)[i + 1]) / 2);
        value = v_if_less(x, middle, value, v_set1(FN(iq4_value)[i + 1]));
        n = v_if_less(x, middle, n, v_set1((float)(i + 1)));
    }
    *number = n;
    return value;
}

/* x ~ scale V[code]: of 16 roundings to IQ4's values the one that points most nearly along x; the scale alone. */
static void FN(fit_iq4)(struct fit *f)
{
    vf largest = first_largest(f), scale = v_zero(), best = v_zero(),
       lowest = v_set1(FN(iq4_value)[0]);
    for (int s = -8; s <= 7; s++) {
        vf cx = v_zero(), cc = v_zero(), number;
        vf inverse = v_div(v_add(v_set1((float)s), lowest), largest);
        if (s == -8) /* the first comes from the largest element alone */
            inverse = v_div(v_set1(1.0f), v_div(v_sub(v_zero(), largest), lowest));
        for (int i = 0; i < f->n; i++) {
            vf x = v_load(f->x + i * VL);
            vf v = iq4_nearest(v_mul(inverse, x), &number), wv = v_mul(v_load(f->w + i * VL), v);
            cx = v_add(cx, v_mul(wv, x));
            cc = v_add(cc, v_mul(wv, v));
        }
        vf fitted = v_ratio(cx, cc), old = v_mul(best, cc);
        vf better = v_if_less(v_zero(), cc, v_mul(cx, cx), old);
        if (s == -8)
            old = v_set1(-1.0f), better = v_zero();
        scale = v_if_less(old, better, fitted, scale);
        best = v_if_less(old, better, v_mul(fitted, cx), best);
    }
    v_store(f->scale, v_if_less(v_abs(largest), v_set1(FIT_NOTHING), v_zero(), scale));
}
