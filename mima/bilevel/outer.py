"""The gradient of one outer step, in two passes over the concepts: memory of one, and of paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from mima.bilevel import lower
from mima.bilevel.hypergradient import accumulate, pullback, reads_gradients
from mima.bilevel.lower import Carried, LowerLevel, State, Tensors, plus
from mima.bilevel.upper import Upper, along_path, as_numbers, upper_gradient
from mima.distributed import ALONE, Ranks, union
from mima.merging import MergeLayer, Params

KEPT = 2**28
"""Bytes of paths that the second pass finds as the first has walked them; it walks others again."""


@dataclass(frozen=True)
class OuterGradient:
    """dJ/dθ and what was seen on the way.

    Attributes:
        gradient: by name, for the names that were asked for.
        losses: the loss of each upper term, by its name.
        drift: ``‖φ − θ‖ / ‖θ‖``, how far the merge moved the weights.
        residual: ``‖(φ − W_n) C_nᵀ‖ / ‖(W_n − W0) C_nᵀ‖`` over all projected weights and concepts:
            how far they miss the merge's constraint; 0 where nothing is projected.
        ends: where the lower levels that are to go on have stopped, by concept.
        path: the losses at each state of the path that counts, by the steps that lead to it.
        moved: φ_k − θ at each of these states, where it was to be kept.

    Losses, drift and residual are those of the path's last state.
    """

    gradient: Tensors
    losses: dict[Any, float]
    drift: float
    residual: float = 0.0
    ends: dict[int, Carried] = field(default_factory=dict)
    path: dict[int, dict[Any, float]] = field(default_factory=dict)
    moved: dict[int, Tensors] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """Length of the gradient, where this process has all of it."""
        return ALONE.norm(self.gradient)


@torch.no_grad()
def outer_gradient(
    theta: Params,
    tasks: Sequence[LowerLevel],
    merge: MergeLayer,
    upper: Upper,
    *,
    mode: str,
    wrt: tuple[str, ...],
    ranks: Ranks = ALONE,
    keep: bool = False,
) -> OuterGradient:
    """Gradient of ``J(θ) = Σ_k Σ upper_k(Merge({θ'_k[n](θ)}))``, k the states of the path.

    Merge is linear, so the first pass needs each concept's contribution only, and the second asks
    each concept for one vector-Jacobian product:

        φ_k = θ + Σ_n delta_n(θ'_k[n] − θ)
        dJ/dθ = Σ_k φ̄_k + Σ_n Σ_k (∂(θ'_k[n] − θ)/∂θ)ᵀ pullback_n(φ̄_k)

    Where lower levels train new words, each keeps its own embeddings beside φ, and the merge plan
    is made anew from them: delta depends on all, and dJ/dθ goes through the plan's solve to each
    concept's embeddings and through its K steps to θ. ``first_order`` uses the trained embeddings
    and, as everywhere, takes their derivative, of the order of the lower step size, for zero.

    A concept is asked for by its index when its turn comes, and again in the second pass, so that
    ``tasks`` and ``upper`` may make it anew each time, as long as they make it the same.

    Args:
        theta: θ by name, every parameter that any concept or the defender changes.
        tasks: the lower level of each concept. Their paths are merged state by state, so where
            there are several, all take the same number of steps.
        merge: the merge layer, its concepts in the order of ``tasks``.
        upper: the upper level in parts that are summed, each differentiated by itself: one for
            each concept or, where no lower level trains new words, for several. A mapping gives
            such parts for some states of the path, by the steps k in 1 … K that lead to them;
            otherwise they are those of the last state.
        mode: ``exact``, ``finite_difference`` or ``first_order``.
        wrt: the names that the defender may change.
        ranks: the processes that share the concepts out. Each sum over concepts is one all-reduce
            for each state.
        keep: keep φ_k − θ of each state, for ``replayed_gradient``.

    Returns:
        The gradient, the same in every process; equal to that of ``naive_outer_gradient`` up to
        rounding. Memory: that of one concept, or of those whose lower levels share their forwards
        (``LowerLevel.at_once``), φ_k − θ for each state k, and as many paths as ``KEPT`` holds.
    """
    theta = {name: value.detach() for name, value in theta.items()}
    # made once and handed on: to make a task may take an adaptation
    first = {0: tasks[0]}
    steps = first[0].steps
    parts = along_path(upper, steps)
    mine = ranks.share(len(tasks))
    points = {k: _Point() for k in parts}
    names: tuple[str, ...] = ()
    ends: dict[int, Carried] = {}
    walked = _Walked(mode)
    for group in _together(mine, tasks, first):
        for task in group.values():
            if task.steps != steps:
                raise ValueError(
                    f"upper level: paths that are merged differ in length: {steps} and {task.steps}"
                )
        for k, states in enumerate(walked.paths(group, theta), start=1):
            if k in points:
                for (n, task), state in zip(group.items(), states, strict=True):
                    merged = points[k].add(n, task, task.change(state.z, theta), merge, theta)
                    names = tuple(dict.fromkeys((*names, *merged)))
        for (n, task), state in zip(group.items(), states, strict=True):
            if task.continues:
                ends[n] = task.stop(state, theta)
        # frees the last states before the next concepts' paths begin
        del state, states
    bars: dict[int, _Bar] = {}
    total: Tensors = {}
    path: dict[int, dict[Any, float]] = {}
    kept: dict[int, Tensors] = {}
    for k, point in points.items():
        if merge.trained_tokens:
            point.merge = _plan_anew(merge, point.tokens, len(tasks), ranks)
        else:
            point.merge = merge
        moved = point.moved | point.merge.spread(point.asked, {name: theta[name] for name in names})
        point.moved = {}
        moved = ranks.all_reduce(moved, theta)
        missed = point.merge.missed(point.asked, {name: moved[name] for name in names})
        far = drift(theta, moved, ranks)
        if keep:
            kept[k] = dict(moved)
        # popped: memory holds φ or the change, and both only where the change is kept
        phi = {name: v + moved.pop(name) if name in moved else v for name, v in theta.items()}
        # without a second pass, nothing reads the gradient at what the attackers alone change
        asked = wrt if mode == "first_order" else None
        bar, words_bar, path[k] = upper_gradient(phi, parts[k], ranks, point.words, asked)
        accumulate(total, {name: bar[name] for name in wrt})
        if mode != "first_order":
            bars[k] = _Bar({name: bar[name] for name in names}, words_bar)
            if merge.trained_tokens:
                bars[k].tokens = _plan_pullback(
                    point.merge, point.asked, bars[k].changed, len(tasks), ranks
                )
    if mode != "first_order":

        def cotangent(n: int, task: LowerLevel, k: int, state: Callable[[], Params]) -> Tensors:
            point, bar = points[k], bars[k]
            back = point.merge.pullback(n, bar.changed)
            if merge.trained_tokens:
                change, _ = apart(task.change(state(), theta), theta)
                C_bar = bar.tokens[n] + point.merge.token_pullback(n, change, bar.changed)
                accumulate(back, _tokens_pullback(task, point.words[n], C_bar))
            accumulate(back, bar.words.get(n, {}))
            return back

        second: Tensors = {}
        for n in mine:
            task = tasks[n]
            cotangents = {k: partial(cotangent, n, task, k) for k in points}
            path_of_one = walked.kept.pop(n, None)
            accumulate(second, pullback(mode, task, theta, wrt, cotangents, path_of_one))
        accumulate(total, ranks.all_reduce(second, {name: theta[name] for name in wrt}))
    everyone = _gathered(ends, ranks, theta)
    return OuterGradient(total, path[max(path)], far, residual(missed, ranks), everyone, path, kept)


@torch.no_grad()
def replayed_gradient(
    theta: Params,
    moved: Mapping[int, Tensors],
    upper: Upper,
    *,
    wrt: tuple[str, ...],
    ranks: Ranks,
) -> OuterGradient:
    """First-order gradient of ``Σ_k Σ upper_k(θ + moved_k)``: an earlier attack on another θ.

    Args:
        theta: θ by name, as it is now.
        moved: ``OuterGradient.moved`` of the step that simulated the attack.
        upper: the upper level at the same states.
        wrt: the names that the defender may change.
        ranks: the processes that share the parts of the upper level out.

    Returns:
        The gradient; ``moved`` is that of the argument.
    """
    theta = {name: value.detach() for name, value in theta.items()}
    total: Tensors = {}
    path: dict[int, dict[Any, float]] = {}
    for k, parts in along_path(upper, max(moved)).items():
        bar, _, path[k] = upper_gradient(plus(theta, moved[k]), parts, ranks, wrt=wrt)
        accumulate(total, bar)
    last = max(path)
    return OuterGradient(
        total, path[last], drift(theta, moved[last], ranks), path=path, moved=dict(moved)
    )


def _together(
    mine: Iterable[int], tasks: Sequence[LowerLevel], made: dict[int, LowerLevel]
) -> Iterator[dict[int, LowerLevel]]:
    """Lower levels of concepts in turn, by their indices; together those that share forwards.

    ``tasks`` makes them, but for those that are ``made`` already.
    """
    group: dict[int, LowerLevel] = {}
    for n in mine:
        task = made.pop(n, None) or tasks[n]
        if group and not task.joins(list(group.values())):
            yield group
            group = {}
        group[n] = task
        # a full group is handed out before the next lower level is made
        if len(group) >= task.at_once:
            yield group
            group = {}
    if group:
        yield group


class _Walked:
    """The paths of the first pass, and those that it keeps for the second.

    Args:
        mode: of the hypergradient; ``first_order`` has no second pass.

    Attributes:
        kept: states 0 to K of concepts' paths.
    """

    def __init__(self, mode: str) -> None:
        self.kept: dict[int, list[State]] = {}
        self._mode = mode
        self._room = KEPT

    def paths(self, group: Mapping[int, LowerLevel], theta: Params) -> Iterator[list[State]]:
        """All states after each step of lower levels that share their forwards."""
        tasks = list(group.values())
        with_gradients = any(reads_gradients(self._mode, task) for task in tasks)
        kept: dict[int, list[State]] = {}
        # of one step, the second pass computes nothing again
        if self._mode != "first_order" and tasks[0].steps > 1:
            sizes = (lower.path_bytes(t, theta, with_gradients=with_gradients) for t in tasks)
            size = sum(sizes)
            if size <= self._room:
                self._room -= size
                kept = {n: [] for n in group}
        self.kept |= kept
        return lower.paths(tasks, theta, list(kept.values()), with_gradients=with_gradients)


def kept_paths(num_bytes: int, count: int, at_once: int) -> int:
    """How many paths the second pass finds as the first has walked them.

    Args:
        num_bytes: of one path, as ``lower.path_bytes`` says.
        count: how many there are.
        at_once: how many share their forwards, which are kept together or not at all.
    """
    room, kept = KEPT, 0
    for first in range(0, count, at_once):
        together = min(at_once, count - first)
        if together * num_bytes <= room:
            room -= together * num_bytes
            kept += together
    return kept


def _gathered(ends: dict[int, Carried], ranks: Ranks, theta: Params) -> dict[int, Carried]:
    """What each process' concepts carry on, in every process: another may draw them next."""
    if ranks.size == 1:
        return ends
    cpu, device = torch.device("cpu"), next(iter(theta.values())).device
    everyone = ranks.all_gather({n: end.to(cpu) for n, end in ends.items()})
    return {n: part[n].to(device) for part in everyone for n in part}


@dataclass
class _Point:
    """What the concepts of this process bring to one state of the path, and how it is merged."""

    moved: Tensors = field(default_factory=dict)
    asked: dict[int, torch.Tensor] = field(default_factory=dict)
    tokens: dict[int, torch.Tensor] = field(default_factory=dict)
    words: dict[int, Tensors] = field(default_factory=dict)
    merge: MergeLayer = field(init=False)

    def add(
        self, n: int, task: LowerLevel, change: Params, merge: MergeLayer, theta: Params
    ) -> tuple[str, ...]:
        """Take concept n's change in; the names that are merged."""
        merged, self.words[n] = apart(change, theta)
        merge.add_averaged(self.moved, n, merged)
        if merge.plan is not None:
            self.tokens[n] = task.tokens(self.words[n]) if merge.trained_tokens else merge.plan.C[n]
            self.asked[n] = merge.asked(merged, self.tokens[n])
        return tuple(merged)


@dataclass
class _Bar:
    """The gradient at one state of the path: at the merged names, at new words, at tokens."""

    changed: Tensors
    words: dict[int, Tensors]
    tokens: list[torch.Tensor] = field(default_factory=list)


def apart(change: Params, theta: Params) -> tuple[Tensors, Tensors]:
    """The change of parameters in θ, which are merged, and of new words, which are not."""
    merged = {name: value for name, value in change.items() if name in theta}
    return merged, {name: value for name, value in change.items() if name not in theta}


def _plan_anew(
    merge: MergeLayer, tokens: Mapping[int, torch.Tensor], count: int, ranks: Ranks
) -> MergeLayer:
    """The merge for the trained tokens, its plan with a graph back to them."""
    C = _everyones(list(tokens.values()), count, ranks, merge.weights.device)
    with torch.enable_grad():
        return merge.for_tokens([C_SD.requires_grad_() for C_SD in C])


def _plan_pullback(
    merge: MergeLayer, asked: Mapping[int, torch.Tensor], phi_bar: Params, count: int, ranks: Ranks
) -> list[torch.Tensor]:
    """Gradient at every concept's tokens through the plan's solve."""
    assert merge.plan is not None
    M_bar = [merge.plan_pullback(A, phi_bar) for A in asked.values()]
    everyones = _everyones(M_bar, count, ranks, merge.weights.device)
    return list(torch.autograd.grad(merge.plan.M, merge.plan.C, everyones))


def _tokens_pullback(task: LowerLevel, words: Params, C_bar: torch.Tensor) -> Tensors:
    """Gradient at a concept's new words for one at its tokens."""
    leaves = {name: value.detach().requires_grad_() for name, value in words.items()}
    with torch.enable_grad():
        C_SD = task.tokens(leaves)
    return dict(zip(leaves, torch.autograd.grad(C_SD, list(leaves.values()), C_bar), strict=True))


def _everyones(
    mine: Sequence[torch.Tensor], count: int, ranks: Ranks, device: torch.device
) -> list[torch.Tensor]:
    """A small tensor for each concept, from the processes that have them, in every process."""
    return [x.to(device) for x in ranks.interleave([x.detach().cpu() for x in mine], count)]


def unmerged_gradient(
    theta: Params,
    tasks: Sequence[LowerLevel],
    upper: Upper,
    *,
    mode: str,
    wrt: tuple[str, ...],
    ranks: Ranks = ALONE,
) -> OuterGradient:
    """Gradient of ``Σ_n upper_n(θ'[n](θ))``: each concept faces its own adaptation, no merge.

    IMMA's objective (Zheng & Yeh, ECCV 2024), summed over concepts, here along their paths.
    """
    alone = MergeLayer(torch.ones(1))
    gradient: Tensors = {}
    seen: list[tuple[dict[Any, float], float, dict[int, dict[Any, float]]]] = []
    ends: dict[int, Carried] = {}
    for n in ranks.share(len(tasks)):
        task = tasks[n]
        own: Upper
        if isinstance(upper, Mapping):
            own = {k: [parts[n]] for k, parts in upper.items() if k <= task.steps}
        else:
            own = [upper[n]]
        one = outer_gradient(theta, [task], alone, own, mode=mode, wrt=wrt, ranks=ranks.for_one())
        accumulate(gradient, one.gradient)
        seen.append((one.losses, one.drift, one.path))
        if one.ends:
            ends[n] = one.ends[0]
    everyone = ranks.interleave(seen, len(tasks))
    return OuterGradient(
        ranks.all_reduce(gradient, {name: theta[name] for name in wrt}),
        union(losses for losses, _, _ in everyone),
        max(drift for _, drift, _ in everyone),
        ends=_gathered(ends, ranks, theta),
        path={
            k: union(path[k] for _, _, path in everyone if k in path)
            for k in sorted({k for _, _, path in everyone for k in path})
        },
    )


def naive_outer_gradient(
    theta: Params,
    tasks: Sequence[LowerLevel],
    merge: MergeLayer,
    upper: Upper,
    *,
    wrt: tuple[str, ...],
) -> OuterGradient:
    """The same gradient with every concept's graph held at once: the definition, for tests.

    Run it inside ``twice_differentiable_attention`` if the loss has attention.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
    paths = [lower.unroll(task, leaves) for task in tasks]
    objective = torch.zeros((), device=merge.weights.device)
    for k, parts in along_path(upper, tasks[0].steps).items():
        adapted, words, C = [], [], []
        for task, path in zip(tasks, paths, strict=True):
            change, own = apart(task.change(path[k - 1], leaves), leaves)
            adapted.append(plus(leaves, change))
            words.append(own)
            if merge.trained_tokens:
                C.append(task.tokens(own))
        phi = (merge.for_tokens(C) if merge.trained_tokens else merge)(leaves, adapted)
        losses: dict[Any, torch.Tensor] = {}
        for own, level in zip(words, parts, strict=True):
            part, found = level({**phi, **own})
            objective = objective + part
            losses |= found
    inputs = [leaves[name] for name in wrt]
    grads = torch.autograd.grad(objective, inputs, materialize_grads=True)
    return OuterGradient(
        dict(zip(wrt, grads, strict=True)),
        as_numbers(losses),
        drift(theta, {name: phi[name].detach() - value for name, value in theta.items()}),
    )


def drift(theta: Params, moved: Params, ranks: Ranks = ALONE) -> float:
    """``‖φ − θ‖ / ‖θ‖`` for ``moved`` = φ − θ."""
    size = ranks.norm(theta)
    return ranks.norm(moved) / size if moved and size else 0.0


def residual(missed: tuple[float, float], ranks: Ranks) -> float:
    """The constraint's residual from what ``MergeLayer.missed`` says of this process' concepts."""
    everyone = ranks.all_gather(ranks.over_shards(*missed))
    gaps, asked = map(sum, zip(*everyone, strict=True))
    return float((gaps / asked) ** 0.5) if asked else 0.0
