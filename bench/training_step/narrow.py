"""Known architectures made small: the same classes and conditioning, a tenth of the width, pictures of 64 x 64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sqdf_fast.families.loading import known_model

_UNET = {
    "sd15": {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": 2},
    "sdxl": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [1, 2, 4],
        "transformer_layers_per_block": [1, 1, 2],
    },
}
_COMMON: dict[str, dict[str, Any]] = {
    "unet": {"sample_size": 8, "layers_per_block": 1},
    "vae": {"sample_size": 64, "layers_per_block": 1, "block_out_channels": [32, 32, 32, 32]},
}


def write(model: str, folder: Path) -> Path:
    """A diffusers folder of configurations without weights; `model`: "sd15" or "sdxl"."""
    known = known_model(model)
    assert known is not None
    shutil.copytree(known, folder, dirs_exist_ok=True)
    for part, changes in {**_COMMON, "unet": _COMMON["unet"] | _UNET[model]}.items():
        file = folder / part / "config.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(values | changes), encoding="utf-8")
    return folder
