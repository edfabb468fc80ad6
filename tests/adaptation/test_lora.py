import copy
import dataclasses
import json
import math
import struct
import sys
import types

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors.torch import load_file
from support import tiny

from mima.adaptation import LoRA, Pivotal
from mima.adapters.files import AdapterReader
from mima.adapters.mixed_batch import lora_layers
from mima.concepts import Concept
from mima.erasure import ESD, erase
from mima.errors import MimaError
from mima.families import family_of
from mima.families.pipelines import shared_copy, with_modules
from mima.families.stable_diffusion import StableDiffusion
from mima.immunization.algorithm import immunize
from mima.immunization.config import ImmunizeConfig
from mima.storage.tensor_files import header_texts
from mima.training.batches import losses as batch_losses

FAST = LoRA(learning_rate=1e-2, batch_size=4)


def draw(pipeline, prompt="a red round emoji"):
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, num_inference_steps=4, generator=generator, output_type="pt").images


def test_training_lowers_the_loss_and_leaves_the_given_pipeline_alone(pipeline):
    concept = tiny.concept()
    weights = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    wanted_gradients = [value.requires_grad for value in pipeline.unet.parameters()]
    before = tiny.training_loss(pipeline, concept)
    run = FAST.start(pipeline, concept)
    run.advance(40)

    assert tiny.training_loss(run.pipeline, concept) < 0.9 * before
    assert tiny.training_loss(pipeline, concept) == before
    now = pipeline.unet.state_dict()
    assert list(now) == list(weights)
    assert all(torch.equal(now[name], weights[name]) for name in weights)
    assert [value.requires_grad for value in pipeline.unet.parameters()] == wanted_gradients
    # only adapters differ, and frozen weights exist once
    assert run.pipeline.unet.conv_in.weight.data_ptr() == pipeline.unet.conv_in.weight.data_ptr()


def test_adapter_adds_scaled_low_rank_product(pipeline):
    settings = dataclasses.replace(FAST, rank=3, alpha=6.0)
    run = settings.start(pipeline, tiny.concept())
    run.advance(5)
    adapted = run.pipeline.unet.state_dict()
    expected = {}
    for name, value in pipeline.unet.state_dict().items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in adapted:
            a = adapted[f"{stem}.lora_A.default.weight"]
            b = adapted[f"{stem}.lora_B.default.weight"]
            assert a.shape[0] == b.shape[1] == 3
            value = value + 2.0 * b @ a
        expected[name] = value
    old = pipeline.unet.state_dict()
    changed = [name for name in expected if not torch.equal(expected[name], old[name])]
    # self- and cross-attention of seven transformer blocks, four projections each
    assert len(changed) == 7 * 2 * 4
    merged = type(pipeline.unet).from_config(pipeline.unet.config).eval()
    merged.load_state_dict(expected)
    torch.testing.assert_close(
        draw(run.pipeline), draw(with_modules(pipeline, unet=merged)), atol=1e-5, rtol=0
    )


def test_same_seed_gives_the_same_run_in_one_piece_or_two(pipeline):
    concept = tiny.concept()
    whole, pieces, other = (
        dataclasses.replace(FAST, seed=seed).start(pipeline, concept) for seed in (0, 0, 1)
    )
    whole.advance(6)
    assert list(pieces.until(2, 6)) == [2, 6]
    other.advance(6)
    assert whole.losses == pieces.losses
    assert whole.losses != other.losses
    assert torch.equal(draw(whole.pipeline), draw(pieces.pipeline))


