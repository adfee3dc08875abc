"""One frozen network in three roles: policy (LoRA on), reference (LoRA off), consistency (consistency LoRA on).

On the base "consistency" the consistency LoRA is on in every role, and the policy's on top of it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from sqdf_fast.errors import UserError, first_line
from sqdf_fast.families import Conditioning, Family
from sqdf_fast.gradient_checkpointing import Context, checkpoint_blocks
from sqdf_fast.kernels.adamw_8bit import round_stochastically

Role = Literal["policy", "reference", "consistency"]
_State = Literal["policy", "reference", "consistency", "bare"]


@dataclass(frozen=True)
class Rows:
    """Independent rows of one network call: samples, or under guidance their two halves, [uncond; cond].

    Attributes:
        x: [R, ...] in the family's precision; timesteps: [R]; conditioning: of the R rows.
    """

    x: Tensor
    timesteps: Tensor
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.x[part], self.timesteps[part], self.conditioning[part])

    def at(self, x: Tensor) -> Rows:
        """The same rows at other latents, [R, ...]."""
        return Rows(x, self.timesteps, self.conditioning)


def guided_rows(
    x: Tensor, timesteps: Tensor, conditioning: Conditioning, unconditional: Conditioning | None = None
) -> Rows:
    """The rows of B samples: [B, ...], or with ``unconditional`` (one row) both halves, [2B, ...].

    Args:
        x: latents [B, ...]; timesteps: [B]; conditioning: of the B samples.
    """
    if unconditional is None:
        return Rows(x, timesteps, conditioning)
    both = Conditioning.cat([unconditional.expand(len(x)), conditioning])
    return Rows(torch.cat([x, x]), torch.cat([timesteps, timesteps]), both)


class Backbone:
    """The network of a family with its adapters; :meth:`role` is the only switch between them.

    In full-parameter mode the policy is a network of its own, trained as a whole, and the family's stays the frozen
    reference.

    Args:
        family: a loaded family; its weights stay frozen.
        kind: "lora", or "full": every parameter of a copy of the network is trained.
        rank, alpha: rank and alpha of the policy LoRA (alpha None: the rank, a scale of 1).
        target_modules: suffixes of the layers that get a policy LoRA; None: the family's own choice.
        seed: seed of the LoRA's Gaussian initialization; B is zero, so policy == reference at the start.
        policy: folder of trained LoRA weights to start from, whose own rank and layers count then; in full-parameter
            mode of a network.
        consistency_lora: folder, file or hub id of the consistency LoRA; None leaves that role out.
        base: what policy and reference start from: the network, or its consistency model.

    Attributes:
        checkpointed: activation checkpointing of the network's blocks, each in the role it ran in; off at first.
        evaluations: rows that went through the network so far.

    Raises:
        UserError: no layer matches target_modules, a LoRA does not fit the network, or the base is impossible.
    """

    def __init__(
        self,
        family: Family,
        *,
        rank: int,
        kind: Literal["lora", "full"] = "lora",
        alpha: float | None = None,
        target_modules: tuple[str, ...] | None = None,
        seed: int = 0,
        policy: str | None = None,
        consistency_lora: str | None = None,
        base: Literal["network", "consistency"] = "network",
    ) -> None:
        self.family, self.kind, self.base = family, kind, base
        if base == "consistency" and (kind == "full" or consistency_lora is None):
            raise UserError("a policy on the consistency model is a LoRA over a consistency LoRA; give both")
        self.evaluations = 0
        self._trained: Any = copy.deepcopy(family.network) if kind == "full" else family.network
        if consistency_lora is not None:
            family.load_lora(consistency_lora, "consistency")
        self.has_consistency = consistency_lora is not None
        if kind == "full":
            if policy is not None:
                self._load_network(policy)
            self._policy = dict(self._trained.requires_grad_(True).named_parameters())
        else:
            if policy is not None:
                family.load_lora(policy, "policy")
            else:
                targets = family.lora_targets if target_modules is None else target_modules
                self._add_policy(rank, rank if alpha is None else alpha, targets, seed)
            self._policy = _adapter(family.network, "policy")
            for parameter in self._policy.values():
                # The LoRA is trained: it stays in full precision over a half-precision base.
                parameter.data = parameter.data.to(family.precision)
        for parameter in _adapter(family.network, "consistency").values():
            parameter.data = parameter.data.to(family.dtype)
        self._layers = [module for module in family.network.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self._layers:
            layer.set_adapter([], inference_mode=True)
        # Autograd drops the gradient of a leaf whose requires_grad is off when the backward pass arrives, whatever it
        # was in the forward pass: the policy's is on in every role, that of the others never is.
        for parameter in self._policy.values():
            parameter.requires_grad_(True)
        self._set("reference")
        networks = {id(network): network for network in (self._trained, family.network)}
        kinds = family.checkpointed_block_types["network"]
        self.checkpointed = [checkpoint_blocks(network, kinds, self._reenter) for network in networks.values()]
        for checkpointed in self.checkpointed:
            checkpointed.enabled = False

    @property
    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in a fixed order."""
        return self._policy

    def network(self, role: _State) -> nn.Module:
        """The module that plays ``role``: one for all with a LoRA, the policy's own in full-parameter mode."""
        return self._trained if role == "policy" else self.family.network

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Run the network as ``role`` inside the block, and as before after it."""
        with self._switched(role):
            yield

    @contextmanager
    def merged(self, role: Role, *, by_layer: bool = False) -> Iterator[None]:
        """As :meth:`role`, with the role's LoRA added to a copy of its layers' weights: no adapter runs. No gradient.

        With ``by_layer`` a layer's copy is made when it runs and dropped after it, which few calls are worth: one copy
        is alive at a time.

        bfloat16 sums are rounded stochastically, always the same way: a young LoRA is smaller than half a unit in the
        last place of most weights, and rounding to nearest would leave it out.

        The weights themselves are untouched and back afterwards, bit for bit: taking a LoRA off by subtraction is not
        exact. Quantized layers run their adapter as ever.
        """
        adapters = self._adapters(role)
        layers = [layer for layer in self._layers if any(name in layer.scaling for name in adapters)]
        weights = [layer.get_base_layer().weight for layer in layers]
        if not all(weight.is_floating_point() for weight in weights):
            layers, weights = [], []
        originals = {layer: weight.data for layer, weight in zip(layers, weights, strict=True)}
        numbers = {layer: number for number, layer in enumerate(layers)}

        @torch.no_grad()
        def merge(layer: Any, *_: Any) -> None:
            deltas = [layer.get_delta_weight(name) for name in adapters if name in layer.scaling]
            merged = _sum(originals[layer], sum(deltas[1:], deltas[0]), numbers[layer])
            layer.get_base_layer().weight.data = merged

        def restore(layer: Any, *_: Any) -> None:
            layer.get_base_layer().weight.data = originals[layer]

        hooks = []
        try:
            for layer in layers:
                if by_layer:
                    hooks.append(layer.register_forward_pre_hook(merge))
                    hooks.append(layer.register_forward_hook(restore, always_call=True))
                else:
                    merge(layer)
            with self._switched("bare" if layers else role):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer in layers:
                restore(layer)

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
        return self.run(guided_rows(x, timesteps, conditioning, unconditional))

    def run(self, rows: Rows) -> Tensor:
        """Network output of each row in the current role, [R, ...] in the network's dtype."""
        self.evaluations += len(rows)
        x = rows.x.to(self.family.dtype)
        return self.family.predict(self.network(self._role), x, rows.timesteps, rows.conditioning)

    def save_policy(self, folder: Path) -> None:
        """Write what was trained: a LoRA that diffusers pipelines load, or in full-parameter mode the network."""
        if self.kind == "full":
            self._trained.save_pretrained(folder)
        else:
            self.family.save_lora(folder, "policy")

    def _load_network(self, folder: str) -> None:
        try:
            trained = type(self._trained).from_pretrained(folder, torch_dtype=self.family.dtype)
            self._trained.load_state_dict(trained.state_dict())
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"policy network {folder!r} cannot be loaded into this model ({first_line(error)}); "
                "give the network/ of its run"
            ) from None

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

    @contextmanager
    def _switched(self, role: _State) -> Iterator[None]:
        previous = self._role
        if role == previous:
            # A checkpointed block often runs again in its own role: no walk through all adapters.
            yield
            return
        self._set(role)
        try:
            yield
        finally:
            self._set(previous)

    def _set(self, role: _State) -> None:
        if role == "consistency" and not self.has_consistency:
            raise UserError(
                "this model has no consistency LoRA; set objective.lookahead=tweedie or give consistency_lora"
            )
        active = self._adapters(role)
        for layer in self._layers:
            # Not set_adapter, which also walks every parameter's requires_grad, and not through nn.Module: this runs
            # thousands of times a step with gradient checkpointing.
            object.__setattr__(layer, "_active_adapter", active)
        self._role: _State = role

    def _adapters(self, role: _State) -> list[str]:
        """The LoRAs that are on in ``role``."""
        if role == "bare":
            return []
        below = ["consistency"] if role == "consistency" or self.base == "consistency" else []
        return [*below, "policy"] if role == "policy" and self.kind == "lora" else below

    def _reenter(self) -> Context:
        return partial(self._switched, self._role)


def _sum(weight: Tensor, delta: Tensor, seed: int) -> Tensor:
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta
    if weight.dtype != torch.bfloat16:
        return exact.to(weight.dtype)
    rounded = round_stochastically(exact.flatten(), seed).view(weight.shape)
    return torch.empty_like(weight).copy_(rounded)


def _adapter(network: Any, name: str) -> dict[str, nn.Parameter]:
    return {key: parameter for key, parameter in network.named_parameters() if f".{name}." in key}
