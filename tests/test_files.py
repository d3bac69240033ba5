"""Atomic writes: all or nothing, also when writing fails."""

import json
import os
import stat

import pytest

from torchzoo.errors import TorchzooError
from torchzoo.files import atomic_path, write_json, write_text


def test_writes_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "note.txt"
    assert write_text(path, "one\n") == path
    assert path.read_text() == "one\n"
    write_text(str(path), "zwei €\n")
    assert path.read_text(encoding="utf-8") == "zwei €\n"
    assert os.listdir(path.parent) == ["note.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_text(tmp_path / "note.txt", "old")

    def write_half():
        with atomic_path(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["note.txt"]


def test_reader_sees_the_old_file_until_the_end(tmp_path):
    path = write_text(tmp_path / "note.txt", "old")
    with atomic_path(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_json_is_indented_and_refuses_what_json_cannot_say(tmp_path):
    path = write_json(tmp_path / "value.json", {"b": [1, 2.5], "a": "ü"})
    assert path.read_text(encoding="utf-8").startswith('{\n  "b": [\n')
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": [1, 2.5], "a": "ü"}
    before = path.read_text(encoding="utf-8")
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            write_json(path, value)
    assert path.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("target", ["file/below.txt", "folder"])
def test_what_cannot_be_written_is_one_error_that_names_the_path(tmp_path, target):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(TorchzooError, match=f"can't write .*{target}"):
        write_text(tmp_path / target, "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