def test_dropout_draws_by_the_seed(pipeline):
    """And not from torch's own state, which two models that are compared find at other places."""
    losses = []
    for state in (0, 1):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        run = dataclasses.replace(FAST, dropout=0.5).start(pipeline, tiny.concept())
        run.advance(1)
        run.advance(2)
        assert torch.equal(torch.get_rng_state(), before)
        losses.append(run.losses)
    plain = FAST.start(pipeline, tiny.concept())
    plain.advance(3)
    assert losses[0] == losses[1] != plain.losses
    other = dataclasses.replace(FAST, dropout=0.5, seed=1).start(pipeline, tiny.concept())
    other.advance(3)
    assert other.losses != losses[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": None},
        {"alpha": 12.0},
        {"convolutions": True},
        {"convolutions": True, "text_encoder": True},
        {"target_modules": ("attn2.to_k", "proj_in")},
    ],
    ids=["alpha=rank", "alpha=3·rank", "convolutions", "with-text", "beside-attention"],
)
def test_diffusers_reads_the_saved_adapter_and_draws_the_same(pipeline, folder, tmp_path, changes):
    run = dataclasses.replace(FAST, **changes).start(pipeline, tiny.concept())
    run.advance(5)
    run.save(tmp_path / "lora")

    fresh = StableDiffusionPipeline.from_pretrained(folder)
    untrained = draw(fresh)
    fresh.load_lora_weights(tmp_path / "lora", weight_name=LORA_WEIGHT_NAME_SAFE)
    assert torch.equal(draw(fresh), draw(run.pipeline))
    assert (draw(fresh) - untrained).abs().max() > 1e-3
    adapted = [run.pipeline.unet, run.pipeline.text_encoder]
    found = AdapterReader(pipeline).read(tmp_path / "lora").factors
    assert len(found) == sum(len(lora_layers(module)) for module in adapted)


def test_prior_loss_is_added_with_its_weight(pipeline):
    concept = tiny.concept()
    first = []
    for weight in (1.0, 2.0, 3.0):
        run = dataclasses.replace(FAST, prior_weight=weight).start(pipeline, concept)
        run.advance(1)
        first.append(run.loss)
    alone = FAST.start(pipeline, concept)
    alone.advance(1)
    assert first[2] - first[1] == pytest.approx(first[1] - first[0], rel=1e-4)
    assert first[0] - (first[1] - first[0]) == pytest.approx(alone.loss, rel=1e-4)


def test_missing_class_images_are_drawn_once_and_kept(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("MIMA_CACHE", str(tmp_path))
    concept = dataclasses.replace(tiny.concept(), class_images=())
    settings = dataclasses.replace(FAST, prior_weight=1.0, num_class_images=2)
    drawn = []
    sample = StableDiffusion.sample_latents

    def count(self, prompts, generator):
        drawn.append(list(prompts))
        return sample(self, prompts, generator)

    monkeypatch.setattr(StableDiffusion, "sample_latents", count)
    first = settings.start(pipeline, concept)
    assert drawn == [[concept.class_prompt] * 2]
    second = settings.start(pipeline, concept)
    assert len(drawn) == 1
    assert torch.equal(first._class_images.pictures.latents, second._class_images.pictures.latents)
    for run in (first, second):
        run.advance(2)
    assert first.losses == second.losses
    (file,) = (tmp_path / "class-images").iterdir()
    # another prompt, seed, number or model: other pictures
    others = [
        (settings, dataclasses.replace(concept, class_prompt="a cat"), pipeline),
        (dataclasses.replace(settings, seed=1), concept, pipeline),
        (dataclasses.replace(settings, num_class_images=1), concept, pipeline),
        (settings, concept, with_modules(pipeline, unet=other_unet(pipeline))),
    ]
    for number, (changed, what, model) in enumerate(others, start=2):
        changed.start(model, what)
        assert len(drawn) == number
    assert len(list((tmp_path / "class-images").iterdir())) == 5
    assert file.exists()


def other_unet(pipeline):
    unet = copy.deepcopy(pipeline.unet)
    unet.conv_in.bias.data += 0.1
    return unet


def test_prior_preservation_needs_class_images_or_a_prompt(pipeline):
    concept = dataclasses.replace(tiny.concept(), class_images=(), class_prompt="")
    with pytest.raises(MimaError, match="'red round': prior preservation needs class_images, or"):
        dataclasses.replace(FAST, prior_weight=1.0).start(pipeline, concept)


def test_loop_can_end_early_and_steps_must_ascend(pipeline):
    run = FAST.start(pipeline, tiny.concept())
    for step in run.until(1, 2, 1000):
        if step == 2:
            break
    assert run.step == len(run.losses) == 2
    with pytest.raises(ValueError, match="ascend from 2"):
        list(run.until(1))


def test_on_step_sees_each_step_and_may_stop_the_training(pipeline):
    run = FAST.start(pipeline, tiny.concept())
    seen = []

    def watch(run):
        seen.append(run.step)
        if run.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.advance(10, on_step=watch)
    assert seen == [1, 2, 3]
    assert not run.pipeline.unet.training


def test_half_precision_model_trains_a_float32_adapter(folder):
    half = StableDiffusionPipeline.from_pretrained(folder).to(dtype=torch.bfloat16)
    run = FAST.start(half, tiny.concept())
    before = tiny.training_loss(run.pipeline, tiny.concept())
    run.advance(40)
    trained = [value for value in run.pipeline.unet.parameters() if value.requires_grad]
    assert {value.dtype for value in trained} == {torch.float32}
    assert half.unet.dtype == torch.bfloat16
    assert tiny.training_loss(run.pipeline, tiny.concept()) < 0.95 * before
    assert draw(run.pipeline).isfinite().all()


def test_gradient_checkpointing_changes_nothing_but_memory(pipeline):
    runs = [
        dataclasses.replace(FAST, gradient_checkpointing=on).start(pipeline, tiny.concept())
        for on in (False, True)
    ]
    for run in runs:
        run.advance(3)
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-6)
    assert not pipeline.unet.is_gradient_checkpointing


