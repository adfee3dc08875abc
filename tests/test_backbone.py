from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sqdf_fast.backbone import Backbone
from sqdf_fast.errors import UserError
from sqdf_fast.families import load_family

PROMPTS = ["a red star", "a blue ring", "a ring"]


@pytest.fixture(scope="module")
def consistency_lora(model, tmp_path_factory) -> str:
    """A LoRA of another rank and on other layers than the policy's, far from zero."""
    folder = tmp_path_factory.mktemp("consistency")
    family = load_family(str(model), device=torch.device("cpu"), dtype=torch.float32)
    backbone = Backbone(family, rank=2, target_modules=("to_q", "to_out.0", "conv1"), seed=5)
    with torch.no_grad():
        for parameter in backbone.policy_parameters.values():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(7))
    family.save_lora(folder, "policy")
    return str(folder)


def make(model: Path, dtype=torch.float32, **settings) -> Backbone:
    family = load_family(str(model), device=torch.device("cpu"), dtype=dtype)
    return Backbone(family, rank=4, **settings)


def stir(backbone: Backbone) -> None:
    """Move the policy away from the reference."""
    with torch.no_grad():
        for number, parameter in enumerate(backbone.policy_parameters.values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.2)


def inputs(backbone: Backbone):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 8, 8, generator=generator).to(backbone.family.dtype)
    return x, torch.tensor([900.0, 500.0, 20.0]), backbone.family.encode(PROMPTS)


def output(backbone: Backbone, role, guided: bool = False) -> torch.Tensor:
    unconditional = backbone.family.encode([""]) if guided else None
    with backbone.role(role):
        return backbone.predict(*inputs(backbone), unconditional)


def test_a_fresh_policy_is_the_reference_bit_for_bit(model):
    backbone = make(model)
    assert torch.equal(output(backbone, "policy"), output(backbone, "reference"))


def test_three_roles_on_one_network(model, consistency_lora):
    backbone = make(model, consistency_lora=consistency_lora)
    plain = make(model)
    stir(backbone)
    reference = output(plain, "reference")
    assert torch.equal(output(backbone, "reference"), reference)
    policy, consistency = output(backbone, "policy"), output(backbone, "consistency")
    assert not torch.allclose(policy, reference, atol=1e-3)
    assert not torch.allclose(consistency, reference, atol=1e-3)
    assert not torch.allclose(consistency, policy, atol=1e-3)
    alone = make(model, policy=consistency_lora)
    assert torch.allclose(output(alone, "policy"), consistency, atol=1e-6)


@pytest.mark.parametrize("merged", [False, True])
def test_a_policy_on_the_consistency_model(model, consistency_lora, merged):
    """Policy and reference have the consistency LoRA underneath; what is saved is the policy's own."""
    dtype = torch.float64
    backbone = make(model, dtype, consistency_lora=consistency_lora, base="consistency")
    plain = make(model, dtype, consistency_lora=consistency_lora)  # the same layers, in the same order

    def run(found: Backbone, role) -> torch.Tensor:
        with found.merged(role) if merged else found.role(role):
            return found.predict(*inputs(found)).detach()

    consistency = run(plain, "consistency")
    for role in ("policy", "reference", "consistency"):
        assert torch.allclose(run(backbone, role), consistency, rtol=0, atol=1e-12)
    stir(backbone)
    policy, reference = run(backbone, "policy"), run(backbone, "reference")
    assert torch.equal(reference, run(backbone, "consistency"))
    assert not torch.allclose(policy, reference, atol=1e-3)
    # The weights of both LoRAs added up, in the network of a backbone that runs none.
    with torch.no_grad():
        for layer, other in zip(backbone._layers, plain._layers, strict=True):
            delta = sum(layer.get_delta_weight(name) for name in layer.scaling)
            other.get_base_layer().weight.add_(delta)
    assert torch.allclose(output(plain, "reference"), policy, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"kind": "full"}])
def test_a_policy_on_a_consistency_model_that_is_not_there(model, settings):
    with pytest.raises(UserError, match="over a consistency LoRA"):
        make(model, base="consistency", **settings)


def test_roles_nest_and_come_back_after_an_error(model):
    backbone = make(model)
    stir(backbone)
    policy = output(backbone, "policy")
    with backbone.role("policy"):
        with pytest.raises(RuntimeError, match="inside"), backbone.role("reference"):
            raise RuntimeError("inside")
        assert torch.equal(backbone.predict(*inputs(backbone)), policy)


def test_gradients_survive_a_switch_of_role_before_the_backward_pass(model, consistency_lora):
    backbone = make(model, consistency_lora=consistency_lora)
    stir(backbone)
    loss = output(backbone, "policy").square().mean()
    with backbone.role("consistency"):
        x, timesteps, conditioning = inputs(backbone)
        x.requires_grad_(True)
        loss = loss + backbone.predict(x, timesteps, conditioning).square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in backbone.policy_parameters.values())
    assert x.grad is not None
    others = [p for name, p in backbone.family.network.named_parameters() if ".policy." not in name]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in others)


