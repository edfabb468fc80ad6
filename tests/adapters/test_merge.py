"""Adapters of every kind and whoever wrote them, merged into one model."""

from __future__ import annotations

import copy
import json
import os

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from packaging.version import Version
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support import tiny

import mima
import mima.adaptation
from mima.adapters.files import AdapterReader
from mima.errors import MimaError
from mima.families import family_of
from mima.families.pipelines import with_values
from mima.merging import MergeLayer, MergePlan
from mima.training.captions import regular_tokens

PROMPTS = ["a red round emoji", "a blue square emoji", "a castle"]
KV = ["attn2.to_k", "attn2.to_v"]
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
WORD = "<new1>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_tiny_stable_diffusion(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def base(folder):
    return StableDiffusionPipeline.from_pretrained(folder)


def lora_config(rank=3, alpha=6.0, targets=ATTENTION, **options):
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **options)


def add_lora(unet, config, seed, name="default"):
    inject_adapter_in_model(config, unet, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for layer in unet.modules():
        if isinstance(layer, LoraLayer):
            for part in (layer.lora_A, layer.lora_B):
                part[name].weight.data.normal_(0, 0.3, generator=generator)


def save_lora(base, folder, config, seed):
    """A LoRA file as diffusers writes it."""
    unet = copy.deepcopy(base.unet)
    add_lora(unet, config, seed)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    base.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict()
    )
    return folder


@pytest.fixture(scope="module")
def loras(base, tmp_path_factory):
    """Three files: other ranks, other alphas, other targets, one rank-stabilised."""
    folder = tmp_path_factory.mktemp("loras")
    configs = [
        lora_config(3, 6.0),
        lora_config(5, 2.0, use_rslora=True),
        lora_config(2, 1.0, KV, rank_pattern={"attn2.to_k": 4}),
    ]
    return [
        save_lora(base, folder / f"lora-{n}", config, seed=n) for n, config in enumerate(configs)
    ]


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


