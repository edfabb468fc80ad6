"""The update that the authors' released code performs, for comparison with published results.

It computes no second derivatives, and does not solve the bi-level problem. Steps come in pairs:

- even: every concept takes one gradient step on the keys and values, from the same weights. The
  results are merged by the hard constraint, without a gradient, and committed: by the tokens of the
  concepts' class prompts, against captions that are drawn anew. All other lower-level parameters
  take one AdamW step on the mean of the concepts' gradients, which is not clipped.
- odd: the upper-level parameters take one AdamW step up on the concepts' losses and down on the
  priors', at the weights as they are now: on the mean over the concepts, clipped.

The released code augments the concepts' pictures (flips, scales with "far away" or "zoomed in" in
the caption); pictures here are read as they are.
"""

# N = concepts, O = output, D = text embedding

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mima.bilevel import lower
from mima.bilevel.hypergradient import accumulate
from mima.bilevel.lower import Tensors
from mima.bilevel.outer import OuterGradient, drift, residual
from mima.bilevel.upper import upper_gradient
from mima.distributed import ALONE, Ranks, union
from mima.immunization import published
from mima.immunization.levels import Problem
from mima.immunization.outer_loop import Ascent
from mima.immunization.progress import Callback, LossName, StepReport
from mima.merging import MergeLayer, Params
from mima.storage.checkpoint import CheckpointFolder


def alternate(
    problem: Problem,
    callbacks: Sequence[Callback] = (),
    folder: CheckpointFolder | None = None,
    *,
    logs: Path | None = None,
) -> list[StepReport]:
    """Run the published pairs of steps, in place on the model's own weights."""
    first, ranks = problem.merge, problem.ranks
    assert first is not None
    assert first.plan is not None
    others = [name for name in problem.lower_names if name not in first.projected]
    with Ascent(problem, callbacks, folder, logs=logs, lower_names=others) as run:
        for step in run.steps():
            if step % 2 == 0:
                tasks = problem.lower_levels(step)
                # the one that the run began with is that of its first step
                plan = first.plan
                if step > 0:
                    plan = published.merge_plan(
                        problem.family,
                        problem.described,
                        problem.config,
                        step,
                        first.weights,
                        problem.captions,
                    )
                merge = MergeLayer(first.weights, plan, first.projected)
                names = [LossName(data.name) for data in problem.data]
                outer, merged = merge_step(
                    run.theta, tasks, merge, names, lr=problem.config.highest_lr, ranks=ranks
                )
                run.update(outer, "lower", committed=merged)
                # otherwise these would be in memory beside the next step's gradients
                del outer, merged
            else:
                upper = problem.upper_levels(step)
                gradient, _, losses = upper_gradient(run.theta, upper, ranks)
                share = 1 / len(problem.data)
                wanted = {name: share * gradient[name] for name in problem.upper_names}
                run.update(OuterGradient(wanted, losses, 0.0))
                del gradient, wanted
    return run.history


def merge_step(
    theta: Params,
    tasks: Sequence[lower.LowerLevel],
    merge: MergeLayer,
    names: Sequence[LossName],
    *,
    lr: float,
    ranks: Ranks = ALONE,
) -> tuple[OuterGradient, Tensors]:
    """The even step: merged keys and values, and the mean gradient of everything else.

    Of each concept's lower level, the gradient of the first batch is used, with the step size lr
    for keys and values. Reports call the concepts' losses by the names.

    Returns:
        The mean gradient of what is not merged, with the losses on the concepts' own pictures, the
        drift and the constraint's residual of the merge; and the merged weights.
    """
    mine = ranks.share(len(tasks))
    assert merge.plan is not None
    total: Tensors = {}
    asked: dict[int, torch.Tensor] = {}
    losses: list[dict[LossName, float]] = []
    for n in mine:
        task = tasks[n]
        loss, gradient = lower.loss_and_gradient(task, lower.start(task, theta), theta, 0)
        # as the upper level's: class pictures count in the gradient alone
        losses.append({names[n]: float(loss if task.own_loss is None else task.own_loss)})
        change = {name: -lr * g for name, g in gradient.items() if name in merge.projected}
        asked[n] = merge.asked(change, merge.plan.C[n])
        rest = {name: g for name, g in gradient.items() if name not in merge.projected}
        accumulate(total, {name: g / len(tasks) for name, g in rest.items()})
    like = {name: theta[name] for name in tasks[0].start(theta)}
    summed = ranks.all_reduce({**merge.spread(asked, like), **total}, like)
    moved = {name: value for name, value in summed.items() if name in merge.projected}
    mean = {name: value for name, value in summed.items() if name not in merge.projected}
    missed = merge.missed(asked, moved)
    report = OuterGradient(
        mean,
        union(ranks.interleave(losses, len(tasks))),
        drift(theta, moved),
        residual(missed, ranks),
    )
    return report, {name: theta[name] + change for name, change in moved.items()}
