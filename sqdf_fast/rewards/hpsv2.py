"""Human Preference Score v2: the cosine of an image and its prompt in a CLIP that was fine-tuned on human choices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from sqdf_fast.errors import UserError
from sqdf_fast.rewards.architectures import load_tokenizer, refuse_other_architectures
from sqdf_fast.rewards.base import exact
from sqdf_fast.rewards.clip import VIT_L_14, CosineReward, open_clip_text_tower, open_clip_vision_tower
from sqdf_fast.rewards.preprocess import letterbox
from sqdf_fast.rewards.published import PublishedFile
from sqdf_fast.rewards.text_features import PromptFeatures, TextTower

WEIGHTS = "xswu/HPSv2"
FILES = {"v2.1": "HPS_v2.1_compressed.pt", "v2.0": "HPS_v2_compressed.pt"}
# The vocabulary of every CLIP with OpenAI's tokenizer, OpenCLIP's ViT-H/14 among them.
TOKENIZER = VIT_L_14


class HPSv2Reward(CosineReward):
    """Human Preference Score v2.1 (or v2.0), about 0.1 to 0.4; it compares images of one prompt.

    r(x, c) = (e / |e|) . (f / |f|), e and f the embeddings of image and prompt in OpenCLIP's ViT-H/14, without the
    learned logit scale, as ``hpsv2.score`` computes it. Source: github.com/tgxs002/HPSv2 (arXiv 2306.09341).
    """

    name = "hpsv2"
    config = "hpsv2"

    @classmethod
    def load(
        cls,
        weights: str = WEIGHTS,
        version: str = "v2.1",
        tokenizer: str = TOKENIZER,
        dtype: torch.dtype = torch.float32,
    ) -> HPSv2Reward:
        """The published weights.

        Args:
            weights: the published ``.pt``, its tensors as ``.safetensors``, a folder with it, or a hub id.
            version: "v2.1" or "v2.0"; names the file in a folder or repository.
            tokenizer: folder or hub id of CLIP's tokenizer.
            dtype: of the vision network; text features and score are float32 (float64 with float64).

        Raises:
            UserError: an unknown version; weights or a tokenizer that cannot be found or are of another architecture.
        """
        from transformers import CLIPTokenizer

        if version not in FILES:
            raise UserError(f"hpsv2 reward: version {version!r} is unknown; allowed: {', '.join(FILES)}")
        published = PublishedFile(cls.name, "weights", FILES[version], f"huggingface.co/{WEIGHTS}")
        path = published.find(weights)
        words = load_tokenizer(CLIPTokenizer, tokenizer, reward=cls.name, published=TOKENIZER)
        refuse = partial(
            refuse_other_architectures,
            path,
            reward=cls.name,
            what="HPSv2 model",
            expected=f"OpenCLIP's ViT-H/14 as in {FILES['v2.1']} from huggingface.co/{WEIGHTS}",
        )

        def text(tensors: Mapping[str, Tensor]) -> TextTower:
            with refuse():
                network = open_clip_text_tower(cls.config, tensors, exact(dtype))
            return TextTower(network, words, reward=cls.name, published=TOKENIZER)

        tensors = published.read(path)
        with refuse():
            vision = open_clip_vision_tower(cls.config, tensors, dtype)
        # The reload must not keep the tensors alive.
        return cls(vision, PromptFeatures(text(tensors), lambda: text(published.read(path))))

    def pixels(self, images: Tensor) -> Tensor:
        return letterbox(images, self.size)
