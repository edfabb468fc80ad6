"""Erased models of others: whatever form they come in, the same model; and immunized from there."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from support.immunizing import assert_same, concepts, settings

from mima.erasure import Edit, erase, load_erased
from mima.errors import MimaError
from mima.families.pipelines import with_modules
from mima.immunization.algorithm import immunize
from mima.release.delta import Delta, load_delta


@pytest.fixture(scope="module")
def weights(pipeline):
    """The UNet that somebody erased cats from."""
    return erase(pipeline, [[Edit("a cat", "a dog")]]).unet.state_dict()


def changed(pipeline, weights):
    own = pipeline.unet.state_dict()
    return {name: value for name, value in weights.items() if not torch.equal(value, own[name])}


def _folder(pipeline, weights, path):
    unet = type(pipeline.unet).from_config(pipeline.unet.config)
    unet.load_state_dict(weights)
    unet.save_pretrained(path / "unet")
    return path


FORMS = {
    # every weight, as ESD's first release has it
    "unet.pt": lambda pipeline, weights, path: torch.save(weights, path),
    "unet.safetensors": lambda pipeline, weights, path: save_file(weights, path),
    # those that were trained, as ESD and UCE have it now
    "some.safetensors": lambda p, weights, path: save_file(changed(p, weights), path),
    "nested.ckpt": lambda p, weights, path: torch.save({"state_dict": changed(p, weights)}, path),
    "prefixed.bin": lambda p, weights, path: torch.save(
        {f"unet.{name}": value for name, value in changed(p, weights).items()}, path
    ),
    "folder": _folder,
    "delta": lambda p, weights, path: Delta(
        {f"unet.{name}": value for name, value in changed(p, weights).items()}
    ).save(path),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_model(pipeline, weights, tmp_path, form):
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    FORMS[form](pipeline, weights, tmp_path / form)
    erased = load_erased(pipeline, tmp_path / form)
    assert_same(erased.pipeline.unet.state_dict(), weights)
    assert_same(pipeline.unet.state_dict(), before)
    assert set(changed(pipeline, weights)) <= {name[len("unet.") :] for name in erased.changed}


def test_half_precision_is_cast(pipeline, weights, tmp_path):
    half = {name: value.half() for name, value in weights.items()}
    save_file(half, tmp_path / "unet.safetensors")
    erased = load_erased(pipeline, tmp_path / "unet.safetensors").pipeline.unet.state_dict()
    assert_same(erased, {name: value.float() for name, value in half.items()})


def test_a_run_goes_on_from_there(pipeline, weights, tmp_path):
    """The same as immunizing the erased model in memory; the delta is from the model before."""
    save_file(weights, tmp_path / "unet.safetensors")
    config = settings(tmp_path, steps=1)
    result = immunize(
        pipeline,
        concepts(),
        config,
        erased=tmp_path / "unet.safetensors",
        output=tmp_path / "out",
        delta=True,
    )
    unet = type(pipeline.unet).from_config(pipeline.unet.config)
    unet.load_state_dict(weights)
    expected = immunize(with_modules(pipeline, unet=unet.eval()), concepts(), config)
    # weights that a file holds lie elsewhere in memory, and a product then rounds otherwise
    assert result.history[0].losses == pytest.approx(expected.history[0].losses, rel=1e-4)
    after = result.pipeline.unet.state_dict()
    # a step moves no weight further than its learning rate, about
    assert max((after[name] - weights[name]).abs().max() for name in weights) < 1e-4
    assert_same(load_delta(pipeline, tmp_path / "out").unet.state_dict(), after)
    assert "unet.safetensors" in (tmp_path / "out" / "README.md").read_text()


def _evil(path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"conv_in.weight": Evil()}, path)


BAD = {
    "absent.pt": (lambda path: None, "does not exist"),
    "evil.pt": (_evil, "cannot be read"),
    "damaged.safetensors": (lambda path: path.write_bytes(b"x" * 99), "cannot be read"),
    "picture.png": (lambda path: path.write_bytes(b"x"), "expected a folder, .safetensors"),
    "list.pt": (lambda path: torch.save([torch.zeros(1)], path), "holds no tensors by name"),
    "foreign.pt": (
        lambda path: torch.save({f"layer{n}.weight": torch.zeros(2, 2) for n in range(9)}, path),
        "of no known kind",
    ),
    "other-shape.pt": (
        lambda path: torch.save({"conv_in.bias": torch.zeros(3)}, path),
        r"unet.conv_in.bias is \[3\], expected \[16\]",
    ),
    "word.pt": (lambda path: torch.save({"<cat>": torch.zeros(32)}, path), "brings new words"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_loaded_is_said(pipeline, tmp_path, capsys, name):
    make, message = BAD[name]
    make(tmp_path / name)
    with pytest.raises(MimaError, match=f"^erased: (?s:.*){message}"):
        load_erased(pipeline, tmp_path / name)
    assert "ran" not in capsys.readouterr().out
