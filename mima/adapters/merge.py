"""Several concepts' adapters in one model: the weighted and the projected merge.

Of low-rank adapters no adapted weight is ever formed. Their weighted merge is ``merge_lora``, and
so is their projected merge, since with ``W_n = W0 + s_n B_n A_n``

    φ = W0 + Σ_n (W_n − W0) C_nᵀ M_n = W0 + Σ_n s_n (B_n A_n C_nᵀ) M_n,

a low-rank update whose rank is the number of the concept's tokens.
"""

# N = adapters, S_n = tokens of concept n, D = text embedding, o = outputs of a weight, r = rank

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from mima import ops
from mima.adapters.adapter import Adapter
from mima.adapters.files import AdapterReader
from mima.choices import MergeMethod
from mima.errors import MimaError, check_choice, told_apart
from mima.families import Family, family_of, load_pipeline, origin_of, source_of
from mima.families.new_words import with_words
from mima.families.pipelines import (
    Pipeline,
    own_networks,
    parameter,
    with_modules,
    with_values,
)
from mima.merging import MergePlan
from mima.release.card import CardFacts
from mima.release.delta import Delta
from mima.release.repository import Released
from mima.storage.inputs import check_adapters, expanded
from mima.training.captions import ordinary_captions, regular_tokens, warn_of_emoji


@dataclass(frozen=True, kw_only=True)
class MergedAdapters(Released):
    """One model that several adapters were merged into.

    Attributes:
        pipeline: an ordinary diffusers pipeline.
        adapters: the adapters' names.
        weights: their weights, in the same order.
        prompts: the text that each answers to; empty for the weighted merge.
        method: ``"projected"`` or ``"weighted"``.
        model: what they were merged into.
        opened_with: what else was said of it, see ``ModelSource.options``.
        changed: names of the changed parameters, as in ``unet.conv_in.weight``.
        words: embeddings [K, D] of the new words that the adapters brought.
        residual: per adapter, ``‖(φ − W0) C_nᵀ − A_n‖ / ‖A_n‖`` over all projected weights, with
            ``A_n = (W_n − W0) C_nᵀ``: how far the merged model misses what the adapter made of its
            prompt's tokens. 0 is the constraint met; None where it has no projected weight or the
            merge was not the projected one.
        drift_bound: per adapter, the factor by which the projection may move a weight further than
            the adapter did (``MergePlan.drift_bound``); None likewise.
        condition: condition number of the ordinary captions' embeddings; None likewise.
    """

    pipeline: Pipeline
    adapters: Sequence[str]
    weights: Sequence[float]
    prompts: Sequence[str]
    method: MergeMethod
    model: str | None
    opened_with: Mapping[str, str]
    changed: Sequence[str]
    words: Mapping[str, torch.Tensor]
    residual: Sequence[float | None]
    drift_bound: Sequence[float | None]
    condition: float | None

    def _facts(self) -> CardFacts:
        names = told_apart(self.adapters)
        metrics = {
            f"{what} of {name}": value
            for what, values in (("residual", self.residual), ("drift bound", self.drift_bound))
            for name, value in zip(names, values, strict=True)
            if value is not None
        }
        if self.condition is not None:
            metrics["condition of the captions"] = self.condition
        prompts = self.prompts or [""] * len(self.adapters)
        many = len(self.adapters) > 1
        count = f"{len(self.adapters)} adapters" if many else "One adapter"
        return CardFacts(
            command="merge",
            title="Merged adapters" if many else "Model with an adapter",
            method=f"{count} in one model, by the {self.method} merge. A residual of 0 means that "
            "the model answers an adapter's prompt as the adapter did."
            if many
            else f"{count} in its model.",
            base_model=self.model,
            opened_with=self.opened_with,
            concepts=list(zip(names, prompts, strict=True)),
            settings={"method": self.method, "weights": [*self.weights]},
            seed=None,
            metrics=metrics,
            tags=["merge"],
        )

    def _delta(self) -> Delta:
        return Delta.of(
            self.pipeline,
            self.changed,
            words=self.words,
            origin={"model": self.model, "adapters": list(self.adapters), "merge": self.method},
        )