def assert_same_weights(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        if tolerance:
            torch.testing.assert_close(value, expected[name], **tolerance)
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("method", ["weighted", "projected"])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_one_weight_of_1_gives_that_adapter_back_exactly(base, loras, singles, method, n):
    weights = [float(i == n) for i in range(3)]
    merged = mima.merge_adapters(base, loras, weights=weights, method=method, prompts=PROMPTS)
    assert_same_weights(merged.pipeline.unet.state_dict(), singles[n])
    assert merged.adapters == [f"lora-{n}"]


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


def test_a_peft_folder_is_read(base, folder, tmp_path):
    config = lora_config(4, 2.0, KV, use_rslora=True)
    model = get_peft_model(copy.deepcopy(base.unet), config)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(tmp_path / "peft")
    merged = mima.merge_adapters(base, [tmp_path / "peft"], method="weighted")
    assert_same_weights(merged.pipeline.unet.state_dict(), model.merge_and_unload().state_dict())


@pytest.fixture(scope="module")
def customs(base, tmp_path_factory):
    """Two Custom Diffusion deltas, each with a word."""
    folders = []
    for n, word in enumerate((WORD, "<new2>")):
        images = [tiny.picture("red", "round", seed=10 * n + i) for i in range(2)]
        concept = mima.Concept(f"thing {n}", f"a {word} emoji", images, token=word)
        run = mima.adaptation.CustomDiffusion(learning_rate=1e-2, seed=n).start(base, concept)
        run.advance(2)
        folders.append(run.save(tmp_path_factory.mktemp("custom") / f"custom-{n}"))
    return folders


def test_custom_diffusion_and_its_words_are_merged_and_reopened(base, customs, tmp_path):
    prompts = [f"a {WORD} emoji", "a <new2> emoji"]
    merged = mima.merge_adapters(base, customs, prompts=prompts, lam=1e-8)
    # both prompts begin with the same "a", of which the two adapters ask different things
    assert all(0 < residual < 0.5 for residual in merged.residual)
    merged.save_pretrained(tmp_path)
    opened = StableDiffusionPipeline.from_pretrained(tmp_path)
    rows = opened.text_encoder.get_input_embeddings().weight
    for custom, word in zip(customs, (WORD, "<new2>"), strict=True):
        learned = load_file(custom / "learned_embeds.safetensors")[word]
        index = opened.tokenizer.convert_tokens_to_ids(word)
        assert opened.tokenizer(f"a {word} emoji").input_ids.count(index) == 1
        assert torch.equal(rows[index], learned)
    assert torch.equal(rows[:-2], base.text_encoder.get_input_embeddings().weight)
    alone = mima.merge_adapters(base, customs, prompts=prompts, weights=[0, 1])
    assert WORD not in alone.pipeline.tokenizer.get_vocab()
    stored = load_file(customs[1] / "pytorch_custom_diffusion_weights.safetensors")
    unet = alone.pipeline.unet.state_dict()
    for key, value in stored.items():
        if value.numel():
            name = key.replace(".processor", "").replace("_custom_diffusion", "")
            assert torch.equal(unet[name], value)


def test_a_learned_word_of_another_program(base, tmp_path):
    row = torch.arange(64.0).view(2, 32)
    torch.save({"string_to_param": {"*": row}, "name": "<two>"}, tmp_path / "word.bin")
    merged = mima.merge_adapters(base, [tmp_path / "word.bin"], method="weighted")
    tokens = merged.pipeline.tokenizer.convert_tokens_to_ids(["<two>", "<two>_1"])
    assert torch.equal(merged.pipeline.text_encoder.get_input_embeddings().weight[tokens], row)


@pytest.mark.parametrize(
    ("word", "message"),
    [("cat", "'cat' is in the model's vocabulary already"), ("", "'' is blank"), (" ", "is blank")],
)
def test_a_word_that_prompts_have_already_is_refused(base, tmp_path, word, message):
    """CLIP's vocabulary has it as "cat</w>"."""
    save_file({word: torch.zeros(1, 32)}, tmp_path / "word.safetensors")
    with pytest.raises(MimaError, match=f"the word {message}" if word.strip() else message):
        mima.merge_adapters(base, [tmp_path / "word.safetensors"], method="weighted")


@pytest.mark.parametrize("word", ["<flora>", "explorer"])
def test_a_word_that_is_spelt_like_another_kind_of_file_is_a_word(base, tmp_path, word):
    row = torch.arange(32.0)[None]
    save_file({word: row}, tmp_path / "learned_embeds.safetensors")
    merged = mima.merge_adapters(base, [tmp_path], method="weighted")
    token = merged.pipeline.tokenizer.convert_tokens_to_ids(word)
    assert torch.equal(merged.pipeline.text_encoder.get_input_embeddings().weight[token], row[0])


def test_words_as_web_interfaces_write_them(base, tmp_path):
    rows = [torch.arange(32.0)[None] + n for n in range(2)]
    whole = {"string_to_token": {"*": 265}, "string_to_param": {"*": rows[0]}, "name": "<web>"}
    torch.save(whole | {"step": 10, "sd_checkpoint": None}, tmp_path / "web.pt")
    save_file({"emb_params": rows[1]}, tmp_path / "styled.safetensors")
    files = [tmp_path / "web.pt", tmp_path / "styled.safetensors"]
    merged = mima.merge_adapters(base, files, method="weighted")
    tokens = merged.pipeline.tokenizer.convert_tokens_to_ids(["<web>", "styled"])
    found = merged.pipeline.text_encoder.get_input_embeddings().weight[tokens]
    assert torch.equal(found, torch.cat(rows))


def test_a_file_of_weights_may_hold_the_tables_that_a_model_is_made_with(base, tmp_path):
    changed = copy.deepcopy(base.unet)
    changed.register_buffer("table", torch.arange(3.0))
    name = next(name for name, _ in changed.named_parameters())
    changed.state_dict()[name].add_(1.0)
    save_file(changed.state_dict(), tmp_path / "unet.safetensors")
    holding = copy.copy(base)
    reader = AdapterReader(base)
    with pytest.raises(MimaError, match="the unet has no table"):
        reader.read(tmp_path / "unet.safetensors")
    holding = copy.deepcopy(base)
    holding.unet.register_buffer("table", torch.arange(3.0))
    found = AdapterReader(holding).read(tmp_path / "unet.safetensors")
    assert f"unet.{name}" in found.values
    assert "unet.table" not in found.values
    holding.unet.table += 1
    with pytest.raises(MimaError, match="the unet has no table"):
        AdapterReader(holding).read(tmp_path / "unet.safetensors")


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


# --- bad input


def _bad_lora(base, path):
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(1, 2)}, path)