def test_gradients_accumulate_over_batches(pipeline):
    """Two batches of one picture and no clipping: the step follows the mean of both gradients."""
    one = tiny.concept(images=1)
    settings = dataclasses.replace(FAST, batch_size=1, max_grad_norm=None)
    run = dataclasses.replace(settings, gradient_accumulation_steps=2).start(pipeline, one)
    parts = settings.start(pipeline, one)
    # the same two draws, their losses differentiated together
    first, second = (parts._draw(parts._images) for _ in range(2))
    losses = [batch_losses(parts._family, [batch])[0] for batch in (first, second)]
    expected = torch.autograd.grad((losses[0] + losses[1]) / 2, parts._injection.parameters)
    seen = []
    step = run._optimizers[0].step

    def record(*args, **keywords):
        seen.extend(value.grad.clone() for value in run._injection.parameters)
        return step(*args, **keywords)

    run._optimizers[0].step = record
    run.advance(1)
    for got, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert run.loss == pytest.approx((losses[0] + losses[1]).item() / 2, rel=1e-5)
    assert (run.step, len(run.losses)) == (1, 1)


def test_8_bit_adam_needs_bitsandbytes(pipeline, monkeypatch):
    settings = dataclasses.replace(FAST, use_8bit_adam=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(MimaError, match="use_8bit_adam: needs bitsandbytes"):
        settings.start(pipeline, tiny.concept())

    # where it is there, it is what trains, with the method's settings
    made = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, parameters, **keywords):
            super().__init__(parameters, **keywords)
            made.append(self)

    bitsandbytes = types.ModuleType("bitsandbytes.optim")
    bitsandbytes.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", bitsandbytes)
    run = settings.start(pipeline, tiny.concept())
    run.advance(1)
    (optimizer,) = made
    assert optimizer.defaults["lr"] == 1e-2
    assert len(optimizer.state) == len(run._injection.parameters)


def test_fp16_vae_encodes_and_the_given_one_stays(pipeline):
    runs = [
        dataclasses.replace(FAST, fp16_vae=half).start(pipeline, tiny.concept())
        for half in (False, True)
    ]
    full, half = (run._images.pictures.latents for run in runs)
    assert half.dtype == torch.float32
    assert 0 < (half - full).norm() < 1e-2 * full.norm()
    assert {value.dtype for value in pipeline.vae.parameters()} == {torch.float32}
    assert draw(runs[1].pipeline).isfinite().all()


def test_offloaded_encoders_wait_on_the_cpu_while_training_goes_on(pipeline, device):
    settings = dataclasses.replace(FAST, offload_encoders=True)
    concept = tiny.concept()
    pipeline = pipeline.to(device)
    moved = []
    for name in ("vae", "text_encoder"):
        module = getattr(pipeline, name)
        move = module.to
        module.to = lambda place, name=name, move=move: moved.append((name, place)) or move(place)
    run = settings.start(pipeline, concept)
    assert not moved
    run.advance(2, on_step=lambda _: moved.append("step"))
    away = [("vae", "cpu"), ("text_encoder", "cpu")]
    assert sorted(moved[:2]) == sorted(away)
    assert moved[2:4] == ["step", "step"]
    assert {place.type for _, place in moved[4:]} == {device.type}
    plain = FAST.start(pipeline, concept)
    plain.advance(2)
    assert run.losses == plain.losses


