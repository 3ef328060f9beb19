"""BLAST product and its gradients on NVIDIA GPUs, with Triton and cuBLAS.

    A_ij = U_i diag(s_ij) V_j^T      U: (b, p, r)   V: (b, q, r)   S: (b, b, r)
    y    = concat_i( (sum_j s_ij * (x_j V_j)) U_i^T )

Lee, Kwon, Qu, Kim: BLAST, NeurIPS 2024, arXiv 2410.21262, equations 1 to 3. T tokens.

At most DECODE_TOKENS tokens: two launches, `down` then `up`, bounded by reading the factors once;
or, as for more tokens, stages 1 and 3 by cuBLAS with the coupling in between, whichever is faster
on this device.

Measured on an H200 and dropped: stages 1 and 2 in one kernel for many tokens (at b = 16 each
program reads all of x: 139 us; cuBLAS and the coupling take 30 and 38), stage 3 by Triton (1.25 to
1.4 times as long as cuBLAS), passes of 512 tokens so that z stays in the L2 cache (the small
products lose more than the coupling gains).

Runs under Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors, for tests.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache

import torch
import triton
from torch import Tensor

from blast_search.kernels import TRITON_BLOCKS
from blast_search.kernels import triton_kernels as k
from blast_search.kernels import triton_tune as tune
from blast_search.modes import float32_products

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DECODE_TOKENS = 64
PRODUCTS = 0  # the candidate that is no number of groups: as for many tokens

Case = tuple[Hashable, ...]


@torch.no_grad()
def forward(x: Tensor, u: Tensor, s: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """x A^T (+ bias); sums in float32; not recorded by autograd (see `backward`).

    Never synchronises and allocates only through PyTorch, so that it can be captured in a CUDA
    graph; call it once per shape before the capture, which tunes it and compiles its kernels.

    Args:
        x: (T, n), any strides. u: (b, p, r). s: (b, b, r). v: (b, q, r). bias: (m,).
            One dtype of DTYPES for all. float32 products are IEEE unless
            PyTorch is told to use TF32 (modes.float32_products).

    Returns:
        (T, m), contiguous, the dtype of x.

    Raises:
        TypeError: mixed or unsupported dtypes.
    """
    x, u, s, v = _prepared(x, u, s, v)
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(len(x), u.shape[0] * u.shape[1])
    if len(x):
        with torch.cuda.device(x.get_device()):  # Triton launches on the current device
            _forward(x, u, s, v, bias, y)
    return y


@torch.no_grad()
def backward(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `forward`, deterministic; z and w are recomputed, not stored.

        dw_i = g_i U_i   dz_j = sum_i s_ij * dw_i   dx_j = dz_j V_j^T
        dU_i = g_i^T w_i   dS_ij = sum_t dw_i * z_j   dV_j = x_j^T dz_j

    Args:
        grad: (T, m), any strides. x, u, s, v: as in `forward`.
        needs: which of the gradients of x, u, s, v are wanted.

    Returns:
        The gradients of x, u, s, v, of their shapes and dtypes; None where not wanted.

    Raises:
        TypeError: mixed or unsupported dtypes.
    """
    x, u, s, v = _prepared(x, u, s, v)
    if not len(x):
        dx, du, ds, dv = (
            torch.zeros_like(t) if need else None
            for t, need in zip((x, u, s, v), needs, strict=True)
        )
        return dx, du, ds, dv
    with torch.cuda.device(x.get_device()):
        return _backward(_rows(grad), x, u, s, v, needs)


def _forward(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None, y: Tensor) -> None:
    tokens = len(x)
    case = _case(x, u, v, bias is not None)

    def run(groups: int) -> None:
        if groups == PRODUCTS:
            _products(x, u, s, v, bias, y, case)
        else:
            w = _down(x, s, v, groups, (*case, groups))
            _up(w, u, bias, y, (*case, groups))

    if _decodes(len(u), tokens):
        # Beside its first kernels, for few tokens, some devices have no room for another config.
        safe = PRODUCTS if tokens > 1 else None
        counts = _group_counts(tokens)
        run(tune.pick("decode", case, counts, run, x.device, nested=True, capturing=safe))
    else:
        run(PRODUCTS)


