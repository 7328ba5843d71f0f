"""JSON that means one thing."""

import json

import pytest

from bivec.models.plain_json import parse_json


@pytest.mark.parametrize("value", [None, True, 1, -0.5, "ü", [], {}, {"a": [{"b": 1}, {"b": 2}]}, [[[[1]]]]])
def test_plain_json_is_read_as_by_python(value):
    assert parse_json(json.dumps(value)) == parse_json(json.dumps(value).encode()) == value


def test_a_key_with_one_value_may_be_there_twice():
    """transformers takes such files, and nothing is lost."""
    assert parse_json('{"a": [1, null], "b": 2, "a": [1, null]}') == {"a": [1, None], "b": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 1.0}', "the key 'a' is there twice"),
        ('[{"x": {"r": 1, "r": 2}}]', "the key 'r' is there twice"),
        (
            json.dumps({str(i): 1 for i in range(100_000)})[:-1] + ', "99999": 2}',
            "the key '99999'",
        ),  # not in square time
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ("9" * 5000, "digits"),
        ("{", "line 1 column 2"),
        ("", "Expecting value"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'"\xff"', "utf-8"),
    ],
)
def test_what_has_no_one_meaning_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}'])
def test_nan_is_taken_where_others_write_it_alone(text):
    parse_json(text)
    with pytest.raises(ValueError, match="no JSON number"):
        parse_json(text, allow_nan=False)