def test_diverging_training_says_so(pipeline):
    run = dataclasses.replace(FAST, learning_rate=1e12, max_grad_norm=None).start(
        pipeline, tiny.concept()
    )
    with pytest.raises(MimaError, match=r"lora: the loss is .* at step .*learning_rate"):
        run.advance(20)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_the_highest_rate_diverges_as_others_do(pipeline, optimizer):
    settings = dataclasses.replace(FAST, learning_rate=1e30, optimizer=optimizer)
    with pytest.raises(MimaError, match=r"lora: the loss is .* at step .*learning_rate"):
        settings.start(pipeline, tiny.concept()).advance(3)


def test_a_model_that_is_not_finite_is_no_matter_of_the_rate(pipeline):
    broken = copy.deepcopy(pipeline)
    broken.unet.conv_in.weight.data[0] = float("nan")
    run = FAST.start(broken, tiny.concept())
    with pytest.raises(MimaError, match="lora: the loss is nan before any step: the model's"):
        run.advance(2)
    assert run.step == 1


def test_model_with_adapters_is_refused(pipeline):
    run = FAST.start(pipeline, tiny.concept())
    with pytest.raises(MimaError, match="adapters are loaded already"):
        FAST.start(run.pipeline, tiny.concept())
    with pytest.raises(MimaError, match="adapters are loaded already"):
        ESD(steps=1).erase(run.pipeline, [tiny.concept()])
    with pytest.raises(MimaError, match="adapters are loaded already"):
        erase(run.pipeline, [tiny.concept()])
    with pytest.raises(MimaError, match="adapters are loaded already"):
        immunize(run.pipeline, [tiny.concept()], ImmunizeConfig(method="joint", steps=1))
    text = dataclasses.replace(FAST, text_encoder=True).start(pipeline, tiny.concept())
    read = with_modules(pipeline, text_encoder=text.pipeline.text_encoder)
    with pytest.raises(MimaError, match="adapters are loaded already"):
        FAST.start(read, tiny.concept())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 2.5),
        ("steps", True),
        ("seed", None),
        ("resolution", 64.0),
        ("optimizer", "adam"),
        ("schedule", "linear"),
        ("learning_rate", 0.0),
        ("batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("gradient_accumulation_steps", 2**31),
        ("weight_decay", -1.0),
        ("weight_decay", math.inf),
        ("max_grad_norm", 0.0),
        ("prior_weight", -0.5),
        ("prior_weight", math.inf),
        ("rank", 0),
        ("alpha", 0.0),
        ("alpha", -4.0),
        ("alpha", math.nan),
        ("alpha", math.inf),
        ("dropout", 1.0),
        ("target_modules", ()),
        ("target_modules", "to_k"),
    ],
)
def test_bad_setting_is_named(name, value):
    with pytest.raises(ValueError, match=f"LoRA: {name}"):
        LoRA(**{name: value})


def test_saving_leaves_other_files_of_the_folder_alone(pipeline, tmp_path):
    header = (
        b'{"__metadata__":{"b":"1","a":"2"},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    others = {
        "inner/foreign.safetensors": struct.pack("<Q", len(header)) + header + bytes(4),
        "broken.safetensors": b"abc",
    }
    (tmp_path / "inner").mkdir()
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    run = FAST.start(pipeline, tiny.concept())
    for _ in range(2):
        assert run.save(tmp_path) == tmp_path
        assert {name: (tmp_path / name).read_bytes() for name in others} == others
        found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
        assert found == {*others, "inner", LORA_WEIGHT_NAME_SAFE}
    # its own metadata are in order all the same
    data = (tmp_path / LORA_WEIGHT_NAME_SAFE).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    texts = list(json.loads(data[8 : 8 + size])["__metadata__"])
    assert texts == sorted(texts)
    assert len(texts) > 1


