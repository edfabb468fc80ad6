"""Adapters merged into one model: what the merges are, and what they are asked."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from packaging.version import Version
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support.loras import KV, add_lora, assert_same_weights, lora_config, save_lora

import mima
import mima.adaptation
from mima.adapters.files import AdapterReader
from mima.errors import MimaError
from mima.families import family_of
from mima.families.pipelines import with_values
from mima.merging import MergeLayer, MergePlan
from mima.training.captions import regular_tokens

PROMPTS = ["a red round emoji", "a blue square emoji", "a castle"]


def fused(folder, *loras, weights=(1.0,)):
    """What diffusers makes of some LoRA files."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    names = [f"l{n}" for n in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        pipeline.load_lora_weights(lora, adapter_name=name, weight_name=LORA_WEIGHT_NAME_SAFE)
    pipeline.set_adapters(names, list(weights))
    pipeline.fuse_lora(adapter_names=names)
    pipeline.unload_lora_weights()
    return pipeline.unet.state_dict()


@pytest.fixture(scope="module")
def singles(folder, loras):
    """The UNet of each file by itself."""
    return [fused(folder, lora) for lora in loras]


@pytest.mark.parametrize("method", ["weighted", "projected"])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_one_weight_of_1_gives_that_adapter_back_exactly(base, loras, singles, method, n):
    weights = [float(i == n) for i in range(3)]
    merged = mima.merge_adapters(base, loras, weights=weights, method=method, prompts=PROMPTS)
    assert_same_weights(merged.pipeline.unet.state_dict(), singles[n])
    assert merged.adapters == [f"lora-{n}"]


def test_a_merge_on_another_device_leaves_the_pipeline_where_it_is(base, loras):
    # the only other device of every machine, which computes nothing
    with pytest.raises(RuntimeError, match="meta"):
        mima.merge_adapters(base, loras[:1], weights=[0.5], method="weighted", device="meta")
    assert base.unet.device.type == base.text_encoder.device.type == "cpu"


def test_the_weighted_merge_of_lora_is_diffusers_combination(base, folder, loras):
    weights = [0.5, -0.25, 2.0]
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    merged = mima.merge_adapters(base, loras, weights=weights, method="weighted")
    expected = fused(folder, *loras, weights=weights)
    assert_same_weights(merged.pipeline.unet.state_dict(), expected, atol=2e-6, rtol=2e-5)
    assert_same_weights(base.unet.state_dict(), before)
    touched = {name for name, value in before.items() if not torch.equal(value, expected[name])}
    assert set(merged.changed) == {f"unet.{name}" for name in touched}


SVD = pytest.param(
    "svd",
    marks=pytest.mark.skipif(
        Version(peft.__version__) < Version("0.21"),
        reason="before 0.21, peft's svd applies an adapter's scale twice",
    ),
)


@pytest.mark.parametrize("kind", ["cat", SVD, "linear"])
def test_the_weighted_merge_is_pefts_where_that_has_no_cross_terms(base, loras, tmp_path, kind):
    """peft's "linear" adds A and B apart: it agrees where no layer has two adapters."""
    unet = copy.deepcopy(base.unet)
    if kind == "linear":
        parts = [lora_config(3, 6.0, ["attn1.to_q"]), lora_config(3, 2.0, KV)]
    else:
        parts = [lora_config(3, 6.0), lora_config(5, 2.0, use_rslora=True)]
    files = []
    for n, config in enumerate(parts):
        files.append(save_lora(base, tmp_path / f"lora-{n}", config, seed=n))
    model = get_peft_model(unet, parts[0], adapter_name="a0")
    model.add_adapter("a1", parts[1])
    for n, file in enumerate(files):
        state = load_file(file / "pytorch_lora_weights.safetensors")
        own = dict(model.named_parameters())
        for key, value in state.items():
            key = key.removeprefix("unet.").replace(".lora.down.", ".lora_A.")
            key = key.replace(".lora.up.", ".lora_B.").replace(
                "lora_A.weight", f"lora_A.a{n}.weight"
            )
            key = key.replace("lora_B.weight", f"lora_B.a{n}.weight")
            own[f"base_model.model.{key}"].data.copy_(value)
    options = {"svd_rank": 8} if kind == "svd" else {}
    model.add_weighted_adapter(["a0", "a1"], [0.7, 0.4], "both", combination_type=kind, **options)
    model.set_adapter("both")
    expected = model.merge_and_unload(adapter_names=["both"]).state_dict()
    merged = mima.merge_adapters(base, files, weights=[0.7, 0.4], method="weighted")
    assert_same_weights(merged.pipeline.unet.state_dict(), expected, atol=2e-5, rtol=1e-4)


