from __future__ import annotations

import pytest

from sqdf_fast.errors import UserError
from sqdf_fast.prompts import available_prompts, load_prompts
from sqdf_fast.shapes import HELD_OUT_PROMPTS, TRAIN_PROMPTS


def test_animals_are_the_45_of_the_paper():
    animals = load_prompts("animals")
    assert len(animals) == len(set(animals)) == 45
    assert animals[:3] == ["cat", "dog", "horse"]
    assert animals[-1] == "kangaroo"


def test_shapes_sets_do_not_overlap():
    assert load_prompts("shapes") == list(TRAIN_PROMPTS)
    assert load_prompts("shapes-held-out") == list(HELD_OUT_PROMPTS)
    assert not set(load_prompts("shapes")) & set(load_prompts("shapes-held-out"))
    assert available_prompts() == ("animals", "shapes", "shapes-held-out")


def test_file_keeps_order_and_repetitions(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# two of three\n a café \r\n\nb, with #hash\na café\n".encode())
    assert load_prompts(path) == load_prompts(str(path)) == ["a café", "b, with #hash", "a café"]


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"# only a comment\n"])
def test_file_without_a_prompt(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"empty\.txt: holds no prompt; write one prompt a line"):
        load_prompts(path)


def test_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"ab\ncaf\xe9 noir\n")
    with pytest.raises(UserError, match=r"latin1\.txt: not UTF-8 \(byte 6\)"):
        load_prompts(path)


def test_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(tmp_path)


def test_unknown_name_suggests_and_lists():
    with pytest.raises(UserError, match=r"did you mean 'animals'.*animals, shapes, shapes-held-out"):
        load_prompts("animal")
    with pytest.raises(UserError, match="neither a file nor a named set; named sets"):
        load_prompts("/no/such/file.txt")
    with pytest.raises(UserError, match="neither a file nor a named set"):
        load_prompts("a" * 300)
