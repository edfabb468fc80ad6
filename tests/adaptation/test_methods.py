import dataclasses

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from support import tiny

from mima.adaptation import (
    METHODS,
    CustomDiffusion,
    DreamBooth,
    DreamBoothLoRA,
    LoRA,
    TextualInversion,
)
from mima.concepts import Concept
from mima.errors import MimaError
from mima.families import family_of
from mima.families.pipelines import networks

WORD = "<new1>"
PROMPT = f"a {WORD} emoji"


@pytest.fixture
def instance():
    images = [tiny.picture("red", "round", seed=seed) for seed in range(4)]
    return Concept(
        "thing", PROMPT, images, token=WORD, initializer="cat", class_prompt="a round emoji",
        class_images=images[:2],
    )  # fmt: skip


def test_what_is_not_finite_is_not_saved(pipeline, instance, tmp_path):
    """The loss is that before the step, so that the last step's harm shows in the weights alone."""
    run = LoRA(steps=1).adapt(pipeline, instance)
    run.save(tmp_path / "good")
    next(weight for weight in run.pipeline.unet.parameters() if weight.requires_grad).data[0] = (
        torch.inf
    )
    with pytest.raises(MimaError, match="step 1 left numbers that are not finite; lower learning"):
        run.save(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def draw(pipeline, prompt=PROMPT):
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, num_inference_steps=4, generator=generator, output_type="pt").images


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    after = module.state_dict()
    return {name for name, value in before.items() if not torch.equal(after[name], value)}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_leaves_the_given_pipeline_alone(pipeline, instance, method):
    settings = METHODS[method](learning_rate=1e-2, batch_size=4)
    before = {name: weights(network) for name, network in networks(pipeline).items()}
    words = len(pipeline.tokenizer)
    drawn = draw(pipeline)
    run = settings.start(pipeline, instance)
    loss = tiny.training_loss(run.pipeline, instance)
    run.advance(15)

    assert tiny.training_loss(run.pipeline, instance) < loss - 1e-4
    for name, values in before.items():
        assert not changed(getattr(pipeline, name), values)
    assert len(pipeline.tokenizer) == words
    assert torch.equal(draw(pipeline), drawn)
    assert (draw(run.pipeline) - drawn).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_reproducible(pipeline, instance, method):
    settings = METHODS[method](learning_rate=1e-3)
    runs = [settings.start(pipeline, instance) for _ in range(2)]
    for run in runs:
        run.advance(3)
    assert runs[0].losses == runs[1].losses
    assert torch.equal(draw(runs[0].pipeline), draw(runs[1].pipeline))


def test_published_defaults():
    assert METHODS["lora"] is LoRA
    assert (LoRA().learning_rate, LoRA().rank) == (1e-4, 4)
    assert (DreamBooth().learning_rate, DreamBooth().steps) == (5e-6, 1000)
    assert (TextualInversion().learning_rate, TextualInversion().steps) == (5e-4, 2000)
    assert (CustomDiffusion().learning_rate, CustomDiffusion().batch_size) == (1e-5, 2)
    assert (DreamBoothLoRA().learning_rate, DreamBoothLoRA().prior_weight) == (1e-4, 1.0)


def test_dreambooth_trains_the_whole_denoiser_and_saves_it(pipeline, folder, instance, tmp_path):
    run = DreamBooth(learning_rate=1e-3).start(pipeline, instance)
    before = weights(pipeline.unet)
    run.advance(2)
    assert changed(run.pipeline.unet, before) == set(before)
    run.save(tmp_path)
    fresh = StableDiffusionPipeline.from_pretrained(folder)
    fresh.unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert torch.equal(draw(fresh), draw(run.pipeline))


def test_textual_inversion_trains_the_new_row_only(pipeline, instance):
    old = pipeline.text_encoder.get_input_embeddings().weight.clone()
    run = TextualInversion(learning_rate=1e-2).start(pipeline, instance)
    new = run.pipeline.text_encoder.get_input_embeddings().weight
    index = run.pipeline.tokenizer.convert_tokens_to_ids(WORD)
    # the new word is the last one, and one token
    assert index == len(old) == len(new) - 1
    assert run.pipeline.tokenizer(PROMPT).input_ids.count(index) == 1
    cat = pipeline.tokenizer.encode("cat", add_special_tokens=False)[0]
    assert torch.equal(new[index], old[cat])
    before = weights(run.pipeline.text_encoder)
    run.advance(3)
    assert torch.equal(new[:-1], old)
    assert (new[index] - old[cat]).abs().max() > 0.01
    assert len(changed(run.pipeline.text_encoder, before)) == 1
    assert not changed(run.pipeline.unet, weights(pipeline.unet))