def test_the_projected_merge_is_its_definition(base, folder, loras, singles):
    """From low-rank factors and from whole models: the layer of the paper, and its residual."""
    weights = [0.2, 0.3, 0.5]
    merged = mima.merge_adapters(
        base, loras, weights=weights, prompts=PROMPTS, num_captions=40, lam=1e-3, seed=3
    )
    family = family_of(base)
    plan = MergePlan.from_embeddings(
        [family.token_embeddings(prompt) for prompt in PROMPTS],
        regular_tokens(family, None, 40, 3),
        lam=1e-3,
        weights=weights,
    )
    names = family.text_projections()
    own = dict(base.unet.named_parameters())
    theta = {name: own[name].detach() for name in own}
    adapted = [{name: state[name] for name in theta} for state in singles]
    expected = MergeLayer(torch.tensor(weights), plan, names)(theta, adapted)
    actual = dict(merged.pipeline.unet.named_parameters())
    assert_same_weights(actual, expected, atol=1e-5, rtol=1e-4)
    for n, prompt in enumerate(PROMPTS):
        C_SD = family.token_embeddings(prompt).double()
        missed = wanted = 0.0
        for name in names:
            asked = (adapted[n][name] - theta[name]).double() @ C_SD.mT
            missed += float(((expected[name] - theta[name]).double() @ C_SD.mT - asked).norm() ** 2)
            wanted += float(asked.norm() ** 2)
        assert merged.residual[n] == pytest.approx((missed / wanted) ** 0.5, rel=1e-3)
    assert merged.condition == pytest.approx(plan.condition)
    assert list(merged.drift_bound) == pytest.approx(plan.drift_bound.tolist())

    # the same adapters as whole UNets, in a folder, a file and a file of the changed weights
    whole = mima.merge_adapters(
        base, [_saved(base, adapted[n], folder.parent / f"whole-{n}", n) for n in range(3)],
        weights=weights, prompts=PROMPTS, num_captions=40, lam=1e-3, seed=3,
    )  # fmt: skip
    assert_same_weights(
        dict(whole.pipeline.unet.named_parameters()), expected, atol=1e-5, rtol=1e-4
    )
    assert whole.residual == pytest.approx(merged.residual, rel=1e-3)


def test_the_residual_counts_weights_that_an_adapter_leaves_alone(base, tmp_path):
    """Another adapter may not change there what this one's prompt is answered."""
    targets = ["attn2.to_k"], ["attn2.to_v"]
    files = [
        save_lora(base, tmp_path / f"lora-{n}", lora_config(2, 2.0, names), seed=n)
        for n, names in enumerate(targets)
    ]
    merged = mima.merge_adapters(base, files, prompts=PROMPTS[:2], num_captions=40, lam=0.1)
    family = family_of(base)
    own = dict(base.unet.named_parameters())
    for n, file in enumerate(files):
        C_SD = family.token_embeddings(PROMPTS[n]).double()
        factors = AdapterReader(base).read(file).factors
        missed = wanted = 0.0
        for name in family.text_projections():
            moved = (merged.pipeline.unet.get_parameter(name) - own[name]).double() @ C_SD.mT
            update = factors.get(f"unet.{name}")
            asked = update.delta().double() @ C_SD.mT if update else torch.zeros_like(moved)
            missed += float((moved - asked).norm() ** 2)
            wanted += float(asked.norm() ** 2)
        assert merged.residual[n] == pytest.approx((missed / wanted) ** 0.5, rel=1e-3)


def _saved(base, weights, path, n):
    pipeline = with_values(base, {f"unet.{name}": value for name, value in weights.items()})
    if n == 0:
        pipeline.unet.save_pretrained(path / "unet")
        return path
    if n == 1:
        pipeline.save_pretrained(path)
        return path
    path = path.with_suffix(".safetensors")
    own = base.unet.state_dict()
    save_file({k: v.clone() for k, v in weights.items() if not torch.equal(v, own[k])}, path)
    return path


def test_text_encoder_lora_is_averaged(base, tmp_path):
    encoder = copy.deepcopy(base.text_encoder)
    config = lora_config(2, 2.0, ["q_proj", "v_proj"])  # a file without metadata has scale 1
    add_lora(encoder, config, seed=5)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(encoder))
    base.save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    for layer in encoder.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
    own = {
        name.replace(".base_layer", ""): value
        for name, value in encoder.state_dict().items()
        if "lora_" not in name
    }
    merged = mima.merge_adapters(base, [tmp_path], method="weighted")
    found = merged.pipeline.text_encoder.state_dict()
    assert_same_weights(found, own, rtol=1e-5, atol=1e-6)


def test_adapters_of_one_file_name_are_told_apart_on_the_card(base, tmp_path):
    for number, name in enumerate(("a", "b")):
        save_lora(base, tmp_path / name, lora_config(), number)
    files = [tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("a", "b")]
    merged = mima.merge_adapters(base, files, prompts=PROMPTS[:2])
    text = str(merged.card()).replace("\\", "")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "| residual of" in line]
    # each has its row, with its own number
    names = ["pytorch_lora_weights", "pytorch_lora_weights (2)"]
    assert [name for name, _ in rows] == [f"residual of {name}" for name in names]
    assert [float(value) for _, value in rows] == pytest.approx(merged.residual, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1, 2]}, "one finite number per adapter"),
        ({"weights": [1, 2, float("nan")]}, "one finite number per adapter"),
        ({"weights": [0, 0, 0]}, "all weights are 0"),
        ({"weights": [1, 1, -1], "prompts": PROMPTS}, "no negative weights"),
        ({"prompts": PROMPTS[:2]}, "3 adapters need as many prompts, got 2"),
        ({}, "needs the prompt of lora-0, lora-1, lora-2"),
        ({"method": "average"}, "'average' is unknown"),
    ],
)
def test_numbers_and_texts_that_do_not_agree(base, loras, options, message):
    with pytest.raises(MimaError, match=message):
        mima.merge_adapters(base, loras, **options)
