"""CETT-PPL: how sparse a model is at a given loss of perplexity, and thresholds that make it so.

Luo et al., "Sparsing law: towards large language models with greater activation sparsity", 2024.
All feed-forward layers share one CETT, the largest at which the perplexity of the pruned model is
at most 1 + p/100 times that of the whole one. Two simpler rules stand beside it for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchzoo.sparsity.ffn import SparseFFN, on_hidden
from torchzoo.sparsity.hosts import FFN, find_ffns
from torchzoo.sparsity.tail_error import Curve
from torchzoo.surgery import replace

Loss = Callable[[nn.Module, Any], Tensor]
Keep = Callable[[str, Tensor], Tensor | None]
"""Of a layer's name and its neurons' values `(..., f)`: which are kept; None for all."""

_FINEST = 1e-6  # strengths of pruning that are closer, relative to the greatest, are the same


@dataclass(frozen=True)
class SparsityReport:
    """Thresholds of a model's feed-forward layers, and what they cost.

    Attributes:
        cett: The CETT that all layers share.
        names: Names of the layers.
        taus: Thresholds on the importance, `(L,)`.
        neuron_thresholds: For each layer the thresholds on abs(h), `(f,)`.
        layer_ratios: Share of neurons kept in each layer, `(L,)`.
        ppl_dense: Perplexity of the whole model.
        ppl_pruned: Perplexity with the thresholds.
    """

    cett: float
    names: tuple[str, ...]
    taus: Tensor
    neuron_thresholds: tuple[Tensor, ...]
    layer_ratios: Tensor
    ppl_dense: float
    ppl_pruned: float

    @property
    def activation_ratio(self) -> float:
        """Share of neurons kept, the mean over layers."""
        return float(self.layer_ratios.mean())

    @property
    def sparsity(self) -> float:
        """Share of neurons dropped, the mean over layers."""
        return 1 - self.activation_ratio

    def apply(self, model: nn.Module) -> None:
        """Make a model skip what the report drops.

        Layers that are no `SparseFFN` become one. Thresholds of a gated layer are compared with
        the product, so that the down-projection alone is spared.

        Args:
            model: The model that was measured, or a copy.

        Raises:
            ValueError: A layer that `SparseFFN.from_mlp` can't take over, or a `SparseFFN` that
                already drops neurons by another rule.
        """
        modules = dict(model.named_modules())
        others = [name for name in self.names if not isinstance(modules[name], SparseFFN)]
        if others:
            replace(model, lambda name, module: name in others, SparseFFN.from_mlp)
        for name, thresholds in zip(self.names, self.neuron_thresholds, strict=True):
            layer: Any = model.get_submodule(name)
            on = "product" if layer.gated else "act"
            if layer.top_k is not None or (
                on != layer.threshold_on and bool(layer.threshold.any())
            ):
                raise ValueError(f"model: {name} already drops neurons by another rule: {layer}")
            layer.set_threshold(
                torch.maximum(layer.threshold, thresholds.to(layer.threshold)), on=on
            )


def cett_ppl(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    p: float = 1.0,
    loss_fn: Loss | None = None,
    ffns: Mapping[str, FFN] | None = None,
    tol: float = 1e-4,
    sequential: bool = False,
    num_candidates: int = 65536,
) -> SparsityReport:
    """Find how sparse a model is at a loss of perplexity of p per cent (CETT-PPL-p%).

    Args:
        model: The model; its mode is left as it is.
        batches: What to measure on, of equal weight. Where a batch is a mapping with an
            `attention_mask`, tokens that it rules out don't count.
        p: How much higher the perplexity may be, in per cent.
        loss_fn: Mean loss in nats of the model on a batch; None: that of a transformers model.
        ffns: The layers; None: all that `find_ffns` knows.
        tol: The search ends when the perplexity's ratio is at most this far below 1 + p/100.
        sequential: Measure each layer with the layers before it pruned; else all on one forward of
            the whole model, as the paper does.
        num_candidates: Thresholds to choose from in each layer.

    Returns:
        The report, on the side of the search that keeps the perplexity.

    Raises:
        ValueError: `p` or `tol` is not positive, no layer is known, or no batches.

    Source:
        Luo et al., "Sparsing law: towards large language models with greater activation sparsity",
        2024.
    """
    measure = _Measure(model, batches, p, tol, loss_fn, ffns)
    weights = {name: ffn.w_down for name, ffn in measure.ffns.items()}
    taus: dict[str, float] = {}

    def thresholds() -> dict[str, Tensor]:
        return {name: _on_neurons(tau, weights[name]) for name, tau in taus.items()}

    def curves(names: Sequence[str], keep: Keep) -> dict[str, Curve]:
        hidden = measure.hidden(names, keep)
        return {name: Curve(h, weights[name], num_candidates) for name, h in hidden.items()}

    whole = {} if sequential else curves(list(weights), lambda name, h: None)

    def at(c: float) -> Keep:
        taus.clear()
        for name in weights:
            curve = curves([name], _above(thresholds()))[name] if sequential else whole[name]
            taus[name] = curve.threshold(c)
        return _above(thresholds())

    c, outcome = measure.largest(at, 1.0)
    at(c)
    return SparsityReport(
        c,
        tuple(weights),
        torch.tensor(list(taus.values()), dtype=torch.float64),
        tuple(thresholds().values()),
        outcome.layer_ratios,
        measure.ppl,
        outcome.ppl,
    )


ppl_sparsity = cett_ppl


def uniform_ppl(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    rule: Literal["top_k", "epsilon"],
    p: float = 1.0,
    loss_fn: Loss | None = None,
    ffns: Mapping[str, FFN] | None = None,
    tol: float = 1e-4,
) -> tuple[float, float]:
    """The share of neurons that simpler rules keep at the same loss of perplexity.

    Args:
        model: The model.
        batches: As for `cett_ppl`, as are the other options.
        rule: `"top_k"`: of every token and layer the same number of largest abs(h) is kept;
            `"epsilon"`: those with abs(h) above one number for all layers.
        p: How much higher the perplexity may be, in per cent.
        loss_fn: Mean loss in nats of the model on a batch.
        ffns: The layers.
        tol: The search ends when the perplexity's ratio is at most this far below 1 + p/100.

    Returns:
        The share of neurons kept, the mean over layers, and the perplexity's ratio.

    Raises:
        ValueError: As `cett_ppl`, or another rule.

    Source:
        The rivals in Luo et al., "Sparsing law: towards large language models with greater
        activation sparsity", 2024.
    """
    if rule not in ("top_k", "epsilon"):
        raise ValueError(f"rule: expected top_k or epsilon, got {rule!r}")
    measure = _Measure(model, batches, p, tol, loss_fn, ffns)

    def top_k(share: float, name: str, h: Tensor) -> Tensor:
        k = h.shape[-1] - int(share * h.shape[-1])
        largest = torch.zeros_like(h, dtype=torch.bool)
        return largest.scatter(-1, h.abs().topk(k, dim=-1).indices, True) & (h != 0)

    def epsilon(limit: float, name: str, h: Tensor) -> Tensor:
        return h.abs() > limit

    if rule == "top_k":
        outcome = measure.largest(lambda share: partial(top_k, share), 1.0)[1]
    else:
        values = measure.hidden(list(measure.ffns), lambda name, h: None).values()
        most = max(float(h.abs().max()) for h in values)
        outcome = measure.largest(lambda limit: partial(epsilon, limit), most)[1]
    return float(outcome.layer_ratios.mean()), outcome.ratio


@dataclass(frozen=True)
class _Outcome:
    """What pruning comes to: the perplexity, its ratio to the whole model's, and what is kept."""

    ppl: float
    ratio: float
    layer_ratios: Tensor


