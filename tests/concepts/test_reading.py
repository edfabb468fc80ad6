"""Concepts from Python, folders, descriptions and training scripts' lists."""

from __future__ import annotations

import json
import os
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mima.cli.options import described_concepts
from mima.concepts import (
    Concept,
    Picture,
    PictureError,
    embedded_concept,
    embedded_concepts,
    embedded_names,
)
from mima.concepts.concept import learnable
from mima.concepts.naming import with_word
from mima.concepts.reading import load_concepts, num_described
from mima.errors import MimaError


def pictures(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("0.png", "1.png"):
        Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / name)
    return folder


def names(group: tuple[Picture, ...]) -> list[str]:
    return [picture.image.name for picture in group if isinstance(picture.image, Path)]


def write(path: Path, content: object) -> Path:
    text = json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content)
    path.write_text(text, encoding="utf-8")
    return path


# in Python


def test_pictures_in_every_form(tmp_path):
    folder = pictures(tmp_path / "cat")
    image = Image.new("RGB", (4, 4))
    forms = {
        "folder": (folder, 2),
        "text": (str(folder), 2),
        "file": (folder / "0.png", 1),
        "image": (image, 1),
        "files": ([folder / "0.png", str(folder / "1.png")], 2),
        "images": ([image, image], 2),
        "pictures": ((Picture(image, "own"), folder / "0.png"), 2),
        "mapping": ([{"file_name": str(folder / "0.png"), "caption": "own"}], 1),
    }
    for form, (source, count) in forms.items():
        concept = Concept("cat", "a cat", source, held_out=source)
        assert len(concept.images) == len(concept.held_out) == count, form
        assert all(picture.load().mode == "RGB" for picture in concept.images)
        own = form in ("pictures", "mapping")
        assert concept.images[0].prompt == ("own" if own else "a cat"), form


def test_a_concept_is_a_frozen_value_that_can_be_varied(tmp_path):
    concept = Concept("cat", "a cat", pictures(tmp_path / "cat"))
    with pytest.raises(FrozenInstanceError):
        concept.name = "dog"
    renamed = replace(concept, name="dog")
    assert (renamed.name, renamed.images) == ("dog", concept.images)
    assert replace(renamed, name="cat") == concept


def test_class_images_take_the_class_prompt(tmp_path):
    folder = pictures(tmp_path / "animals")
    concept = Concept("cat", "a cat", folder, class_prompt="an animal", class_images=folder)
    assert {picture.prompt for picture in concept.class_images} == {"an animal"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": " "}, "name is empty"),
        ({"name": "a\rcat"}, r"concept 'a\\rcat': its name holds a control character"),
        ({"prompt": " "}, "no caption|prompt is empty|lack captions"),
        ({"images": ()}, "no pictures"),
        ({"images": "absent"}, "no such file"),
        ({"kind": "styel"}, "did you mean 'style'"),
        ({"token": "<new1>"}, "does not contain the token '<new1>'"),
        ({"token": ""}, "token is empty"),
    ],
)
def test_bad_concepts(tmp_path, change, message):
    good = {"name": "cat", "prompt": "a cat", "images": pictures(tmp_path / "cat")}
    with pytest.raises(MimaError, match=message):
        Concept(**{**good, **change})


def test_wrong_types(tmp_path):
    folder = pictures(tmp_path / "cat")
    with pytest.raises(TypeError, match="prompt must be a string"):
        Concept("cat", 3, folder)
    with pytest.raises(TypeError, match="pictures must be"):
        Concept("cat", "a cat", 3)
    with pytest.raises(TypeError, match="path or a PIL image"):
        Concept("cat", "a cat", [3])


