"""The four Triton kernels of a BLAST product and how to launch each.

    down    w_i = sum_j s_ij * (x_j V_j)       stages 1 and 2 in one pass, z never in memory
    couple  w_i = sum_j s_ij * z_j             stage 2 alone
    up      y_i = w_i U_i^T + bias_i           stage 3, straight into (T, m)
    couple_gradient  dS_ij = sum_t dw_i * z_j  deterministic: partial sums, then one sum

Shapes as in `blast_search.matrix`; T tokens. Inputs bfloat16, float16 or float32; sums are
float32. Source of the product: arXiv 2410.21262, equations 1 to 3.

A three-dimensional register tile of blocks, tokens and ranks stands for "one accumulator per
block"; block counts that are not powers of two are masked.

A config is a dict of tile sizes (tokens, rank, inner, out), warps and stages. Launchers shrink
tiles to the problem, so any config is valid for any shape.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Config = dict[str, int]


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    # The interpreter keeps bfloat16 as bit patterns and would multiply those: UPCAST there.
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "pieces", "share"])
def _down(
    x, v, s, w, tokens, q, r, x_stride, pieces, share,
    B: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, INNER: tl.constexpr,
    RANK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # A program owns a (tokens, ranks) tile of every w_i and `share` of the B * pieces pieces of
    # the input columns, `pieces` per input block. Coupling is linear, so each piece is coupled
    # at once: one loop that the compiler can pipeline, and no bubble between input blocks.
    rank = tl.program_id(0) * RANK + tl.arange(0, RANK)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    group = tl.program_id(2)
    inner = tl.arange(0, INNER)
    block = tl.arange(0, BLOCKS)
    in_rank = rank < r
    in_token = token < tokens
    in_block = block < B
    x_row = x + token.to(tl.int64) * x_stride
    acc = tl.zeros((BLOCKS, TOKENS, RANK), tl.float32)
    for c in tl.range(0, share, num_stages=STAGES):
        piece = group * share + c
        j = piece // pieces
        column = (piece % pieces) * INNER + inner
        # The last group may have pieces past the last block. Compared as vectors: the
        # interpreter does not make a mask of a vector and a scalar.
        in_inner = (column < q) & (j * q + column < B * q)
        in_pair = in_block & (block * 0 + j < B)
        v_tile = tl.load(
            v + (j * q + column)[:, None] * r + rank[None, :],
            in_inner[:, None] & in_rank[None, :], 0.0,
        )  # fmt: skip
        s_j = tl.load(
            s + (block[:, None] * B + j) * r + rank[None, :],
            in_pair[:, None] & in_rank[None, :], 0.0,
        )  # fmt: skip
        if TOKENS == 1:  # a matrix-vector product: the matrix units would idle
            x_tile = tl.load(x + j * q + column, in_inner, 0.0)
            z = tl.sum(x_tile.to(tl.float32)[:, None] * v_tile.to(tl.float32), 0)[None, :]
        else:
            x_tile = tl.load(
                x_row[:, None] + (j * q + column)[None, :],
                in_token[:, None] & in_inner[None, :], 0.0,
            )  # fmt: skip
            z = tl.zeros((TOKENS, RANK), tl.float32)
            z = _dot(x_tile, v_tile, z, PRECISION, UPCAST)
        acc += s_j.to(tl.float32)[:, None, :] * z[None, :, :]
    row = (group * B + block).to(tl.int64)[:, None, None] * tokens + token[None, :, None]
    mask = in_block[:, None, None] & in_token[None, :, None] & in_rank[None, None, :]
    tl.store(w + row * r + rank[None, None, :], acc.to(w.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _up(
    w, u, bias, y, tokens, blocks, p, r, m,
    GROUPS: tl.constexpr, BIAS: tl.constexpr,
    TOKENS: tl.constexpr, OUT: tl.constexpr, RANK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    i = tl.program_id(2)
    rank = tl.arange(0, RANK)
    in_out = out < p
    in_token = token < tokens
    u_i = u + i * p * r
    w_i = w + i.to(tl.int64) * tokens * r
    step = tokens.to(tl.int64) * blocks * r  # from one group's partial sum to the next
    if TOKENS == 1:
        partial = tl.zeros((OUT, RANK), tl.float32)
        for k in tl.range(0, r, RANK, num_stages=STAGES):
            in_rank = k + rank < r
            w_tile = tl.zeros((RANK,), tl.float32)
            for g in tl.static_range(GROUPS):
                w_tile += tl.load(w_i + g * step + k + rank, in_rank, 0.0)
            u_tile = tl.load(
                u_i + out[:, None] * r + (k + rank)[None, :],
                in_out[:, None] & in_rank[None, :], 0.0,
            )  # fmt: skip
            partial += u_tile.to(tl.float32) * w_tile[None, :]
        acc = tl.sum(partial, 1)[None, :]
    else:
        acc = tl.zeros((TOKENS, OUT), tl.float32)
        w_row = w_i + token.to(tl.int64)[:, None] * r
        for k in tl.range(0, r, RANK, num_stages=STAGES):
            in_rank = k + rank < r
            mask = in_token[:, None] & in_rank[None, :]
            w_tile = tl.load(w_row + (k + rank)[None, :], mask, 0.0)
            for g in tl.static_range(1, GROUPS):
                w_tile += tl.load(w_row + g * step + (k + rank)[None, :], mask, 0.0)
            u_tile = tl.load(
                u_i + out[None, :] * r + (k + rank)[:, None],
                in_out[None, :] & in_rank[:, None], 0.0,
            )  # fmt: skip
            acc = _dot(w_tile.to(u.dtype.element_ty), u_tile, acc, PRECISION, UPCAST)
    if BIAS:
        acc += tl.load(bias + i * p + out, in_out, 0.0).to(tl.float32)[None, :]
    target = y + token.to(tl.int64)[:, None] * m + (i * p + out)[None, :]
    tl.store(target, acc.to(y.dtype.element_ty), in_token[:, None] & in_out[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _couple(
    z, s, w, tokens, r, s_out, s_in,
    B: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    # All blocks of z's tile are read at once and kept: one pass over z, one over w.
    # Tokens on the first axis of the grid: the others end at 65,535 programs.
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rank = tl.program_id(1) * RANK + tl.arange(0, RANK)
    block = tl.arange(0, BLOCKS)
    in_rank = rank < r
    in_block = block < B
    in_tile = (token < tokens)[:, None] & in_rank[None, :]
    offset = token.to(tl.int64)[:, None] * r + rank[None, :]
    size = tokens.to(tl.int64) * r
    # Blocks in the middle: the compiler spreads threads over the first and last axis, so that
    # the sum over blocks stays inside a thread.
    z_tile = tl.load(
        z + block.to(tl.int64)[None, :, None] * size + offset[:, None, :],
        in_block[None, :, None] & in_tile[:, None, :], 0.0,
    ).to(tl.float32)  # fmt: skip
    for i in range(B):
        s_i = tl.load(
            s + i * s_out + block[:, None] * s_in + rank[None, :],
            in_block[:, None] & in_rank[None, :], 0.0,
        ).to(tl.float32)  # fmt: skip
        w_tile = tl.sum(z_tile * s_i[None, :, :], 1)
        tl.store(w + i * size + offset, w_tile.to(w.dtype.element_ty), in_tile)


@triton.jit(do_not_specialize=["tokens", "share"])
def _couple_gradient(
    dw, z, partial, tokens, r, share,
    B: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, RANK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # A program sums its share of the tokens for all (i, j); the shares are added afterwards, in
    # a fixed order. The token axis stays in the accumulator until the end of the loop.
    rank = tl.program_id(0) * RANK + tl.arange(0, RANK)
    part = tl.program_id(1)
    step = tl.arange(0, TOKENS)
    block = tl.arange(0, BLOCKS)
    in_block = block < B
    in_rank = rank < r
    size = tokens.to(tl.int64) * r
    start = block.to(tl.int64)[:, None, None] * size + rank[None, None, :]
    inside = in_block[:, None, None] & in_rank[None, None, :]
    acc = tl.zeros((BLOCKS, BLOCKS, TOKENS, RANK), tl.float32)
    for t in tl.range(0, share, TOKENS, num_stages=STAGES):
        token = part * share + t + step
        offset = start + token.to(tl.int64)[None, :, None] * r
        mask = inside & (token < tokens)[None, :, None]
        dw_tile = tl.load(dw + offset, mask, 0.0).to(tl.float32)
        z_tile = tl.load(z + offset, mask, 0.0).to(tl.float32)
        acc += dw_tile[:, None, :, :] * z_tile[None, :, :, :]
    pair = (part * B + block)[:, None] * B + block[None, :]
    tl.store(
        partial + pair[:, :, None] * r + rank[None, None, :],
        tl.sum(acc, 2),
        in_block[:, None, None] & in_block[None, :, None] & in_rank[None, None, :],
    )


def _tile(size: int, limit: int) -> int:
    """The tile for an axis of `size`: at most `limit`; 16 at least, as tl.dot needs."""
    return min(limit, max(16, int(triton.next_power_of_2(size))))


def tf32() -> bool:
    """Whether float32 products may use TF32, as PyTorch's own then do."""
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # set through the newer fp32_precision
        return torch.get_float32_matmul_precision() != "highest"