def _products(
    x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None, y: Tensor, case: Case
) -> None:
    """Into y (T, m): cuBLAS, the coupling, cuBLAS.  z and w are kept by rank, (b, r, T)."""
    w = _couple(_by_rank(v, x), s, case)
    torch.bmm(w.mT, u.mT, out=_blocks(y, len(u)))
    if bias is not None:
        y.add_(bias)


def _by_rank(factor: Tensor, x: Tensor) -> Tensor:
    """(x_j F_j)^T as (b, r, T), for F (b, q, r) and x (T, b q)."""
    b, _, r = factor.shape
    result = k.by_rank(b, r, len(x), x)
    return torch.bmm(factor.mT, _blocks(x, b).mT, out=result)


def _backward(
    grad: Tensor, x: Tensor, u: Tensor, s: Tensor, v: Tensor, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_u, need_s, need_v = needs
    dx = du = ds = dv = None
    case = _case(x, u, v, False)
    x_blocks, g_blocks = _blocks(x, len(u)), _blocks(grad, len(u))
    z = _by_rank(v, x) if need_u or need_s else None
    if z is not None and need_u:
        du = torch.bmm(g_blocks.mT, _couple(z, s, case).mT)
    if need_x or need_s or need_v:
        dw = _by_rank(u, grad)
        if z is not None and need_s:
            ds = _couple_gradient(dw, z, s, case)
        if need_x or need_v:
            dz = _couple(dw, s.transpose(0, 1), case)
            if need_x:
                dx = torch.empty_like(x, memory_format=torch.contiguous_format)
                torch.bmm(dz.mT, v.mT, out=_blocks(dx, len(u)))
            if need_v:
                dv = torch.bmm(x_blocks.mT, dz.mT)
    return dx, du, ds, dv


def _prepared(x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    dtypes = {t.dtype for t in (x, u, s, v)}
    if len(dtypes) > 1 or x.dtype not in DTYPES:
        raise TypeError(f"dtypes {dtypes}, expected one for all, of {DTYPES}.")
    return _rows(x), u.contiguous(), s.contiguous(), v.contiguous()


def _decodes(b: int, tokens: int) -> bool:
    return tokens <= DECODE_TOKENS and b <= TRITON_BLOCKS


def _rows(x: Tensor) -> Tensor:
    """x with unit inner stride and rows that do not overlap (an expanded gradient's do)."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _blocks(x: Tensor, b: int) -> Tensor:
    """(T, b q) as (b, T, q), a view."""
    return x.view(len(x), b, x.shape[1] // b).transpose(0, 1)


def _case(x: Tensor, u: Tensor, v: Tensor, bias: bool) -> Case:
    """What a choice depends on; tokens by the next power of two, ranks in steps of up to 1.5.

    With exact ranks each of a profile's cells would tune for itself.  But Triton compiles other
    kernels for sizes and addresses that 16 divides: loads that overlap, and take shared memory.
    A config that was fastest without may have no room with it.
    """
    precision = float32_products() if x.dtype == torch.float32 else None
    tokens, (b, p, r) = triton.next_power_of_2(len(x)), u.shape
    power = triton.next_power_of_2(r)
    rank = power * 3 // 4 if 4 * r <= 3 * power else power
    aligned = r % 16 == 0, x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    return tokens, b, p, rank, v.shape[1], str(x.dtype), precision, bias, *aligned


def _down(x: Tensor, s: Tensor, v: Tensor, groups: int, case: Case) -> Tensor:
    """w (groups, b, T, r): stages 1 and 2, in parts that are to be added."""
    (b, _, r), tokens = v.shape, len(x)

    def run(config: k.Config) -> Tensor:
        w = x.new_empty((groups, b, tokens, r))
        k.down(x, v, s, w, config)
        return w

    return run(tune.pick("down", case, _down_configs(b, tokens), run, x.device))


def _up(w: Tensor, u: Tensor, bias: Tensor | None, y: Tensor, case: Case) -> None:
    """Stage 3 into y (T, m)."""

    def run(config: k.Config) -> None:
        k.up(w, u, bias, y, config)

    run(tune.pick("up", case, _up_configs(len(y)), run, y.device))


def _couple(z: Tensor, s: Tensor, case: Case) -> Tensor:
    b, r, tokens = z.shape
    w = k.by_rank(b, r, tokens, z)

    def run(config: k.Config) -> None:
        k.couple(z, s, w, config)

    run(tune.pick("couple", case, _couple_configs(b), run, z.device))
    return w


def _couple_gradient(dw: Tensor, z: Tensor, s: Tensor, case: Case) -> Tensor:
    ds = torch.empty_like(s)

    def run(config: k.Config) -> None:
        k.couple_gradient(dw, z, ds, config)

    run(tune.pick("couple_gradient", case, GRADIENT_CONFIGS, run, z.device))
    return ds


GRADIENT_CONFIGS = [
    {"tokens": tokens, "warps": warps, "stages": stages}
    for tokens, warps, stages in ((128, 4, 3), (256, 4, 3), (64, 2, 4), (256, 8, 2), (64, 4, 2))
]


@lru_cache(64)
def _couple_configs(b: int) -> list[k.Config]:
    """Tiles whose accumulator needs at most 128 registers per thread."""
    blocks = max(16, triton.next_power_of_2(b))
    tiles = ((512, 4), (1024, 4), (256, 4), (1024, 8), (256, 2), (256, 8), (64, 1), (16, 4))
    return [
        {"tokens": tokens, "warps": warps, "stages": 1}
        for tokens, warps in tiles
        if blocks * tokens <= warps * 4096
    ]


def _group_counts(tokens: int) -> list[int]:
    """Into how many partial sums `down` may be split, to have enough programs for the device."""
    return [8, 16, 4] if tokens == 1 else [4, 2, 1, PRODUCTS]


@lru_cache(1024)
def _down_configs(b: int, tokens: int) -> list[k.Config]:
    """Tiles whose accumulators, one per block, need at most 128 registers per thread."""
    blocks = triton.next_power_of_2(b)
    if tokens == 1:
        tiles: tuple[tuple[int, ...], ...] = (
            (1, 32, 256, 4, 1), (1, 64, 256, 4, 1), (1, 64, 128, 4, 1), (1, 64, 256, 8, 1),
            (1, 128, 128, 4, 1), (1, 128, 128, 8, 1), (1, 32, 128, 4, 3), (1, 32, 512, 8, 1),
        )  # fmt: skip
    else:
        rows = max(16, triton.next_power_of_2(tokens))
        tiles = (
            (rows, 16, 128, 4, 4), (rows, 16, 256, 4, 3), (rows, 32, 128, 4, 4),
            (rows, 32, 256, 4, 3), (rows, 64, 64, 4, 4), (rows, 64, 128, 4, 3),
            (rows, 64, 128, 8, 4), (16, 16, 128, 4, 4),
        )  # fmt: skip
    return [
        {"tokens": rows, "rank": rank, "inner": inner, "warps": warps, "stages": stages}
        for rows, rank, inner, warps, stages in tiles
        if blocks * rows * rank <= warps * 4096
    ]


@lru_cache(1024)
def _up_configs(tokens: int) -> list[k.Config]:
    if tokens == 1:
        tiles: tuple[tuple[int, ...], ...] = (
            (1, 8, 1024, 4, 1), (1, 4, 1024, 4, 1), (1, 32, 128, 4, 4), (1, 16, 512, 4, 1),
            (1, 16, 1024, 8, 1), (1, 4, 2048, 4, 1), (1, 8, 2048, 8, 1), (1, 8, 512, 4, 2),
        )  # fmt: skip
    else:
        rows = max(16, triton.next_power_of_2(tokens))
        tiles = (
            (rows, 32, 128, 4, 4), (rows, 64, 64, 4, 4), (rows, 64, 128, 4, 3),
            (rows, 32, 256, 4, 3), (rows, 16, 256, 4, 3), (rows, 64, 128, 8, 3),
        )  # fmt: skip
    return [
        {"tokens": rows, "out": out, "inner": inner, "warps": warps, "stages": stages}
        for rows, out, inner, warps, stages in tiles
    ]