def _lora_of_a_wider_model(base, path):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {"lora_A": torch.zeros(1, 99), "lora_B": torch.zeros(16, 1)}
    save_file({f"{layer}.{name}.weight": factor for name, factor in factors.items()}, path)


BAD = {
    "absent": (lambda base, path: None, "does not exist"),
    "damaged": (lambda base, path: path.write_bytes(b"no"), "cannot be read"),
    "not-of-this-model": (_bad_lora, r"does not fit the model|cannot be read"),
    "of-a-wider-model": (_lora_of_a_wider_model, r"does not fit the model: size mismatch for mid_"),
    "unknown": (
        lambda base, path: save_file({f"x{n}": torch.zeros(2) for n in range(9)}, path),
        "of no known kind",
    ),
    "other-shape": (
        lambda base, path: save_file({"conv_in.weight": torch.zeros(3)}, path),
        r"unet.conv_in.weight is \[3\], expected \[16, 4, 3, 3\]",
    ),
    "foreign-name": (
        lambda base, path: save_file(
            {"conv_in.bias": torch.zeros(16), "conv_between.bias": torch.zeros(3)}, path
        ),
        "the unet has no conv_between.bias",
    ),
    "wide-word": (lambda base, path: save_file({"<w>": torch.zeros(7)}, path), "has 7 numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_an_adapter_is_named(base, tmp_path, case):
    make, message = BAD[case]
    make(base, tmp_path / "adapter.safetensors")
    with pytest.raises(MimaError, match=message):
        AdapterReader(base).read(tmp_path / "adapter.safetensors")


def test_a_pickle_that_would_run_code_is_refused(base, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"x": Evil()}, tmp_path / "adapter.pt")
    with pytest.raises(MimaError, match="it is damaged, or holds more than tensors"):
        AdapterReader(base).read(tmp_path / "adapter.pt")


def test_a_dora_file_is_read(base, tmp_path):
    config = lora_config(2, 2.0, KV, use_dora=True)
    save_lora(base, tmp_path / "dora", config, seed=0)
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    merged = mima.merge_adapters(base, [tmp_path / "dora"], method="weighted")
    adapted = copy.deepcopy(base)
    adapted.load_lora_weights(tmp_path / "dora", weight_name=LORA_WEIGHT_NAME_SAFE)
    adapted.fuse_lora()
    adapted.unload_lora_weights()
    assert_same_weights(merged.pipeline.unet.state_dict(), adapted.unet.state_dict())
    assert_same_weights(base.unet.state_dict(), before)
    changed = AdapterReader(base).read(tmp_path / "dora").values
    assert changed
    assert all(name.endswith((".to_k.weight", ".to_v.weight")) for name in changed)


@pytest.mark.parametrize(
    "config",
    [
        LoKrConfig(r=2, alpha=4, target_modules=KV, decompose_both=True),
        LoHaConfig(r=2, alpha=4, target_modules=KV),
        LoraConfig(r=2, target_modules=KV, use_dora=True),
    ],
    ids=["lokr", "loha", "dora"],
)
def test_peft_folders_of_other_kinds_are_read(base, tmp_path, config):
    model = get_peft_model(copy.deepcopy(base.unet), config)
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        if value.requires_grad:
            value.data.normal_(0.5, 0.3, generator=generator)
    model.save_pretrained(tmp_path / "peft")
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    merged = mima.merge_adapters(base, [tmp_path / "peft"], method="weighted")
    assert_same_weights(merged.pipeline.unet.state_dict(), model.merge_and_unload().state_dict())
    assert_same_weights(base.unet.state_dict(), before)
    assert AdapterReader(base).read(tmp_path / "peft").values


@pytest.mark.parametrize(("key", "kind"), [("lokr_w1", "LoKr"), ("hada_w1_a", "LoHa")])
def test_files_of_lycoris_are_refused_by_name(base, tmp_path, key, kind):
    file = tmp_path / "adapter.safetensors"
    save_file({f"lora_unet_down_blocks_0_attentions_0_proj_in.{key}": torch.ones(2, 2)}, file)
    with pytest.raises(MimaError, match=f"is a {kind}; of these, peft's folders"):
        AdapterReader(base).read(file)


def kohya(base, path, **further):
    """A LoRA of one projection as kohya's scripts name it, with alpha 1 at rank 2."""
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    rows, columns = base.unet.get_submodule(name).weight.shape
    prefix = "lora_unet_" + name.replace(".", "_")
    given = {"lora_down.weight": torch.ones(2, columns), "lora_up.weight": torch.ones(rows, 2)}
    given |= {"alpha": torch.tensor(1.0), **further}
    state = {f"{prefix}.{key}": value for key, value in given.items() if value is not None}
    save_file(state, path)
    return f"unet.{name}.weight"


def test_kohyas_files_are_read_and_their_dora_is_refused(base, tmp_path):
    file = tmp_path / "lora.safetensors"
    name = kohya(base, file)
    (factor,) = AdapterReader(base).read(file).factors.items()
    assert factor[0] == name
    assert torch.equal(factor[1].delta(), torch.ones_like(factor[1].delta()))
    # without alpha, the update is B A itself
    kohya(base, file, alpha=None)
    assert AdapterReader(base).read(file).factors[name].delta().eq(2).all()
    for problem, message in (
        ({"dora_scale": torch.ones(4, 1)}, "is a DoRA; this is not supported"),
        ({"lora_up.weight": None}, r"it lacks '.*lora_up\.weight'"),
        ({"lora_up.weight": torch.full((16, 2), torch.nan)}, "to_k.weight holds numbers that are"),
    ):
        kohya(base, file, **problem)
        with pytest.raises(MimaError, match=message):
            AdapterReader(base).read(file)


@pytest.mark.parametrize("beside", [{"bias": "all"}, {"modules_to_save": ["conv_out"]}])
def test_what_peft_keeps_beside_low_rank_matrices_is_refused(base, tmp_path, beside):
    """It would go into the weights that the reader shares with the caller's model."""
    model = get_peft_model(copy.deepcopy(base.unet), LoraConfig(target_modules=["to_k"], **beside))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.save_pretrained(tmp_path)
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    with pytest.raises(MimaError, match="beside the low-rank matrices"):
        AdapterReader(base).read(tmp_path)
    assert_same_weights(base.unet.state_dict(), before)


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


def test_two_meanings_of_one_word_are_refused(base, tmp_path):
    for n in range(2):
        save_file({WORD: torch.full((32,), float(n))}, tmp_path / f"{n}.safetensors")
    files = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    with pytest.raises(MimaError, match=f"two adapters bring the word '{WORD}'"):
        mima.merge_adapters(base, files, method="weighted")


def test_the_prompt_that_adapt_wrote_down_is_used(base, loras, tmp_path):
    origin = {"command": "adapt", "prompts": ["a red round emoji"]}
    (loras[0] / "mima.json").write_text(json.dumps(origin))
    assert AdapterReader(base).read(loras[0]).prompt == "a red round emoji"
    (loras[0] / "mima.json").unlink()


def peft_folder(base, folder, **told):
    unet = copy.deepcopy(base.unet)
    add_lora(unet, lora_config(2, 2.0, KV), 0)
    folder.mkdir(exist_ok=True)
    state = {f"base_model.model.{k}": v for k, v in get_peft_model_state_dict(unet).items()}
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2.0, "target_modules": KV} | told
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


