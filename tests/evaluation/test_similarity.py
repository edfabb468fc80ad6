import json

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, CLIPModel, CLIPTokenizer

from mima.errors import MimaError
from mima.evaluation import (
    ClipEncoder,
    DinoEncoder,
    ImageEncoder,
    TextImageEncoder,
    load_encoder,
    prompt_alignment,
    similarity,
)
from mima.evaluation.similarity import Preprocessor

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny.save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(clip_folder):
    return load_encoder(clip_folder)


@pytest.fixture(scope="module")
def pictures():
    colours = ("red", "green", "blue", "yellow")
    return [tiny.picture(colour, "round", seed=seed) for seed, colour in enumerate(colours)]


def features(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def test_preprocessing_by_hand():
    settings = {
        "size": {"shortest_edge": 4},
        "do_center_crop": True,
        "crop_size": {"height": 4, "width": 4},
        "image_mean": MEAN,
        "image_std": STD,
    }
    # twice as wide as high: the middle half survives
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = [255, 128, 0]
    out = Preprocessor(settings)([Image.fromarray(pixels)])
    assert out.shape == (1, 3, 4, 4)
    expected = (torch.tensor([1.0, 128 / 255, 0.0]) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(out, expected.view(1, 3, 1, 1).expand(1, 3, 4, 4))


@pytest.mark.parametrize("kind", ["clip", "vit"])
@pytest.mark.parametrize("size", [(32, 32), (61, 40), (20, 33)], ids=str)
def test_preprocessing_agrees_with_transformers(kind, size, tmp_path):
    from transformers import AutoImageProcessor

    folder = tiny.save_tiny_clip(tmp_path) if kind == "clip" else tiny.save_tiny_dino(tmp_path)
    theirs = AutoImageProcessor.from_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    # smooth, so that only the resize filters' rounding differs
    rows, columns = np.mgrid[: size[1], : size[0]]
    waves = np.stack([np.sin(rows / 9), np.cos(columns / 7), np.sin((rows + columns) / 11)], -1)
    image = Image.fromarray((127 + 120 * waves).astype(np.uint8))
    ours = Preprocessor(settings)([image])
    reference = theirs(images=image, return_tensors="pt")["pixel_values"]
    # one grey level is 1/255 over a standard deviation of at least 0.26
    torch.testing.assert_close(ours, reference, rtol=0, atol=3 / 255 / 0.26)


def test_clip_features_are_those_of_transformers(clip, clip_folder, pictures):
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    settings = json.loads((clip_folder / "preprocessor_config.json").read_text())
    with torch.no_grad():
        images = features(model.get_image_features(pixel_values=Preprocessor(settings)(pictures)))
        texts = [
            features(model.get_text_features(**tokenizer(text, return_tensors="pt")))
            for text in ("a cat", "a red round emoji")
        ]
    torch.testing.assert_close(clip.embed(pictures), F.normalize(images, dim=-1))
    torch.testing.assert_close(
        clip.embed_text(["a cat", "a red round emoji"]), F.normalize(torch.cat(texts), dim=-1)
    )


@pytest.mark.parametrize("version", [1, 2])
def test_dino_features_are_the_class_token(tmp_path, pictures, version):
    folder = tiny.save_tiny_dino(tmp_path, version=version)
    encoder = load_encoder(folder)
    assert isinstance(encoder, DinoEncoder)
    model = AutoModel.from_pretrained(folder).eval()
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    with torch.no_grad():
        hidden = model(pixel_values=Preprocessor(settings)(pictures)).last_hidden_state
    torch.testing.assert_close(encoder.embed(pictures), F.normalize(hidden[:, 0], dim=-1))
    assert isinstance(encoder, ImageEncoder)
    assert not isinstance(encoder, TextImageEncoder)


def test_batch_size_changes_nothing(clip_folder, clip, pictures):
    small = ClipEncoder(clip_folder, batch_size=3)
    torch.testing.assert_close(small.embed(pictures), clip.embed(pictures))
    texts = ["a cat", "a red round emoji", "dog", "a"]
    torch.testing.assert_close(small.embed_text(texts), clip.embed_text(texts))


def test_similarity_is_the_cosine(clip, pictures):
    embedded = clip.embed(pictures)
    table = similarity(embedded, embedded[:2])
    assert table.shape == (4, 2)
    torch.testing.assert_close(table[[0, 1], [0, 1]], torch.ones(2))
    torch.testing.assert_close(table[3, 1], torch.cosine_similarity(embedded[3], embedded[1], 0))


def test_alignment_pairs_each_image_with_its_own_prompt(clip, pictures):
    prompts = ["a red emoji", "a cat", "a red emoji", "a dog"]
    expected = [
        torch.cosine_similarity(clip.embed([image])[0], clip.embed_text([prompt])[0], 0)
        for image, prompt in zip(pictures, prompts, strict=True)
    ]
    torch.testing.assert_close(prompt_alignment(pictures, prompts, clip), torch.stack(expected))


def test_alignment_refuses_what_does_not_fit(clip, pictures, tmp_path):
    with pytest.raises(ValueError, match="4 images and 1 prompts"):
        prompt_alignment(pictures, ["a cat"], clip)
    with pytest.raises(TypeError, match="embeds no texts"):
        prompt_alignment(pictures, ["a"] * 4, load_encoder(tiny.save_tiny_dino(tmp_path)))


def test_unusable_encoders_are_named(tmp_path):
    with pytest.raises(MimaError, match="encoder: cannot open"):
        load_encoder(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(MimaError, match="is a bert model; clip, vit and dinov2"):
        load_encoder(tmp_path)
    with pytest.raises(MimaError, match=r"size .* not understood"):
        Preprocessor({"size": {"longest_edge": 5}})
    with pytest.raises(MimaError, match="image_mean"):
        Preprocessor({"size": 5})


def test_nothing_to_embed_is_refused(clip):
    with pytest.raises(ValueError, match="images is empty"):
        clip.embed([])
    with pytest.raises(ValueError, match="texts is empty"):
        clip.embed_text([])
