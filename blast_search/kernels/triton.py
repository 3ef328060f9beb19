"""BLAST product and its gradients on NVIDIA GPUs, with Triton and cuBLAS.

    A_ij = U_i diag(s_ij) V_j^T      U: (b, p, r)   V: (b, q, r)   S: (b, b, r)
    y    = concat_i( (sum_j s_ij * (x_j V_j)) U_i^T )

Lee, Kwon, Qu, Kim: BLAST, NeurIPS 2024, arXiv 2410.21262, equations 1 to 3. T tokens.

At most DECODE_TOKENS tokens: two launches, `down` then `up`, bounded by reading the factors once.
More tokens: three matrix-product-like stages, each by the fastest of its candidates on this
device. Runs under Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors, for tests.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache

import torch
import triton
from torch import Tensor

from blast_search.kernels import triton_kernels as k
from blast_search.kernels import triton_tune as tune

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DECODE_TOKENS = 64
FUSED_BLOCKS = 64  # more blocks than this need more accumulators than there are registers
CHUNKS = (2048, 512)  # tokens per pass, so that z and w stay in the L2 cache
CUBLAS: k.Config = {}  # the candidate that is no Triton config

Case = tuple[Hashable, ...]


@torch.no_grad()
def forward(x: Tensor, u: Tensor, s: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """x A^T (+ bias); sums in float32; not recorded by autograd (see `backward`).

    Never synchronises and allocates only through PyTorch, so that it can be captured in a CUDA
    graph; call it once per shape before the capture, which tunes it and compiles its kernels.

    Args:
        x: (T, n), any strides. u: (b, p, r). s: (b, b, r). v: (b, q, r). bias: (m,).
            One dtype of DTYPES for all. float32 products are IEEE unless
            torch.backends.cuda.matmul.allow_tf32 is set.

    Returns:
        (T, m), contiguous, the dtype of x.

    Raises:
        TypeError: mixed or unsupported dtypes.
    """
    x, u, s, v = _prepared(x, u, s, v)
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
    if _decodes(len(u), tokens):

        def decode(groups: int) -> None:
            w = _down(x, s, v, groups, (*case, groups))
            _up(w, u, bias, y, (*case, groups))

        decode(tune.pick("decode", case, _group_counts(tokens), decode, x.device))
    else:

        def prefill(chunk: int) -> None:
            size = chunk or tokens
            for start in range(0, tokens, size):
                part = x[start : start + size]
                inner = _case(part, u, v, bias is not None)
                _up(_down(part, s, v, 1, inner), u, bias, y[start : start + size], inner)

        # 0 is the whole call: the token counts of one case differ.
        chunks = [0, *(chunk for chunk in CHUNKS if chunk <= tokens // 2)]
        prefill(tune.pick("chunk", case, chunks, prefill, x.device))


def _backward(
    grad: Tensor, x: Tensor, u: Tensor, s: Tensor, v: Tensor, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_u, need_s, need_v = needs
    dx = du = ds = dv = None
    case = _case(x, u, v, False)
    x_blocks, g_blocks = _blocks(x, len(u)), _blocks(grad, len(u))
    z = torch.bmm(x_blocks, v) if need_u or need_s else None
    if z is not None and need_u:
        du = torch.bmm(g_blocks.transpose(1, 2), _couple(z, s, case))
    if need_x or need_s or need_v:
        dw = torch.bmm(g_blocks, u)
        if z is not None and need_s:
            ds = _couple_gradient(dw, z, case).to(s.dtype)
        if need_x or need_v:
            dz = _couple(dw, s.transpose(0, 1), case)
            if need_x:
                dx = torch.empty_like(x, memory_format=torch.contiguous_format)
                torch.bmm(dz, v.transpose(1, 2), out=_blocks(dx, len(u)))
            if need_v:
                dv = torch.bmm(x_blocks.transpose(1, 2), dz)
    return dx, du, ds, dv


def _prepared(x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    dtypes = {t.dtype for t in (x, u, s, v)}
    if len(dtypes) > 1 or x.dtype not in DTYPES:
        raise TypeError(f"dtypes {dtypes}, expected one for all, of {DTYPES}.")
    return _rows(x), u.contiguous(), s.contiguous(), v.contiguous()


def _decodes(b: int, tokens: int) -> bool:
    return tokens <= DECODE_TOKENS and b <= FUSED_BLOCKS


def _rows(x: Tensor) -> Tensor:
    """x with unit inner stride and rows that do not overlap (an expanded gradient's do)."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _blocks(x: Tensor, b: int) -> Tensor:
    """(T, b q) as (b, T, q), a view."""
    return x.view(len(x), b, x.shape[1] // b).transpose(0, 1)


def _case(x: Tensor, u: Tensor, v: Tensor, bias: bool) -> Case:
    """What a choice depends on; tokens by the next power of two, ranks in steps of up to 1.5.

    Exact ranks would let each of a profile's cells tune for a second or two.
    """
    precision = k.tf32() if x.dtype == torch.float32 else None
    tokens, (b, p, r) = triton.next_power_of_2(len(x)), u.shape
    power = triton.next_power_of_2(r)
    rank = power * 3 // 4 if 4 * r <= 3 * power else power
    return tokens, b, p, rank, v.shape[1], str(x.dtype), precision, bias


def _down(x: Tensor, s: Tensor, v: Tensor, groups: int, case: Case) -> Tensor:
    """w (groups, b, T, r): stages 1 and 2. Partial sums stay in float32 until they are added."""
    (b, _, r), tokens = v.shape, len(x)

    def run(config: k.Config) -> Tensor:
        if config == CUBLAS:
            return _couple(torch.bmm(_blocks(x, b), v), s, case).unsqueeze(0)
        dtype = x.dtype if groups == 1 else torch.float32
        w = x.new_empty((groups, b, tokens, r), dtype=dtype)
        k.down(x, v, s, w, config)
        return w

    return run(tune.pick("down", case, _down_configs(b, tokens), run, x.device))


def _up(w: Tensor, u: Tensor, bias: Tensor | None, y: Tensor, case: Case) -> None:
    """Stage 3 into y (T, m)."""

    def run(config: k.Config) -> None:
        if config == CUBLAS:
            torch.bmm(w[0], u.transpose(1, 2), out=_blocks(y, len(u)))
            if bias is not None:
                y.add_(bias)
        else:
            k.up(w, u, bias, y, config)

    run(tune.pick("up", case, _up_configs(len(u), len(y)), run, y.device))


def _couple(z: Tensor, s: Tensor, case: Case) -> Tensor:
    w = torch.empty_like(z)

    def run(config: k.Config) -> None:
        k.couple(z, s, w, config)

    run(tune.pick("couple", case, COUPLE_CONFIGS, run, z.device))
    return w


def _couple_gradient(dw: Tensor, z: Tensor, case: Case) -> Tensor:
    if len(z) > GRADIENT_BLOCKS:
        return torch.einsum("itk,jtk->ijk", dw, z).contiguous()

    def run(config: k.Config) -> Tensor:
        return k.couple_gradient(dw, z, config)

    return run(tune.pick("couple_gradient", case, GRADIENT_CONFIGS, run, z.device))


COUPLE_CONFIGS = [
    {"elements": elements, "rank": rank, "warps": warps, "stages": 1}
    for elements, rank, warps in (
        (16384, 64, 4), (8192, 64, 4), (8192, 64, 2), (16384, 128, 4), (32768, 64, 8),
    )
]  # fmt: skip
GRADIENT_BLOCKS = 32  # b^2 accumulators per rank: more do not fit in the registers
GRADIENT_CONFIGS = [
    {"elements": elements, "rank": rank, "warps": warps, "programs": programs, "stages": 3}
    for elements, rank, warps in ((8192, 32, 4), (16384, 32, 8), (4096, 16, 4), (16384, 64, 8))
    for programs in (512, 1024)
]


def _group_counts(tokens: int) -> list[int]:
    """Into how many partial sums `down` may be split, to have enough programs for the device."""
    return [8, 16, 4] if tokens == 1 else [4, 2, 1]


@lru_cache(1024)
def _down_configs(b: int, tokens: int) -> list[k.Config]:
    """Tiles whose accumulators, one per block, need at most 128 registers per thread."""
    blocks = triton.next_power_of_2(b)
    if tokens == 1:
        tiles: tuple[tuple[int, ...], ...] = (
            (1, 32, 128, 4, 3), (1, 32, 256, 4, 1), (1, 16, 256, 4, 3), (1, 64, 128, 4, 1),
            (1, 64, 64, 4, 4),
        )  # fmt: skip
    elif _decodes(b, tokens):
        rows = max(16, triton.next_power_of_2(tokens))
        tiles = (
            (rows, 16, 128, 4, 4), (rows, 16, 256, 4, 3), (rows, 32, 128, 4, 4),
            (rows, 32, 256, 4, 3), (rows, 64, 64, 4, 4), (rows, 32, 128, 8, 4),
            (16, 16, 128, 4, 4),
        )  # fmt: skip
    else:
        tiles = (
            (64, 32, 256, 8, 3), (64, 32, 128, 8, 4), (64, 64, 256, 8, 2), (64, 64, 128, 8, 3),
            (128, 32, 128, 8, 3), (32, 32, 256, 4, 3),
        )  # fmt: skip
    fused = [
        {"tokens": rows, "rank": rank, "inner": inner, "warps": warps, "stages": stages}
        for rows, rank, inner, warps, stages in tiles
        if blocks * rows * rank <= warps * 4096
    ]
    if _decodes(b, tokens):
        return fused
    # Below 8 blocks z is small, and each program of the fused kernel would read x again.
    return [CUBLAS, *(fused if b >= 8 else [])]


@lru_cache(1024)
def _up_configs(b: int, tokens: int) -> list[k.Config]:
    if tokens == 1:
        tiles: tuple[tuple[int, ...], ...] = (
            (1, 16, 256, 4, 3), (1, 32, 128, 4, 4), (1, 8, 512, 4, 2), (1, 8, 1024, 4, 1),
            (1, 4, 1024, 4, 1),
        )  # fmt: skip
    elif _decodes(b, tokens):
        rows = max(16, triton.next_power_of_2(tokens))
        tiles = (
            (rows, 32, 128, 4, 4), (rows, 16, 128, 4, 4), (rows, 16, 256, 4, 3),
            (rows, 32, 256, 4, 3), (rows, 64, 64, 4, 4),
        )  # fmt: skip
    else:
        tiles = (
            (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (64, 128, 64, 4, 4),
            (128, 64, 64, 4, 4),
        )  # fmt: skip
    configs = [
        {"tokens": rows, "out": out, "inner": inner, "warps": warps, "stages": stages}
        for rows, out, inner, warps, stages in tiles
    ]
    return configs if _decodes(b, tokens) else [CUBLAS, *configs]
