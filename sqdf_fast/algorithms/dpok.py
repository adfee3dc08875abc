"""DPOK: the policy gradient of a denoising trajectory's transitions, with a KL to the pretrained model."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sqdf_fast.algorithms.ddpo import Ddpo


class Dpok(Ddpo):
    """Fan et al., arXiv 2305.16381: policy gradient plus alpha KL(p_theta || p_pretrained) of each transition.

    As in the published program the ratio is clamped, whichever way the advantage points: beyond the range a transition
    has no policy gradient. The KL is this package's (``objective.alpha``, ``objective.kl_scale``); docs/baselines.md
    says how it and the advantage differ from the program's.
    """

    regularized: ClassVar[bool] = True

    def _surrogate(self, ratio: Tensor, gain: Tensor) -> Tensor:
        return -gain * ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
