# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton's functions are pointers, tiles and integers, which have no Python types)
"""The Triton kernels of relative_attention: forward, dQ with the gradient of the bias, dK and dV.

    P = exp(S - lse),  O = (P * keep) V,  dV = (P * keep)^T dO,  dS = P * (keep * dO V^T - rowsum(dO * O))
    keep is 0 or 1 / (1 - dropout);  dQ = s dS K,  dK = s dS^T Q,  db_d = sum over rows and over j - i = d of dS_ij

The first two hold a tile of queries and walk over keys, the third holds a tile of keys and walks over queries: 4 and
14 N M D FLOPs a head. Each looks through the documents of the other side for the first and the last token that its tile
may see, and walks from there to there. The bias is a gather from the values of each distance. Nothing has the size
N x M, and the host waits for nothing.

The gradient of the bias: a gather along the rows of a tile of dS brings each diagonal j - i = d into a column, and the
columns are summed. A step's upper diagonals go on in the next step as its lower ones, and are kept for it. So a program
writes each sum once, and torch adds those of all programs: no atomics, so the same bits in every run.

What is dropped is a function of the seed, the row, the head, i and j alone: row and column are hashed each by itself,
and a score costs two multiplications. lse is in units of log2, fp32 [B, H, N], +inf for a query that sees no key.
Dtype: products of tiles in the input dtype with fp32 accumulators (fp32 inputs: IEEE fp32), P and dS rounded to it, the
rest fp32. Dao, "FlashAttention-2" (2023); the hash after Wellons, "Prospecting for Hash Functions" (2018).
"""

from __future__ import annotations

from trunkline.kernels.attention.forward import dot, load_rows, store_rows
from trunkline.kernels.triton_path import jit, tl

MARGIN = 64
"""Entries before and behind a head's bias, for the scores of a tile past the last token. No tile is larger."""


def _constant(value):
    return value if tl is None else tl.constexpr(value)


_LOG2E, _MARGIN, _AT_ONCE = _constant(1.4426950408889634), _constant(MARGIN), _constant(1024)


@jit
def _relative_fwd_kernel(
    q, k, v, bias, query_document, key_document, out, lse,
    q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_m, k_stride_h, v_stride_b, v_stride_m, v_stride_h,
    N, M, H, scale, seed_low, seed_high, least_kept, rescale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    first_query, head, b, h = _place(tl.cdiv(N, BLOCK_M), H, BLOCK_M)
    in_tile = tl.arange(0, BLOCK_M)
    queries = first_query + in_tile
    q += b * q_stride_b + h * q_stride_h
    q_tile = load_rows(q, first_query, in_tile, q_stride_n, queries < N, D, BLOCK_D, True)
    k += b * k_stride_b + h * k_stride_h
    v += b * v_stride_b + h * v_stride_h
    bias += h * (N + M - 1 + 2 * _MARGIN) + _MARGIN + N - 1
    key_document += b * M
    document = _real_documents(query_document + b * N, queries, N)
    first, last = _span(key_document, document, M)
    if CAUSAL:
        last = tl.minimum(last, first_query + BLOCK_M)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first_key in range(first, last, BLOCK_N):
        in_keys = tl.arange(0, BLOCK_N)
        keys = first_key + in_keys
        k_tile = load_rows(k, first_key, in_keys, k_stride_m, keys < last, D, BLOCK_D, True)
        v_tile = load_rows(v, first_key, in_keys, v_stride_m, keys < last, D, BLOCK_D, True)
        i, j = queries[:, None], keys[None, :]
        seen = _seen(i, j, document[:, None], _documents(key_document, keys, last)[None, :], CAUSAL)
        s = dot(q_tile, tl.trans(k_tile), None)
        s = _add_bias(s * scale, bias, first_key - first_query, in_keys[None, :] - in_tile[:, None], HAS_BIAS)
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new) * _LOG2E  # of a row that has seen no key yet: else NaN
        p = tl.exp2(s * _LOG2E - base[:, None])
        shrink = tl.exp2(m * _LOG2E - base)
        l = l * shrink + tl.sum(p, 1)  # noqa: E741
        if DROPS:
            p = tl.where(_kept(seed_low, seed_high, head, i, j, least_kept), p, 0.0)
        acc = dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None])
        m = m_new

    sees_none = l == 0
    l = tl.where(sees_none, 1.0, l)  # noqa: E741
    acc = acc * (rescale / l)[:, None]
    row_lse = tl.where(sees_none, float("inf"), m * _LOG2E + tl.log2(l))
    tl.store(lse + head.to(tl.int64) * N + queries, row_lse, mask=queries < N)
    store_rows(out + (b * N * H + h) * D, first_query, in_tile, H * D, acc, queries < N, D, BLOCK_D)