def _numbers(x: Tensor) -> dict[str, Any]:
    return {
        "PRECISION": "tf32" if x.dtype == torch.float32 and tf32() else "ieee",
        "UPCAST": x.dtype == torch.bfloat16 and not x.is_cuda,
    }


def _effort(config: Config) -> dict[str, Any]:
    return {
        "num_warps": config["warps"],
        "num_stages": config["stages"],
        "enable_fp_fusion": True,  # fused multiply-adds; Triton's default is about to change
    }


def down(x: Tensor, v: Tensor, s: Tensor, w: Tensor, config: Config) -> None:
    """Writes w (groups, b, T, r); the sum over groups is the coupled result.

    Each group covers a part of the input columns: several groups give a call with few tokens
    enough programs. x: (T, n), unit inner stride. v: (b, q, r). s: (b, b, r).
    """
    b, q, r = v.shape
    groups, tokens = w.shape[0], len(x)
    rows = 1 if config["tokens"] == 1 else _tile(tokens, config["tokens"])
    ranks, inner = _tile(r, config["rank"]), _tile(q, config["inner"])
    pieces = triton.cdiv(q, inner)
    _down[(triton.cdiv(r, ranks), triton.cdiv(tokens, rows), groups)](
        x, v, s, w, tokens, q, r, x.stride(0), pieces, triton.cdiv(b * pieces, groups),
        B=b, BLOCKS=triton.next_power_of_2(b), TOKENS=rows, INNER=inner, RANK=ranks,
        STAGES=config["stages"], **_numbers(x), **_effort(config),
    )  # fmt: skip