class _Measure:
    """Runs a model on batches, whole or pruned."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        p: float,
        tol: float,
        loss_fn: Loss | None,
        ffns: Mapping[str, FFN] | None,
    ):
        for name, value in (("p", p), ("tol", tol)):
            if not value > 0:
                raise ValueError(f"{name}: expected a number > 0, got {value}")
        if not batches:
            raise ValueError("batches: expected at least one, got none")
        self.model, self.batches = model, batches
        self.allowed, self.tol = 1 + p / 100, tol
        self.loss_fn = loss_fn or _transformers_loss
        self.ffns = dict(find_ffns(model) if ffns is None else ffns)
        if not self.ffns:
            raise ValueError("ffns: expected feed-forward layers, got none")
        self._token_mask: Tensor | None = None
        self.ppl = math.exp(self._run(lambda name, h: None))

    def hidden(self, names: Sequence[str], keep: Keep) -> dict[str, Tensor]:
        """What the neurons of some layers give, `(N, f)`, while layers are pruned."""
        seen: dict[str, list[Tensor]] = {name: [] for name in names}

        def see(name: str, h: Tensor) -> Tensor | None:
            if name in seen:
                seen[name].append(self._counted(h))
            return _pruned(h, keep(name, h))

        self._run(see)
        return {name: torch.cat(parts) for name, parts in seen.items()}

    def pruned(self, keep: Keep) -> _Outcome:
        """Perplexity and shares when layers are pruned."""
        kept: dict[str, list[Tensor]] = {name: [] for name in self.ffns}

        def see(name: str, h: Tensor) -> Tensor | None:
            mask = keep(name, h)
            assert mask is not None
            kept[name].append(self._counted(mask).double().mean(-1))
            return _pruned(h, mask)

        loss = self._run(see)
        ratios = torch.stack([torch.cat(parts).mean() for parts in kept.values()])
        return _Outcome(math.exp(loss), math.exp(loss) / self.ppl, ratios.cpu())

    def largest(self, at: Callable[[float], Keep], most: float) -> tuple[float, _Outcome]:
        """The greatest strength of pruning below `most` that keeps the perplexity, by bisection."""
        low, high = 0.0, most
        best = self.pruned(at(low))
        while best.ratio < self.allowed - self.tol and high - low > _FINEST * most:
            middle = (low + high) / 2
            outcome = self.pruned(at(middle))
            if outcome.ratio <= self.allowed:
                low, best = middle, outcome
            else:
                high = middle
        return low, best

    @torch.no_grad()
    def _run(self, see: Callable[[str, Tensor], Tensor | None]) -> float:
        """Mean loss over the batches; what `see` returns takes the place of the values."""
        modes = [(module, module.training) for module in self.model.modules()]
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # which calls hooks
            for name, ffn in self.ffns.items():
                stack.callback(on_hidden(ffn.module, ffn.down, partial(see, name)))
            self.model.eval()
            losses = []
            for batch in self.batches:
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                self._token_mask = None if mask is None else mask.flatten().bool()
                losses.append(float(self.loss_fn(self.model, batch)))
        for module, training in modes:
            module.training = training
        return math.fsum(losses) / len(losses)

    def _counted(self, values: Tensor) -> Tensor:
        """The rows `(N, f)` of the batch's tokens that count."""
        rows = values.flatten(0, -2)
        return rows if self._token_mask is None else rows[self._token_mask]


def _pruned(h: Tensor, keep: Tensor | None) -> Tensor | None:
    return None if keep is None else torch.where(keep, h, 0.0)


def _above(thresholds: Mapping[str, Tensor]) -> Keep:
    """Keep what is above its neuron's threshold; layers without any are whole."""
    return lambda name, h: h.abs() > thresholds[name] if name in thresholds else None


def _on_neurons(tau: float, w_down: Tensor) -> Tensor:
    """The threshold on abs(h) of each neuron; one that adds nothing is always dropped."""
    norms = w_down.norm(dim=0)
    return torch.where(norms > 0, tau / norms, torch.inf)


def _transformers_loss(model: nn.Module, batch: Any) -> Tensor:
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    labels = inputs["input_ids"]
    if "attention_mask" in inputs:
        labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**{"labels": labels, **inputs}).loss
    assert isinstance(loss, Tensor)
    return loss
