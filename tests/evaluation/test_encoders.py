import json
import sqlite3
from contextlib import closing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support import tiny
from transformers import AutoModel, CLIPModel, CLIPTokenizer

from mima.errors import MimaError
from mima.evaluation import (
    ClipEncoder,
    DinoEncoder,
    ImageEncoder,
    TextImageEncoder,
    load_encoder,
    load_similarity,
    prompt_alignment,
    similarity,
)
from mima.evaluation.encoders import judge_fingerprint
from mima.evaluation.feature_cache import CachedSimilarity
from mima.evaluation.preprocessing import Preprocessor


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


def test_a_configuration_asks_for_no_more_than_its_files_hold(tmp_path):
    folder = tiny.save_tiny_clip(tmp_path / "clip")
    (folder / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(MimaError, match=r"config\.json asks for [\d,]+ numbers, the files hold"):
        load_similarity(folder)


def test_unusable_encoders_are_named(tmp_path):
    with pytest.raises(MimaError, match="neither a folder nor a hub id"):
        load_encoder(tmp_path / "nothing")
    with pytest.raises(MimaError, match=r"'embeded' is neither .* did you mean 'embedded'"):
        load_similarity("embeded")
    with pytest.raises(MimaError, match="encoder: cannot open"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(MimaError, match="is a bert model; clip, vit and dinov2"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("model", ["clip", "dino", "owner/name"])
def test_where_the_hub_cannot_be_reached_the_error_says_what_to_use(model):
    remedy = r"offline mode .*; name a local folder, or use embedded \(--similarity embedded\)"
    with pytest.raises(MimaError, match=remedy):
        load_similarity(model)


def test_nothing_to_embed_is_refused(clip):
    with pytest.raises(ValueError, match="images is empty"):
        clip.embed([])
    with pytest.raises(ValueError, match="texts is empty"):
        clip.embed_text([])


def published(pictures, side):
    """What IMMA's script does before CLIP and DINO, step by step."""
    rows = []
    for picture in pictures:
        small = picture.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(small, np.float32) / 255).permute(2, 0, 1)
        shifted = (pixels - torch.tensor(-1.0)) / 2
        large = F.interpolate(shifted[None], size=(side, side), mode="bicubic")[0]
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        rows.append((large - mean) / std)
    return torch.stack(rows)


def test_the_published_protocol_is_the_published_scripts(clip_folder, pictures, tmp_path):
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = published(pictures, tiny.RESOLUTION)
    with torch.no_grad():
        expected = F.normalize(features(model.get_image_features(pixel_values=pixels)), dim=-1)
    encoder = load_similarity(clip_folder, protocol="published")
    torch.testing.assert_close(encoder.embed(pictures), expected)
    folder = tiny.save_tiny_dino(tmp_path)
    dino = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = F.normalize(dino(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)
    encoder = load_similarity(folder, protocol="published")
    torch.testing.assert_close(encoder.embed(pictures), expected)
    with pytest.raises(ValueError, match="standard or published, got 'loose'"):
        load_similarity(clip_folder, protocol="loose")


def test_another_version_of_a_judge_has_another_fingerprint(clip, clip_folder, tmp_path):
    again = judge_fingerprint(load_encoder(clip_folder, batch_size=3))
    assert again == judge_fingerprint(clip)
    others = [
        load_encoder(tiny.save_tiny_clip(tmp_path / "weights", seed=1)),
        load_encoder(clip_folder, protocol="published"),
        load_encoder("embedded"),
        load_encoder("embedded-clip"),
    ]
    cropped = tiny.save_tiny_clip(tmp_path / "cropped")
    settings = json.loads((cropped / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.5] * 3
    (cropped / "preprocessor_config.json").write_text(json.dumps(settings))
    others.append(load_encoder(cropped))
    judge = load_encoder("embedded")
    judge.numbers["shares"] = judge.numbers["shares"].flip(0)
    others.append(judge)
    found = {judge_fingerprint(other) for other in others}
    assert len(found | {again}) == len(others) + 1


class Counting:
    """Counts the pictures that it looks at."""

    def __init__(self, encoder):
        self.encoder, self.seen = encoder, 0
        self.name = "counting"

    def embed(self, images):
        self.seen += len(images)
        return self.encoder.embed(images)


class Pairs:
    """A similarity of pairs: one minus the difference of mean grey, and a count."""

    name = "pairs"

    def __init__(self):
        self.seen = 0

    def pairs(self, a, b):
        self.seen += len(a) * len(b)
        grey = [[np.asarray(i.convert("L"), float).mean() / 255 for i in s] for s in (a, b)]
        return 1 - (torch.tensor(grey[0])[:, None] - torch.tensor(grey[1])).abs().float()


def test_each_file_is_looked_at_once(clip, pictures, tmp_path):
    files = [tmp_path / f"{index}.png" for index in range(4)]
    for file, picture in zip(files, pictures, strict=True):
        picture.save(file)
    expected = similarity(clip.embed(pictures[:3]), clip.embed(pictures))
    for model, table in (
        (Counting(clip), expected),
        (Pairs(), Pairs().pairs(pictures[:3], pictures)),
    ):
        cached = CachedSimilarity(model, name="x", path=tmp_path / "seen.sqlite")
        torch.testing.assert_close(cached.table(files[:3], files), table)
        looked = model.seen
        torch.testing.assert_close(cached.table(files[:3], files), table)
        # another process, another time
        again = CachedSimilarity(model, name="x", path=tmp_path / "seen.sqlite")
        torch.testing.assert_close(again.table(files[:3], files), table)
        assert model.seen == looked
        # another protocol is another model, and other contents another picture
        CachedSimilarity(
            model, name="x", protocol="published", path=tmp_path / "seen.sqlite"
        ).table(files[:1], files[:1])
        assert model.seen == looked + 1
        tiny.picture("red", "square", seed=7).save(files[0])
        again.table(files[:1], files[:1])
        assert model.seen == looked + 2
        pictures[0].save(files[0])
    with pytest.raises(ValueError, match="got 0, 4"):
        cached.table([], files)


@pytest.mark.parametrize("damage", ["no database", "another table", "no bytes"])
def test_a_damaged_file_of_what_was_seen_is_one_line(tmp_path, damage):
    file, picture = tmp_path / "seen.sqlite", tmp_path / "0.png"
    tiny.picture("red", "round").save(picture)
    cached = CachedSimilarity(load_encoder(), name="x", path=file)
    cached.features([picture])
    if damage == "no database":
        file.write_bytes(b"hello" * 1000)
    else:
        with closing(sqlite3.connect(file)) as seen, seen:
            change = "DROP TABLE seen; CREATE TABLE seen (a TEXT)"
            seen.executescript("UPDATE seen SET value = 3" if damage == "no bytes" else change)
    again = CachedSimilarity(load_encoder(), name="x", path=file)
    with pytest.raises(MimaError, match=r"cannot use .*seen\.sqlite: .*may be removed") as caught:
        again.features([picture])
    assert "\n" not in str(caught.value)
