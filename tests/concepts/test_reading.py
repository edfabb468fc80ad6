"""Concepts from folders, descriptions, lists of them, and what is told beside."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.concept_files import names, pictures, write

from mima.cli.options import described_concepts
from mima.concepts import Concept, PictureError, embedded_concept
from mima.concepts.reading import load_concepts, num_described
from mima.errors import MimaError

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


def test_what_a_folder_of_pictures_holds_besides_is_not_read_aloud(tmp_path, caplog):
    folder = pictures(tmp_path / "cat")
    pictures(folder / "held_out", "2.png")
    pictures(folder / "class_images", "3.png")
    told = {"prompt": "a cat", "class_prompt": "an animal"}
    Concept.from_folder(folder, **told)
    Concept("cat", images=folder, held_out=folder / "held_out", class_images=folder, **told)
    assert caplog.messages == []
    Concept("cat", images=folder, **told)
    Concept("cat", images=folder, held_out=folder / "held_out", **told)
    load_concepts([{"name": "cat", "images": str(folder), **told}])
    both = f"nothing reads held_out/ and class_images/ in {folder}"
    assert [message.partition("; ")[0] for message in caplog.messages] == [
        f"concept 'cat': {both}",
        f"concept 'cat': nothing reads class_images/ in {folder}",
        f"concept description, concept 1: {both}",
    ]


def test_class_pictures_without_captions_need_a_class_prompt(tmp_path):
    folder = pictures(tmp_path / "cat")
    pictures(folder / "class_images")
    with pytest.raises(
        MimaError, match=r"one prompt for all \(class_prompt= in Python, --class-prompt,"
    ):
        Concept.from_folder(folder, prompt="a cat")
    with pytest.raises(MimaError, match="there is no class_prompt for all"):
        Concept("cat", "a cat", folder / "0.png", class_images=folder / "1.png")


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


def test_anchors_and_merges_of_yaml_are_read(tmp_path):
    pictures(tmp_path / "shown", "a.png")
    (tmp_path / "concepts.yaml").write_text(
        "- &cat {name: cat, prompt: a cat, images: shown}\n- {<<: *cat, name: dog}\n- *cat\n"
    )
    names = [concept.name for concept in load_concepts(tmp_path / "concepts.yaml")]
    assert names == ["cat", "dog", "cat-2"]


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


def test_lists_that_name_each_other_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("concepts: [b.yaml]")
    (tmp_path / "b.yaml").write_text("[a.yaml]")
    with pytest.raises(MimaError, match=r"b\.yaml names .*a\.yaml, .* a list in a circle"):
        load_concepts(tmp_path / "a.yaml")


def test_a_link_to_a_folder_names_its_concept(tmp_path):
    pictures(tmp_path / "blobs" / "83af01")
    (tmp_path / "cat").symlink_to(tmp_path / "blobs" / "83af01")
    assert Concept.from_folder(tmp_path / "cat", prompt="a cat").name == "cat"
