"""What the merge of a run is made of, and where."""

from unittest import mock

import pytest
import torch
from support import builders
from support.immunizing import concepts, problem_of, settings

from mima.errors import MimaError
from mima.families import family_of, load_pipeline
from mima.immunization.algorithm import immunize
from mima.immunization.checks import check_model
from mima.immunization.config import ImmunizeConfig
from mima.immunization.merge import concept_tokens, merge_layer
from mima.merging import MergePlan


def test_a_merge_is_where_the_run_computes(small_model):
    family = family_of(load_pipeline(str(small_model)))
    elsewhere = torch.device("meta")
    stop = mock.patch.object(MergePlan, "from_embeddings", side_effect=ValueError("enough"))
    with stop as made, pytest.raises(MimaError, match="enough"):
        merge_layer(family, concepts(2), ImmunizeConfig(), elsewhere)
    C, regular = made.call_args.args
    assert {x.device for x in (*C, regular, made.call_args.kwargs["weights"])} == {elsewhere}


def test_the_merge_is_made_of_what_the_erased_model_reads(tmp_path, monkeypatch):
    """Of transformers with joint attention, erasure edits what reads the text."""
    folder = builders.save(builders.sd3, tmp_path / "model")
    solved = []
    monkeypatch.setattr(
        "mima.immunization.algorithm._run", lambda problem, *_: solved.append(problem) or []
    )
    immunize(folder, concepts(1), settings(tmp_path, erase_first=True, steps=1))
    (problem,) = solved
    (concept,) = concepts(1)
    read = concept_tokens(problem.family, concept)
    assert torch.equal(problem.merge.plan.C[0], read)
    before = concept_tokens(family_of(load_pipeline(folder)), concept)
    assert (read - before).norm() > 1e-2 * before.norm()


def test_a_merge_of_prompts_is_not_of_what_other_captions_teach(model):
    pipeline = load_pipeline(str(model))
    attacker = {"captions": ["as_is", "rare_token"]}

    def check(lower=attacker, **changes):
        check_model(pipeline, concepts(1), ImmunizeConfig(lower=lower, **changes))

    with pytest.raises(MimaError, match=r"captions: .* learned under rare_token needs merge"):
        check()
    for other in ({"merge": "average"}, {"merge": "sum"}, {"method": "joint"}):
        check(**other)
    # of weights that nothing projects the mean is kept
    check(attacker | {"parameters": r"conv_in\.weight"})


@pytest.mark.parametrize("rule", ["projected", "average", "sum"])
def test_a_step_about_some_concepts_merges_these_alone(model, tmp_path, rule):
    """Its gradient is that of a run which has no other concepts."""
    config = settings(tmp_path, merge=rule, concepts_per_step=2, hypergradient="exact")
    three = problem_of(model, config, 3)
    step = next(step for step in range(9) if three.concepts(step) == [0, 1])
    two = problem_of(model, config, 2)
    ours, alone = (
        problem.hypergradient(
            problem.theta(), problem.lower_levels(step), problem.upper_levels(step)
        )
        for problem in (three, two)
    )
    # the shares are 1/2 in both, which one of them has from thirds
    torch.testing.assert_close(ours.gradient, alone.gradient, rtol=1e-4, atol=1e-7)
    assert ours.losses == pytest.approx(alone.losses)
    assert ours.drift == pytest.approx(alone.drift)
