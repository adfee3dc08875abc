"""Published weights: found on disk or on the hub, read without running what a pickle may hold."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqdf_fast.errors import UserError


@dataclass(frozen=True)
class PublishedFile:
    """A file of weights that a reward's authors published.

    Attributes:
        reward: which reward asks; option: the option that says where the file is; part: what the file holds.
        filename: its published name; source: where a user gets it.
    """

    reward: str
    option: str
    part: str
    filename: str
    source: str

    def find(self, place: str) -> Path:
        """The file at ``place``: itself, a folder that holds it, a repository of the hub, or an address (https).

        From an address it is downloaded once, into torch's own cache (``TORCH_HOME``).

        Raises:
            UserError: it is at none of them.
        """
        if place.startswith("https://"):
            return self._download(place)
        path = Path(place).expanduser()
        for candidate in (path, path / self.filename):
            if candidate.is_file():
                return candidate
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(place, self.filename))
        except (OSError, ValueError) as error:
            raise self._missing(place, error) from None

    def _download(self, address: str) -> Path:
        path = Path(torch.hub.get_dir()) / "checkpoints" / self.filename
        if not path.is_file():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(address, str(path), progress=False)
            except (OSError, ValueError) as error:
                raise self._missing(address, error) from None
        return path

    def _missing(self, place: str, error: Exception) -> UserError:
        return UserError(
            f"{self.reward} reward: no {self.part} at {place!r} ({first_line(error)}); download {self.filename} "
            f"from {self.source} and give its path as the option {self.option}"
        )

    def read(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a ``.safetensors`` file or of a pickle (under ``state_dict`` where there is one), on the CPU.

        Raises:
            UserError: a damaged file, one that holds more than tensors, or none.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        found: Any
        try:
            if path.suffix == ".safetensors":
                found = load_file(path)
            else:
                found = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise UserError(
                f"{self.reward} reward: {path} cannot be read ({first_line(error)}); "
                f"download it again from {self.source}"
            ) from None
        if isinstance(found, dict):
            found = found.get("state_dict", found)
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise UserError(
                f"{self.reward} reward: {path} holds something else than named tensors; "
                f"give {self.filename} from {self.source} as the option {self.option}"
            )
        return dict(found)


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