def test_texts_that_utf8_cannot_write_are_refused_before_anything_is_trained(tmp_path):
    folder = pictures(tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(MimaError, match=r"name 'caf\\udce9' cannot .* give the concept a name"):
        Concept.from_folder(folder, prompt="a cat")
    assert Concept.from_folder(folder, name="cafe", prompt="a cat").name == "cafe"
    with pytest.raises(MimaError, match=r"prompt 'a .* cannot be written as UTF-8"):
        Concept("cat", "a \udce9", folder)
    with pytest.raises(MimaError, match=r"the caption .* of '.*0\.png' cannot be written"):
        Concept("cat", "a cat", [Picture(folder / "0.png", "a \ud800")])


def test_captions_must_say_the_token(tmp_path):
    folder = pictures(tmp_path / "cat", "a.png", "b.png")
    (folder / "b.txt").write_text("a plain castle")
    with pytest.raises(MimaError, match=r"1 captions do not contain .* 'a plain castle'"):
        Concept("castle", "a <new1> castle", folder, token="<new1>")


def test_every_unreadable_picture_is_in_one_error(tmp_path):
    folder = pictures(tmp_path / "cat", "good.png")
    (folder / "bad.png").write_text("x")
    held_out = pictures(tmp_path / "more")
    (held_out / "worse.pdf").write_bytes(b"%PDF")
    with pytest.raises(PictureError, match="2 pictures cannot be read") as caught:
        Concept("cat", "a cat", folder, held_out=held_out)
    assert "bad.png" in str(caught.value)
    assert "worse.pdf" in str(caught.value)


# folders


def test_a_bare_folder(tmp_path):
    folder = pictures(tmp_path / "red square")
    concept = Concept.from_folder(folder, prompt="a red square")
    assert (concept.name, concept.prompt) == ("red square", "a red square")
    assert names(concept.images) == ["0.png", "1.png"]


def test_a_complete_folder(tmp_path):
    folder = pictures(tmp_path / "cat")
    pictures(folder / "held_out", "2.png")
    pictures(folder / "class_images", "3.png")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,one cat\n1.png,two cats\n")
    described = {"name": "Cat", "prompt": "a cat", "class_prompt": "an animal", "kind": "benign"}
    write(folder / "concept.yaml", described)
    concept = Concept.from_folder(folder)
    assert (concept.name, concept.kind, concept.class_prompt) == ("Cat", "benign", "an animal")
    assert [picture.prompt for picture in concept.images] == ["one cat", "two cats"]
    assert names(concept.held_out) == ["2.png"]
    assert concept.held_out[0].prompt == "a cat"
    assert concept.class_images[0].prompt == "an animal"
    assert Concept.from_folder(folder, name="other").name == "other"


def test_a_description_is_found_whatever_the_case_of_its_name(tmp_path):
    folder = pictures(tmp_path / "cat")
    write(folder / "Concept.yaml", {"prompt": "a cat"})
    (concept,) = load_concepts(tmp_path / "cat")
    assert concept.prompt == "a cat"


def test_the_commonest_caption_is_the_prompt_where_nothing_says_it(tmp_path):
    folder = pictures(tmp_path / "cat", "0.png", "1.png", "2.png")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,x\n1.png,y\n2.png,y\n")
    assert Concept.from_folder(folder).prompt == "y"


def test_pictures_elsewhere(tmp_path):
    pictures(tmp_path / "cat" / "photos")
    write(tmp_path / "cat" / "concept.yaml", {"prompt": "a cat", "images": "photos"})
    assert names(Concept.from_folder(tmp_path / "cat").images) == ["0.png", "1.png"]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"promt": "a cat"}, "'promt' is unknown; did you mean 'prompt'"),
        ({"prompt": 3}, "prompt must be text, got 3"),
        (["a cat"], "expected the attributes of one concept"),
        ({"prompt": "a cat", "images": "absent"}, "no such file"),
    ],
)
def test_bad_descriptions_in_a_folder(tmp_path, description, message):
    folder = pictures(tmp_path / "cat")
    write(folder / "concept.yaml", description)
    with pytest.raises(MimaError, match=message):
        Concept.from_folder(folder)