@jit
def _place(tiles, H, BLOCK: tl.constexpr):
    """A program's first token, its head among those of all rows, its row and its head."""
    head = tl.program_id(0) // tiles
    return tl.program_id(0) % tiles * BLOCK, head, (head // H).to(tl.int64), (head % H).to(tl.int64)


@jit
def _documents(document, at, length):
    return tl.load(document + at, mask=at < length, other=-1).to(tl.int32)


@jit
def _real_documents(document, at, length):
    """With a number at padding that no token of the other side has."""
    found = _documents(document, at, length)
    return tl.where(found < 0, -(2**31), found)


@jit
def _span(document, of_tile, length):
    """The first token whose document is from the lowest to the highest of the tile's, and the one behind the last."""
    low, high = tl.min(tl.where(of_tile < 0, 2**31 - 1, of_tile)), tl.max(of_tile)
    first, last = length, 0
    for start in range(0, length, _AT_ONCE):
        at = start + tl.arange(0, _AT_ONCE)
        found = _documents(document, at, length)
        inside = (found >= low) & (found <= high)
        first = tl.minimum(first, tl.min(tl.where(inside, at, length)))
        last = tl.maximum(last, tl.max(tl.where(inside, at + 1, 0)))
    return first, last


@jit
def _seen(i, j, document_i, document_j, CAUSAL: tl.constexpr):
    seen = document_i == document_j
    return seen & (j <= i) if CAUSAL else seen


@jit
def _add_bias(scores, bias, distance, in_tile, HAS_BIAS: tl.constexpr):
    """`bias` at the distance 0; `distance` that of the tile's first tokens, `in_tile` what each score's adds to it."""
    return scores + tl.load(bias + distance + in_tile) if HAS_BIAS else scores


@jit
def _kept(seed_low, seed_high, head, i, j, least_kept):
    """Whether the probability of query i and key j is not dropped."""
    of_head = _mix(_mix(_mix(seed_low.to(tl.uint32)) ^ seed_high.to(tl.uint32)) ^ head.to(tl.uint32))
    x = _mix(of_head + i.to(tl.uint32)) ^ (_mix(of_head ^ 0x9E3779B9) + j.to(tl.uint32) * 0x9E3779B9)
    x *= 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x.to(tl.int32, bitcast=True) >= least_kept


@jit
def _mix(x):
    """uint32, of which each bit follows from all of x."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _relative_bwd_dq_kernel(
    q, k, v, bias, query_document, key_document, out, d_out, lse, delta, dq, diagonals,
    q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_m, k_stride_h, v_stride_b, v_stride_m, v_stride_h,
    do_stride_b, do_stride_n, do_stride_h,
    N, M, H, scale, seed_low, seed_high, least_kept, rescale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, DROPS: tl.constexpr, BIAS_LEARNS: tl.constexpr,
):  # fmt: skip
    tl.static_assert(BLOCK_M <= BLOCK_N, "a tile of more queries has diagonals that the next one does not complete")
    first_query, head, b, h = _place(tl.cdiv(N, BLOCK_M), H, BLOCK_M)
    in_tile, in_keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    queries = first_query + in_tile
    real = queries < N
    q_tile = load_rows(q + b * q_stride_b + h * q_stride_h, first_query, in_tile, q_stride_n, real, D, BLOCK_D, True)
    o_tile = load_rows(out + (b * N * H + h) * D, first_query, in_tile, H * D, real, D, BLOCK_D, True)
    d_out += b * do_stride_b + h * do_stride_h
    do_tile = load_rows(d_out, first_query, in_tile, do_stride_n, real, D, BLOCK_D, True)
    row_lse = tl.load(lse + head.to(tl.int64) * N + queries, mask=real, other=float("inf"))
    row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1) / rescale
    tl.store(delta + head.to(tl.int64) * N + queries, row_delta, mask=real)
    k += b * k_stride_b + h * k_stride_h
    v += b * v_stride_b + h * v_stride_h
    bias += h * (N + M - 1 + 2 * _MARGIN) + _MARGIN + N - 1
    diagonals += ((b * tl.cdiv(N, BLOCK_M) + first_query // BLOCK_M) * H + h) * (N + M - 1)
    key_document += b * M
    document = _real_documents(query_document + b * N, queries, N)
    first, last = _span(key_document, document, M)
    if CAUSAL:
        last = tl.minimum(last, first_query + BLOCK_M)

    dq_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    unfinished = tl.zeros([BLOCK_N], tl.float32)  # sums of the diagonals from this step's first one on
    diagonal = first - first_query + N - 1
    for first_key in range(first, last, BLOCK_N):
        keys = first_key + in_keys
        k_tile = load_rows(k, first_key, in_keys, k_stride_m, keys < last, D, BLOCK_D, True)
        v_tile = load_rows(v, first_key, in_keys, v_stride_m, keys < last, D, BLOCK_D, True)
        others = _documents(key_document, keys, last)
        _, ds = _step(
            q_tile, k_tile, v_tile, do_tile, row_lse, row_delta, document, others, bias, first_query, first_key,
            head, scale, seed_low, seed_high, least_kept, CAUSAL, HAS_BIAS, DROPS,
        )  # fmt: skip
        if BIAS_LEARNS:
            column = in_tile[:, None] + in_keys[None, :]
            skewed = tl.gather(ds, column % BLOCK_N, 1)
            sums = unfinished + tl.sum(tl.where(column < BLOCK_N, 0.0, skewed), 0)
            _store_diagonals(diagonals, diagonal - BLOCK_N + in_keys, sums * rescale, N + M - 1)
            unfinished = tl.sum(tl.where(column < BLOCK_N, skewed, 0.0), 0)
            diagonal += BLOCK_N
        dq_sum = dot(ds.to(k_tile.dtype), k_tile, dq_sum)
    if BIAS_LEARNS:
        _store_diagonals(diagonals, diagonal - BLOCK_N + in_keys, unfinished * rescale, N + M - 1)
    dq_sum *= scale * rescale
    store_rows(dq + (b * N * H + h) * D, first_query, in_tile, H * D, dq_sum, real, D, BLOCK_D)


@jit
def _step(
    q_tile, k_tile, v_tile, do_tile, row_lse, row_delta, of_query, of_key, bias, first_query, first_key, head, scale,
    seed_low, seed_high, least_kept, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """The probabilities that are kept, and the gradient of the scores, both times 1 - dropout."""
    in_tile, in_keys = tl.arange(0, q_tile.shape[0])[:, None], tl.arange(0, k_tile.shape[0])[None, :]
    i, j = first_query + in_tile, first_key + in_keys
    seen = _seen(i, j, of_query[:, None], of_key[None, :], CAUSAL)
    s = dot(q_tile, tl.trans(k_tile), None)
    s = _add_bias(s * scale, bias, first_key - first_query, in_keys - in_tile, HAS_BIAS)
    p = tl.where(seen, tl.exp2(s * _LOG2E - row_lse[:, None]), 0.0)
    p_kept, dp = p, dot(do_tile, tl.trans(v_tile), None)
    if DROPS:
        kept = _kept(seed_low, seed_high, head, i, j, least_kept)
        p_kept, dp = tl.where(kept, p, 0.0), tl.where(kept, dp, 0.0)
    return p_kept, p * (dp - row_delta[:, None])


@jit
def _store_diagonals(diagonals, at, sums, length):
    tl.store(diagonals + at, sums, mask=(at >= 0) & (at < length))


@jit
def _relative_bwd_dkdv_kernel(
    q, k, v, bias, query_document, key_document, d_out, lse, delta, dk, dv,
    q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_m, k_stride_h, v_stride_b, v_stride_m, v_stride_h,
    do_stride_b, do_stride_n, do_stride_h,
    N, M, H, scale, seed_low, seed_high, least_kept, rescale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Scores are held transposed, [keys, queries], so that both products take their left operand from registers."""
    first_key, head, b, h = _place(tl.cdiv(M, BLOCK_N), H, BLOCK_N)
    in_keys = tl.arange(0, BLOCK_N)
    keys = first_key + in_keys
    k_tile = load_rows(k + b * k_stride_b + h * k_stride_h, first_key, in_keys, k_stride_m, keys < M, D, BLOCK_D, True)
    v_tile = load_rows(v + b * v_stride_b + h * v_stride_h, first_key, in_keys, v_stride_m, keys < M, D, BLOCK_D, True)
    q += b * q_stride_b + h * q_stride_h
    d_out += b * do_stride_b + h * do_stride_h
    lse += head.to(tl.int64) * N
    delta += head.to(tl.int64) * N
    bias += h * (N + M - 1 + 2 * _MARGIN) + _MARGIN + N - 1
    query_document += b * N
    document = _real_documents(key_document + b * M, keys, M)
    first, last = _span(query_document, document, N)
    if CAUSAL:
        first = tl.maximum(first, first_key)

    dk_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first_query in range(first, last, BLOCK_M):
        in_tile = tl.arange(0, BLOCK_M)
        queries = first_query + in_tile
        real = queries < last
        q_tile = load_rows(q, first_query, in_tile, q_stride_n, real, D, BLOCK_D, True)
        do_tile = load_rows(d_out, first_query, in_tile, do_stride_n, real, D, BLOCK_D, True)
        row_lse = tl.load(lse + queries, mask=real, other=float("inf"))
        row_delta = tl.load(delta + queries, mask=real, other=0.0)
        others = _documents(query_document, queries, last)
        p_kept, ds = _step(
            q_tile, k_tile, v_tile, do_tile, row_lse, row_delta, others, document, bias, first_query, first_key,
            head, scale, seed_low, seed_high, least_kept, CAUSAL, HAS_BIAS, DROPS,
        )  # fmt: skip
        dv_sum = dot(tl.trans(p_kept.to(do_tile.dtype)), do_tile, dv_sum)
        dk_sum = dot(tl.trans(ds.to(q_tile.dtype)), q_tile, dk_sum)
    offset = (b * M * H + h) * D
    store_rows(dk + offset, first_key, in_keys, H * D, dk_sum * (scale * rescale), keys < M, D, BLOCK_D)
    store_rows(dv + offset, first_key, in_keys, H * D, dv_sum * rescale, keys < M, D, BLOCK_D)