def up(w: Tensor, u: Tensor, bias: Tensor | None, y: Tensor, config: Config) -> None:
    """Writes y (T, m), contiguous, from w (groups, b, T, r), u (b, p, r) and bias (m,)."""
    b, p, r = u.shape
    groups, tokens = w.shape[0], len(y)
    rows = 1 if config["tokens"] == 1 else _tile(tokens, config["tokens"])
    columns = config["out"] if rows == 1 else _tile(p, config["out"])
    _up[(triton.cdiv(p, columns), triton.cdiv(tokens, rows), b)](
        w, u, y if bias is None else bias, y, tokens, b, p, r, y.shape[1],
        GROUPS=groups, BIAS=bias is not None,
        TOKENS=rows, OUT=columns, RANK=_tile(r, config["inner"]),
        STAGES=config["stages"], **_numbers(u), **_effort(config),
    )  # fmt: skip


def couple(z: Tensor, s: Tensor, w: Tensor, config: Config) -> None:
    """Writes w (b, T, r) from z (b, T, r), both contiguous, and s (b, b, r) of any strides but 1
    along r: s.transpose(0, 1) gives the product with the transposed coupling."""
    b, tokens, r = z.shape
    blocks, ranks = triton.next_power_of_2(b), _tile(r, config["rank"])
    room = max(1, config["elements"] // (blocks * ranks))
    rows = min(room, triton.next_power_of_2(tokens))
    _couple[(triton.cdiv(tokens, rows), triton.cdiv(r, ranks))](
        z, s, w, tokens, r, s.stride(0), s.stride(1),
        B=b, BLOCKS=blocks, TOKENS=rows, RANK=ranks, **_effort(config),
    )  # fmt: skip


def couple_gradient(dw: Tensor, z: Tensor, config: Config) -> Tensor:
    """dS (b, b, r), float32, from dw and z (b, T, r), both contiguous."""
    b, tokens, r = z.shape
    blocks, ranks = triton.next_power_of_2(b), _tile(r, config["rank"])
    rows = max(1, config["elements"] // (blocks * blocks * ranks))
    tiles = triton.cdiv(r, ranks)
    parts = max(1, min(triton.cdiv(config["programs"], tiles), triton.cdiv(tokens, 4 * rows)))
    share = triton.cdiv(tokens, parts * rows) * rows
    partial = dw.new_empty((parts, b, b, r), dtype=torch.float32)
    _couple_gradient[(tiles, parts)](
        dw, z, partial, tokens, r, share,
        B=b, BLOCKS=blocks, TOKENS=rows, RANK=ranks, STAGES=config["stages"], **_effort(config),
    )  # fmt: skip
    return partial.sum(0)