def merge_adapters(
    model: Any,
    adapters: Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    method: MergeMethod = "projected",
    prompts: Sequence[str] | None = None,
    captions: str | Path | None = None,
    num_captions: int = 200,
    lam: float = 1e-4,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> MergedAdapters:
    """Merge adapters of one base model into it.

    ``"weighted"``: ``φ = W0 + Σ_n w_n (W_n − W0)`` for every parameter. On LoRA this is what peft's
    ``add_weighted_adapter(..., combination_type="cat")`` followed by a merge gives. (Its
    ``"linear"`` sums A and B apart, so that their product has cross terms between adapters.)

    ``"projected"``: the weights that read text (keys and values of cross-attention) are merged by
    the text they answer to, as in Custom Diffusion (Kumari et al., CVPR 2023):
    ``min_φ ‖(φ − W0) C_regᵀ‖²`` subject to ``φ C_nᵀ = W_n C_nᵀ`` for all n, softened by ``lam``.
    All other parameters are merged by the weighted average.

    An adapter with weight 0 leaves no trace, its new words included. One that alone has a weight,
    and that weight is 1, is given back exactly: ``[1, 0, 0]`` is the first adapter's own model,
    for LoRA bit for bit that of diffusers' ``fuse_lora``.

    Args:
        model: a diffusers pipeline, which stays as it is, or whatever ``load_pipeline`` opens.
        adapters: N folders or files, as ``AdapterReader.read`` takes them: LoRA of any ranks and
            alphas, Custom Diffusion, learned words, fine-tuned models, deltas.
        weights: N finite numbers of any sum, for the projected merge not negative; default 1/N
            each.
        method: ``"projected"`` or ``"weighted"``.
        prompts: for the projected merge, what asks for each adapter's concept, such as
            ``"a <new1> castle"``; default what ``mima adapt`` wrote beside the adapter.
        captions: a file of ordinary captions, which the merge leaves alone; default those shipped.
        num_captions: how many of them are read.
        lam: softness of the constraint; 0 is hard, see ``MergePlan``.
        seed: draws the captions.
        device: where to merge; by default where a pipeline in memory is, otherwise the CPU.
        dtype: of a model that is opened; one in memory keeps its own.

    Returns:
        The merged pipeline, in the model's dtype, and how far it misses the constraint.

    Raises:
        MimaError: an adapter that cannot be read or does not fit, two that bring the same word,
            numbers that do not agree, or a projected merge without prompts.

    Examples:
        >>> merged = merge_adapters("base", ["cat-lora", "dog-lora"], prompts=["a cat", "a dog"])
        >>> merged.save_pretrained("both")
    """
    if not adapters:
        raise MimaError("merge: no adapters given")
    check_choice("merge:", method, get_args(MergeMethod))
    shares = [1 / len(adapters)] * len(adapters) if weights is None else [*map(float, weights)]
    if len(shares) != len(adapters) or not all(map(math.isfinite, shares)):
        raise MimaError(
            f"merge: weights must be one finite number per adapter ({len(adapters)}), got {weights}"
        )
    if method == "projected" and min(shares) < 0:
        raise MimaError(f"merge: the projected merge takes no negative weights, got {shares}")
    if not any(shares):
        raise MimaError("merge: all weights are 0")
    if prompts is not None and len(prompts) != len(adapters):
        raise MimaError(f"merge: {len(adapters)} adapters need as many prompts, got {len(prompts)}")
    check_adapters(adapters)
    source = None if captions is None else expanded(captions)
    if method == "projected":
        ordinary_captions(source)

    opened = source_of(model)
    pipeline = model if opened is None else load_pipeline(opened, dtype=dtype)
    if device is not None:
        pipeline = with_modules(pipeline, **own_networks(pipeline)).to(device)
    reader = AdapterReader(pipeline)
    kept = [n for n, share in enumerate(shares) if share]
    chosen = [reader.read(adapters[n]) for n in kept]
    texts = (
        _prompts(chosen, prompts and [prompts[n] for n in kept]) if method == "projected" else []
    )
    words = _all_words(chosen)
    merge = _Merge(pipeline, chosen, [shares[n] for n in kept], words)
    if len(kept) == 1 and merge.weights == [1.0]:
        values = {name: chosen[0].adapted(name, weight) for name, weight in merge.base.items()}
        report: dict[str, Any] = {"residual": [0.0 if method == "projected" else None]}
    elif method == "weighted":
        values, report = merge.weighted(merge.names), {}
    else:
        warn_of_emoji(pipeline, source)
        values, report = merge.projected(merge.plan(texts, source, num_captions, lam, seed))
    blank: list[float | None] = [None] * len(kept)
    return MergedAdapters(
        pipeline=with_words(with_values(pipeline, values), words),
        adapters=[adapter.name for adapter in chosen],
        weights=merge.weights,
        prompts=texts,
        method=method,
        model=origin_of(model),
        opened_with=opened.options if opened else {},
        changed=list(values),
        words=words,
        residual=report.get("residual", blank),
        drift_bound=report.get("drift_bound", blank),
        condition=report.get("condition"),
    )


@torch.no_grad()
def apply(pipeline: Pipeline, adapters: Sequence[Adapter], weights: Sequence[float] = ()) -> Any:
    """A pipeline with adapters in its weights: ``W0 + Σ_n w_n (W_n − W0)``, and with their words.

    The given pipeline stays as it is. The weights are N numbers, by default 1/N each.

    Raises:
        MimaError: two adapters bring the same word with different meanings.
    """
    words = _all_words(adapters)
    merge = _Merge(pipeline, adapters, weights or [1 / len(adapters)] * len(adapters), words)
    return with_words(with_values(pipeline, merge.weighted(merge.names)), words)


class _Merge:
    """The merge of some adapters, none of weight 0."""

    def __init__(
        self,
        pipeline: Pipeline,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        words: Mapping[str, torch.Tensor],
    ) -> None:
        self.pipeline = pipeline
        self.adapters = adapters
        self.weights = list(weights)
        self.words = words
        self.names = list(
            dict.fromkeys(name for one in adapters for name in (*one.factors, *one.values))
        )
        self.base = {name: parameter(pipeline, name).detach() for name in self.names}

    def weighted(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """``φ = W0 + Σ_n w_n (W_n − W0)``."""
        merged = {name: self._add(name) for name in names if self._low_rank(name)}
        full = [name for name in names if name not in merged]
        values = ops.weighted_merge(*self._whole(full), self.weights)
        return {**merged, **dict(zip(full, values, strict=True))}

    def _whole(self, names: Sequence[str]) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """The model's own weights of these names, and each adapter's."""
        base = [self.base[name] for name in names]
        thetas = [
            [one.adapted(name, weight) for name, weight in zip(names, base, strict=True)]
            for one in self.adapters
        ]
        return base, thetas

    def plan(
        self,
        prompts: Sequence[str],
        captions: Path | None,
        num_captions: int,
        lam: float,
        seed: int,
    ) -> MergePlan:
        """The merge plan of the prompts, as the merged text encoders read them."""
        encoders = self.weighted([name for name in self.names if name.startswith("text_encoder")])
        reader: Family = family_of(with_words(with_values(self.pipeline, encoders), self.words))
        C = [reader.token_embeddings(prompt) for prompt in prompts]
        regular = regular_tokens(reader, captions, num_captions, seed)
        try:
            return MergePlan.from_embeddings(C, regular, lam=lam, weights=self.weights)
        except ValueError as error:
            raise MimaError(f"merge: {error}") from error

    def projected(self, plan: MergePlan) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """``φ = W0 + Σ_n (W_n − W0) C_nᵀ M_n`` where text is read, the average elsewhere."""
        family = family_of(self.pipeline)
        reads_text = {f"{family.denoiser_name}.{name}" for name in family.text_projections()}
        here = [name for name in self.names if name in reads_text]
        if not here:
            raise MimaError(
                "merge: no adapter changes a weight that reads text, so there is nothing to "
                "project; use the weighted merge"
            )
        values = self.weighted([name for name in self.names if name not in reads_text])
        targets = [
            {name: self._target(one, name, C_SD) for name in here if one.changes(name)}
            for one, C_SD in zip(self.adapters, plan.C, strict=True)
        ]
        low_rank = [name for name in here if self._low_rank(name)]
        for name in low_rank:
            touching = self._touching(name)
            values[name] = ops.merge_lora(
                self.base[name],
                [plan.M[n] for n in touching],
                [targets[n][name] for n in touching],
                [1.0] * len(touching),
                [1.0] * len(touching),
            )
        full = [name for name in here if name not in low_rank]
        merged = ops.projected_merge(*self._whole(full), plan.C, plan.M)
        values |= dict(zip(full, merged, strict=True))

        residual = self._residual(plan, targets, {name: values[name] for name in here})
        return values, {
            "residual": residual,
            "drift_bound": plan.drift_bound.tolist(),
            "condition": plan.condition,
        }

    def _residual(
        self,
        plan: MergePlan,
        targets: Sequence[Mapping[str, torch.Tensor]],
        merged: Mapping[str, torch.Tensor],
    ) -> list[float | None]:
        """Per adapter, ``‖(φ − W0) C_nᵀ − A_n‖ / ‖A_n‖``, with ``targets`` the ``A_n`` by weight.

        Measured on the merged weights themselves, with the rounding of their dtype. Of a weight
        that the adapter leaves alone, ``A_n`` is 0.
        """
        lengths = [len(C_SD) for C_SD in plan.C]
        C_TD = torch.cat(plan.C)
        errors, norms = [0.0] * len(targets), [0.0] * len(targets)
        for name, value in merged.items():
            moved = ((value - self.base[name]) @ C_TD.mT).split(lengths, dim=1)
            for n, (wanted, gap_oS) in enumerate(zip(targets, moved, strict=True)):
                if name in wanted:
                    gap_oS = gap_oS - wanted[name]
                    norms[n] += float(wanted[name].float().square().sum())
                errors[n] += float(gap_oS.float().square().sum())
        return [math.sqrt(e / n) if n else None for e, n in zip(errors, norms, strict=True)]

    def _low_rank(self, name: str) -> bool:
        return all(name in one.factors for one in self.adapters if one.changes(name))

    def _touching(self, name: str) -> list[int]:
        """Which adapters have a low-rank update of a weight."""
        return [n for n, one in enumerate(self.adapters) if name in one.factors]

    def _add(self, name: str) -> torch.Tensor:
        """The weight plus low-rank updates, none of which is formed."""
        weight, touching = self.base[name], self._touching(name)
        factors = [self.adapters[n].factors[name] for n in touching]
        merged = ops.merge_lora(
            weight.flatten(1),
            [one.A.to(weight) for one in factors],
            [one.B.to(weight) for one in factors],
            [one.scale for one in factors],
            [self.weights[n] for n in touching],
        )
        return merged.view_as(weight)

    def _target(self, adapter: Adapter, name: str, C_SD: torch.Tensor) -> torch.Tensor:
        """``A_n = (W_n − W0) C_nᵀ`` [o, S_n], in the weight's dtype."""
        weight = self.base[name]
        if name in adapter.factors:
            update = adapter.factors[name]
            return (update.B.to(weight) @ (update.A.to(weight) @ C_SD.mT)) * update.scale
        return (adapter.values[name].to(weight) - weight) @ C_SD.mT


def _prompts(adapters: Sequence[Adapter], given: Sequence[str] | None) -> list[str]:
    texts = given or [adapter.prompt or "" for adapter in adapters]
    silent = [one.name for one, text in zip(adapters, texts, strict=True) if not text.strip()]
    if silent:
        raise MimaError(
            f"merge: the projected merge needs the prompt of {', '.join(silent)}; give one for "
            "each adapter, or use the weighted merge"
        )
    return [*texts]


def _all_words(adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
    words: dict[str, torch.Tensor] = {}
    for adapter in adapters:
        for word, rows in adapter.words.items():
            if word in words and not torch.equal(words[word], rows):
                raise MimaError(
                    f"merge: two adapters bring the word {word!r} with different meanings; train "
                    "one of them with another word"
                )
            words[word] = rows
    return words
