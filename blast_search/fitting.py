"""Factors of any (layer, candidate) of one model, on demand and cached.

The result depends on the layer and the candidate alone, never on what was fitted before: a
resumed run gets the same factors as an undisturbed one.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blast_search.errors import IncompatibleInputError
from blast_search.factorize import factorize
from blast_search.factors import Factors, relative_error
from blast_search.gram import regularised
from blast_search.layers import dense_weight, get_modules
from blast_search.lowrank import LowRankBasis, low_rank_basis
from blast_search.plan import Choices
from blast_search.space import Candidate, LayerSpec
from blast_search.structured import Structure, empty_layer, fit_structure

CACHE_BYTES = 600 << 20  # of factors, at least
# Times the layers' own bytes.  A tangent (tangent.py) wants up to seven candidates of every layer,
# at most plans, and again those around the next plan, which are nearly the same.  In a smaller
# cache that drops what was used longest ago, each of them pushes out one that will be wanted: with
# 600 MiB, `smollm2` had all its 1,470 fitted anew for every plan.
AROUND = 4
MEMORY_SHARE = 8  # of the machine's memory, one part in so many at most
SEARCH_SWEEPS = 10  # enough to rank candidates; final factors get factorize.SWEEPS


class Fitter:
    """Factorises layers of a dense model with the Grams of its calibration data.

    What is kept of all layers (Grams, bases, factors) is kept on the CPU: for a language model of
    7 billion parameters it is several times the model.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LayerSpec],
        grams: Mapping[str, Tensor],
        max_ranks: Mapping[str, int],
    ) -> None:
        self.dense = get_modules(model, layers)
        self.layers = {layer.name: layer for layer in layers}
        self._grams = grams
        self._max_ranks = max_ranks
        self._bases: dict[str, LowRankBasis] = {}
        self._cache: OrderedDict[tuple[str, Candidate, int], Factors] = OrderedDict()
        self._cached_bytes = 0
        self._room = _room(list(self.dense.values()))

    def gram(self, name: str) -> Tensor | None:
        """The layer's Gram (n, n) or its diagonal (n,), where it has one."""
        return self._grams.get(name)

    def basis(self, name: str) -> LowRankBasis:
        """The layer's whitened SVD: the error of b = 1 at every rank."""
        if name not in self._bases:
            try:
                self._bases[name] = low_rank_basis(
                    dense_weight(self.dense[name]),
                    self._grams.get(name),
                    self._max_ranks.get(name, 0),
                    name,
                ).to(torch.device("cpu"))
            except IncompatibleInputError as error:
                raise IncompatibleInputError(f"layer {name}: {error}") from error
        return self._bases[name]

    def factors(self, name: str, candidate: Candidate, sweeps: int = SEARCH_SWEEPS) -> Factors:
        """Factors of a candidate; b > 1 with `sweeps` alternating passes."""
        if candidate.num_blocks == 1:
            return self.basis(name).factors(candidate.rank)
        key = (name, candidate, sweeps)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        weight, gram = dense_weight(self.dense[name]), self._grams.get(name)
        gram = None if gram is None else gram.to(weight.device)
        if isinstance(candidate, Structure):
            factors = fit_structure(weight, candidate, gram)
        else:
            b, r = candidate.num_blocks, candidate.rank
            factors = factorize(weight, b, r, gram, sweeps, self.basis(name).to(weight.device))
        u, v, s = (t.cpu() for t in (factors.U, factors.V, factors.S))
        factors = self._cache[key] = Factors(u, v, s, factors.error)
        self._cached_bytes += _size(factors)
        while self._cached_bytes > self._room and len(self._cache) > 1:
            self._cached_bytes -= _size(self._cache.popitem(last=False)[1])
        return factors

    def error(self, name: str, candidate: Candidate, sweeps: int = SEARCH_SWEEPS) -> float:
        """Relative error of a candidate's factors in the norm of `basis`: with the Gram's ridge.

        Calibration data never spans a layer's whole input space; what they leave out counts here.
        """
        if candidate.num_blocks == 1:
            return self.basis(name).error(candidate.rank)
        f, gram = self.factors(name, candidate, sweeps), self._grams.get(name)
        norm = None if gram is None else regularised(gram.cpu())
        return relative_error(dense_weight(self.dense[name]).cpu(), (f.U, f.S, f.V), norm)

    def module(self, name: str, candidate: Candidate, sweeps: int = SEARCH_SWEEPS) -> nn.Module:
        """A layer ready to be put in place: the dense module itself, or a fitted BlastLinear."""
        linear = self.dense[name]
        if candidate.is_dense:
            return linear
        layer = empty_layer(linear, candidate)
        layer.set_factors(self.factors(name, candidate, sweeps))
        return layer

    def modules(self, choices: Choices, sweeps: int = SEARCH_SWEEPS) -> dict[str, nn.Module]:
        return {name: self.module(name, candidate, sweeps) for name, candidate in choices.items()}

    def __getstate__(self) -> dict[str, Any]:
        # What is cached may be several times the model: whoever gets a copy fits what it needs.
        return vars(self) | {"_cache": OrderedDict(), "_cached_bytes": 0}


def _room(layers: Sequence[nn.Module]) -> int:
    """Bytes of factors to keep: what tangents ask for, as far as there is memory for it."""
    weights = [dense_weight(layer) for layer in layers]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wanted = AROUND * sum(4 * w.numel() for w in weights)
    return max(CACHE_BYTES, min(wanted, memory // MEMORY_SHARE))


def _size(factors: Factors) -> int:
    return sum(t.numel() * t.element_size() for t in (factors.U, factors.V, factors.S))
