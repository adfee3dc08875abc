"""One frozen network in three roles: policy (LoRA on), reference (LoRA off), consistency (consistency LoRA on)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sqdf_fast.errors import UserError
from sqdf_fast.families import Conditioning, Family

Role = Literal["policy", "reference", "consistency"]


class Backbone:
    """The network of a family with its adapters; :meth:`role` is the only switch between them.

    Args:
        family: a loaded family; its weights stay frozen.
        rank, alpha: of the policy LoRA (alpha None: the rank, a scale of 1).
        target_modules: suffixes of the layers that get a policy LoRA.
        seed: of the LoRA's Gaussian initialisation; B is zero, so policy == reference at the start, bit for bit.
        policy_lora: folder of trained LoRA weights to start the policy from; its own rank and layers count then.
        consistency_lora: folder, file or hub id of the consistency LoRA; None leaves that role out.
        gradient_checkpointing: recompute the network's blocks in the backward pass, each in the role it ran in.

    Raises:
        UserError: no layer matches target_modules, or a LoRA does not fit the network.
    """

    def __init__(
        self,
        family: Family,
        *,
        rank: int,
        alpha: float | None = None,
        target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0"),
        seed: int = 0,
        policy_lora: str | None = None,
        consistency_lora: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.family = family
        self.evaluations = 0
        network = family.network
        if consistency_lora is not None:
            family.load_lora(consistency_lora, "consistency")
        if policy_lora is not None:
            family.load_lora(policy_lora, "policy")
        else:
            self._add_policy(rank, rank if alpha is None else alpha, target_modules, seed)
        self._layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        self._policy: dict[str, nn.Parameter] = {}
        for name, parameter in network.named_parameters():
            if ".policy." in name:
                # The LoRA is trained: it stays in full precision over a half-precision base.
                parameter.data = parameter.data.to(family.precision)
                self._policy[name] = parameter
            elif ".consistency." in name:
                parameter.data = parameter.data.to(family.dtype)
        self.has_consistency = consistency_lora is not None
        self._set("reference")
        if gradient_checkpointing:
            network.enable_gradient_checkpointing(gradient_checkpointing_func=self._checkpoint)

    @property
    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in a fixed order."""
        return self._policy

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Run the network as ``role`` inside the block; afterwards it is what it was before."""
        previous = self._role
        self._set(role)
        try:
            yield
        finally:
            self._set(previous)

    def predict(
        self,
        x: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None = None,
    ) -> Tensor:
        """Network output in the current role.

        Args:
            x: latents [B, ...]; timesteps: [B].
            conditioning: of the B samples; unconditional: one row, or None to run the conditional branch only.

        Returns:
            [B, ...], or with ``unconditional`` [2B, ...] ordered [unconditional; conditional].
        """
        if unconditional is not None:
            rows = torch.zeros(len(x), dtype=torch.long, device=x.device)
            conditioning = Conditioning.cat([unconditional[rows], conditioning])
            x, timesteps = torch.cat([x, x]), torch.cat([timesteps, timesteps])
        self.evaluations += len(x)
        return self.family.predict(x.to(self.family.dtype), timesteps, conditioning)

    def _add_policy(self, rank: int, alpha: float, target_modules: tuple[str, ...], seed: int) -> None:
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(target_modules))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Several adapters on one network are the point here.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            torch.manual_seed(seed)
            try:
                self.family.network.add_adapter(config, adapter_name="policy")
            except ValueError:
                raise UserError(
                    f"policy.target_modules = {list(target_modules)} match no layer of this network; "
                    "allowed: suffixes of its module names, e.g. to_q, to_k, to_v, to_out.0"
                ) from None

    def _set(self, role: Role) -> None:
        if role == "consistency" and not self.has_consistency:
            raise UserError(
                "this model has no consistency LoRA; set objective.lookahead=tweedie or give consistency_lora"
            )
        active = [] if role == "reference" else [role]
        for layer in self._layers:
            layer.set_adapter(active, inference_mode=True)
        # Autograd drops the gradient of a leaf whose requires_grad is off when the backward pass arrives, whatever it
        # was in the forward pass: the policy's stays on in every role, that of the others never is.
        for parameter in self._policy.values():
            parameter.requires_grad_(True)
        self._role: Role = role

    def _checkpoint(self, module: Callable[..., Any], *inputs: Any) -> Any:
        role = self._role

        def run(*inputs: Any) -> Any:
            with self.role(role):
                return module(*inputs)

        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
