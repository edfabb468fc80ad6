import contextlib
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mima.errors import MimaError
from mima.storage import plain_data
from mima.storage.plain_data import flat, read_json, read_yaml


def test_nested_settings_as_one_level():
    nested = {"steps": 3, "lower": {"lr": 1e-5, "adam": {"eps": None}}, "seeds": [0, [1]], "a": {}}
    assert flat(nested) == {
        "steps": 3,
        "lower.lr": 1e-5,
        "lower.adam.eps": None,
        "seeds": [0, [1]],
        "a": {},
    }
    assert flat({}) == {}


HOSTILE_YAML = {
    "aliases": "\n".join(
        ["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))]
    ),
    "itself": "&a [*a]",
    "deep": "[" * 500,
    "many values": "[" + "1," * 110_000,
    "long integer": "a: " + "9" * 5000,
    "no integer": "a: !!int ''",
    "no date": "a: 2001-99-99",
    "no flag": "a: !!bool perhaps",
    "no time": "a: !!timestamp never",
}


@pytest.mark.parametrize("case", HOSTILE_YAML)
def test_hostile_yaml_is_refused(case):
    with pytest.raises(MimaError) as caught:
        read_yaml(HOSTILE_YAML[case])
    assert len(str(caught.value)) < 300


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML has no parser in C here")
@pytest.mark.parametrize(
    "text",
    [
        # that in Python takes seconds to refuse the many values
        *(text for case, text in HOSTILE_YAML.items() if case != "many values"),
        "name: cat\nimages: &x [0.png, {file_name: 'a: b.png'}]\nmore: *x\nday: 2020-01-31\n",
        "a: |\n  one\n  two\nb: >-\n  three\n\n  four\n? c\n: ~\n",
        "é: [ü, 😀, 0x1F, 1e-4, 1.0e-4, yes]",
        # what one of them takes and the other does not
        *("a: b\tc", "[what?]"),
        # what is none, and where
        *(
            "a: [",
            "a: b: c",
            "a: 'b",
            "- a\nb",
            "a: 1\na: 2",
            "a: !!python/name:x y",
            "\0",
            "\ud800",
        ),
        *("a: *b", "@a", "--- a\n--- b"),
    ],
)
def test_a_parser_in_c_says_what_that_in_python_says(text, monkeypatch):
    def outcome():
        try:
            return read_yaml(text)
        except (MimaError, yaml.YAMLError) as error:
            return type(error), str(error)

    said = outcome()
    monkeypatch.setattr(plain_data, "_LOADERS", plain_data._LOADERS[1:])
    assert len(plain_data._LOADERS) == 1
    assert outcome() == said


@pytest.mark.parametrize("text", ["[" * 5000 + "]" * 5000, "9" * 5000, '{"a": 1, "a": 2}'])
def test_hostile_json_is_refused(text):
    with pytest.raises(MimaError):
        read_json(text)


@pytest.mark.parametrize("end", ["", "\\", '"]'])
def test_a_text_of_escaped_quotes_is_read_once(end):
    # to try each quote as the first of a text takes hours
    with pytest.raises(json.JSONDecodeError):
        read_json('"' + '\\"' * 250_000 + end)


def test_brackets_in_texts_are_no_nesting():
    text = '{"a": "' + "[" * 500 + '", "b": "\\"' + "{" * 500 + '"}'
    assert read_json(text) == {"a": "[" * 500, "b": '"' + "{" * 500}


def test_aliases_repeat_plain_values():
    assert read_yaml("a: &x {lr: 1}\nb: *x\nc: {<<: *x, steps: 2}") == {
        "a": {"lr": 1},
        "b": {"lr": 1},
        "c": {"lr": 1, "steps": 2},
    }


def test_a_hundred_thousand_keys_are_compared_once():
    text = json.dumps({f"key{n}": n for n in range(100_000)})
    assert len(read_json(text)) == 100_000


texts = st.text(alphabet=st.sampled_from("[]{}:,&*!-|>\"'\\ \n\ta1.e9~<?#%@"), max_size=80)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(texts)
def test_no_text_is_an_accident(text):
    with contextlib.suppress(MimaError, yaml.YAMLError):
        read_yaml(text)
    with contextlib.suppress(MimaError, json.JSONDecodeError):
        read_json(text)
