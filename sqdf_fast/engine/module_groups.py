"""The modules of a run by the stage that uses them: which recompute, and whose frozen weights are on the device."""

from __future__ import annotations

from typing import Literal

from torch import nn

from sqdf_fast.backbone import Backbone, Role
from sqdf_fast.config import Execution
from sqdf_fast.engine.offload import Offload
from sqdf_fast.gradient_checkpointing import CheckpointedBlocks, checkpoint_blocks

Part = Literal["network", "decoder", "reward"]


class Parts:
    """Network, decoder and reward of a run.

    Args:
        backbone: the network's roles; its family has the decoder.
        reward: the reward's module, None where it has none; ``checkpointed_block_types`` names its blocks.
    """

    def __init__(self, backbone: Backbone, reward: nn.Module | None = None) -> None:
        family = backbone.family
        self.backbone = backbone
        self._modules: dict[Part, list[nn.Module]] = {
            "network": [family.network],
            "decoder": [family.vae],
            "reward": [] if reward is None else [reward],
        }
        self.checkpointed: dict[Part, list[CheckpointedBlocks]] = {
            "network": backbone.checkpointed,
            "decoder": [checkpoint_blocks(family.vae, family.checkpointed_block_types["decoder"])],
            "reward": []
            if reward is None
            else [checkpoint_blocks(reward, getattr(reward, "checkpointed_block_types", ()))],
        }
        self._offload: Offload | None = None

    def apply(self, execution: Execution) -> None:
        """Recompute and keep resident what ``execution`` says, from now on."""
        for name, checkpointed in self.checkpointed.items():
            for found in checkpointed:
                found.enabled = name in execution.gradient_checkpointing
        if execution.offload == "staged" and self._offload is None:
            self._offload = Offload(dict(self._modules.items()), self.backbone.family.device)
        elif execution.offload == "none" and self._offload is not None:
            self._offload.use(*self._modules)
            self._offload = None

    def leave(self, *names: Part) -> None:
        """What runs next needs no other parts than these."""
        if self._offload is not None:
            self._offload.leave(*names)

    def use(self, *names: Part) -> None:
        """What runs next needs these parts' weights on the device, and no others."""
        if self._offload is not None:
            self._offload.use(*names)

    def of_role(self, role: Role) -> tuple[Part, ...]:
        """What running the network as ``role`` needs: a fully trained policy never leaves."""
        return () if role == "policy" and self.backbone.kind == "full" else ("network",)
