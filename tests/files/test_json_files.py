"""JSON is read as strictly as `formats/README.md` says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emloc_tools.errors import FormatError
from emloc_tools.files import json_files
from emloc_tools.files.json_files import MAX_DEPTH, parse_object, read_json, whole_number
from tests.files.literal import put

REFUSED = {
    "nothing": b"",
    "an array": b"[1]",
    "a text": b'"a"',
    "two objects": b"{}{}",
    "a comment": b"{} // comment",
    "a trailing comma": b'{"a": 1,}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "Latin-1": '{"ä": 1}'.encode("latin-1"),
    "an overlong encoding": b'{"\xc0\xaf": 1}',
    "a duplicate key": b'{"a": 1, "a": 1}',
    "a duplicate key by escape": b'{"a": 1, "\\u0061": 2}',
    "a duplicate key further in": b'{"b": [{"a": 1, "a": 2}]}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": Infinity}',
    "-Infinity": b'{"a": -Infinity}',
    "half a surrogate pair as a key": b'{"\\udc00": 1}',
    "half a surrogate pair as a value": b'{"a": ["\\ud83d"]}',
    "surrogates in the wrong order": b'{"a": "\\ude00\\ud83d"}',
    "ten thousand digits": b'{"a": ' + b"1" * 10_000 + b"}",
    "objects without end": b'{"a":' * 50_000,
    "arrays too deep": b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
}


@pytest.mark.parametrize("what", REFUSED)
def test_anything_but_strict_json_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    path = put(tmp_path, "x.json", REFUSED[what])
    with pytest.raises(FormatError) as caught:
        read_json(path, "C1")
    assert (caught.value.rule, caught.value.file) == ("C1", str(path))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_what_strict_json_allows_is_read_as_it_is() -> None:
    text = '{"a": [1, 2.5, true, null, "\\ud83d\\ude00 \\n"], "": {"b": -3}}'
    assert parse_object(text.encode()) == {"a": [1, 2.5, True, None, "😀 \n"], "": {"b": -3}}


def test_the_deepest_allowed_nesting_is_read() -> None:
    depth = MAX_DEPTH - 1  # arrays inside the outermost object
    data = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    assert parse_object(data) == json.loads(data)


def test_a_file_above_the_limit_is_refused_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, "x.json", b'{"a": 1}')
    assert read_json(path, "C1") == {"a": 1}
    with pytest.raises(FormatError, match="is larger than 7 bytes"):
        json_files.read_bytes(path, "C1", limit=7)
    assert json_files.read_bytes(path, "C1", limit=8) == b'{"a": 1}'


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, True), (7, True), (-1, False), (True, False), (1.0, False), ("1", False), (None, False), ([], False)],
)
def test_whole_numbers_are_integers_written_as_such(value: object, expected: bool) -> None:
    assert whole_number(value) is expected
