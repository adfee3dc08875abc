from __future__ import annotations

import io

from rich.console import Console

from sqdf_fast.display import StageProgress


def test_each_stage_has_its_bar_and_figures():
    out = io.StringIO()
    with StageProgress(Console(file=out, force_terminal=True, width=120)) as progress:
        progress("sampling", 3, 3, {})
        progress("training", 1, 4, {"loss": 0.5})
        progress("training", 2, 4, {"loss": 0.25})
    last = out.getvalue().split("sampling")[-1]
    assert "3/3" in last
    assert "2/4" in last
    assert "loss 0.25" in last
