import logging

import pytest
import torch
from safetensors.torch import save

from mima import console
from mima.families import family_of
from mima.families.stable_diffusion import StableDiffusion
from mima.training import class_images
from mima.training.class_images import ClassPictures


def test_class_images_go_on_after_the_last_batch_that_is_kept(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("mima.training.batches.CHUNK", 2)
    family = family_of(pipeline)
    prompts = ["a cat", "a dog", "a cat", "a dog", "a cat"]

    def draw(folder, count=5):
        monkeypatch.setenv("MIMA_CACHE", str(tmp_path / folder))
        generator = torch.Generator().manual_seed(0)
        return ClassPictures(family).latents(prompts[:count], generator), generator.get_state()

    at_once, state = draw("one")
    first, _ = draw("two", count=4)
    sample = StableDiffusion.sample_latents
    drawn = []

    def count(self, prompts, generator):
        drawn.append(list(prompts))
        return sample(self, prompts, generator)

    monkeypatch.setattr(StableDiffusion, "sample_latents", count)
    both, later_state = draw("two")
    assert drawn == [["a cat"]]
    assert torch.equal(both, at_once)
    assert torch.equal(both[:4], first)
    assert torch.equal(state, later_state)
    # the same words twice are two pictures
    assert len({latent.numpy().tobytes() for latent in both}) == 5


def test_class_images_are_found_whatever_order_a_schedulers_defaults_have(
    pipeline, tmp_path, monkeypatch
):
    """diffusers lists the settings that were left at their defaults in no order."""
    monkeypatch.setenv("MIMA_CACHE", str(tmp_path))
    found = []
    for listed in (["a", "b"], ["b", "a"]):
        pipeline.scheduler.register_to_config(_use_default_values=listed)
        ClassPictures(family_of(pipeline)).latents(["a cat"], torch.Generator().manual_seed(0))
        found.append(sorted(path.name for path in tmp_path.rglob("*.safetensors")))
    assert found[0] == found[1]
    assert len(found[0]) == 1


def test_commands_say_how_far_the_drawing_is(pipeline, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setenv("MIMA_CACHE", str(tmp_path))
    caplog.set_level(logging.INFO, "mima.training.class_images")
    monkeypatch.setattr(logging.getLogger("mima"), "handlers", [console._OneLine()])
    ClassPictures(family_of(pipeline)).latents(["a cat"] * 2, torch.Generator())
    assert capsys.readouterr().err == "class pictures: 2 of 2\n"


def test_processes_that_draw_the_same_do_not_meet(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("MIMA_CACHE", str(tmp_path))
    family, write = family_of(pipeline), class_images.save_checked
    names, others = [], []

    def write_while_another_does(path, tensors):
        names.append(path.name)
        if len(names) == 1:
            others.append(ClassPictures(family).latents(["a cat"], torch.Generator()))
        write(path, tensors)

    monkeypatch.setattr(class_images, "save_checked", write_while_another_does)
    own = ClassPictures(family).latents(["a cat"], torch.Generator())
    assert torch.equal(own, others[0])
    # each wrote to a file of its own, and one is left
    assert len(set(names)) == 2
    assert len(list((tmp_path / "class-images").iterdir())) == 1


@pytest.mark.parametrize(
    "content", [b"half", save({"a": torch.zeros(2)})], ids=["damaged", "others"]
)
def test_damaged_class_pictures_are_drawn_again(pipeline, tmp_path, monkeypatch, caplog, content):
    monkeypatch.setenv("MIMA_CACHE", str(tmp_path))
    pictures = ClassPictures(family_of(pipeline))
    drawn = pictures.latents(["a cat"], torch.Generator())
    (file,) = (tmp_path / "class-images").iterdir()
    intact = file.read_bytes()
    file.write_bytes(content)
    assert torch.equal(pictures.latents(["a cat"], torch.Generator()), drawn)
    assert file.read_bytes() == intact
    assert "it is made again" in caplog.text


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/proc/none", " in /proc/none/class-images (MIMA_CACHE): No such file or directory"),
        ("/dev/null/x", " in /dev/null/x/class-images (MIMA_CACHE): Not a directory"),
        ("~nobody-of-this-name", " (MIMA_CACHE): '~nobody-of-this-name' is no path: "),
    ],
)
def test_a_cache_that_cannot_be_used_is_said_once(pipeline, monkeypatch, caplog, place, message):
    monkeypatch.setattr("mima.training.batches.CHUNK", 1)
    monkeypatch.setenv("MIMA_CACHE", place)
    drawn = ClassPictures(family_of(pipeline)).latents(["a cat", "a dog"], torch.Generator())
    assert len(drawn) == 2
    (warning,) = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert warning.startswith(f"class pictures are not kept{message}")