HOSTILE_SETTINGS = {
    "an expression that never ends": ({"target_modules": r"(a*)*b"}, "is an expression"),
    "another": ({"exclude_modules": r"(.*.*)*x"}, "is an expression"),
    "a key that is one": ({"rank_pattern": {r"(a|a)*$": 4}}, "is an expression"),
    "a huge rank": ({"r": 10**9}, "rank 1000000000, the largest"),
    "a huge rank of some": ({"rank_pattern": {"to_k": 10**9}}, "rank 1000000000, the largest"),
    "no rank": ({"r": "two"}, "rank 'two'"),
    "no kind": ({"peft_type": 7}, "cannot be read|is a "),
    "no list": ({"target_modules": {"a": 1}}, "cannot be read|is an expression"),
    "a beginning that moves the weights": ({"init_lora_weights": "olora"}, "'olora' has changed"),
    "one that parts them": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' has changed"),
}


@pytest.mark.parametrize("case", HOSTILE_SETTINGS)
def test_hostile_settings_of_an_adapter_are_refused(base, tmp_path, case):
    told, message = HOSTILE_SETTINGS[case]
    good = peft_folder(base, tmp_path / "good", init_lora_weights="gaussian")
    assert AdapterReader(base).read(good).factors
    with pytest.raises(MimaError, match=message) as caught:
        AdapterReader(base).read(peft_folder(base, tmp_path / "bad", **told))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02.", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x80\x04K\x01.", b"x" * 99]
)
def test_damaged_pickles_are_refused(base, tmp_path, content):
    (tmp_path / "adapter.pt").write_bytes(content)
    with pytest.raises(MimaError, match=r"adapter\.pt"):
        AdapterReader(base).read(tmp_path / "adapter.pt")


