from __future__ import annotations

import io

import pytest
import torch

from sqdf_fast.errors import UserError
from sqdf_fast.rewards import load_reward, preflight
from sqdf_fast.rewards.preprocess import to_pil


def test_minus_the_kilobytes_at_quality_95():
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = torch.cat([noise, torch.full((1, 3, 64, 64), 0.5)])
    scores = load_reward("jpeg")(images, ["a", "b"])
    sizes = []
    for image in to_pil(images):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        sizes.append(-len(buffer.getvalue()) / 1000)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(sizes, abs=1e-6)
    assert scores[1] - scores[0] > 4


def test_training_on_it_is_refused():
    with pytest.raises(UserError, match=r"'jpeg' has no gradient and the objective follows .*--set algorithm=ddpo"):
        preflight(load_reward("jpeg"), torch.rand(1, 3, 16, 16), ["a"])
