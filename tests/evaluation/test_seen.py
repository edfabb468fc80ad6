"""What an immunization saw is kept apart from what it is measured with, or said."""

import json
from dataclasses import replace

import pytest
from PIL import ImageOps
from support import immunizing, tiny

from mima.choices import SEED_STRIDE
from mima.concepts.near_duplicates import signature
from mima.concepts.pictures import Picture, digest
from mima.demo import PRIOR_SEED
from mima.errors import MimaError
from mima.evaluation import evaluate
from mima.evaluation.comparison import _method_of
from mima.evaluation.seen import Level, Seen, benign_prompts, seen_by, trained_on
from mima.immunization.algorithm import immunize
from mima.immunization.encoding import _class_prompts
from mima.release.repository import apply_delta
from mima.training.captions import divided, ordinary_captions


def record(folder, **values):
    folder.mkdir(exist_ok=True)
    (folder / "mima.json").write_text(json.dumps(values))
    return folder


def test_what_was_seen_and_is_measured_is_said(tmp_path):
    target, other = tiny.concept("red", "round"), tiny.concept("blue", "square")
    saw = {
        "lower": {"pictures": [digest(picture) for picture in target.images]},
        "benign": {"concepts": [other.name], "prompts": ["a dog"]},
    }
    seen = seen_by(record(tmp_path / "model", saw=saw, config={"seed": 7}))
    assert seen.seed == 7
    assert seen.prompts == {"a dog"}
    # the pictures that attacks train on are meant to have been seen
    (sentence,) = seen.overlaps([target], [other])
    assert sentence.startswith("blue square, which is to stay learnable, was a concept of the")
    leaked = replace(target, held_out=(*target.held_out, target.images[0]))
    (first, _) = seen.overlaps([leaked], [other])
    assert first.startswith("1 of the pictures that attacks on red round are compared with")
    (third,) = seen.overlaps([other], [target])
    assert third.startswith("Pictures of red round, which is to stay learnable, were seen by")


def test_what_was_seen_is_known_however_it_is_written(tmp_path):
    target, other = tiny.concept("red", "round"), tiny.concept("blue", "square")
    seen = Seen(levels={"prior": Level(prompts=frozenset({"A  Blue square emoji "}))})
    (sentence,) = seen.overlaps([target], [other])
    assert sentence.startswith("Prompts of blue square, which is to stay learnable, were seen by")
    assert seen.said("a blue square emoji")
    named = Seen(levels={"benign": Level(concepts=("Blue Square",))})
    (sentence,) = named.overlaps([target], [other])
    assert "was a concept of the immunization's benign level" in sentence
    assert seen_by(record(tmp_path / "model", saw={})).known
    assert not seen_by(record(tmp_path / "old", config={})).known
    assert not seen_by(tmp_path / "nothing").known


def test_pictures_that_are_trained_on_and_compared_with_are_said():
    target, other = tiny.concept("red", "round"), tiny.concept("blue", "square")
    assert trained_on([target, other], [target, other]) == []
    leaked = replace(target, held_out=(*target.held_out, *target.images[:3]))
    (sentence,) = trained_on([leaked, other])
    assert sentence.startswith("3 of the pictures that attacks on red round are compared with are")
    assert "among its own training pictures" in sentence
    # the other concept's pictures count where attacks train on them
    lent = replace(other, images=(*other.images, target.held_out[0]))
    assert trained_on([target, lent]) == []
    (sentence,) = trained_on([target, lent], [lent])
    assert sentence.startswith("1 of the pictures that attacks on red round are compared with are")
    assert "among blue square's training pictures" in sentence
    assert trained_on([replace(target, held_out=())]) == []


def mirrored(picture):
    return Picture(ImageOps.mirror(picture.load()), picture.prompt)


def test_nearly_the_same_pictures_are_said_in_other_words(tmp_path):
    target, other = tiny.concept("red", "round"), tiny.concept("blue", "square")
    pictures = [*target.images, *other.images]
    saw = {
        "lower": {
            "pictures": list(map(digest, pictures)),
            "signatures": list(map(signature, pictures)),
        }
    }
    seen = seen_by(record(tmp_path / "model", saw=saw))
    assert seen.untold == []
    leaked = replace(target, held_out=(target.images[0], mirrored(target.images[1])))
    exact, near = seen.overlaps([leaked], [])
    assert exact.startswith("1 of the pictures that attacks on red round are compared with were")
    assert near.startswith("1 of the pictures that attacks on red round are compared with are near")
    turned = replace(other, images=tuple(map(mirrored, other.images)), held_out=())
    (near,) = seen.overlaps([], [turned])
    assert near.startswith(
        "Pictures of blue square, which is to stay learnable, are nearly the same"
    )

    exact, near = trained_on([leaked])
    assert "1 of the pictures" in exact
    assert "among its own training pictures" in exact
    assert "1 of the pictures" in near
    assert "nearly the same pictures as some of its own training pictures" in near


def test_a_record_of_before_there_were_signatures_is_read_and_said_to_be_one(tmp_path):
    target = tiny.concept("red", "round")
    old = {"lower": {"pictures": list(map(digest, target.images)), "prompts": ["a dog"]}}
    seen = seen_by(record(tmp_path / "old", saw=old))
    (sentence,) = seen.untold
    assert "by exact hashes alone" in sentence
    leaked = replace(target, held_out=(target.images[0], mirrored(target.images[1])))
    (exact,) = seen.overlaps([leaked], [])
    assert exact.startswith("1 of the pictures")
    (sentence,) = seen_by(tmp_path / "nothing").untold
    assert "is not on record with the model" in sentence
    damaged = {"lower": {"pictures": [], "signatures": ["AAAA"]}}
    with pytest.raises(MimaError, match="saw is damaged"):
        seen_by(record(tmp_path / "damaged", saw=damaged))