def test_names_of_a_megabyte_are_cut_and_looked_through_once(base, tmp_path):
    folder = peft_folder(base, tmp_path / "adapter")
    # a line break keeps an expression from reaching the end
    name = ".lora_" * 100_000 + "\n\n"
    save_file({name: torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(MimaError, match="does not fit the model") as caught:
        AdapterReader(base).read(folder)
    assert len(str(caught.value)) < 1000


def test_a_header_of_many_parts_is_looked_through_once(base, tmp_path):
    header = json.dumps({f"part{n}.r": 2 for n in range(60_000)})
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    state = {f"{layer}.lora_A.weight": torch.zeros(2, 99)}
    save_file(state, tmp_path / "adapter.safetensors", {"lora_adapter_metadata": header})
    with pytest.raises(MimaError, match=r"adapter\.safetensors"):
        AdapterReader(base).read(tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39])
def test_a_product_of_factors_that_is_not_finite_is_refused(base, tmp_path, scale):
    folder = peft_folder(base, tmp_path / "adapter", lora_alpha=scale)
    with pytest.raises(MimaError, match=r"to_k\.weight holds numbers that are not finite"):
        AdapterReader(base).read(folder)


def test_a_folder_without_weights_asks_no_hub(base, tmp_path, monkeypatch):
    # a hub's name of a repository, too
    monkeypatch.chdir(tmp_path)
    folder = peft_folder(base, tmp_path / "owner-name")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MimaError, match=r"holds no adapter_model\.safetensors or adapter_model\.b"):
        AdapterReader(base).read("owner-name")


