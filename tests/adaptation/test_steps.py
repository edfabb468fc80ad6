"""Optimisers, schedules and restarts of an adaptation, against steps that are done by hand."""

import dataclasses

import pytest
import torch
from support import tiny

from mima.adaptation import DreamBooth, LoRA, TextualInversion
from mima.adaptation.steps import build_optimizers, rate_factor
from mima.concepts import Concept
from mima.concepts.pictures import Picture
from mima.training.batches import losses

FAST = DreamBooth(learning_rate=1e-3, steps=10, batch_size=2, max_grad_norm=None)


def trained(run):
    return [parameter.detach().clone() for parameter in run._injection.parameters]


def record_rates(run):
    rates = []
    run.advance(
        run.adaptation.steps,
        on_step=lambda run: rates.append(run._optimizers[0].param_groups[0]["lr"]),
    )
    return rates


def test_sgd_follows_the_gradient_with_momentum(pipeline):
    settings = dataclasses.replace(FAST, optimizer="sgd", weight_decay=0.0, learning_rate=0.1)
    run, twin = (settings.start(pipeline, tiny.concept()) for _ in range(2))
    run.advance(2)
    velocity = None
    for _ in range(2):
        ((_, batch),) = twin._batches()
        (loss,) = losses(twin._family, [batch])
        gradients = torch.autograd.grad(loss, twin._injection.parameters)
        velocity = (
            [g.clone() for g in gradients]
            if velocity is None
            else [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
        )
        with torch.no_grad():
            for parameter, v in zip(twin._injection.parameters, velocity, strict=True):
                parameter -= 0.1 * v
    for got, wanted in zip(trained(run), trained(twin), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_muon_steps_do_not_depend_on_the_scale_of_gradients():
    torch.manual_seed(0)
    gradients = [torch.randn(6, 4), torch.randn(6, 1, 2, 2), torch.randn(5)]
    moved = []
    for scale in (1.0, 1e-3):
        parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
        pair = build_optimizers(parameters, optimizer="muon", learning_rate=0.1, weight_decay=0.0)
        # matrices and filters by Muon, the rest by AdamW
        assert [type(o).__name__ for o in pair] == ["Muon", "AdamW"]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = scale * gradient
        for optimizer in pair:
            optimizer.step()
        moved.append([p.detach() for p in parameters])
    # Muon computes in bfloat16, with 8 bits
    torch.testing.assert_close(moved[0][:2], moved[1][:2], rtol=5e-2, atol=1e-3)
    # orthogonal: near equal singular values, unlike the gradient's; those of filters, too
    for step, gradient in zip(moved[0][:2], gradients[:2], strict=True):
        values, before = (torch.linalg.svdvals(t.flatten(1)) for t in (step, gradient))
        assert values[0] / values[-1] < 2 < before[0] / before[-1]


def test_muon_moves_filters_as_the_matrices_that_they_are():
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 4, 3, 3), torch.randn(2, 3, 4, 3, 3)
    settings = {"learning_rate": 0.1, "weight_decay": 0.5}
    filters = torch.nn.Parameter(start.clone())
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    (own,) = build_optimizers([filters], optimizer="muon", **settings)
    plain = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    place = filters.data_ptr()
    for gradient in gradients:
        filters.grad, matrix.grad = gradient.clone(), gradient.flatten(1)
        own.step()
        plain.step()
    assert filters.shape == filters.grad.shape == start.shape
    assert filters.data_ptr() == place
    assert torch.equal(filters.flatten(1), matrix)
    # a step without a gradient leaves them alone
    own.zero_grad()
    own.step(lambda: 1.0)
    assert torch.equal(filters.flatten(1), matrix)


def test_the_average_is_drawn_with_and_the_weights_are_trained(pipeline):
    settings = dataclasses.replace(FAST, ema_decay=0.3)
    plain = FAST.start(pipeline, tiny.concept())
    mean, decays = trained(plain), (0.0, 2 / 11, 0.25, 0.3)
    for decay in decays:
        plain.advance(1)
        mean = [decay * m + (1 - decay) * p for m, p in zip(mean, trained(plain), strict=True)]
    run = settings.start(pipeline, tiny.concept())
    # stops on the way change nothing
    for steps in (1, 2, 1):
        run.advance(steps)
    for value, expected in zip(trained(run), mean, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(trained(run)[0], trained(plain)[0])
    assert run.losses == plain.losses
    second = settings.start(pipeline, tiny.concept())
    second.restore(run.checkpoint())
    assert all(map(torch.equal, trained(second), trained(run)))
    whole = settings.start(pipeline, tiny.concept())
    for learner, steps in ((second, 2), (whole, 6)):
        learner.advance(steps)
    assert all(map(torch.equal, trained(second), trained(whole)))
    assert second.losses == whole.losses


def test_a_new_word_is_drawn_as_its_average(pipeline):
    images = [Picture(picture.image, "a <sks>") for picture in tiny.concept().images]
    concept = Concept("thing", "a <sks>", images, token="<sks>", initializer="cat")
    runs = [
        TextualInversion(learning_rate=0.1, ema_decay=decay).start(pipeline, concept)
        for decay in (None, 0.5)
    ]
    rows = []
    for run in runs:
        run.advance(5)
        table = run.pipeline.text_encoder.get_input_embeddings().weight
        row = table[run.pipeline.tokenizer.convert_tokens_to_ids("<sks>")]
        rows.append(row.detach().clone())
    assert runs[0].losses == runs[1].losses
    assert not torch.equal(*rows)
    torch.testing.assert_close(rows[1], trained(runs[1])[0].reshape(rows[1].shape))


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_optimizers_learn_and_go_on_from_a_checkpoint(pipeline, optimizer):
    rate = 0.3 if optimizer == "sgd" else 1e-3
    settings = dataclasses.replace(
        FAST, optimizer=optimizer, learning_rate=rate, schedule="cosine", max_grad_norm=1.0
    )
    whole = settings.start(pipeline, tiny.concept())
    before = tiny.training_loss(whole.pipeline, tiny.concept())
    whole.advance(10)
    assert tiny.training_loss(whole.pipeline, tiny.concept()) < before - 1e-3
    first, second = (settings.start(pipeline, tiny.concept()) for _ in range(2))
    first.advance(4)
    second.restore(first.checkpoint())
    second.advance(6)
    assert all(map(torch.equal, trained(second), trained(whole)))


def test_a_cosine_rises_and_falls_to_the_last_step(pipeline):
    rates = record_rates(
        dataclasses.replace(FAST, schedule="cosine", steps=20).start(pipeline, tiny.concept())
    )
    assert rates == pytest.approx([1e-3 * rate_factor("cosine", step, 20) for step in range(20)])
    assert rates[:2] == pytest.approx([5e-4, 1e-3])
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert 0 < rates[-1] < 1e-5
    assert set(record_rates(FAST.start(pipeline, tiny.concept()))) == {1e-3}


def test_a_restart_forgets_the_optimisers_state_and_keeps_the_weights(pipeline):
    settings = LoRA(learning_rate=1e-3, steps=6, batch_size=2)
    concept = tiny.concept()
    run = dataclasses.replace(settings, restart_every=3).start(pipeline, concept)
    plain = settings.start(pipeline, concept)
    for learner in (run, plain):
        learner.advance(3)
    assert all(map(torch.equal, trained(run), trained(plain)))
    # by hand: a new optimiser
    plain._optimizers = plain._new_optimizers()
    for learner in (run, plain):
        learner.advance(3)
    assert all(map(torch.equal, trained(run), trained(plain)))
    undisturbed = settings.start(pipeline, concept)
    undisturbed.advance(6)
    assert not all(map(torch.equal, trained(run), trained(undisturbed)))


def test_8_bits_are_for_adamw():
    with pytest.raises(ValueError, match="use_8bit_adam must be left out with another optimizer"):
        LoRA(optimizer="sgd", use_8bit_adam=True)