@pytest.mark.usefixtures("float64")
def test_gradient_of_the_new_row_is_that_of_the_loss(pipeline, instance):
    # float64 for the sake of the differences; the row itself stays in float32
    new = TextualInversion().inject(pipeline.to(dtype=torch.float64), instance)
    (row,) = new.parameters
    family = family_of(new.pipeline)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(row.shape, generator=generator, dtype=row.dtype)
    probe = torch.randn(tiny.MAX_TOKENS, row.shape[0], generator=generator)

    def value():
        return (new.encode_prompts(family, [PROMPT])["encoder_hidden_states"][0] * probe).sum()

    (gradient,) = torch.autograd.grad(value(), row)
    sides = []
    for sign in (1, -1):
        row.data += sign * 1e-3 * direction
        sides.append(value().item())
        row.data -= sign * 1e-3 * direction
    assert (sides[0] - sides[1]) / 2e-3 == pytest.approx((gradient @ direction).item(), rel=1e-3)


def test_encoding_with_a_graph_is_what_the_pipeline_reads_after_the_step(pipeline, instance):
    new = TextualInversion().inject(pipeline, instance)
    (row,) = new.parameters
    family = family_of(new.pipeline)
    prompts = ["a cat", PROMPT]
    row.data += 0.1 * torch.randn(row.shape)  # a constant would vanish in the layer norm
    with_graph = new.encode_prompts(family, prompts)["encoder_hidden_states"]
    stale = family.encode_prompts(prompts)["encoder_hidden_states"]
    new.after_step()
    committed = family.encode_prompts(prompts)["encoder_hidden_states"]
    torch.testing.assert_close(with_graph, committed)
    assert torch.equal(stale[0], committed[0])
    assert (stale[1] - committed[1]).abs().max() > 1e-2


def test_new_word_without_initializer_starts_from_the_mean(pipeline, instance):
    concept = dataclasses.replace(instance, initializer=None)
    old = pipeline.text_encoder.get_input_embeddings().weight
    new = TextualInversion().start(pipeline, concept).pipeline.text_encoder
    torch.testing.assert_close(new.get_input_embeddings().weight[-1], old.mean(0))


def test_diffusers_reads_the_learned_word(pipeline, folder, instance, tmp_path):
    run = TextualInversion(learning_rate=1e-2).start(pipeline, instance)
    run.advance(5)
    run.save(tmp_path)
    fresh = StableDiffusionPipeline.from_pretrained(folder)
    fresh.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    assert torch.equal(draw(fresh), draw(run.pipeline))


@pytest.mark.parametrize("word", [True, False], ids=["word", "no-word"])
def test_diffusers_reads_custom_diffusion(pipeline, folder, instance, tmp_path, word):
    concept = instance if word else tiny.concept()
    prompt = concept.prompt
    run = CustomDiffusion(learning_rate=1e-2).start(pipeline, concept)
    before = weights(pipeline.unet)
    run.advance(5)
    assert changed(run.pipeline.unet, before) == set(family_of(pipeline).text_projections())
    run.save(tmp_path)
    fresh = StableDiffusionPipeline.from_pretrained(folder)
    fresh.unet.load_attn_procs(
        tmp_path,
        weight_name="pytorch_custom_diffusion_weights.safetensors",
        # diffusers 0.42 sets the processors only if it is given the pipeline
        _pipeline=fresh,
    )
    if word:
        fresh.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    # other attention kernels: equal up to rounding
    torch.testing.assert_close(draw(fresh, prompt), draw(run.pipeline, prompt), rtol=0, atol=1e-5)
    assert (draw(run.pipeline, prompt) - draw(pipeline, prompt)).abs().max() > 1e-3


@pytest.mark.parametrize("method", [TextualInversion, CustomDiffusion])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initializer": "purple"}, "initializer 'purple' must be one token"),
        (
            {"token": "cat", "prompt": "a cat emoji", "images": ()},
            "token 'cat' is in the model's vocabulary already",
        ),
    ],
)
def test_unusable_word_is_refused(pipeline, instance, method, changes, message):
    if changes.get("token") == "cat":
        changes = {**changes, "images": [picture.image for picture in instance.images]}
    with pytest.raises(MimaError, match=message):
        method().start(pipeline, dataclasses.replace(instance, **changes))


def test_textual_inversion_needs_a_word(pipeline):
    with pytest.raises(MimaError, match="'red round' has no token"):
        TextualInversion().start(pipeline, tiny.concept())


@pytest.mark.parametrize("method", [DreamBooth, TextualInversion, CustomDiffusion])
def test_half_precision_weights_are_not_trained(folder, instance, method):
    half = StableDiffusionPipeline.from_pretrained(folder).to(dtype=torch.bfloat16)
    with pytest.raises(MimaError, match=r"float32 .* the denoiser is in bfloat16"):
        method().start(half, instance)


def test_dreambooth_leaves_what_is_frozen(pipeline, instance):
    names = [name for name, _ in pipeline.unet.named_parameters() if ".attn2." in name]
    before = weights(pipeline.unet)
    run = DreamBooth(learning_rate=1e-3, frozen=tuple(names)).start(pipeline, instance)
    run.advance(2)
    assert changed(run.pipeline.unet, before) == set(before) - set(names)
    with pytest.raises(MimaError, match=r"frozen: the denoiser has no parameter conv_on\.weight"):
        DreamBooth(frozen=("conv_on.weight",)).start(pipeline, instance)