def test_pipes_are_not_waited_for(base, tmp_path):
    os.mkfifo(tmp_path / "adapter.safetensors")
    with pytest.raises(MimaError, match="holds no adapter"):
        AdapterReader(base).read(tmp_path)
    with pytest.raises(MimaError, match="is no ordinary file"):
        AdapterReader(base).read(tmp_path / "adapter.safetensors")


ODD = {
    "sparse": torch.ones(1, 32).to_sparse(),
    "meta": torch.empty(1, 32, device="meta"),
    "quantized": torch.quantize_per_tensor(torch.ones(1, 32), 0.1, 0, torch.qint8),
    "complex": torch.ones(1, 32, dtype=torch.complex64),
    "repeated": torch.zeros(1).expand(10**9, 32),
    "long": torch.zeros(1000, 32),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_pickles_tensors_are_plain_and_as_large_as_they_look(base, tmp_path, kind):
    for state in ({"<w>": ODD[kind]}, {"string_to_param": {"*": ODD[kind]}, "name": "w"}):
        torch.save(state, tmp_path / "adapter.pt")
        with pytest.raises(
            MimaError, match=r"adapter\.pt: .* (plain tensors are read|1000 vectors)"
        ):
            AdapterReader(base).read(tmp_path / "adapter.pt")


def test_a_peft_pickle_of_texts_is_refused(base, tmp_path):
    folder = peft_folder(base, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x.lora_A.weight": "no"}, folder / "adapter_model.bin")
    with pytest.raises(MimaError, match="adapter"):
        AdapterReader(base).read(folder)


@pytest.mark.parametrize("value", [None, "x", *(torch.ones(16).to(t) for t in (torch.int8, bool))])
@pytest.mark.parametrize("name", ["conv_in.bias", "mid.processor.to_k_custom_diffusion.weight"])
def test_weights_of_no_floating_point_are_refused(base, tmp_path, name, value):
    torch.save({name: value}, tmp_path / "adapter.pt")
    with pytest.raises(MimaError, match=r"adapter\.pt: unet\..* expected numbers of floating"):
        AdapterReader(base).read(tmp_path / "adapter.pt")


def test_low_rank_matrices_of_whole_numbers_are_refused(base, tmp_path):
    folder = peft_folder(base, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    save_file({name: value.to(torch.int8) for name, value in load_file(file).items()}, file)
    message = r"weight is of torch\.int8, expected numbers of floating"
    with pytest.raises(MimaError, match=message):
        AdapterReader(base).read(folder)
    save_lora(base, tmp_path / "lora", lora_config(), 0)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    save_file({name: value.to(torch.int8) for name, value in load_file(file).items()}, file)
    with pytest.raises(MimaError, match=message):
        AdapterReader(base).read(file)


def test_weights_of_8_bits_are_read(base, tmp_path):
    bias = torch.ones(16).to(torch.float8_e4m3fn)
    save_file({"conv_in.bias": bias}, tmp_path / "adapter.safetensors")
    merged = mima.merge_adapters(base, [tmp_path / "adapter.safetensors"], method="weighted")
    assert torch.equal(merged.pipeline.unet.conv_in.bias, bias.float())
    bias.view(torch.uint8)[0] = 0x7F
    save_file({"conv_in.bias": bias}, tmp_path / "adapter.safetensors")
    with pytest.raises(MimaError, match=r"conv_in\.bias holds numbers that are not finite"):
        AdapterReader(base).read(tmp_path / "adapter.safetensors")


NOTED = {"mid.processor.to_k_custom_diffusion.weight": torch.zeros(2), "note": "x"}


@pytest.mark.parametrize(
    "state", [{1: torch.zeros(2)}, {"a": [1]}, {"string_to_param": 3}, {}, NOTED]
)
def test_pickles_of_something_else_are_refused(base, tmp_path, state):
    torch.save(state, tmp_path / "adapter.pt")
    with pytest.raises(MimaError, match=r"adapter\.pt"):
        AdapterReader(base).read(tmp_path / "adapter.pt")