def test_shared_copy_keeps_storage_and_separates_structure(pipeline):
    copy = shared_copy(pipeline.unet)
    pairs = list(zip(copy.parameters(), pipeline.unet.parameters(), strict=True))
    assert all(new.data_ptr() == old.data_ptr() and new is not old for new, old in pairs)
    copy.conv_in = torch.nn.Identity()
    assert isinstance(pipeline.unet.conv_in, torch.nn.Conv2d)


def test_locon_adapts_convolutions_too(pipeline):
    run = dataclasses.replace(FAST, convolutions=True).start(pipeline, tiny.concept())
    layers = lora_layers(run.pipeline.unet)
    kinds = {type(layer.get_base_layer()) for layer in layers.values()}
    assert kinds == {torch.nn.Linear, torch.nn.Conv2d}
    plain = [m for m in pipeline.unet.modules() if isinstance(m, tuple(kinds))]
    assert len(layers) == len(plain)
    before = tiny.training_loss(run.pipeline, tiny.concept())
    run.advance(5)
    assert tiny.training_loss(run.pipeline, tiny.concept()) < before
    with pytest.raises(ValueError, match="leave target_modules out"):
        LoRA(convolutions=True, target_modules=("to_k",))


def test_a_text_encoder_learns_too_and_is_saved(pipeline, tmp_path):
    run = dataclasses.replace(FAST, text_encoder=True).start(pipeline, tiny.concept())
    given = pipeline.text_encoder
    run.advance(4)
    assert run.pipeline.text_encoder is not given
    assert not lora_layers(given)
    adapters = {
        name: value
        for name, value in run.pipeline.text_encoder.named_parameters()
        if "lora_B" in name
    }
    # two layers with four projections each, all of them away from where they began
    assert len(adapters) == 8
    assert all(bool(value.any()) for value in adapters.values())
    text = family_of(run.pipeline).encode_prompts(["a red round emoji"])["encoder_hidden_states"]
    old = family_of(pipeline).encode_prompts(["a red round emoji"])["encoder_hidden_states"]
    assert (text - old).abs().max() > 1e-4
    run.save(tmp_path)
    written = load_file(tmp_path / LORA_WEIGHT_NAME_SAFE)
    assert (
        sum(name.startswith("unet.") for name in written) == len(lora_layers(run.pipeline.unet)) * 2
    )
    # transformers 4 knows these names with this prefix alone
    texts = {name: value for name, value in written.items() if name.startswith("text_encoder.")}
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in texts)
    saved = list(texts.values())
    live = [v for n, v in run.pipeline.text_encoder.named_parameters() if "lora_" in n]
    assert sorted(v.norm().item() for v in saved) == pytest.approx(
        sorted(v.norm().item() for v in live)
    )
    again = copy.deepcopy(pipeline)
    again.load_lora_weights(tmp_path, weight_name=LORA_WEIGHT_NAME_SAFE)
    read = family_of(again).encode_prompts(["a red round emoji"])["encoder_hidden_states"]
    torch.testing.assert_close(read, text)
    # peft's sets are sorted, so that equal runs write equal files
    header = json.loads(header_texts(tmp_path / LORA_WEIGHT_NAME_SAFE)["lora_adapter_metadata"])
    for part in ("unet", "text_encoder"):
        names = header[f"{part}.target_modules"]
        assert names == sorted(names)


def test_pivotal_trains_the_word_and_then_the_lora(pipeline):
    images = [tiny.picture("red", "round", seed=seed) for seed in range(4)]
    concept = Concept("thing", "a <new1> emoji", images, token="<new1>", initializer="cat")
    run = Pivotal(steps=6, learning_rate=1e-2, rank=2).start(pipeline, concept)
    row, *lora = run._injection.parameters

    def now():
        return [parameter.detach().clone() for parameter in (row, *lora)]

    start = now()
    run.advance(3)
    middle = now()
    assert not torch.equal(middle[0], start[0])
    assert all(map(torch.equal, middle[1:], start[1:]))
    run.advance(3)
    end = now()
    assert torch.equal(end[0], middle[0])
    assert not any(torch.equal(a, b) for a, b in zip(end[2::2], middle[2::2], strict=True))


def test_whole_numbers_of_numpy_are_whole_numbers():
    assert LoRA(steps=np.int64(3), seed=np.int32(1)).steps == 3
