from mima.storage.plain_data import flat


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
