"""LoRA files of other programs mean what their format says, or what is not read is named."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from support import builders, ldm

from mima.adapters.files import AdapterReader
from mima.errors import MimaError

ENCODERS = {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return builders.sdxl(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return builders.flux(tmp_path_factory.mktemp("flux"))


def layer(name, shape, rank, alpha=None, names=("lora_down", "lora_up"), dtype=torch.float32):
    """One layer's tensors, and its update by hand: ``alpha / rank · B A``, where alpha is None B A.

    Shape is that of the weight, flat but for a convolution's.
    """
    down = torch.randn(rank, *shape[1:]).to(dtype)
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:])).to(dtype)
    state = dict(zip((f"{name}.{part}.weight" for part in names), (down, up), strict=True))
    if alpha is not None:
        state[f"{name}.alpha"] = torch.tensor(alpha)
    product = up.flatten(1).double() @ down.flatten(1).double()
    return state, product * (1 if alpha is None else alpha / rank)


def kohya(pipeline, *, sgm=False, dtype=torch.float32):
    """Layers of UNet and text encoders with ranks and alphas of their own; updates by weight."""
    ranks, alphas = (2, 5, 3, 4), (1.0, 7.0, None, 0.3, 4.0)
    unet = pipeline.unet
    names = {name: name for name in unet.state_dict()}
    if sgm:
        names = dict(zip(unet.state_dict(), ldm.unet(unet), strict=True))
    places = {}
    for name, module in unet.named_modules():
        # of the layers outside the blocks, older diffusers takes some for each other
        if "block" in name and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            key = names[f"{name}.weight"].removeprefix("model.diffusion_model.")
            key = key.removesuffix(".weight").replace(".", "_")
            places[f"unet.{name}.weight"] = (f"lora_unet_{key}", module.weight.shape)
    for part, prefix in ENCODERS.items():
        for name, module in getattr(pipeline, part, torch.nn.Module()).named_modules():
            if isinstance(module, torch.nn.Linear) and "encoder.layers" in name:
                key = prefix + name.removeprefix("text_model.").replace(".", "_")
                places[f"{part}.{name}.weight"] = (key, module.weight.shape)
    state, updates = {}, {}
    for n, (weight, (key, shape)) in enumerate(places.items()):
        rank = min(ranks[n % len(ranks)], *shape[:2])
        held, updates[weight] = layer(key, shape, rank, alphas[n % len(alphas)], dtype=dtype)
        state |= held
    return state, updates


def assert_read(pipeline, file, state, updates):
    save_file(state, file)
    found = AdapterReader(pipeline).read(file).factors
    assert found.keys() == updates.keys()
    for name, update in updates.items():
        torch.testing.assert_close(found[name].delta(), update.float(), msg=name)


@pytest.mark.parametrize(
    ("model", "options"),
    [("base", {}), ("base", {"dtype": torch.float16}), ("sdxl", {}), ("sdxl", {"sgm": True})],
    ids=["sd", "sd-float16", "sdxl", "sdxl-sgm"],
)
def test_each_layer_of_kohyas_files_has_a_strength_of_its_own(model, options, request, tmp_path):
    pipeline = request.getfixturevalue(model)
    assert_read(pipeline, tmp_path / "lora.safetensors", *kohya(pipeline, **options))


def test_one_strength_for_all_layers_is_no_part_of_their_matrices(base, tmp_path):
    width = base.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight.shape
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_"
    state = {}
    for projection, rank in (("q", 4), ("out_0", 2)):
        state |= layer(name + projection, width, rank, 0.3 * rank)[0]
    save_file(state, tmp_path / "lora.safetensors")
    factors = AdapterReader(base).read(tmp_path / "lora.safetensors").factors
    ups = [factor.B for factor in factors.values()]
    assert [factor.scale for factor in factors.values()] == pytest.approx([0.3, 0.3])
    assert {len(up.mT) for up in ups} == {2, 4}
    assert all(any(torch.equal(up, x) for x in state.values() if x.shape == up.shape) for up in ups)


WIDTH = 24
BLOCK = "transformer.transformer_blocks.0"


def test_layers_of_flux_have_strengths_of_their_own(flux, tmp_path):
    fused, product = layer("lora_unet_double_blocks_0_img_attn_qkv", (3 * WIDTH, WIDTH), 4, 0.3)
    updates = dict(
        zip((f"{BLOCK}.attn.to_{n}.weight" for n in "qkv"), product.chunk(3), strict=True)
    )
    state, updates[f"{BLOCK}.ff.net.2.weight"] = layer(
        "lora_unet_double_blocks_0_img_mlp_2", (WIDTH, 4 * WIDTH), 3, 7.0
    )
    assert_read(flux, tmp_path / "kohya.safetensors", state | fused, updates)
    state, updates = {}, {}
    for n, names in enumerate([("lora_down", "lora_up"), ("lora_A", "lora_B")]):
        for projection, alpha in (("q", 2.0), ("k", 7.0)):
            name = f"{BLOCK}.attn.to_{projection}"
            held, updates[f"{name}.weight"] = layer(name, (WIDTH, WIDTH), 4 - n, alpha, names)
            state |= held
        assert_read(flux, tmp_path / f"peft-{n}.safetensors", state, updates)
        state = {}


def of_flux(name, *, rank=4, width=WIDTH):
    return layer(name, (width, width), rank, 2.0)[0]


GOOD = "lora_unet_double_blocks_0_img_attn_proj"
PEFT = f"{BLOCK}.attn.to_q"
LEFT_OUT = {
    "T5 of kohya": (GOOD, of_flux("lora_te3_encoder_block_0_layer_0_SelfAttention_q"), "lora_te3_"),
    "T5 of ComfyUI": (
        GOOD,
        of_flux("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"),
        r"text_encoders\.t5xxl",
    ),
    "the projection of CLIP": (GOOD, of_flux("lora_te1_text_projection"), "lora_te1_text_proj"),
    "differences of biases": (
        GOOD,
        {"lora_unet_double_blocks_0_img_mlp_2.diff_b": torch.ones(WIDTH)},
        r"img_mlp_2\.diff_b",
    ),
    "differences of norms": (
        GOOD,
        {"diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale.diff": torch.ones(12)},
        r"key_norm\.scale\.diff",
    ),
    "kohya beside peft": (PEFT, of_flux(GOOD), GOOD),
    "kohya beside OneTrainer": (
        "lora_transformer_transformer_blocks_0_attn_to_q",
        of_flux(GOOD),
        GOOD,
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_diffusers_leaves_out_of_a_file_is_refused(flux, tmp_path, case):
    kept, further, message = LEFT_OUT[case]
    file = tmp_path / "lora.safetensors"
    save_file(of_flux(kept), file)
    assert AdapterReader(flux).read(file).factors
    save_file(of_flux(kept) | further, file)
    with pytest.raises(MimaError, match=f"{message}.* such names"):
        AdapterReader(flux).read(file)


def test_what_diffusers_leaves_out_may_be_zero(flux, tmp_path):
    file = tmp_path / "lora.safetensors"
    nothing = {name: torch.zeros_like(x) for name, x in of_flux("lora_te3_x").items()}
    save_file(of_flux(GOOD) | {k: v for k, v in nothing.items() if "alpha" not in k}, file)
    assert AdapterReader(flux).read(file).factors


@pytest.mark.parametrize("kind", ["sd3", "sana", "lumina2"])
def test_names_that_diffusers_does_not_know_for_a_model_are_named(tmp_path, kind):
    pipeline = builders.KINDS[kind](tmp_path)
    file = tmp_path / "lora.safetensors"
    attention = {"sd3": "transformer_blocks.0.attn", "sana": "transformer_blocks.0.attn1"}
    name = f"{attention.get(kind, 'layers.0.attn')}.to_q"
    known, update = layer(f"transformer.{name}", (24, 24), 4, 2.0, ("lora_A", "lora_B"))
    assert_read(pipeline, file, known, {f"transformer.{name}.weight": update})
    for others in (of_flux("lora_unet_joint_blocks_0_x"), of_flux("lora_transformer_x")):
        for state in (others, known | others):
            save_file(state, file)
            with pytest.raises(MimaError, match=r"lora_[ut]\w+\.lora_\w+\.weight \(2 such names\)"):
                AdapterReader(pipeline).read(file)


def test_clip_by_names_that_diffusers_does_not_know_is_refused(flux, tmp_path):
    file = tmp_path / "lora.safetensors"
    name = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    save_file(of_flux(GOOD) | of_flux(name, width=16), file)
    with pytest.raises(MimaError, match="holds layers of a text encoder by names"):
        AdapterReader(flux).read(file)


def test_alphas_beside_a_configuration_are_refused(base, tmp_path):
    file = tmp_path / "lora.safetensors"
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    state, _ = layer(name, (32, 32), 2, 1.0, ("lora_A", "lora_B"))
    save_file(state, file, {"lora_adapter_metadata": '{"unet.r": 2}'})
    with pytest.raises(MimaError, match=r"to_q\.alpha beside a configuration"):
        AdapterReader(base).read(file)


def test_a_layer_of_another_width_is_refused(flux, tmp_path):
    """Of Flux's control LoRAs, for which diffusers widens the transformer."""
    names = ("lora_A", "lora_B")
    wide = layer("transformer.x_embedder", (WIDTH, 32), 4, None, names)[0]
    save_file(wide | layer(PEFT, (WIDTH, WIDTH), 4, None, names)[0], tmp_path / "c.safetensors")
    with pytest.raises(MimaError, match=r"x_embedder\.weight is changed as \[24, 32\], expected"):
        AdapterReader(flux).read(tmp_path / "c.safetensors")
