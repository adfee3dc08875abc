from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sqdf_fast.errors import UserError
from sqdf_fast.kernels import native
from sqdf_fast.kernels.adamw_8bit import (
    BLOCK,
    Coefficients,
    adamw_8bit,
    adamw_32bit,
    dynamic_map,
    maps,
    reference,
    round_stochastically,
    sum_of_squares,
)
from sqdf_fast.kernels.philox import philox_uint32

needs_native = pytest.mark.skipif(not native.available(), reason="installed without the native library")
implementations = pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), "reference"])
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def coefficients(step: int, gradient_scale: float = 1.0) -> Coefficients:
    return Coefficients.of(step, **SETTINGS, gradient_scale=gradient_scale)


def fresh_states(numel: int) -> list[Tensor]:
    blocks = -(-numel // BLOCK)
    codes = [torch.zeros(numel, dtype=torch.uint8) for _ in range(2)]
    return [*codes, torch.zeros(blocks), torch.zeros(blocks)]


def gradient_like(parameter: Tensor, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Magnitudes over several decades, as gradients have them."""
    generator = torch.Generator().manual_seed(step)
    magnitude = 10 ** torch.randn(parameter.shape, generator=generator)
    return (1e-2 * magnitude * torch.randn(parameter.shape, generator=generator)).to(dtype)


@pytest.fixture
def instruction_sets() -> Iterator[list[str]]:
    best = native.instruction_set()
    found = ["baseline", "AVX2", "AVX-512"]
    yield found[: found.index(best) + 1]
    native.limit_instruction_set(best)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_those_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_a_map_holds_zero_and_one_and_is_as_fine_as_its_decade_allows(signed: bool) -> None:
    values = dynamic_map(signed)
    assert (len(values), values[-1].item(), values.sort().values.equal(values)) == (256, 1.0, True)
    assert values[maps.ZERO_CODE if signed else 0] == 0
    top = values[values > 0.1][:-1]
    assert len(top) == (64 if signed else 128)
    torch.testing.assert_close(top.diff(), torch.full((len(top) - 1,), 0.9 / len(top)))


@pytest.mark.parametrize("signed", [True, False])
def test_no_cell_of_the_lookup_holds_two_boundaries_and_none_begins_above_the_first(signed: bool) -> None:
    bounds = maps.boundaries(signed)
    cells = bounds.view(torch.int32) >> 16
    assert len(cells.unique()) == len(cells)
    assert cells[0] > maps.FIRST_CELL
    assert cells[-1] - maps.FIRST_CELL < len(maps.lookup(signed))


def near_boundaries(signed: bool) -> Tensor:
    """Every value of a map, every boundary, the floats beside them, their negatives, 0 and what lies below the map."""
    bounds = torch.cat([maps.boundaries(signed), dynamic_map(signed).abs(), torch.tensor([1e-30, 1e-8, 2.0**-24])])
    infinity = torch.tensor(torch.inf)
    exact = torch.cat([bounds, bounds.nextafter(infinity), bounds.nextafter(-infinity)]).clamp(0, 1)
    return torch.cat([exact, -exact]) if signed else exact


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_code_is_found_at_every_boundary(signed: bool) -> None:
    values = near_boundaries(signed)
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    blocks = torch.cat([torch.ones(len(blocks), 1), blocks], dim=1).flatten()  # absmax 1: nothing is rescaled
    codes, absmax = reference.quantize(blocks, signed=signed)
    assert torch.equal(absmax, torch.ones(len(blocks) // BLOCK))
    if not signed:
        assert ((codes == 0) == (blocks == 0)).all()
        blocks = blocks.clamp(min=dynamic_map(False)[1].item() * 0.51) * (blocks != 0)
    distance = (blocks.double()[:, None] - dynamic_map(signed).double()).abs()
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    # a boundary is a float32 itself, off the true midpoint by at most half its last bit
    assert (chosen - distance.amin(1) <= blocks.abs().double() * 2.0**-23).all()
    assert torch.equal(dynamic_map(signed)[codes.long()] < 0, (blocks < 0) & (codes != maps.ZERO_CODE))


@needs_native
@pytest.mark.parametrize("signed", [True, False])
def test_native_codes_are_the_references_at_every_boundary(signed: bool, instruction_sets: list[str]) -> None:
    """The moments are put in through the gradient: beta = 0 makes them the gradient, and its square."""
    values = near_boundaries(signed)
    given = values if signed else values.sqrt()
    given = torch.nn.functional.pad(given, (0, -len(given) % 255)).view(-1, 255)
    given = torch.cat([torch.ones(len(given), 1), given], dim=1).flatten()
    only = Coefficients(1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0)
    for name in instruction_sets:
        native.limit_instruction_set(name)
        states = fresh_states(len(given))
        adamw_8bit(torch.zeros(len(given)), given, *states, only, impl="native")
        moments = given if signed else given * given
        codes, absmax = reference.quantize(moments, signed=signed)
        assert torch.equal(states[0 if signed else 1], codes), name
        assert torch.equal(states[2 if signed else 3], absmax), name


@needs_native
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_and_reference_agree_to_the_bit(
    dtype: torch.dtype, gradient_dtype: torch.dtype, instruction_sets: list[str]
) -> None:
    for name in instruction_sets:
        native.limit_instruction_set(name)
        for numel in (1, 127, 255, 256, 257, 511, 513, 8192 + 300, 40001):
            parameter = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
            ours, truth = ([parameter.clone(), *fresh_states(numel)] for _ in range(2))
            wide, wide_truth = ([parameter.clone(), torch.zeros(numel), torch.zeros(numel)] for _ in range(2))
            for step in (1, 2, 3):
                gradient = gradient_like(parameter, step, gradient_dtype)
                scale = coefficients(step, 0.7)
                for impl, found, full in (("native", ours, wide), ("reference", truth, wide_truth)):
                    adamw_8bit(found[0], gradient, *found[1:], scale, seed=step - 2, impl=impl)
                    adamw_32bit(full[0], gradient, *full[1:], scale, seed=step - 2, impl=impl)
            for found, expected in zip([*ours, *wide], [*truth, *wide_truth], strict=True):
                assert torch.equal(found, expected), (name, numel)


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_32_bit_states_give_adamw(impl: str, dtype: torch.dtype) -> None:
    parameter = torch.randn(3000).to(dtype)
    expected = torch.nn.Parameter(parameter.double())
    settings = {name: SETTINGS[name] for name in ("lr", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW([expected], betas=(0.9, 0.999), **settings)
    state1, state2 = torch.zeros(3000), torch.zeros(3000)
    for step in (1, 2, 3, 4):
        gradient = gradient_like(parameter, step)
        adamw_32bit(parameter, gradient, state1, state2, coefficients(step, 0.5), seed=step, impl=impl)
        expected.grad = gradient.double() * 0.5
        optimizer.step()
    torch.testing.assert_close(state1.double(), optimizer.state[expected]["exp_avg"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(state2.double(), optimizer.state[expected]["exp_avg_sq"], rtol=1e-5, atol=1e-12)
    # four roundings of at most one bit each
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 4 * 2**-7, "atol": 1e-3}
    torch.testing.assert_close(parameter.double(), expected.detach(), **tolerance)


@implementations
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_parameters_are_those_of_bitsandbytes_within_its_own_quantization_error(impl: str, spread: float) -> None:
    """Gradients of one magnitude, and of magnitudes over decades, where 8 bits say little of the smaller ones."""
    optim = pytest.importorskip("bitsandbytes.optim")
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(3 * 4096 + 100, generator=generator)
    magnitude = 1e-2 * 10 ** (spread * torch.randn(start.shape, generator=generator))
    settings = {name: SETTINGS[name] for name in ("lr", "eps", "weight_decay")}
    theirs, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())
    optimizer, truth = optim.AdamW8bit([theirs], **settings), torch.optim.AdamW([exact], **settings)
    ours, states = start.clone(), fresh_states(len(start))
    for step in range(1, 9):
        gradient = magnitude * torch.randn(start.shape, generator=generator)
        adamw_8bit(ours, gradient, *states, coefficients(step, 0.25), impl=impl)
        theirs.grad, exact.grad = gradient * 0.25, gradient.double() * 0.25
        optimizer.step()
        truth.step()
        apart = (ours - theirs.detach()).double().norm()
        their_error, our_error = ((p.detach().double() - exact.detach()).norm() for p in (theirs, ours))
        if step == 1:  # nothing has been quantized yet when the parameters are updated
            assert apart <= 1e-5 * (exact.detach() - start).norm()
        else:
            assert apart <= their_error
            assert our_error <= 1.02 * their_error


@implementations
def test_states_of_bitsandbytes_continue(impl: str) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    settings = {name: SETTINGS[name] for name in ("lr", "eps", "weight_decay")}
    theirs = torch.nn.Parameter(torch.randn(50_000, generator=torch.Generator().manual_seed(6)))
    optimizer = optim.AdamW8bit([theirs], **settings)
    for step in range(1, 6):
        theirs.grad = gradient_like(theirs, step)
        before, ours = optimizer.state[theirs], theirs.detach().clone()
        names = ("state1", "state2", "absmax1", "absmax2")
        states = [before[name].clone() for name in names] if before else fresh_states(len(ours))
        adamw_8bit(ours, theirs.grad, *states, coefficients(step), impl=impl)
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)
        for found, name in zip(states[2:], names[2:], strict=True):
            torch.testing.assert_close(found, before[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_the_exact_search_of_bitsandbytes(signed: bool) -> None:
    """Its fast search on a CPU is coarser and misses the nearest code of small values; float64 takes the exact one."""
    pytest.importorskip("bitsandbytes")
    moments = gradient_like(torch.empty(20 * 256), 3)
    moments = moments if signed else moments.square()
    codes, absmax = reference.quantize(moments, signed=signed)
    expected, scale = torch.ops.bitsandbytes.quantize_blockwise(moments.double(), dynamic_map(signed), 256)
    assert torch.equal(absmax, scale)
    expected = expected.int() if signed else expected.int().clamp(min=1)
    difference = (codes.int() - expected).abs()
    assert difference.max() <= 1  # a tie within rounding
    assert difference.sum() <= 2


@implementations
def test_a_block_without_gradient_stays_zero_and_a_tiny_one_is_no_nan(impl: str) -> None:
    gradient = torch.cat([torch.zeros(256), torch.full((256,), 1e-39), torch.full((256,), 1e-21), torch.ones(10)])
    parameter, states = torch.ones(len(gradient)), fresh_states(len(gradient))
    for step in (1, 2, 3):
        adamw_8bit(parameter, gradient, *states, coefficients(step), impl=impl)
    assert torch.isfinite(parameter).all()
    first, second = (
        reference.dequantize(states[i], states[i + 2], signed=signed) for i, signed in ((0, True), (1, False))
    )
    assert torch.equal(first[:512], torch.zeros(512))
    assert torch.equal(second[:768], torch.zeros(768))
    assert (first[512:768] > 0).all()
    decay = 1 - SETTINGS["lr"] * SETTINGS["weight_decay"]
    torch.testing.assert_close(parameter[:256], torch.full((256,), decay**3))


@implementations
def test_what_is_not_finite_reaches_its_own_element_and_its_blocks_scale_and_no_further(impl: str) -> None:
    parameter, states = torch.ones(600), fresh_states(600)
    gradient = torch.ones(600)
    gradient[300], gradient[301] = torch.nan, torch.inf
    adamw_8bit(parameter, gradient, *states, coefficients(1), impl=impl)
    assert parameter.isfinite().logical_not().nonzero().flatten().tolist() == [300, 301]
    assert states[2].isfinite().tolist() == states[3].isfinite().tolist() == [True, False, True]


def test_stochastic_rounding_takes_one_of_the_two_neighbors_and_is_right_on_average() -> None:
    down, up = 1.0, 1.0 + 2.0**-7
    for part in (0.0, 0.125, 0.5, 0.9):
        values = torch.full((2**18,), down + part * 2.0**-7)
        for sign in (1, -1):
            rounded = round_stochastically(sign * values, seed=3).float() * sign
            assert set(rounded.unique().tolist()) <= {down, up}
            # five standard deviations of the mean of 2^18 coins
            assert abs((rounded == up).double().mean().item() - part) <= 5 * (part * (1 - part) / 2**18) ** 0.5


def test_stochastic_rounding_draws_the_words_that_its_docstring_names() -> None:
    numel = 3 * 512 - 7
    words = philox_uint32(torch.tensor([-5]), 2048)[0]  # word 4 c + lane is lane `lane` at counter c
    element = torch.arange(numel)
    word = words[4 * (64 * (element // 512) + element % 64) + element // 64 % 4]
    random = torch.where(element // 256 % 2 == 0, word & 0xFFFF, word >> 16)
    values = torch.full((numel,), 1.0) + 2.0**-8
    rounded = round_stochastically(values, seed=-5).float()
    assert torch.equal(rounded > 1, random >= 2**15)


def test_stochastic_rounding_keeps_what_bfloat16_has() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    rounded = round_stochastically(every.float(), seed=1)
    number = ~every.isnan()
    assert torch.equal(rounded[number].view(torch.int16), every[number].view(torch.int16))
    assert rounded[~number].isnan().all()


@needs_native
def test_native_rounding_keeps_nans_infinities_and_the_sign(instruction_sets: list[str]) -> None:
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.3e38, -1e-40])
    parameter = special.repeat(100).bfloat16()
    idle = Coefficients(1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0)
    for name in instruction_sets:
        native.limit_instruction_set(name)
        found = parameter.clone()
        adamw_32bit(found, torch.zeros(800), torch.zeros(800), torch.zeros(800), idle, seed=9, impl="native")
        assert torch.equal(found.isnan(), parameter.isnan())
        assert torch.equal(found.nan_to_num(1.0), parameter.nan_to_num(1.0))


@implementations
def test_steps_below_half_a_bit_of_bfloat16_move_the_mean(impl: str) -> None:
    numel, steps = 4096, 20
    parameter, states = torch.ones(numel, dtype=torch.bfloat16), fresh_states(numel)
    for step in range(1, steps + 1):
        small = Coefficients.of(step, 1e-4, 0.9, 0.999, 1e-8, 0.0, 1.0)
        adamw_8bit(parameter, torch.ones(numel, dtype=torch.bfloat16), *states, small, seed=step, impl=impl)
    # 20 steps of 1e-4, each a fortieth of the gap below 1
    assert abs(parameter.double().mean().item() - (1 - steps * 1e-4)) < 2e-4


@needs_native
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit() -> None:
    start = torch.randn(9 * 8192 + 77, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradient, results = gradient_like(start, 1), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        parameter, states = start.clone(), fresh_states(len(start))
        for step in (1, 2):
            adamw_8bit(parameter, gradient, *states, coefficients(step), seed=step, impl="native")
        pieces = [gradient, gradient[:100], gradient[:8193].half()]
        results.append([parameter, *states, torch.tensor(sum_of_squares(pieces, impl="native"), dtype=torch.float64)])
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            assert torch.equal(found, expected)


@implementations
def test_sum_of_squares_is_that_of_all_tensors_in_double_precision(impl: str) -> None:
    tensors = [
        torch.full((3,), 1e30),
        torch.randn(8192 + 17),
        torch.randn(40, 50).half(),
        torch.randn(1).bfloat16(),
        torch.full((40000,), 1e-25),
        torch.empty(0),
    ]
    for part in (tensors, tensors[1:], tensors[4:], tensors[5:]):
        expected = sum(tensor.double().square().sum().item() for tensor in part)
        assert sum_of_squares(part, impl=impl) == pytest.approx(expected, rel=1e-13)
    assert sum_of_squares([], impl=impl) == 0
    for bad in (torch.nan, torch.inf):
        assert not torch.tensor(sum_of_squares([torch.ones(300), torch.tensor([bad])], impl=impl)).isfinite()


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    parameter, gradient, states = torch.ones(300), torch.ones(300), fresh_states(300)
    with pytest.raises(UserError, match=r"parameter is torch.float64; it must be one of float32, bfloat16$"):
        adamw_8bit(parameter.double(), gradient, *states, coefficients(1))
    with pytest.raises(UserError, match=r"gradient is torch.int64"):
        adamw_8bit(parameter, gradient.long(), *states, coefficients(1))
    with pytest.raises(UserError, match=r"state2 is torch.float32; it must be one of uint8"):
        adamw_8bit(parameter, gradient, states[0], gradient, *states[2:], coefficients(1))
    with pytest.raises(UserError, match=r"gradient has shape \(299,\).*300 elements"):
        adamw_8bit(parameter, gradient[1:], *states, coefficients(1))
    with pytest.raises(UserError, match=r"state1 has shape.*contiguous"):
        adamw_32bit(parameter, gradient, torch.ones(600)[::2], gradient, coefficients(1))
    with pytest.raises(UserError, match=r"absmax2 is torch.float32 \(1,\).*\[2\]"):
        adamw_8bit(parameter, gradient, *states[:3], torch.ones(1), coefficients(1))
    with pytest.raises(UserError, match="float64"):
        sum_of_squares([gradient.double()])
    with pytest.raises(UserError, match="contiguous"):
        sum_of_squares([torch.ones(4, 4).t()])


FAKE_FIRST = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from sqdf_fast.kernels.adamw_8bit import Coefficients, adamw_8bit

def step():
    parameter, codes = torch.ones(300), [torch.zeros(300, dtype=torch.uint8) for _ in range(2)]
    one = Coefficients.of(1, 0.5, 0.9, 0.999, 1e-8, 0.0, 1.0)
    adamw_8bit(parameter, torch.ones(300), *codes, torch.zeros(2), torch.zeros(2), one, impl="reference")
    return parameter

with FakeTensorMode():
    step()
torch.set_default_device("meta")
step()
torch.set_default_device("cpu")
print(step().unique().tolist())
"""


@pytest.mark.slow
def test_a_simulated_step_leaves_nothing_behind() -> None:
    done = subprocess.run([sys.executable, "-c", FAKE_FIRST], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[0.5]\n"), done.stderr
