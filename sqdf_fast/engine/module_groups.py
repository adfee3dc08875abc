"""The modules of a run, grouped by the stages that use them, for gradient checkpointing and offload."""

from __future__ import annotations

from typing import Literal

from torch import nn

from sqdf_fast.backbone import Backbone, Role
from sqdf_fast.config import Execution
from sqdf_fast.engine.offload import Offload
from sqdf_fast.gradient_checkpointing import CheckpointedBlocks, checkpoint_blocks

ModuleGroup = Literal["network", "decoder", "reward"]

ALL_GROUPS: tuple[ModuleGroup, ...] = ("network", "decoder", "reward")


class ModuleGroups:
    """Network, decoder and reward of a run; ``reward.checkpointed_block_types`` names its blocks."""

    def __init__(self, backbone: Backbone, reward: nn.Module | None = None) -> None:
        family = backbone.family
        self.backbone = backbone
        self._modules: dict[ModuleGroup, list[nn.Module]] = {
            "network": [family.network],
            "decoder": [family.vae],
            "reward": [] if reward is None else [reward],
        }
        kinds = getattr(reward, "checkpointed_block_types", ())
        self.checkpointed: dict[ModuleGroup, list[CheckpointedBlocks]] = {
            "network": backbone.checkpointed,
            "decoder": [checkpoint_blocks(family.vae, family.checkpointed_block_types["decoder"])],
            "reward": [checkpoint_blocks(module, kinds) for module in self._modules["reward"]],
        }
        self._offload: Offload | None = None

    def apply(self, execution: Execution) -> None:
        """Apply the execution's gradient checkpointing and offload."""
        for name, blocks in self.checkpointed.items():
            for checkpointed in blocks:
                checkpointed.enabled = name in execution.gradient_checkpointing
        if execution.offload == "staged" and self._offload is None:
            self._offload = Offload(self._modules, self.backbone.family.device)
        elif execution.offload == "none" and self._offload is not None:
            self._offload.use(*self._modules)
            self._offload = None

    def leave(self, *names: ModuleGroup) -> None:
        """Drop the offloaded weights of all other groups from the device."""
        if self._offload is not None:
            self._offload.leave(*names)

    def use(self, *names: ModuleGroup) -> None:
        """Upload these groups' weights, and drop all other offloaded ones."""
        if self._offload is not None:
            self._offload.use(*names)

    def of_role(self, role: Role) -> tuple[ModuleGroup, ...]:
        """The groups that running the network as ``role`` needs: a fully trained policy is never offloaded."""
        return () if role == "policy" and self.backbone.kind == "full" else ("network",)
