from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.commands import run

import mima


def test_merge_and_apply(workdir, model, adapters):
    loras = [adapters / "cat-lora", adapters / "dog-lora"]
    # the prompts are those that adapt wrote down
    output = run("merge", *loras, "--model", model, "-o", "both", "--weights", "0.75,0.25")
    assert "merged cat-lora, dog-lora: both" in output
    assert "residual" in output
    merged = mima.merge_adapters(model, loras, weights=[0.75, 0.25], prompts=["a cat", "a dog"])
    after = load_file("both/unet/diffusion_pytorch_model.safetensors")
    assert after.keys() == merged.pipeline.unet.state_dict().keys()
    assert all(after[k].equal(v) for k, v in merged.pipeline.unet.state_dict().items())
    run("sample", "a cat", "--model", "both", "--steps", 2)

    options = ["--delta", "--weights", "0.75 0.25"]
    run("merge", *loras, "--model", model, "-o", "delta", *options)
    assert set(load_file("delta/model_delta.safetensors")) == set(merged.changed)
    assert not Path("delta/unet").exists()
    assert "applied delta" in run("apply", "delta", "--model", model, "-o", "whole")
    again = load_file("whole/unet/diffusion_pytorch_model.safetensors")
    assert all(again[name].equal(after[name]) for name in after)
    # mima's own, so that they may be replaced
    run("merge", loras[0], "--model", model, "-o", "both", "--method", "weighted", "--overwrite")
    run("apply", "delta", "--model", model, "-o", "whole", "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ADAPTER", "absent", "gone"], "no such adapter: absent, gone"),
        (["ADAPTER", "--weights", "a,b"], "expected numbers, as in 0.5,0.25,0.25"),
        (["ADAPTER", "--weights", "1,2"], "one finite number per adapter (1)"),
        (["ADAPTER", "--prompt", "a", "--prompt", "b"], "1 adapters need as many prompts, got 2"),
        (["cat"], "cat holds no adapter"),
        (["ADAPTER", "--captions", "absent.txt"], "cannot read absent.txt"),
        (["ADAPTER", "--lam", "-1"], "'--lam'"),
        (["ADAPTER", "--method", "sum"], "'sum'"),
        (["ADAPTER", "--model", "absent"], "absent"),
        (["ADAPTER", "--output", "dog"], "not empty"),
    ],
)
def test_bad_merges(workdir, model, adapters, arguments, message):
    before = sorted(workdir.rglob("*"))
    options = [] if "--model" in arguments else ["--model", model]
    options += [] if "--output" in arguments else ["--output", "out"]
    arguments = [adapters / "cat-lora" if item == "ADAPTER" else item for item in arguments]
    assert message in run("merge", *arguments, *options, code=2)
    assert sorted(workdir.rglob("*")) == before
