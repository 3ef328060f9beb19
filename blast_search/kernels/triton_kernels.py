"""The four Triton kernels of a BLAST product and how to launch each.

    down    w_i = sum_j s_ij * (x_j V_j)       few tokens: stages 1 and 2, z never in memory
    up      y_i = w_i U_i^T + bias_i           few tokens: stage 3, straight into (T, m)
    couple  w_i = sum_j s_ij * z_j             stage 2 alone
    couple_gradient  dS_ij = sum_t dw_i * z_j

Shapes as in `blast_search.matrix`; T tokens. Inputs bfloat16, float16 or float32; sums are
float32. Source of the product: arXiv 2410.21262, equations 1 to 3.

In `down`, a three-dimensional register tile of blocks, tokens and ranks stands for "one
accumulator per block"; block counts that are not powers of two are masked.

A config is a dict of tile sizes (tokens, rank, inner, out), warps and stages. Launchers shrink
tiles to the problem, so any config is valid for any shape (those with tokens = 1 for one token).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blast_search.modes import float32_products

Config = dict[str, int]
STEP = 16  # numbers: the rows of z and w by rank begin at multiples of so many
LINE = 128  # bytes that a prefetch brings into the L2 cache


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
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
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
    EARLY: tl.constexpr, BYTES: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    if EARLY:
        # `down` is still running: meanwhile bring this program's rows of u near, then wait.
        rows = tl.minimum(OUT, p - tl.program_id(0) * OUT)
        first = (tl.program_id(2) * p + tl.program_id(0) * OUT) * r
        line = tl.arange(0, 128)
        for k in range(0, tl.cdiv(rows * r * BYTES, LINE), 128):
            number = tl.minimum((k + line) * (LINE // BYTES), rows * r - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l",
                [(u + first + number).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        tl.extra.cuda.gdc_wait()
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
                w_tile += tl.load(w_i + g * step + k + rank, in_rank, 0.0).to(tl.float32)
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
            w_tile = tl.load(w_row + (k + rank)[None, :], mask, 0.0).to(tl.float32)
            for g in tl.static_range(1, GROUPS):
                part = tl.load(w_row + g * step + (k + rank)[None, :], mask, 0.0)
                w_tile += part.to(tl.float32)
            u_tile = tl.load(
                u_i + out[None, :] * r + (k + rank)[:, None],
                in_out[None, :] & in_rank[:, None], 0.0,
            )  # fmt: skip
            acc = _dot(w_tile.to(u.dtype.element_ty), u_tile, acc, PRECISION, UPCAST)
    if BIAS:
        acc += tl.load(bias + i * p + out, in_out, 0.0).to(tl.float32)[None, :]
    target = y + token.to(tl.int64)[:, None] * m + (i * p + out)[None, :]
    tl.store(target, acc.to(y.dtype.element_ty), in_token[:, None] & in_out[None, :])


@triton.jit(do_not_specialize=["step"])
def _couple(
    z, s, w, r, s_out, s_in, step,
    B: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # For each component of the rank, coupling is a b x b matrix times b x T numbers: work for the
    # matrix units, bounded by reading z and writing w once.  They multiply 16 rows at least, so
    # with few blocks a program takes several components, as a block-diagonal matrix.
    row = tl.arange(0, ROWS)
    block, k = row % BLOCKS, tl.program_id(0) * (ROWS // BLOCKS) + row // BLOCKS
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = (block < B) & (k < r)
    s_k = tl.load(
        s + block[:, None] * s_out + block[None, :] * s_in + k[:, None],
        inside[:, None] & inside[None, :] & (k[:, None] == k[None, :]), 0.0,
    )  # fmt: skip
    rows = (block.to(tl.int64) * r + k) * (step * STEP)
    # Padding is computed along: the compiler makes wide loads of masks that end at STEP.
    mask = inside[:, None] & (token < step * STEP)[None, :]
    z_k = tl.load(z + rows[:, None] + token[None, :], mask, 0.0)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    w_k = _dot(s_k, z_k, acc, PRECISION, UPCAST)
    tl.store(w + rows[:, None] + token[None, :], w_k.to(w.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["tokens", "step"])
def _couple_gradient(
    dw, z, ds, tokens, r, step,
    B: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    block, k = row % BLOCKS, tl.program_id(0) * (ROWS // BLOCKS) + row // BLOCKS
    inside = (block < B) & (k < r)
    rows = (block.to(tl.int64) * r + k) * (step * STEP)
    acc = tl.zeros((ROWS, ROWS), tl.float32)
    for t in tl.range(0, tokens, TOKENS, num_stages=STAGES):
        token = t + tl.arange(0, TOKENS)
        mask = inside[:, None] & (token < step * STEP)[None, :]
        dw_k = tl.load(dw + rows[:, None] + token[None, :], mask, 0.0)
        z_k = tl.load(z + rows[:, None] + token[None, :], mask, 0.0)
        in_token = (token < tokens)[None, :]  # padding may hold anything
        dw_k, z_k = tl.where(in_token, dw_k, 0.0), tl.where(in_token, z_k, 0.0)
        acc = _dot(dw_k, tl.trans(z_k), acc, PRECISION, UPCAST)
    pair = (block[:, None] * B + block[None, :]).to(tl.int64) * r
    tl.store(
        ds + pair + k[:, None], acc.to(ds.dtype.element_ty),
        inside[:, None] & inside[None, :] & (k[:, None] == k[None, :]),
    )  # fmt: skip


def _tile(size: int, limit: int) -> int:
    """The tile for an axis of `size`: at most `limit`; 16 at least, as tl.dot needs."""
    return min(limit, max(16, int(triton.next_power_of_2(size))))


@cache
def _dependent_launch(device: torch.device, tokens: int) -> bool:
    """Whether `up` begins while `down` ends: from Hopper on.

    Measured on an H200: 9.6 to 8.6 us for one token (4096 x 4096), 13.6 to 14.1 for 16.
    """
    if device.type != "cuda" or tokens > 1 or torch.version.hip or not hasattr(tl, "extra"):
        return False
    known = hasattr(tl.extra.cuda, "gdc_wait")  # Triton 3.4 and later
    return known and torch.cuda.get_device_capability(device) >= (9, 0)


def _numbers(x: Tensor) -> dict[str, Any]:
    return {
        "PRECISION": float32_products() if x.dtype == torch.float32 else "ieee",
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
        STAGES=config["stages"], EARLY=_dependent_launch(x.device, tokens), **_numbers(x),
        **_effort(config),
    )  # fmt: skip


def up(w: Tensor, u: Tensor, bias: Tensor | None, y: Tensor, config: Config) -> None:
    """Writes y (T, m), contiguous, from w (groups, b, T, r), u (b, p, r) and bias (m,).

    To be launched right after the `down` that writes w, whose end it may overlap.
    """
    early = _dependent_launch(w.device, len(y))
    overlap = {"launch_pdl": True} if early else {}
    b, p, r = u.shape
    groups, tokens = w.shape[0], len(y)
    rows = 1 if config["tokens"] == 1 else _tile(tokens, config["tokens"])
    columns = config["out"] if rows == 1 else _tile(p, config["out"])
    _up[(triton.cdiv(p, columns), triton.cdiv(tokens, rows), b)](
        w, u, y if bias is None else bias, y, tokens, b, p, r, y.shape[1],
        GROUPS=groups, BIAS=bias is not None,
        TOKENS=rows, OUT=columns, RANK=_tile(r, config["inner"]),
        STAGES=config["stages"], EARLY=early, BYTES=u.itemsize, LINE=LINE,
        **_numbers(u), **_effort(config), **overlap,
    )  # fmt: skip


def by_rank(b: int, r: int, tokens: int, like: Tensor) -> Tensor:
    """An empty (b, r, T) whose rows begin at multiples of STEP numbers, so that loads are wide."""
    length = triton.cdiv(tokens, STEP) * STEP
    return like.new_empty((b, r, length))[:, :, :tokens]


def _check_steps(*tensors: Tensor) -> None:
    """The kernels trust that these come from `by_rank`: anything else would be a wild read."""
    (_, r, _), step = tensors[0].shape, tensors[0].stride(1)
    if any(t.stride() != (r * step, step, 1) for t in tensors) or step % STEP:
        raise ValueError(f"strides {[t.stride() for t in tensors]}, expected those of by_rank.")


def couple(z: Tensor, s: Tensor, w: Tensor, config: Config) -> None:
    """Writes w (b, r, T) from z (b, r, T), both of `by_rank`, and s (b, b, r) of any strides but 1
    along r: s.transpose(0, 1) gives the product with the transposed coupling."""
    b, r, tokens = z.shape
    _check_steps(z, w)
    columns = _tile(tokens, config["tokens"])
    blocks = triton.next_power_of_2(b)
    rows = max(16, blocks)
    _couple[(triton.cdiv(r, rows // blocks), triton.cdiv(tokens, columns))](
        z, s, w, r, s.stride(0), s.stride(1), z.stride(1) // STEP,
        B=b, BLOCKS=blocks, ROWS=rows, TOKENS=columns, STEP=STEP,
        **_numbers(z), **_effort(config),
    )  # fmt: skip


def couple_gradient(dw: Tensor, z: Tensor, ds: Tensor, config: Config) -> None:
    """Writes ds (b, b, r) from dw and z (b, r, T), both of `by_rank`; always the same way."""
    b, r, tokens = z.shape
    _check_steps(dw, z)
    blocks = triton.next_power_of_2(b)
    rows = max(16, blocks)
    _couple_gradient[(triton.cdiv(r, rows // blocks),)](
        dw, z, ds, tokens, r, z.stride(1) // STEP,
        B=b, BLOCKS=blocks, ROWS=rows, TOKENS=_tile(tokens, config["tokens"]), STEP=STEP,
        STAGES=config["stages"], **_numbers(z), **_effort(config),
    )  # fmt: skip
