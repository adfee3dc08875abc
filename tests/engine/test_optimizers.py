from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sqdf_fast.config import Optimizer as Settings
from sqdf_fast.engine import optimizers
from sqdf_fast.engine.optimizers import (
    BlockwiseAdamW,
    allocate_states,
    clip_grad_norm,
    gradient_norm,
    load_state_tensors,
    make_optimizer,
    state_tensors,
)
from sqdf_fast.errors import UserError

SHAPES = ((70, 90), (8, 4, 3, 3), (4096,), (5,))


def parameters_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(parameters, step)
        clip_grad_norm(optimizer, 1.0)
        optimizer.step()


def same(left: list[nn.Parameter], right: list[nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def settings(**given) -> Settings:
    return Settings(**{"lr": 1e-2, "weight_decay": 0.1, **given})


def bitsandbytes_on_cpu(parameters: list[nn.Parameter], chosen: Settings) -> torch.optim.Optimizer:
    """What CUDA parameters get; bitsandbytes itself runs on a CPU too."""
    pytest.importorskip("bitsandbytes")
    return optimizers._bitsandbytes(parameters, chosen, seed=7)


def every_kind(parameters: list[nn.Parameter], kind: str) -> torch.optim.Optimizer:
    if kind == "bitsandbytes":
        return bitsandbytes_on_cpu(parameters, settings(kind="adamw8bit"))
    return make_optimizer(parameters, settings(kind=kind), "cpu", seed=7)


KINDS = ("adamw", "adamw8bit", "bitsandbytes")


def test_adamw_is_torchs_fused_one_and_in_bfloat16_ours_with_states_of_32_bits() -> None:
    optimizer = make_optimizer(parameters_of(), settings(beta1=0.8, beta2=0.95, eps=1e-6), "cpu")
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    names = ("lr", "betas", "eps", "weight_decay", "fused")
    assert [group[name] for name in names] == [1e-2, (0.8, 0.95), 1e-6, 0.1, True]
    assert type(make_optimizer(parameters_of(torch.float64), settings(states="cpu"), "cpu")) is torch.optim.AdamW
    parameters = parameters_of(torch.bfloat16)
    rounded = make_optimizer(parameters, settings(), "cpu")
    run(rounded, parameters, range(1))
    assert {rounded.state[p]["state1"].dtype for p in parameters} == {torch.float32}


@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit"])
def test_8_bit_states_begin_at_4096_elements(kind: str) -> None:
    parameters = parameters_of()
    optimizer = make_optimizer(parameters, settings(kind=kind), "cpu")
    assert isinstance(optimizer, BlockwiseAdamW)
    run(optimizer, parameters, range(1))
    states = [optimizer.state[p] for p in parameters]
    assert [s["state1"].dtype for s in states] == [torch.uint8, torch.float32, torch.uint8, torch.float32]
    assert [tuple(s["state2"].shape) for s in states] == list(SHAPES)
    assert [len(s["absmax1"]) for s in states if "absmax1" in s] == [25, 16]


def test_what_has_no_meaning_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"paged_adamw8bit with optimizer\.states=cpu.*adamw8bit$"):
        make_optimizer(parameters_of(), settings(kind="paged_adamw8bit", states="cpu"), "cpu")
    with pytest.raises(UserError, match=r"float64.*optimizer\.kind=adamw"):
        make_optimizer(parameters_of(torch.float64), settings(kind="adamw8bit"), "cpu")
    strided = nn.Parameter(torch.randn(8, 6).t())
    with pytest.raises(UserError, match=r"strides \(1, 6\).*channels_last"):
        make_optimizer([strided], settings(kind="adamw8bit"), "cpu")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"adamw8bit needs bitsandbytes.*sqdf-fast\[cuda\]"):
        make_optimizer(parameters_of(), settings(kind="adamw8bit"), "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_device_gets_bitsandbytes_or_states_on_the_cpu(dtype: torch.dtype) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    for kind, paged in (("adamw8bit", False), ("paged_adamw8bit", True)):
        found = make_optimizer(parameters_of(dtype), settings(kind=kind), "cuda")
        assert isinstance(found, optim.AdamW8bit)
        assert found.is_paged is paged
    for kind, smallest in (("adamw8bit", 4096), ("adamw", None)):
        found = make_optimizer(parameters_of(dtype), settings(kind=kind, states="cpu"), "cuda")
        assert isinstance(found, BlockwiseAdamW)
        assert (found.states_on, found.min_8bit_size) == (torch.device("cpu"), smallest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_takes_the_steps_of_adamw(dtype: torch.dtype) -> None:
    exact = [nn.Parameter(p.detach().double()) for p in parameters_of(dtype)]
    chosen = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    truth = torch.optim.AdamW(exact, **chosen)
    for step in range(8):
        give_gradients(exact, step)
        for parameter in exact:  # the gradients that the others see
            parameter.grad = parameter.grad.to(dtype).double()
        nn.utils.clip_grad_norm_(exact, 1.0)
        truth.step()
    start = parameters_of(dtype)
    for kind in KINDS:
        parameters = parameters_of(dtype)
        run(every_kind(parameters, kind), parameters, range(8))
        for found, expected, before in zip(parameters, exact, start, strict=True):
            moved = (expected - before).norm()
            # 8-bit moments; in bfloat16 a step is a tenth to several times the last bit
            limit = 0.03 if dtype == torch.float32 else 0.5
            assert (found.double() - expected).norm() <= limit * moved, kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    whole = parameters_of(dtype)
    run(every_kind(whole, kind), whole, range(6))

    first = parameters_of(dtype)
    optimizer = every_kind(first, kind)
    run(optimizer, first, range(3))
    stored = {
        f"{i}.{name}": tensor.contiguous()
        for i, parameter in enumerate(first)
        for name, tensor in state_tensors(optimizer, parameter).items()
    }
    read = load(save(stored))
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    resumed = every_kind(second, kind)
    for i, parameter in enumerate(second):
        tensors = {name.partition(".")[2]: t for name, t in read.items() if name.startswith(f"{i}.")}
        load_state_tensors(resumed, parameter, tensors)
    run(resumed, second, range(3, 6))
    assert same(second, whole)
    assert not same(first, whole)


def test_a_state_put_in_place_as_tensors_is_gone_on_with() -> None:
    """optimizer.state[parameter] = {...}, contiguous, with the step a tensor: what a checkpoint holds."""
    layout = torch.channels_last
    whole = [nn.Parameter(torch.randn(16, 32, 3, 3).to(memory_format=layout))]
    first = [nn.Parameter(whole[0].detach().clone())]
    run(every_kind(whole, "adamw8bit"), whole, range(4))
    optimizer = every_kind(first, "adamw8bit")
    run(optimizer, first, range(2))
    state = {name: torch.as_tensor(value).contiguous() for name, value in optimizer.state[first[0]].items()}
    resumed = every_kind(first, "adamw8bit")
    resumed.state[first[0]] = state
    run(resumed, first, range(2, 4))
    assert same(first, whole)
    assert first[0].is_contiguous(memory_format=layout)


def test_state_dict_keeps_codes_and_goes_on_to_the_bit() -> None:
    whole, first = parameters_of(torch.bfloat16), parameters_of(torch.bfloat16)
    run(every_kind(whole, "adamw8bit"), whole, range(4))
    optimizer = every_kind(first, "adamw8bit")
    run(optimizer, first, range(2))
    resumed = every_kind(first, "adamw8bit")
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[first[0]]["state1"].dtype == torch.uint8
    run(resumed, first, range(2, 4))
    assert same(first, whole)


def test_states_move_between_bitsandbytes_and_ours() -> None:
    parameters = parameters_of()
    theirs = every_kind(parameters, "bitsandbytes")
    run(theirs, parameters, range(3))
    twin = [nn.Parameter(p.detach().clone()) for p in parameters]
    ours = every_kind(twin, "adamw8bit")
    for parameter, copy in zip(parameters, twin, strict=True):
        ours.load_state(copy, theirs.state[parameter])
    run(theirs, parameters, range(3, 4))
    run(ours, twin, range(3, 4))
    for found, expected in zip(twin, parameters, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    back = every_kind(twin, "bitsandbytes")
    for parameter in twin:
        load_state_tensors(back, parameter, state_tensors(ours, parameter))
    assert torch.equal(back.state[twin[0]]["state2"], ours.state[twin[0]]["state2"])
    assert back.state[twin[0]]["step"] == 4


def test_a_state_of_another_kind_is_refused() -> None:
    parameters = parameters_of()
    for kind, other in (("adamw", "adamw8bit"), ("adamw8bit", "adamw"), ("adamw", "bitsandbytes")):
        optimizer = every_kind(parameters, kind)
        run(optimizer, parameters, range(1))
        with pytest.raises(ValueError, match="the optimizer's state has"):
            load_state_tensors(every_kind(parameters, other), parameters[0], state_tensors(optimizer, parameters[0]))
    eight = every_kind(parameters, "adamw8bit")
    run(eight, parameters, range(1))
    with pytest.raises(ValueError, match=r"absmax1 is torch.float32 \(25,\), not torch.float32 \(16,\)"):
        load_state_tensors(eight, parameters[0], state_tensors(eight, parameters[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_that_of_torch(kind: str, dtype: torch.dtype, max_norm: float) -> None:
    clipped, scaled = parameters_of(dtype), parameters_of(dtype)
    optimizer, other = every_kind(clipped, kind), every_kind(scaled, kind)
    give_gradients(clipped, 0)
    give_gradients(scaled, 0)
    exact = math.sqrt(sum(p.grad.double().square().sum().item() for p in clipped))
    assert clip_grad_norm(optimizer, max_norm) == pytest.approx(exact, rel=1e-6 if dtype == torch.float32 else 1e-2)
    factor = min(1.0, max_norm / exact)
    for parameter in scaled:
        parameter.grad = parameter.grad * factor
    optimizer.step()
    other.step()
    for found, expected in zip(clipped, scaled, strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-6 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_the_clip_factor_holds_for_one_step_and_leaves_gradients_alone() -> None:
    parameters = parameters_of()
    optimizer = every_kind(parameters, "adamw8bit")
    give_gradients(parameters, 0)
    before = [p.grad.clone() for p in parameters]
    norm = clip_grad_norm(optimizer, 0.5)
    assert optimizer.gradient_scale == 0.5 / (norm + 1e-6)
    optimizer.step()
    assert optimizer.gradient_scale == 1.0
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))
    first = optimizer.state[parameters[3]]["state1"]
    torch.testing.assert_close(first, 0.1 * before[3] * 0.5 / norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_leaves_everything_untouched(bad: float) -> None:
    parameters, twin = parameters_of(torch.bfloat16), parameters_of(torch.bfloat16)
    optimizer, other = every_kind(parameters, "adamw8bit"), every_kind(twin, "adamw8bit")
    run(optimizer, parameters, range(1))
    run(other, twin, range(1))
    give_gradients(parameters, 1)
    parameters[1].grad.view(-1)[7] = bad
    assert not math.isfinite(clip_grad_norm(optimizer, 1.0))
    optimizer.step()
    assert same(parameters, twin)
    run(optimizer, parameters, range(1, 3))
    run(other, twin, range(1, 3))
    assert same(parameters, twin)


def test_the_norm_takes_every_layout_and_dtype() -> None:
    gradients = [torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last), torch.randn(30, 20).t()]
    gradients += [torch.randn(300).bfloat16(), torch.randn(300).half()]
    expected = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    assert gradient_norm(gradients) == pytest.approx(expected, rel=1e-12)
    assert gradient_norm([gradients[0].double()]) == pytest.approx(gradients[0].double().norm().item(), rel=1e-12)
    assert gradient_norm([]) == 0


def test_a_parameter_without_gradient_stays_and_groups_have_their_own_settings() -> None:
    parameters = parameters_of()
    groups = [{"params": parameters[:1], "lr": 0.0, "weight_decay": 0.0}, {"params": parameters[1:]}]
    optimizer = BlockwiseAdamW(groups, lr=1e-2)
    before = [p.detach().clone() for p in parameters]
    give_gradients(parameters, 0)
    parameters[2].grad = None
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(parameters, before, strict=True)] == [True, False, True, False]
    assert parameters[2] not in optimizer.state


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_step_after_its_states_allocates_none_and_is_the_same_step(kind: str, monkeypatch) -> None:
    parameters, twin = parameters_of(), parameters_of()
    optimizer, other = every_kind(parameters, kind), every_kind(twin, kind)
    give_gradients(parameters, 0)
    parameters[3].grad = None
    whole, calls = torch.zeros_like, []

    def fails_within_the_second_state(*given, **options):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no room")
        return whole(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros_like", fails_within_the_second_state)
        with pytest.raises(torch.OutOfMemoryError):
            allocate_states(optimizer)
    allocate_states(optimizer)
    before = [state_tensors(optimizer, parameter) for parameter in parameters]
    assert [bool(tensors) for tensors in before] == [True, True, True, False]
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros_like", None)
        optimizer.step()
    for parameter, tensors in zip(parameters, before, strict=True):
        for name, tensor in state_tensors(optimizer, parameter).items():
            assert name == "step" or tensor is tensors[name]
    give_gradients(twin, 0)
    twin[3].grad = None
    other.step()
    assert same(parameters, twin)


def test_the_seed_decides_the_rounding() -> None:
    runs = []
    for seed in (1, 1, 2):
        parameters = parameters_of(torch.bfloat16)
        run(make_optimizer(parameters, settings(kind="adamw8bit", lr=1e-4), "cpu", seed=seed), parameters, range(2))
        runs.append(parameters)
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("kind", KINDS)
def test_small_steps_move_bfloat16_weights_on_average(kind: str) -> None:
    """Twenty steps of 1e-4 on weights of 1, whose last bit is worth 4e-3 below and 8e-3 above."""
    (parameter,) = [nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))]
    chosen = settings(kind="adamw" if kind == "adamw" else "adamw8bit", lr=1e-4, weight_decay=0.0)
    optimizer = (bitsandbytes_on_cpu if kind == "bitsandbytes" else lambda p, s: make_optimizer(p, s, "cpu"))(
        [parameter], chosen
    )
    for _ in range(20):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert abs(parameter.double().mean().item() - (1 - 20e-4)) < 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_through_staging_is_the_same_step(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters taken for another device's: every one passes through the two places, the largest one last too."""
    direct, staged = parameters_of(dtype), parameters_of(dtype)
    run(every_kind(direct, "adamw8bit"), direct, range(3))
    optimizer = every_kind(staged, "adamw8bit")
    monkeypatch.setattr(optimizer, "_home", lambda parameter: torch.device("cpu", 0))
    run(optimizer, staged, range(2))
    optimizer._staging._buffers[0].fill_(255)
    run(optimizer, staged, range(2, 3))
    assert len(optimizer._staging._buffers) == 2
    assert same(direct, staged)


class FakeStream:
    """Notes who waits for whom, and marks its events with what was on it last."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> SimpleNamespace:
        last = self.log[-1]
        return SimpleNamespace(synchronize=lambda: self.log.append(f"wait: {last}"))


def test_copies_run_beside_the_update_in_an_order_that_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and gradients say that they are on a GPU; copies, streams and places are noted."""
    direct, remote = parameters_of()[:3], parameters_of()[:3]
    give_gradients(direct, 0)
    give_gradients(remote, 0)
    every_kind(direct, "adamw8bit").step()
    optimizer = make_optimizer(remote, settings(kind="adamw8bit", states="cpu"), "cuda", seed=7)
    names = {p.data_ptr(): f"values {i}" for i, p in enumerate(remote)}
    names |= {p.grad.data_ptr(): f"gradient {i}" for i, p in enumerate(remote)}
    log: list[str] = []
    main, side, running = FakeStream("main", log), FakeStream("side", log), []
    device, copy, empty, update = torch.Tensor.device, torch.Tensor.copy_, torch.empty, BlockwiseAdamW._update

    def copied(there: torch.Tensor, here: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        for tensor, way in ((here, "down"), (there, "up")):
            if tensor.data_ptr() in names:
                assert non_blocking
                assert running == [side]
                log.append(f"{names[tensor.data_ptr()]} {way}")
        return copy(there, here)

    def updated(optimizer, state, group, number, *given) -> None:
        log.append(f"update {number}")
        update(optimizer, state, group, number, *given)

    @contextmanager
    def on(stream: FakeStream):
        running.append(stream)
        yield
        running.remove(stream)

    def pinned(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        log.append("pinned" if pin_memory else "pageable")
        return empty(size, dtype=dtype)

    cuda = torch.device("cuda", 0)
    places = property(lambda tensor: cuda if tensor.data_ptr() in names else device.__get__(tensor))
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "device", places)
        patched.setattr(torch.Tensor, "copy_", copied)
        patched.setattr(torch, "empty", pinned)
        patched.setattr(BlockwiseAdamW, "_update", updated)
        patched.setattr(torch.cuda, "Stream", lambda device: side)
        patched.setattr(torch.cuda, "current_stream", lambda device: main)
        patched.setattr(torch.cuda, "stream", on)
        allocate_states(optimizer)
        assert log == ["pinned", "pinned"]
        log.clear()
        optimizer.step()
    assert log == [
        "side waits for main",
        *("values 0 down", "gradient 0 down", "values 1 down", "gradient 1 down"),
        *("wait: gradient 0 down", "update 0", "values 0 up"),
        # Into the place of 0, whose values are on their way up before.
        *("values 2 down", "gradient 2 down"),
        *("wait: gradient 1 down", "update 1", "values 1 up"),
        *("wait: gradient 2 down", "update 2", "values 2 up"),
        "main waits for side",
    ]
    assert same(direct, remote)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_parameters_with_states_on_the_cpu_take_the_cpus_steps(dtype: torch.dtype) -> None:
    here, there = parameters_of(dtype), [nn.Parameter(p.detach().cuda()) for p in parameters_of(dtype)]
    local = make_optimizer(here, settings(kind="adamw8bit"), "cpu", seed=7)
    remote = make_optimizer(there, settings(kind="adamw8bit", states="cpu"), "cuda", seed=7)
    for step in range(4):
        give_gradients(here, step)
        for parameter, other in zip(here, there, strict=True):
            other.grad = parameter.grad.cuda()
        local.step()
        remote.step()
    assert {remote.state[p]["state1"].device.type for p in there} == {"cpu"}
    assert same(here, [nn.Parameter(p.detach().cpu()) for p in there])


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_can_be_simulated(kind: str, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        parameters = [nn.Parameter(torch.empty(64, 128, dtype=dtype))]
        optimizer = make_optimizer(parameters, settings(kind=kind), "cpu")
        parameters[0].grad = torch.empty_like(parameters[0])
        optimizer.step()
        optimizer.step()
        sizes = {name: tensor.nbytes for name, tensor in state_tensors(optimizer, parameters[0]).items()}
    wide = kind == "adamw"
    first = "exp_avg" if wide and dtype == torch.float32 else "state1"
    assert sizes[first] == 64 * 128 * (4 if wide else 1)
