from __future__ import annotations

import bitsandbytes
import pytest
import torch
from torch import nn

from sqdf_fast.engine.offload import Offload

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).requires_grad_(False)
    network[0].to(memory_format=torch.channels_last)
    adapter = nn.Linear(3, 3)
    adapter.bias.requires_grad_(False)
    return {
        "network": nn.ModuleList([network, adapter]),
        "decoder": nn.Linear(7, 2, dtype=torch.bfloat16).requires_grad_(False),
    }


def test_for_a_gpu_a_part_is_pinned_and_comes_in_one_asynchronous_copy(monkeypatch):
    """The GPU's memory is the CPU's here; what is asked for is noted."""
    parts, pinned, copies = modules(), [], []
    before = {name: [tensor.clone() for tensor in part.state_dict().values()] for name, part in parts.items()}
    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def on_the_host(like, size, *, dtype, pin_memory):
        pinned.append((size, pin_memory))
        return new_empty(like, size, dtype=dtype)

    def to_the_device(host, device, **options):
        copies.append((host.numel(), device, options))
        return host.clone()

    monkeypatch.setattr(torch.Tensor, "new_empty", on_the_host)
    monkeypatch.setattr(torch.Tensor, "to", to_the_device)
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **options: empty(*size, **options))
    offload = Offload({name: [module] for name, module in parts.items()}, CUDA)
    (network, decoder), (one, two) = zip(*pinned, strict=True)
    assert one is two is True
    assert offload.resident == frozenset()
    at_once = {"copy": True, "non_blocking": True}
    for name, size in (("network", network), ("decoder", decoder), ("network", network)):
        copies.clear()
        for _ in range(2):
            offload.use(name)
        assert copies == [(size, CUDA, at_once)]
        found = zip(parts[name].state_dict().values(), before[name], strict=True)
        assert all(torch.equal(one, two) for one, two in found)


def make(parts: dict[str, nn.Module]) -> Offload:
    return Offload({name: [module] for name, module in parts.items()}, CPU)


def test_weights_come_back_bit_for_bit_in_their_layout():
    parts = modules()
    before = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in parts.items()}
    offload = make(parts)
    assert offload.resident == {"network", "decoder"}
    offload.use("decoder")
    assert offload.resident == {"decoder"}
    network = parts["network"][0]
    assert all(tensor.numel() == 0 for tensor in (*network.parameters(), *network.buffers()))
    offload.use("network")
    assert parts["decoder"].weight.numel() == 0
    offload.use("network", "decoder")
    for name, part in parts.items():
        for key, value in part.state_dict().items():
            assert torch.equal(value, before[name][key])
            assert value.stride() == before[name][key].stride()


def test_what_is_trained_stays():
    parts = modules()
    offload, adapter = make(parts), parts["network"][1]
    weight = adapter.weight.data_ptr()
    offload.use("decoder")
    assert adapter.weight.data_ptr() == weight
    assert adapter.bias.numel() == 0
    with torch.no_grad():
        adapter.weight.fill_(2)
    offload.use("network")
    assert (adapter.weight == 2).all()


def tensors_of(layer: bitsandbytes.nn.Linear4bit) -> list[torch.Tensor]:
    """Everything of a 4-bit layer that grows with its weight, and its code books."""
    outer = layer.weight.quant_state
    states = [outer] if outer.state2 is None else [outer, outer.state2]
    return [layer.weight, layer.bias, *(tensor for state in states for tensor in (state.absmax, state.code))]


@pytest.mark.parametrize("nested", [False, True], ids=["float32 scales", "quantized scales"])
def test_of_a_4_bit_layer_nothing_stays_and_its_output_comes_back(nested):
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        512, 256, quant_type="nf4", compress_statistics=nested, compute_dtype=torch.float32
    ).to(CPU)
    layer.requires_grad_(False)
    x = torch.randn(3, 512, requires_grad=True)
    before = layer(x)
    (slope,) = torch.autograd.grad(before.square().sum(), x)
    assert len(tensors_of(layer)) == (6 if nested else 4)
    offload = make({"network": layer, "decoder": nn.Linear(2, 2).requires_grad_(False)})
    offload.use("decoder")
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(layer)) == 0
    offload.use("network")
    assert torch.equal(layer(x), before)
    (again,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.equal(again, slope)


def test_a_shared_tensor_belongs_to_the_first_part():
    shared = nn.Linear(2, 2).requires_grad_(False)
    offload = Offload({"one": [shared], "two": [shared, nn.Linear(2, 2).requires_grad_(False)]}, CPU)
    offload.use("one")
    assert shared.weight.numel() == 4
    offload.use("two")
    assert shared.weight.numel() == 0


def test_an_upload_that_runs_out_of_memory_leaves_a_state_to_go_on_from(monkeypatch):
    parts = modules()
    offload = make(parts)
    offload.use("network")
    upload = torch.Tensor.to

    def no_room(self, *arguments, **keywords):
        if keywords.get("copy"):
            raise torch.OutOfMemoryError("no room")
        return upload(self, *arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", no_room)
        with pytest.raises(torch.OutOfMemoryError):
            offload.use("decoder")
    assert offload.resident == frozenset()
    offload.use("network")
    assert offload.resident == {"network"}
    assert parts["network"][0](torch.ones(2, 3, 4, 4)).shape == (2, 5, 2, 2)
