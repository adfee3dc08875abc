"""ReFL: the reward of the image that a late state predicts, and its gradient through that one prediction."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sqdf_fast.algorithms.draft import DirectReward, Pass, Start
from sqdf_fast.engine.noise import Stream, generator


class Refl(DirectReward):
    """Xu et al., "ImageReward", arXiv 2304.05977: x_t sampled without a gradient, x0_hat = a x_t + b m(x_t) with one.

    t is drawn evenly among the last ``refl.window`` of the steps, for each sample on its own. The loss is mean -r,
    or mean relu(margin - r) with ``refl.margin``. The paper's second term, the denoising loss on the pretraining
    data, is left out, as it is in the published program.
    """

    def start(self, prompts: list[str], seeds: Tensor, step: int) -> Start:
        """Each sample's state at an index of its own."""
        steps = len(self.schedule)
        window = max(1, round(self.config.refl.window * steps))
        draw = generator(self.config.seed, Stream.LATE_STEP, step)
        index = torch.randint(steps - window, steps, (len(prompts),), generator=draw)
        # One call for each index, so that nothing is denoised further than needed.
        groups = [(index == i).nonzero().flatten() for i in index.unique()]
        starts = [self.sampled([prompts[row] for row in rows], seeds[rows], int(index[rows[0]])) for rows in groups]
        back = torch.cat(groups).argsort().to(starts[0].x.device)
        x = torch.cat([start.x for start in starts])[back]
        return Start(prompts, seeds.to(x.device), x, index.to(x.device))

    def passes(self, start: Start, size: int) -> Iterator[Pass]:
        """One: predict, decode, reward."""
        self.forward()
        x0_hat = self.predicted(start.x, start.index, start.prompts)
        reward, margin = self.runtime.score_latents(x0_hat, start.prompts), self.config.refl.margin
        loss = -reward if margin is None else torch.relu(margin - reward)
        yield Pass(loss.sum() / size, reward)
