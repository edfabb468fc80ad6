"""How the defender steps: AdamW, or Muon on matrices and filters."""

import sys

import pytest
import torch
from support.immunizing import assert_same, concepts, problem_of, settings

from mima.adaptation.steps import Muon
from mima.bilevel.outer import OuterGradient
from mima.families import ModelSource
from mima.immunization.algorithm import immunize
from mima.immunization.config import ImmunizeConfig
from mima.immunization.outer_loop import Ascent
from mima.immunization.planning.plan import plan

MUON = {"optimizer": "muon", "lr": 1e-3, "parameters": "denoiser", "max_grad_norm": None}


def test_matrices_take_muons_step_and_the_rest_adamws(model, tmp_path):
    problem = problem_of(model, settings(tmp_path, upper=MUON))
    before = {name: value.clone() for name, value in problem.theta().items()}
    draw = torch.Generator().manual_seed(0)
    gradient = {name: torch.randn(v.shape, generator=draw) for name, v in before.items()}
    with Ascent(problem) as run:
        run.update(OuterGradient(gradient, {}, 0.0))
    kinds = set()
    for name, value in before.items():
        parameter = value.clone().requires_grad_()
        parameter.grad = gradient[name].clone()
        kinds.add(value.ndim)
        if value.ndim in (2, 4):
            alone = Muon([parameter], lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        else:
            alone = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.01)
        alone.step()
        torch.testing.assert_close(run.theta[name], parameter.detach(), rtol=1e-5, atol=1e-8)
    assert kinds == {1, 2, 4}


@pytest.mark.parametrize("offload", [False, True])
def test_a_run_by_muon_goes_on_bit_by_bit(model, tmp_path, offload):
    config = settings(tmp_path, steps=4, upper=MUON, offload_optimizer=offload)
    whole = immunize(model, concepts(), config)
    options = {"checkpoint": tmp_path / "run"}

    def interrupt(report):
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        immunize(model, concepts(), config, callbacks=[interrupt], **options)
    resumed = immunize(model, concepts(), config, resume=True, **options)
    found = resumed.pipeline.unet.state_dict()
    assert_same(found, whole.pipeline.unet.state_dict())
    if offload and sys.platform == "linux":
        plain = immunize(model, concepts(), config.model_copy(update={"offload_optimizer": False}))
        assert_same(found, plain.pipeline.unet.state_dict())


def test_a_plan_counts_one_moment_of_what_muon_trains(model, tmp_path):
    kept = {
        name: plan(
            ModelSource(model), concepts(), settings(tmp_path, upper=MUON | {"optimizer": name})
        ).memory["outer steps"]["the optimizer's moments"]
        for name in ("adamw", "muon")
    }
    problem = problem_of(model, settings(tmp_path, upper=MUON))
    with Ascent(problem) as run:
        run.update(OuterGradient({n: torch.ones_like(v) for n, v in run.theta.items()}, {}, 0.0))
        held = sum(
            value.nbytes
            for name, optimizer in run._optimizers["upper"].items()
            for key, value in optimizer.state[run.theta[name]].items()
            if key != "step"
        )
    assert kept["muon"] == held
    assert 0.5 * kept["adamw"] < held < 0.6 * kept["adamw"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": 2, "hypergradient": "first_order"}, "Muon's step of a matrix needs all its"),
        ({"method": "alternating"}, "no optimizer but adamw"),
        ({"upper": {"optimizer": "sgd"}}, "Input should be 'adamw' or 'muon'"),
    ],
)
def test_what_muon_cannot_do_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ImmunizeConfig.model_validate({"upper": MUON} | changes)
