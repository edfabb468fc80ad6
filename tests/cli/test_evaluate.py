from __future__ import annotations

import json

import tiny
from cli.commands import run


def test_evaluate_attacks_writes_and_goes_on(model, workdir):
    tiny.save_tiny_clip(workdir / "clip")
    grid = "{lora: {steps: 2, learning_rate: 1e-2}}"
    command = [
        *("evaluate", model, model, "--concepts", "cat", "--others", "dog", "-o", "results"),
        *("--similarity", workdir / "clip", "--processes", 1, "--set", f"methods={grid}"),
        *("--set", "seeds=[0]", "--set", "benign_prompts=2", "--set", "sampler={steps: 2}"),
        *("--set", "lr_factors=[1]", "--name", "same"),
    ]
    # a model and itself, on training pictures since there are no others
    assert "clip: worst attack SGR +0.000" in run(*command)
    written = json.loads((workdir / "results" / "evaluation.json").read_text())
    assert (written["name"], written["method"], written["complete"]) == ("same", None, True)
    assert written["concepts"][0]["references"] == "images"
    attacks = (workdir / "results" / "attacks.csv").read_text()
    assert len(attacks.splitlines()) == 1 + 2
    run(*command)
    assert (workdir / "results" / "attacks.csv").read_text() == attacks
    assert "other seeds, grid" in run(*command, "--set", "seeds=[1]", code=2)
    # by default CLIP, which is not on this machine
    unsaid = ["evaluate", model, model, "--concepts", "cat", "-o", "other", "--processes", 1]
    assert "(--similarity embedded)" in run(*unsaid, code=2)
    assert "preset 'slow' is unknown" in run(*command[:3], *command[3:], "--preset", "slow", code=2)
