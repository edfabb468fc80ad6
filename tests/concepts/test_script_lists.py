"""The lists of concepts that training scripts read."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.concept_files import names, pictures, write

from mima.concepts.reading import load_concepts
from mima.errors import MimaError


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