def test_a_record_is_found_from_home_and_no_path_is_one_line(tmp_path, monkeypatch):
    record(tmp_path / "model", saw={}, config={"seed": 3, "method": "joint"})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert seen_by("~/model").seed == 3
    assert _method_of("~/model") == "joint"
    for read in (seen_by, _method_of):
        with pytest.raises(MimaError, match="is no path"):
            read("~nobody-of-this-name/model")


def test_a_model_without_a_record_has_no_overlaps(tmp_path):
    target = tiny.concept("red", "round")
    for folder in (tmp_path / "nothing", record(tmp_path / "old", config={})):
        assert seen_by(folder).overlaps([target], [target]) == []
    with pytest.raises(MimaError, match="saw is damaged"):
        seen_by(record(tmp_path / "damaged", saw=[1]))


GRID = {
    "methods": {"lora": {"batch_size": 1, "steps": 1}},
    "lr_factors": (1.0,),
    "seeds": (0,),
    "evaluations": 1,
    "max_prompts": 1,
    "benign_prompts": 2,
    "sampler": {"steps": 1, "guidance": 1.0},
}


def test_what_a_run_writes_about_itself_keeps_it_from_being_measured_with(tmp_path):
    tiny.save_tiny_stable_diffusion(tmp_path / "base")
    tiny.save_tiny_clip(tmp_path / "clip")
    first, second = tiny.concept("red", "round"), tiny.concept("blue", "square")
    drawn = replace(first, class_images=())
    config = immunizing.settings(tmp_path, steps=1, num_class_images=5)
    for name, delta in (("immunized", False), ("delta", True)):
        immunize(
            tmp_path / "base", [drawn, second], config, output=tmp_path / name, delta=delta,
        )  # fmt: skip
    seen = seen_by(tmp_path / "immunized")
    captions = ordinary_captions(config.captions)
    free, left = divided(captions)
    assert len(left) == 2
    own = {digest(picture) for concept in (first, second) for picture in concept.images}
    assert seen.levels["lower"] == seen.levels["upper"]
    assert seen.levels["upper"].concepts == (first.name, second.name)
    assert seen.levels["upper"].pictures == own
    shown = {signature(picture) for concept in (first, second) for picture in concept.images}
    assert seen.levels["upper"].signatures == shown
    assert seen.levels["prior"].pictures == {digest(p) for p in second.class_images}
    said = {picture.prompt for picture in second.class_images}
    prompts = seen.levels["prior"].prompts - said
    assert len(prompts) == 5
    assert prompts < set(free)
    # the delta's folder says the same, the delta itself names pictures by their hashes alone
    apply_delta(tmp_path / "base", tmp_path / "delta").save_pretrained(tmp_path / "whole")
    assert seen_by(tmp_path / "delta") == seen
    whole = seen_by(tmp_path / "whole")
    assert whole.levels["upper"].signatures is None
    assert whole.levels["upper"].pictures == own
    assert whole.prompts == seen.prompts
    assert next(iter(own)) not in (tmp_path / "whole" / "README.md").read_text()

    result = evaluate(
        tmp_path / "base",
        tmp_path / "immunized",
        # its held-out pictures are those that the run saw
        [replace(first, held_out=first.images)],
        others=[second],
        output=tmp_path / "out",
        settings=GRID,
        similarities=[tmp_path / "clip"],
        captions=config.captions,
        processes=1,
    )
    assert set(result.benign.prompts) == set(left)
    levels = ("lower", "upper")
    *said, near, own = result.overlaps
    assert len(said) == 2 * len(levels)
    # a class picture shows the same square, less than a point further
    assert near.startswith("Pictures of blue square, which is to stay learnable, are nearly the")
    assert "prior level" in near
    assert "are among its own training pictures" in own
    for level in levels:
        compared = f"{len(first.images)} of the pictures that attacks on {first.name} are compared"
        assert any(o.startswith(compared) and f"{level} level" in o for o in result.overlaps)
        assert any(o.startswith(second.name) and f"{level} level" in o for o in result.overlaps)


def test_class_pictures_are_drawn_with_seeds_that_no_measurement_has(tmp_path):
    """A measured picture's noise is of a small number, a class picture's of a hash."""
    config = immunizing.settings(tmp_path, num_class_images=2)
    own = replace(tiny.concept(), class_images=())
    for seed in range(10):
        _, draws = _class_prompts(own, config.model_copy(update={"seed": seed}))
        assert draws.initial_seed() > 10**6
        assert draws.initial_seed() > PRIOR_SEED > SEED_STRIDE * seed
    # torch draws by the last 32 bits, of which the last three are then 0 in multiples of the stride
    assert PRIOR_SEED % 8 == 7
    assert SEED_STRIDE % 8 == 0


def test_captions_are_divided_where_there_are_enough():
    captions = [f"a {n}" for n in "abcdefgh"]
    free, left = divided([*captions, *captions])
    assert (free, left) == (["a a", "a b", "a c", "a e", "a f", "a g"], ["a d", "a h"])
    assert divided(captions[:3]) == (captions[:3], captions[:3])


def test_prompts_that_were_seen_are_replaced_or_said():
    captions = [f"a {n}" for n in "abcdefgh"]

    def chosen(*prompts, count=2):
        level = Level(prompts=frozenset(prompts))
        return benign_prompts(captions, Seen(levels={"prior": level}), count)

    assert chosen() == (["a d", "a h"], [])
    assert chosen("a d") == (["a h", "a a"], [])
    assert chosen(*captions, count=0) == ([], [])
    prompts, (sentence,) = chosen(*captions)
    assert prompts == ["a d", "a h"]
    assert "not held out" in sentence