def test_a_checkpointed_block_takes_its_own_role_and_gives_the_same_gradient(model, consistency_lora):
    gradients = []
    for checkpoint in (False, True):
        backbone = make(model, torch.float64, consistency_lora=consistency_lora)
        backbone.checkpointed[0].enabled = checkpoint
        stir(backbone)
        with backbone.role("policy"):
            first = backbone.predict(*inputs(backbone))
        with backbone.role("consistency"):
            x, timesteps, conditioning = inputs(backbone)
            second = backbone.predict(x + 0.1 * first, timesteps, conditioning)
        assert [found.count for found in backbone.checkpointed] == [0]
        second.square().sum().backward()
        gradients.append([parameter.grad for parameter in backbone.policy_parameters.values()])
    (found,) = backbone.checkpointed
    # the policy's first two blocks come before any LoRA: no graph
    assert found.count == 2 * found.blocks - 2 > 10
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_merged_role_is_the_role_and_leaves_no_trace(model, consistency_lora, by_layer):
    backbone = make(model, consistency_lora=consistency_lora)
    stir(backbone)
    before = {name: tensor.clone() for name, tensor in backbone.family.network.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in backbone.family.network.parameters()]
    for role in ("policy", "consistency", "reference"):
        expected = output(backbone, role)
        with torch.no_grad(), backbone.merged(role, by_layer=by_layer):
            assert torch.allclose(backbone.predict(*inputs(backbone)), expected, atol=1e-5)
        assert torch.equal(output(backbone, role), expected)
    with pytest.raises(RuntimeError, match="inside"), backbone.merged("policy"):
        raise RuntimeError("inside")
    assert [parameter.data_ptr() for parameter in backbone.family.network.parameters()] == addresses
    after = backbone.family.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_merged_lora_below_the_resolution_of_bfloat16_is_there_on_average(model):
    backbone = make(model, torch.bfloat16)
    layer = next(module for module in backbone.family.network.modules() if hasattr(module, "get_delta_weight"))
    weight, generator = layer.get_base_layer().weight, torch.Generator().manual_seed(0)
    weight.data = torch.randn(weight.shape, generator=generator).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in backbone.policy_parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    delta, before = layer.get_delta_weight("policy"), weight.data.float()
    # hardly any element moves by half a unit in the last place
    assert (before + delta).to(torch.bfloat16).eq(weight.data).float().mean() > 0.7
    with backbone.merged("policy"):
        first = weight.data.float() - before
    with backbone.merged("policy"):
        assert torch.equal(weight.data.float() - before, first)
    projection = float((first * delta).sum() / delta.square().sum())
    # the rounding's noise is some ten times the delta, over 256 elements
    assert 0.3 < projection < 2


def test_merging_runs_no_adapter(model):
    backbone = make(model)
    stir(backbone)
    calls = []
    for module in backbone.family.network.modules():
        if type(module).__name__ == "ModuleDict" and "policy" in module:
            module["policy"].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad(), backbone.merged("policy"):
        backbone.predict(*inputs(backbone))
    assert calls == []
    output(backbone, "policy")
    assert calls


def test_guided_batch_is_unconditional_then_conditional(model):
    backbone = make(model)
    x, timesteps, conditioning = inputs(backbone)
    both = output(backbone, "reference", guided=True)
    empty = backbone.family.encode([""] * 3)
    with backbone.role("reference"):
        assert torch.allclose(both[:3], backbone.predict(x, timesteps, empty), atol=1e-6)
        assert torch.allclose(both[3:], backbone.predict(x, timesteps, conditioning), atol=1e-6)


def test_evaluations_count_samples_through_the_network(model):
    backbone = make(model)
    output(backbone, "policy")
    output(backbone, "reference", guided=True)
    assert backbone.evaluations == 3 + 6


@pytest.mark.parametrize(
    ("base", "lora"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_precision_of_the_policy(model, base, lora):
    backbone = make(model, base)
    assert {parameter.dtype for parameter in backbone.policy_parameters.values()} == {lora}
    assert output(backbone, "policy").dtype == base


def test_the_seed_decides_the_start_and_nothing_else_does(model):
    torch.manual_seed(1)
    one = make(model, seed=3)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    two = make(model, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    three = make(model, seed=4)
    first, second, third = (list(backbone.policy_parameters.values()) for backbone in (one, two, three))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, third, strict=True))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_a_saved_policy_comes_back_bit_for_bit_with_its_scale(model, tmp_path, base):
    backbone = make(model, base, alpha=16.0)
    stir(backbone)
    backbone.family.save_lora(tmp_path, "policy")
    twin = make(model, base, policy=str(tmp_path))
    assert backbone.policy_parameters.keys() == twin.policy_parameters.keys()
    for name, parameter in backbone.policy_parameters.items():
        assert torch.equal(parameter, twin.policy_parameters[name])
        assert twin.policy_parameters[name].dtype == torch.float32
    assert torch.equal(output(backbone, "policy"), output(twin, "policy"))
    assert all(parameter.requires_grad for parameter in twin.policy_parameters.values())


def test_faults_are_one_line(model, consistency_lora, tmp_path):
    with pytest.raises(UserError, match="match no layer"):
        make(model, target_modules=("to_qkv",))
    with pytest.raises(UserError, match="no consistency LoRA"), make(model).role("consistency"):
        pass
    with pytest.raises(UserError, match="cannot be loaded"):
        make(model, consistency_lora=str(tmp_path))
    state = load_file(Path(consistency_lora) / "pytorch_lora_weights.safetensors")
    wrong = {key: tensor[..., :3].contiguous() if "lora_A" in key else tensor for key, tensor in state.items()}
    save_file(wrong, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="cannot be loaded"):
        make(model, consistency_lora=str(tmp_path))
