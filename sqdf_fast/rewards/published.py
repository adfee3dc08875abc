"""Published weights: found on disk or on the hub, read without running what a pickle may hold."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqdf_fast.errors import UserError, first_line


@dataclass(frozen=True)
class PublishedFile:
    """A file of weights that a reward's authors published.

    Attributes:
        reward, option: names of the reward and of its option that locates the file.
        filename: published name; source: where a user gets it.
    """

    reward: str
    option: str
    filename: str
    source: str

    def find(self, place: str) -> Path:
        """The file at ``place``: itself, a folder that holds it, a hub repository, or an address (https).

        An address is downloaded once, into torch's own cache (``TORCH_HOME``).

        Raises:
            UserError: no such file.
        """
        path = Path(place).expanduser()
        try:
            if place.startswith("https://"):
                path = Path(torch.hub.get_dir()) / "checkpoints" / self.filename
                if not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    torch.hub.download_url_to_file(place, str(path), progress=False)
                return path
            for candidate in (path, path / self.filename):
                if candidate.is_file():
                    return candidate
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(place, self.filename))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.reward} reward: no {self.option} at {place!r} ({first_line(error)}); download {self.filename} "
                f"from {self.source} and give its path as the option {self.option}"
            ) from None

    def read(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a ``.safetensors`` file or of a pickle (or of its ``state_dict``), on the CPU.

        Raises:
            UserError: a damaged file, or one that holds anything but tensors.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        loaded: Any
        try:
            if path.suffix == ".safetensors":
                loaded = load_file(path)
            else:
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise UserError(
                f"{self.reward} reward: {path} cannot be read ({first_line(error)}); "
                f"download it again from {self.source}"
            ) from None
        if isinstance(loaded, dict):
            loaded = loaded.get("state_dict", loaded)
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise UserError(
                f"{self.reward} reward: {path} does not hold named tensors; "
                f"give {self.filename} from {self.source} as the option {self.option}"
            )
        return dict(loaded)
