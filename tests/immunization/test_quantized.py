"""A pipeline in memory whose denoiser is quantized: read in float32, and given back whole."""

from __future__ import annotations

import pytest
import torch
from support.immunizing import assert_same, concepts, settings

from mima.errors import MimaError
from mima.families import family_of, load_pipeline
from mima.families.frozen import Upcast, is_quantized, stored_bytes, with_quantized_held
from mima.immunization.algorithm import immunize


class Bytes(torch.Tensor):
    """A weight in 8 bits with a scale for each row, which no operator knows: as torchao's are."""

    @staticmethod
    def __new__(cls, data, scale):
        made = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)
        made.data_8, made.scale = data, scale
        return made

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantize(self):
        return self.data_8.float() * self.scale

    def __tensor_flatten__(self):
        return ["data_8", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data_8, args[0].scale)
        raise NotImplementedError(f"{func} reads the quantized weight")


def by_hand(module):
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            weight = torch.nn.Parameter(Bytes.of(layer.weight.detach()), requires_grad=False)
            layer.weight = weight


def by_torchao(module):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())


def quantized(model, quantize):
    pipeline = load_pipeline(model)
    quantize(pipeline.unet)
    pipeline.unet.is_quantized = True
    pipeline.unet.register_to_config(quantization_config={"quant_method": "torchao"})
    return pipeline


def dequantized(pipeline, model):
    """The model with the values that the quantized weights give back."""
    plain = load_pipeline(model)
    values = {
        name: value.dequantize() if is_quantized(value) else value
        for name, value in pipeline.unet.named_parameters()
    }
    plain.unet.load_state_dict(values)
    return plain


def assert_near(ours, theirs, config):
    """The same weights, but for the rounding of products, which may hang on where operands lie.

    Adam takes a step of one length also where a gradient is hardly more than rounding.
    """
    apart = torch.cat([(ours[name] - value).abs().flatten() for name, value in theirs.items()])
    assert ours.keys() == theirs.keys()
    assert float(apart.max()) <= 2 * config.steps * config.upper.lr
    assert float((apart > config.upper.lr / 100).double().mean()) < 0.01


@pytest.mark.parametrize("mode", ["first_order", "exact"])
@pytest.mark.parametrize("quantize", [by_hand, by_torchao])
def test_it_is_immunized_as_the_same_values_in_float32(model, tmp_path, quantize, mode):
    pipeline = quantized(model, quantize)
    plain = dequantized(pipeline, model)
    config = settings(tmp_path, steps=2, hypergradient=mode, gradient_checkpointing=True)
    found, wanted = (
        immunize(model, concepts(), config, checkpoint=tmp_path / place)
        for model, place in ((pipeline, "quantized"), (plain, "plain"))
    )
    for one, other in zip(found.history, wanted.history, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-6)
    ours, theirs = (result.pipeline.unet.state_dict() for result in (found, wanted))
    assert_near(ours, theirs, config)
    # the result opens without the library that quantized; the caller's pipeline is as it was
    found.save_pretrained(tmp_path / "out")
    assert_same(load_pipeline(tmp_path / "out").unet.state_dict(), ours)
    assert pipeline.unet.is_quantized
    assert is_quantized(pipeline.unet.mid_block.attentions[0].proj_in.weight) or any(
        map(is_quantized, pipeline.unet.parameters())
    )


def test_what_is_frozen_stays_in_8_bits_and_is_planned_so(model, tmp_path):
    pipeline = quantized(model, by_hand)
    held = with_quantized_held(pipeline)
    kept = [p for p in held.unet.parameters() if isinstance(p, Upcast)]
    assert kept
    assert all(p.stored.data_8.dtype == torch.int8 for p in kept)
    found = immunize(pipeline, concepts(), settings(tmp_path), dry_run=True)
    names = family_of(held).parameter_names("cross_attention")
    frozen = {n: p for n, p in held.unet.named_parameters() if n not in names}
    parts = found.memory["outer steps"]
    in_8_bits = [p for p in frozen.values() if isinstance(p, Upcast)]
    assert parts["frozen weights, int8"] == sum(p.numel() for p in in_8_bits)
    assert sum(map(stored_bytes, in_8_bits)) < 1.3 * parts["frozen weights, int8"]
    assert parts["trained weights, float32"] == 4 * sum(found.numels.values())


def test_other_commands_refuse_it(model):
    with pytest.raises(
        MimaError, match=r"unet is quantized; .*immunize takes a pipeline in memory"
    ):
        load_pipeline(quantized(model, by_hand))
