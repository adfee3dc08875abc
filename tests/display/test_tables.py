from __future__ import annotations

from sqdf_fast.display import text_table


def test_columns_are_aligned_and_short_rows_follow():
    rows = [["sqdf", "1.0 [0.5, 1.5]", "[bold]"], ["gone", "not run yet"], ["a long name", "-", ""]]
    assert text_table(["method", "reward", "note"], rows, left=(0, 2)).splitlines() == [
        "method               reward  note",
        "sqdf         1.0 [0.5, 1.5]  [bold]",
        "a long name               -",
        "gone: not run yet",
    ]


def test_without_heads_and_without_rows():
    assert text_table((), [["a", "1"], ["bcd", "10"]]).splitlines() == ["a     1", "bcd  10"]
    assert text_table(["method", "reward"], [["gone", "why"][:1]]) == "gone"
    assert text_table(["a", "b"], []) == ""


def test_a_wide_table_is_not_wrapped():
    assert len(text_table(["name", "note"], [["x", "word " * 200]], left=(0, 1)).splitlines()) == 2
