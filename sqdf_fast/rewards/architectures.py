"""Networks of rewards: built from shipped configurations, filled with tensors, read in transformers' format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqdf_fast.errors import UserError, first_line

# Architectures of the published backbones; numbers only.
CONFIGS = Path(__file__).parent / "configs"


def architecture(name: str, part: str) -> dict[str, Any]:
    """``part`` (vision_config, text_config) of ``configs/<name>.json``: keywords of a transformers configuration."""
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))[part]


def empty(model: Any, config: Any, *, device: torch.device | str, dtype: torch.dtype, **options: Any) -> Any:
    """A model of ``config`` with random weights (on ``meta``: none). ``options`` are its own keywords."""
    with torch.device(device):
        return model._from_config(config, dtype=dtype, attn_implementation=_attention(model), **options)


def filled(model: Any, config: Any, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, **options: Any) -> Any:
    """A model of ``config`` with ``weights``, on the CPU, for inference.

    Raises:
        KeyError, RuntimeError: tensors of another architecture.
    """
    from accelerate import init_empty_weights

    # No random weights are drawn only to be overwritten; the buffers are real.
    with init_empty_weights():
        network = model._from_config(config, dtype=dtype, attn_implementation=_attention(model), **options)
    network.load_state_dict({name: tensor.to(dtype) for name, tensor in weights}, strict=True, assign=True)
    return network.eval()


def pretrained(
    model: Any, place: str, dtype: torch.dtype, *, reward: str, option: str, published: str, kind: str = "CLIP"
) -> Any:
    """The part ``model`` of a model in transformers' format; the rest of the file is not loaded.

    Args:
        place: folder or hub id.
        reward, option: names of the reward and of its option that gave ``place``, for messages.
        published: hub id of the authors' model, for messages.

    Raises:
        UserError: no such model, or one that lacks a weight.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    try:
        # A whole model is read for a part of it: no list of the other weights as unexpected.
        logging.set_verbosity_error()
        network, loading = model.from_pretrained(
            place, dtype=dtype, attn_implementation=_attention(model), output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{reward} reward: no {kind} model at {place!r} ({first_line(error)}); "
            f"give a folder or hub id as the option {option}, e.g. after `hf download {published}`"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{reward} reward: {place} holds no weights for {missing[0]} (of {len(missing)} missing); "
            f"a whole {kind} model is needed, e.g. {published}"
        )
    return network


def load_tokenizer(tokenizer: Any, place: str, *, reward: str, published: str) -> Any:
    """A tokenizer of the class ``tokenizer``; arguments and errors as for :func:`pretrained`."""
    try:
        return tokenizer.from_pretrained(place)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{reward} reward: no tokenizer at {place!r} ({first_line(error)}); "
            f"give a folder or hub id as the option tokenizer, e.g. after `hf download {published}`"
        ) from None


@contextmanager
def refuse_other_architectures(path: Path, *, reward: str, what: str, expected: str) -> Iterator[None]:
    """Turn what :func:`filled` raises for the tensors of ``path`` into a UserError.

    Args:
        what: kind of model that the file should be; expected: description of the published one.
    """
    try:
        yield
    except (KeyError, RuntimeError) as error:
        # load_state_dict names the class in its first line and what does not fit in the second.
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        wrong = f"no tensor {lines[0]}" if isinstance(error, KeyError) else lines[min(1, len(lines) - 1)]
        raise UserError(f"{reward} reward: {path} is not a published {what} ({wrong}); expected {expected}") from None


def _attention(model: Any) -> str:
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
