"""PickScore: the scaled cosine of an image and its prompt in a CLIP that was fine-tuned on human choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sqdf_fast.rewards.clip import CosineReward
from sqdf_fast.rewards.text_features import ConstantFeatures, PromptFeatures

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

MODEL = "yuvalkirstain/PickScore_v1"


class PickScoreReward(CosineReward):
    """PickScore, typically 15 to 25; it compares images of one prompt.

    r(x, c) = s (e / |e|) . (f / |f|), e and f the embeddings of image and prompt in a fine-tuned ViT-H/14, s = exp of
    its learned logit scale. Source: github.com/yuvalkirstain/PickScore (arXiv 2305.01569).

    Args:
        vision, prompts: as for :class:`CosineReward`.
        scale: s, a number.
    """

    name = "pickscore"
    model = MODEL
    # OpenCLIP's ViT-H/14, of which HPSv2 is another fine-tuning.
    config = "hpsv2"

    def __init__(
        self,
        vision: CLIPVisionModelWithProjection,
        prompts: PromptFeatures | ConstantFeatures,
        scale: Tensor | float = 100.0,
    ) -> None:
        super().__init__(vision, prompts)
        self.scale: Tensor
        self.register_buffer("scale", torch.as_tensor(scale, dtype=prompts.dtype, device=vision.device))

    @classmethod
    def load(
        cls, model: str = MODEL, tokenizer: str | None = None, dtype: torch.dtype = torch.float32
    ) -> PickScoreReward:
        """The published weights.

        Args:
            model: folder or hub id of the model in transformers' format.
            tokenizer: folder or hub id of CLIP's tokenizer; default: that of ``model``.
            dtype: of the vision network; text features and score are float32 (float64 with float64).

        Raises:
            UserError: a model or a tokenizer that cannot be found or is of another architecture.
        """
        from transformers import CLIPConfig, CLIPPreTrainedModel

        class LogitScale(CLIPPreTrainedModel):
            """The one tensor of a CLIP model that belongs to neither tower."""

            config_class = CLIPConfig

            def __init__(self, config: CLIPConfig) -> None:
                super().__init__(config)
                self.logit_scale = nn.Parameter(torch.zeros(()))
                self.post_init()

        vision, prompts = cls.towers(model, tokenizer, dtype, clean=str)
        return cls(vision, prompts, cls.part(LogitScale, model, prompts.dtype).logit_scale.detach().exp())

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * super().forward(images, prompts)