def test_bad_folders(tmp_path):
    with pytest.raises(MimaError, match="does not exist"):
        Concept.from_folder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MimaError, match="holds no pictures"):
        Concept.from_folder(tmp_path / "empty", prompt="x")
    with pytest.raises(MimaError, match="give one prompt for all"):
        Concept.from_folder(pictures(tmp_path / "cat"))
    with pytest.raises(MimaError, match="'propmt' is unknown; did you mean 'prompt'"):
        Concept.from_folder(tmp_path / "cat", propmt="a cat")
    write(tmp_path / "cat" / "concept.yaml", {})
    write(tmp_path / "cat" / "concept.json", {})
    with pytest.raises(MimaError, match="keep one"):
        Concept.from_folder(tmp_path / "cat")


# load_concepts


def test_a_folder_of_concepts(tmp_path):
    for name in ("b", "a"):
        write(pictures(tmp_path / name) / "concept.yaml", {"prompt": name})
    assert [concept.name for concept in load_concepts(tmp_path)] == ["a", "b"]


def test_an_empty_folder_among_concepts_is_an_error(tmp_path):
    write(pictures(tmp_path / "a") / "concept.yaml", {"prompt": "a"})
    (tmp_path / "b").mkdir()
    with pytest.raises(MimaError, match="b holds no pictures"):
        load_concepts(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(MimaError, match="holds no pictures and no folders"):
        load_concepts(tmp_path)
    with pytest.raises(MimaError, match="no concepts given"):
        load_concepts([])
    with pytest.raises(MimaError, match="neither a folder, nor a file, nor an embedded"):
        load_concepts("absent")
    with pytest.raises(TypeError, match="got 3"):
        load_concepts(3)
    with pytest.raises(MimaError, match=r"described in \.yaml or \.json"):
        load_concepts(pictures(tmp_path / "a") / "0.png")


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_of_concepts(tmp_path, suffix):
    pictures(tmp_path / "cat")
    pictures(tmp_path / "more", "2.png")
    entries = [
        {"name": "c", "prompt": "a cat", "images": "cat", "held_out": ["more/2.png"]},
        {
            "prompt": "a dog",
            "images": [{"file_name": "cat/0.png", "text": "my dog"}, "cat/1.png"],
            "kind": "object",
        },
    ]
    for content in (entries, {"concepts": entries}):
        first, second = load_concepts(write(tmp_path / f"list{suffix}", content))
        assert (first.name, names(first.held_out)) == ("c", ["2.png"])
        assert (second.name, [p.prompt for p in second.images]) == ("a dog", ["my dog", "a dog"])
    (alone,) = load_concepts(write(tmp_path / f"one{suffix}", entries[0]))
    assert alone.name == "c"


def test_a_list_of_everything(tmp_path):
    folder = pictures(tmp_path / "cat")
    concept = Concept("made", "x", folder)
    described = {"prompt": "y", "images": "cat"}
    found = load_concepts([concept, described, [folder / "0.png"][:0]], base=tmp_path)
    assert [item.name for item in found] == ["made", "cat"]


def test_paths_may_start_from_the_working_directory(tmp_path, monkeypatch):
    pictures(tmp_path / "data" / "cat")
    (tmp_path / "lists").mkdir()
    path = write(tmp_path / "lists" / "one.yaml", {"prompt": "a cat", "images": "data/cat"})
    monkeypatch.chdir(tmp_path)
    assert names(load_concepts(path)[0].images) == ["0.png", "1.png"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.yaml", "", "expected the attributes of a concept, got None"),
        ("a.yaml", "[]", "describes no concepts"),
        ("a.yaml", "- 3", "expected the attributes of a concept, got 3"),
        ("a.yaml", "- {prompt: x}", "images is missing"),
        ("a.yaml", "- {name: x, images: []}", "has no pictures: images is empty"),
        ("a.yaml", "- {prompt: x, imagse: y}", "'imagse' is unknown; did you mean 'images'"),
        ("a.yaml", "- {prompt: [x], images: y}", "prompt must be text"),
        ("a.json", '[{"instance_prompt": "x"}]', "instance_data_dir is missing"),
        ("a.json", '[{"instance_data_dir": "absent"}]', "does not exist"),
        ("a.json", '[{"instance_data_dir": 3}]', "instance_data_dir must be text"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(MimaError, match=message):
        load_concepts(tmp_path / name)


def test_unreadable_pictures_of_all_concepts_come_in_one_error(tmp_path):
    for name in ("a", "b"):
        folder = pictures(tmp_path / name)
        write(folder / "concept.yaml", {"prompt": name})
        (folder / f"bad-{name}.png").write_text("x")
    with pytest.raises(PictureError, match="2 pictures") as caught:
        load_concepts(tmp_path)
    assert len(caught.value.problems) == 2


# the lists of training scripts


def test_a_training_scripts_list(tmp_path):
    pictures(tmp_path / "cat")
    pictures(tmp_path / "animals", "9.png")
    (tmp_path / "cat" / "metadata.csv").write_text("file_name,text\n0.png,x\n1.png,y\n")
    entry = {
        "instance_prompt": "a <new1> cat",
        "class_prompt": "animal",
        "instance_data_dir": "cat",
        "class_data_dir": "animals",
        "token": "<new1>",
        "validation_prompt": "a <new1> cat on the moon",
    }
    (concept,) = load_concepts(write(tmp_path / "list.json", [entry]))
    assert (concept.name, concept.token, concept.kind) == ("cat", "<new1>", "instance")
    assert concept.validation_prompt == "a <new1> cat on the moon"
    # the scripts use one prompt for all pictures
    assert {picture.prompt for picture in concept.images} == {"a <new1> cat"}
    assert [picture.prompt for picture in concept.class_images] == ["animal"]


@pytest.mark.parametrize("where", ["beside the list", "beside the pictures"])
@pytest.mark.parametrize("kind", ["csv", "txt", "one line"])
def test_prompt_filename(tmp_path, where, kind):
    folder = pictures(tmp_path / "cat")
    text = {"csv": "file_name,prompt\n0.png,x\n1.png,y\n", "txt": "x\ny\n", "one line": "x\n"}[kind]
    name = "prompts.csv" if kind == "csv" else "prompts.txt"
    ((tmp_path if where == "beside the list" else folder) / name).write_text(text)
    entry = {"instance_prompt": "a cat", "instance_data_dir": "cat", "prompt_filename": name}
    (concept,) = load_concepts(write(tmp_path / "list.json", [entry]))
    expected = ["x", "x"] if kind == "one line" else ["x", "y"]
    assert [picture.prompt for picture in concept.images] == expected
    assert concept.prompt == "a cat"


def test_prompt_filename_that_does_not_fit(tmp_path):
    pictures(tmp_path / "cat")
    entry = {"instance_data_dir": "cat", "prompt_filename": "p.txt"}
    path = write(tmp_path / "list.json", [entry])
    with pytest.raises(MimaError, match=r"p\.txt is neither in"):
        load_concepts(path)
    (tmp_path / "p.txt").write_text("x\ny\nz\n")
    with pytest.raises(MimaError, match="3 prompts for the 2 pictures"):
        load_concepts(path)


def test_class_images_that_are_yet_to_be_made(tmp_path):
    pictures(tmp_path / "cat")
    entry = {"instance_prompt": "a cat", "instance_data_dir": "cat", "class_data_dir": "absent"}
    (concept,) = load_concepts(write(tmp_path / "list.json", [entry]))
    assert concept.class_images == ()


def test_class_images_that_a_script_fetched_come_with_their_captions(tmp_path):
    pictures(tmp_path / "cat")
    fetched = pictures(tmp_path / "animals" / "images").parent
    # the paths start where the script ran
    (fetched / "images.txt").write_text("data/animals/images/1.png\ndata/animals/images/0.png\n")
    (fetched / "caption.txt").write_text("a grey cat\ntwo cats\n")
    entry = {"instance_prompt": "a cat", "instance_data_dir": "cat", "class_data_dir": "animals"}
    path = write(tmp_path / "list.json", [entry])
    (concept,) = load_concepts(path)
    assert [(p.prompt, p.image.name) for p in concept.class_images] == [
        ("a grey cat", "1.png"),
        ("two cats", "0.png"),
    ]
    (fetched / "caption.txt").write_text("a grey cat\n")
    with pytest.raises(MimaError, match=r"images\.txt names 2 pictures, caption\.txt holds 1"):
        load_concepts(path)


def test_keys_that_only_a_script_understands_are_ignored_aloud(tmp_path):
    pictures(tmp_path / "cat")
    entry = {"instance_prompt": "a cat", "instance_data_dir": "cat", "num_class_images": 200}
    with pytest.warns(UserWarning, match="ignored num_class_images"):
        load_concepts(write(tmp_path / "list.json", [entry]))


def test_keys_of_yaml_that_are_no_texts_are_ignored_aloud_too(tmp_path):
    pictures(tmp_path / "cat")
    text = "- {instance_prompt: a cat, instance_data_dir: cat, 2: foo, on: bar, zed: 1}\n"
    (tmp_path / "list.yaml").write_text(text)
    with pytest.warns(UserWarning, match="ignored 2, True, zed"):
        load_concepts(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("name", "text"), [("metadata.csv", "file_name,text\n"), ("prompts.txt", "a cat\n")]
)
def test_captions_of_no_pictures(tmp_path, name, text):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / name).write_text(text)
    entry = {"instance_data_dir": "empty", "prompt_filename": name}
    with pytest.raises(MimaError, match=r"concept 1: instance_data_dir .*empty holds no pictures"):
        load_concepts(write(tmp_path / "list.json", [entry]))


def test_captioned_pictures_alone_are_a_concept_and_no_group(tmp_path):
    folder = pictures(tmp_path / "cat")
    listed = [{"file_name": f"cat/{name}.png", "text": "a cat"} for name in "01"]
    (concept,) = load_concepts(write(tmp_path / "one.yaml", {"images": listed}))
    assert (concept.prompt, names(concept.images)) == ("a cat", ["0.png", "1.png"])
    (tmp_path / "held.yaml").write_text(f"held_out: [{{file_name: {folder / '0.png'}, text: x}}]\n")
    with pytest.raises(MimaError, match="images is missing"):
        load_concepts(tmp_path / "held.yaml")


def grouped(tmp_path: Path) -> Path:
    for name in ("cat", "dog", "cow"):
        pictures(tmp_path / name)
    entry = {
        name: {"instance_prompt": f"a {name}", "class_prompt": "animal", "instance_data_dir": name}
        for name in ("cat", "dog", "cow")
    }
    content = {"Cat+Dog": [entry["cat"], entry["dog"]], "Cow": [entry["cow"]]}
    return write(tmp_path / "groups.json", content)


def test_groups(tmp_path):
    path = grouped(tmp_path)
    assert [concept.name for concept in load_concepts(path, group="Cat+Dog")] == ["Cat", "Dog"]
    assert [concept.name for concept in load_concepts(f"{path}#Cow")] == ["Cow"]
    with pytest.raises(MimaError, match=r"2 groups of concepts, say which: Cat\+Dog, Cow"):
        load_concepts(path)
    with pytest.raises(MimaError, match="no group 'Cow2'; did you mean 'Cow'"):
        load_concepts(path, group="Cow2")


def test_groups_may_be_named_by_numbers(tmp_path):
    for name in ("cat", "dog"):
        pictures(tmp_path / name)
    groups = {
        number: [{"instance_prompt": f"a {name}", "instance_data_dir": name}]
        for number, name in ((1, "cat"), (2, "dog"))
    }
    path = write(tmp_path / "groups.yaml", groups)
    with pytest.raises(MimaError, match="2 groups of concepts, say which: 1, 2"):
        load_concepts(path)
    assert [concept.prompt for concept in load_concepts(f"{path}#2")] == ["a dog"]
    with pytest.raises(MimaError, match="no group '3'"):
        load_concepts(path, group="3")
    write(path, {1: groups[1]})
    assert [concept.name for concept in load_concepts(path)] == ["1"]
    with pytest.raises(MimaError, match="group '1' stands twice"):
        load_concepts({1: groups[1], "1": groups[2]}, base=tmp_path, group="1")


def test_the_only_group_needs_no_name(tmp_path):
    pictures(tmp_path / "cat")
    entry = {"instance_prompt": "a cat", "instance_data_dir": "cat"}
    path = write(tmp_path / "groups.json", {"van gogh+monet": [entry, entry]})
    assert [concept.name for concept in load_concepts(path)] == ["van gogh", "monet"]
    write(path, {"a+b+c": [entry, entry]})
    assert [concept.name for concept in load_concepts(path)] == ["cat", "cat-2"]
    write(path, {"a+b": []})
    with pytest.raises(MimaError, match="group 'a\\+b' is empty"):
        load_concepts(path)


def test_concepts_with_the_same_class_prompt_stay_apart(tmp_path):
    entries = []
    for name in ("x/cat", "y/cat", "z/cat-2"):
        pictures(tmp_path / name)
        entries.append(
            {"instance_prompt": f"{name}", "class_prompt": "cat", "instance_data_dir": name}
        )
    found = load_concepts(write(tmp_path / "list.json", entries))
    assert [concept.prompt for concept in found] == ["x/cat", "y/cat", "z/cat-2"]
    assert len({concept.name for concept in found}) == 3


# embedded


def test_embedded_concepts():
    found = embedded_concepts()
    assert len(found) == len(embedded_names()) >= 18
    kinds = [concept.kind for concept in found]
    assert kinds.count("object") >= 6
    assert kinds.count("style") >= 2
    assert kinds.count("instance") >= 4
    assert kinds.count("benign") >= 6
    for concept in found:
        assert concept.images, concept.name
        assert concept.held_out, concept.name
        assert concept.class_prompt, concept.name
    assert load_concepts(embedded_names()[0]) == [found[0]]


def test_an_unknown_embedded_concept():
    name = embedded_names()[0]
    with pytest.raises(MimaError, match=f"did you mean '{name}'"):
        embedded_concept(name + "x")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lists.json", '{"cat+dog": [], "bird": [], "cat+dog": []}'),
        ("lists.yaml", "cat+dog: []\nbird: []\ncat+dog: []\n"),
    ],
)
def test_a_group_that_stands_twice_is_named_not_dropped(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(MimaError, match=rf"{name}: 'cat\+dog' stands twice"):
        load_concepts(tmp_path / name)


def test_anchors_and_merges_of_yaml_are_read(tmp_path):
    pictures(tmp_path / "shown", "a.png")
    (tmp_path / "concepts.yaml").write_text(
        "- &cat {name: cat, prompt: a cat, images: shown}\n- {<<: *cat, name: dog}\n- *cat\n"
    )
    names = [concept.name for concept in load_concepts(tmp_path / "concepts.yaml")]
    assert names == ["cat", "dog", "cat-2"]


def test_prompts_for_evaluation_are_no_captions(tmp_path):
    pictures(tmp_path / "castle")
    (tmp_path / "p.txt").write_text("photo of a {}.\na {} on the moon\n")
    entry = {
        "instance_prompt": "photo of a <new1> castle",
        "instance_data_dir": "castle",
        "prompt_filename": "p.txt",
        "token": "<new1>",
    }
    (concept,) = load_concepts(write(tmp_path / "list.json", [entry]))
    assert {picture.prompt for picture in concept.images} == {"photo of a <new1> castle"}
    assert concept.validation_prompt == "photo of a <new1> castle."


def test_compositions_without_names_are_named_by_their_folders(tmp_path):
    for name in ("cat", "dog", "hat"):
        pictures(tmp_path / name)
    entries = {
        name: {"instance_prompt": f"a {name}", "instance_data_dir": name}
        for name in ("cat", "dog", "hat")
    }
    lists = [[entries["cat"], entries["hat"]], [entries["dog"], entries["hat"]]]
    path = write(tmp_path / "dataset_multiconcept.json", lists)
    with pytest.raises(MimaError, match=r"2 groups of concepts, say which: cat\+hat, dog\+hat"):
        load_concepts(path)
    assert [c.name for c in load_concepts(f"{path}#dog+hat")] == ["dog", "hat"]


def test_compositions_of_the_same_folders_are_numbered(tmp_path):
    for name in ("cat", "dog"):
        pictures(tmp_path / name)
    lists = [
        [{"instance_prompt": f"{kind} {name}", "instance_data_dir": name} for name in order]
        for kind, order in (
            ("photo of a", ("cat", "dog")),
            ("painting of a", ("cat", "dog")),
            ("drawing of a", ("dog", "cat")),
        )
    ]
    path = write(tmp_path / "compositions.json", lists)
    with pytest.raises(MimaError, match=r"3 groups .*: cat\+dog, cat\+dog-2, dog\+cat"):
        load_concepts(path)
    for group, kind in (("cat+dog", "photo"), ("cat+dog-2", "painting")):
        found = load_concepts(path, group=group)
        assert [(c.name, c.prompt) for c in found] == [
            ("cat", f"{kind} of a cat"),
            ("dog", f"{kind} of a dog"),
        ]


# what is told beside a description


@pytest.mark.parametrize("kind", ["folder", "file", "list", "mapping", "concept", "one of a group"])
def test_what_is_told_wins_over_a_description(tmp_path, kind):
    folder = pictures(tmp_path / "cat")
    animals = pictures(tmp_path / "animals")
    entry = {"instance_prompt": "a cat", "instance_data_dir": "cat", "class_prompt": "x"}
    sources = {
        "folder": folder,
        "file": lambda: write(tmp_path / "c.yaml", {"images": "cat"}),
        "list": lambda: write(tmp_path / "c.json", [entry]),
        "mapping": {"images": str(folder), "prompt": "a dog"},
        "concept": Concept("cat", "a <new1> dog", folder),
        "one of a group": lambda: (
            f"{write(tmp_path / 'g.json', {'a': [entry], 'cat': [entry]})}#cat"
        ),
    }
    source = sources[kind]
    told = {
        "prompt": "a <new1> cat",
        "class_prompt": "an animal",
        "class_images": str(animals),
        "token": "<new1>",
        "initializer": "cat",
    }
    (concept,) = load_concepts(source() if callable(source) else source, told=told)
    assert (concept.name, concept.prompt, concept.initializer) == ("cat", "a <new1> cat", "cat")
    own = "a <new1> dog" if kind == "concept" else "a <new1> cat"
    assert {picture.prompt for picture in concept.images} == {own}
    assert [picture.prompt for picture in concept.class_images] == ["an animal"] * 2


def test_the_command_line_says_the_prompt_of_a_file_without_one(tmp_path):
    folder = pictures(tmp_path / "cat")
    file = str(write(tmp_path / "c.yaml", {"images": "cat"}))
    (concept,) = described_concepts([file], {"prompt": "a cat"})
    assert (concept.prompt, {p.prompt for p in concept.images}) == ("a cat", {"a cat"})
    message = rf"^--prompt, --class-prompt says .* one concept, {file} {folder} describes 2$"
    with pytest.raises(MimaError, match=message):
        described_concepts([file, str(folder)], {"prompt": "a cat", "class_prompt": "x"})


def test_a_prompt_that_is_told_leaves_pictures_their_captions(tmp_path):
    (pictures(tmp_path / "cat") / "0.txt").write_text("a cat on a table")
    entry = {"instance_data_dir": "cat"}
    file = write(tmp_path / "c.json", [entry])
    (concept,) = load_concepts(file, told={"prompt": "a dog"})
    assert [picture.prompt for picture in concept.images] == ["a cat on a table", "a dog"]
    # the scripts whose key it is read no captions
    file = write(tmp_path / "c.json", [entry | {"instance_prompt": "a cat"}])
    (concept,) = load_concepts(file, told={"prompt": "a dog"})
    assert [picture.prompt for picture in concept.images] == ["a dog"] * 2


def test_an_embedded_concept_may_be_told_something():
    (fox,) = load_concepts("unseen-fox", told={"class_prompt": "a beast"})
    assert fox == replace(embedded_concept("unseen-fox"), class_prompt="a beast")


def test_what_is_told_is_told_of_one_concept(tmp_path):
    sources = [pictures(tmp_path / name) for name in ("cat", "dog")]
    with pytest.raises(MimaError, match="prompt: told of one concept, but 2 are described"):
        load_concepts(sources, told={"prompt": "x"})
    assert num_described(sources) == num_described(tmp_path) == 2


def test_pictures_that_are_not_there_are_named(tmp_path):
    entry = {"instance_prompt": "a cat", "instance_data_dir": "benchmark_dataset/cat"}
    with pytest.raises(MimaError, match="benchmark_dataset/cat does not exist"):
        load_concepts(write(tmp_path / "dataset.json", [entry]))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800", "~nosuchuser/cat.png"])
def test_no_path_is_an_accident(tmp_path, name):
    with pytest.raises(MimaError, match="is no path"):
        Concept("cat", "a cat", name)
    pictures(tmp_path / "cat")
    (tmp_path / "cat" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(MimaError, match="is no path"):
        Concept.from_folder(tmp_path / "cat")


def test_a_concept_is_freed_of_pictures_that_show_another() -> None:
    fox, mono = embedded_concept("unseen-fox"), embedded_concept("style-mono")
    left = fox.without([mono])
    assert [p.prompt for p in left.images] == [
        p.prompt for p in fox.images if "mono style" not in p.prompt
    ]
    assert 0 < len(left.images) < len(fox.images)
    assert left.held_out == fox.held_out
    assert fox.without([embedded_concept("tiger")]) is fox
    with pytest.raises(MimaError, match="every picture's caption names one of: mono style"):
        mono.without([mono])


def test_lists_that_name_each_other_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("concepts: [b.yaml]")
    (tmp_path / "b.yaml").write_text("[a.yaml]")
    with pytest.raises(MimaError, match=r"b\.yaml names .*a\.yaml, .* a list in a circle"):
        load_concepts(tmp_path / "a.yaml")


def test_a_link_to_a_folder_names_its_concept(tmp_path):
    pictures(tmp_path / "blobs" / "83af01")
    (tmp_path / "cat").symlink_to(tmp_path / "blobs" / "83af01")
    assert Concept.from_folder(tmp_path / "cat", prompt="a cat").name == "cat"


def test_a_name_is_a_word(tmp_path):
    folder = pictures(tmp_path / "p", "a.png", "b.png")
    (folder / "a.txt").write_text("a cartoon of a card")
    (folder / "b.txt").write_text("two Cars")
    learnt = Concept("cartoon", "a cartoon", folder)
    left = learnt.without([Concept("car", "a car", pictures(tmp_path / "car"))])
    assert [picture.prompt for picture in left.images] == ["a cartoon of a card"]
    castle = Concept("castle", "a <new1> castle", folder.parent / "car", token="<new1>")
    assert with_word("photo of a <new1> castle", castle, "sks") == "photo of a sks"
    assert with_word("<new1>, a castle", castle, "sks") == "sks, a sks"


def test_what_must_stay_learnable_is_freed_of_targets_aloud(tmp_path, caplog):
    folder = pictures(tmp_path / "tiger", "a.png", "b.png")
    (folder / "a.txt").write_text("a tiger in mono style")
    (folder / "b.txt").write_text("a tiger")
    style = Concept("mono style", "mono style", pictures(tmp_path / "style"), kind="style")
    (tiger,) = learnable([Concept("tiger", "a tiger", folder)], [style])
    assert [picture.prompt for picture in tiger.images] == ["a tiger"]
    assert "concept 'tiger': 1 of its 2 pictures are left out" in caplog.text
    # where nothing would be left, it stays as it is
    black = Concept("black cat", "a black cat", pictures(tmp_path / "black"))
    assert learnable([black], [Concept("cat", "a cat", folder)]) == [black]
    assert "every picture's caption names one of: cat" in caplog.text
