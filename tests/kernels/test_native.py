from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sqdf_fast.errors import UserError
from sqdf_fast.kernels import discounted_loss, native
from sqdf_fast.kernels.dispatch import module
from sqdf_fast.kernels.philox import native as philox
from sqdf_fast.kernels.philox.reference import Draw


class Raw:
    """The raw functions of an op's native implementation, called with the fields of their arguments."""

    def __init__(self, op: str) -> None:
        self._native, self._reference = module(op, "native"), module(op, "reference")

    def forward(self, *given: object) -> Any:
        return self._native.forward(self._reference.Forward(*given))

    def backward(self, *given: object) -> Any:
        return self._native.backward(self._reference.Backward(*given))


denoise_step, posterior_mean = Raw("denoise_step"), Raw("posterior_mean")


DTYPES = (torch.float32, torch.float16, torch.bfloat16)

needs_native = pytest.mark.skipif(not native.available(), reason="installed without the native library")


@pytest.fixture
def fresh_loader() -> Iterator[None]:
    """The loader as it is before its first use, here and for the tests that follow."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@needs_native
def test_the_library_declares_the_version_that_the_header_has() -> None:
    header = (Path(native.__file__).parent / "native.h").read_text()
    assert f"#define SQDF_FAST_ABI_VERSION {native.ABI_VERSION}\n" in header
    assert native.library().sqdf_fast_abi_version() == native.ABI_VERSION
    assert native.unavailable_reason() is None


@needs_native
def test_openmp_threads_are_those_of_torch() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    found = native.library().sqdf_fast_max_threads()
    torch.set_num_threads(before)
    if found == 1:
        pytest.skip("built without OpenMP")
    assert found == 3


@needs_native
def test_the_instruction_set_fits_the_processor() -> None:
    known = {
        "AVX-512": {"AVX512"},
        "AVX2": {"AVX2", "AVX512"},
        "baseline": {"DEFAULT", "AVX2", "AVX512", "NO AVX"},
    }
    assert torch.backends.cpu.get_cpu_capability() in known[native.instruction_set()]


def _without_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("SQDF_FAST_NATIVE_LIBRARY", "")
    monkeypatch.setattr("sqdf_fast.kernels.__path__", [str(tmp_path)])
    return "no C\\+\\+ compiler"


def _not_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    path = tmp_path / "broken.so"
    path.write_bytes(b"not a library")
    monkeypatch.setenv("SQDF_FAST_NATIVE_LIBRARY", str(path))
    return "broken.so does not load"


def _of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    if native.find() is None:
        pytest.skip("installed without the native library")
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    return f"ABI {native.ABI_VERSION - 1}, this package needs {native.ABI_VERSION}"


@pytest.mark.usefixtures("fresh_loader")
@pytest.mark.parametrize("break_it", [_without_library, _not_a_library, _of_another_version])
def test_a_missing_library_is_one_line_and_no_crash(
    break_it, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = break_it(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING, logger="sqdf_fast.kernels"):
        assert [native.available() for _ in range(3)] == [False] * 3
    assert len(caplog.messages) == 1
    assert "\n" not in caplog.messages[0]
    with pytest.raises(RuntimeError, match=expected):
        native.library()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def instruction_sets() -> Iterator[list[str]]:
    """Those that this processor has; the best one is in use again afterwards."""
    best = native.instruction_set()
    found = ["baseline", "AVX2", "AVX-512"]
    yield found[: found.index(best) + 1]
    native.limit_instruction_set(best)


@pytest.fixture
def cached_traffic() -> Iterator[None]:
    yield
    native.limit_cached_traffic(None)


def every_result(shape: tuple[int, ...], guidance_scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """All outputs of the raw functions on fixed inputs; sample i is the same whatever the number of samples."""
    batch, rows = shape[0], shape[0] if guidance_scale == 1 else 2 * shape[0]

    def draw(stream: int, rows: int = batch) -> Tensor:
        seeds = [97 * (i % batch) + 50 * (i // batch) + stream for i in range(rows)]
        samples = [torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(samples).to(dtype)

    table = torch.tensor([[0.9, -0.3, 0.2], [1.1, 0.4, 0.05], [0.7, 2.0, 1.5]])
    index = torch.arange(batch) % 3
    seed = torch.arange(batch) - 1
    x, noise, grad, policy, reference = draw(1), draw(2), draw(3), draw(4, rows), draw(5, rows)
    g = guidance_scale
    given = denoise_step.forward(x, policy, reference, table, index, g, noise, None, 0.5, True)
    drawn = denoise_step.forward(x, policy, reference, table, index, g, None, seed, 0.5, True)
    grad_kl = torch.linspace(1, 2, 7)[:batch]
    pulled = denoise_step.backward(grad, grad_kl, given[2], table, index, g, 0.5, dtype, dtype)
    mean = posterior_mean.forward(x, policy, table[:, :2], index, g, dtype)
    back = posterior_mean.backward(grad, table[:, :2], index, g, dtype, dtype)
    names = ("x_prev", "kl", "delta", "x_prev_seed", "kl_seed", "delta_seed", "grad_x", "grad_policy", "x0")
    return dict(zip((*names, "mean_grad_x", "mean_grad_output"), (*given, *drawn, *pulled, mean, *back), strict=True))


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(found[name], value), name


@needs_native
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(every_result((3, 2, 19001), 7.5, dtype))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@needs_native
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_give_the_same_bits(
    guidance_scale: float, dtype: torch.dtype, instruction_sets: list[str]
) -> None:
    found = []
    for name in instruction_sets:
        native.limit_instruction_set(name)
        assert native.instruction_set() == name
        found.append(every_result((2, 3, 2741), guidance_scale, dtype))
        found[-1]["normal"] = philox.normal(Draw(torch.tensor([3, -4]), 5003))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@needs_native
@pytest.mark.usefixtures("threads", "cached_traffic")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("shape", [(2, 16), (3, 1, 272), (2, 2, 8208), (3, 2, 12000)])
def test_past_the_cache_go_the_same_bits(
    shape: tuple[int, ...], guidance_scale: float, count: int, instruction_sets: list[str]
) -> None:
    """Of float32 rows that are whole cache lines: no others are written past the cache."""
    torch.set_num_threads(count)
    for name in instruction_sets:
        native.limit_instruction_set(name)
        native.limit_cached_traffic(2**62)
        cached = every_result(shape, guidance_scale, torch.float32)
        native.limit_cached_traffic(0)
        streamed = every_result(shape, guidance_scale, torch.float32)
        assert all(t.data_ptr() % 64 == 0 and t[0].numel() % 16 == 0 for t in streamed.values() if t.ndim > 1)
        assert_same_bits(streamed, cached)


@needs_native
@pytest.mark.usefixtures("cached_traffic")
def test_only_whole_lines_are_written_past_the_cache() -> None:
    """Destinations at every offset to a cache line keep their neighbors, whatever the length of a row."""
    mean = native.function("sqdf_fast_posterior_mean_forward", "pipiplpdllpii", "i")
    table, index = torch.tensor([[2.0, 3.0]]), torch.zeros(2, dtype=torch.int64)
    native.limit_cached_traffic(0)
    for numel in (1, 15, 16, 64, 100, 272, 8208):
        x, output = torch.randn(2, 2, numel).unbind()
        inputs = x.data_ptr(), 0, output.data_ptr(), 0, table.data_ptr(), 1, index.data_ptr(), 1.0, 2, numel
        for offset in (0, 1, 4, 8, 16):
            found = torch.full((2 * numel + 48,), 7.0)
            assert mean(*inputs, found.data_ptr() + 4 * offset, 0, 1) == 0
            expected = torch.full_like(found, 7.0)
            expected[offset : offset + 2 * numel] = (2 * x + 3 * output).flatten()
            assert torch.equal(found, expected), (numel, offset)


@needs_native
@pytest.mark.parametrize("numel", [1, 127, 511, 512, 513, 8191, 8192, 8193, 2 * 8192 + 5])
def test_rows_of_every_length_are_walked_to_their_end(numel: int) -> None:
    """Elementwise results are those of a longer row; the KL is the sum over exactly this row."""
    table, index = torch.tensor([[0.9, -0.3, 0.2]]), torch.zeros(2, dtype=torch.int64)
    x, noise, grad = torch.randn(3, 2, 20000).unbind()
    policy, reference = torch.randn(2, 4, 20000).unbind()
    seed, grad_kl = torch.tensor([8, 9]), torch.zeros(2)

    def results(n: int) -> tuple[Tensor, ...]:
        cut = [tensor[:, :n].contiguous() for tensor in (x, policy, reference)]
        x_prev, _, delta = denoise_step.forward(*cut, table, index, 3.0, noise[:, :n], None, 1.0, True)
        drawn, _, _ = denoise_step.forward(*cut, table, index, 3.0, None, seed, 1.0, True)
        pulled = denoise_step.backward(grad[:, :n], grad_kl, delta, table, index, 3.0, 1.0, *DTYPES[:2])
        mean = posterior_mean.forward(cut[0], cut[1], table[:, :2], index, 3.0, torch.float32)
        back = posterior_mean.backward(grad[:, :n], table[:, :2], index, 3.0, *DTYPES[:2])
        return x_prev, delta, drawn, *pulled, mean, *back

    for cut, whole in zip(results(numel), results(20000), strict=True):
        assert torch.isfinite(whole).all()
        assert torch.equal(cut, whole[:, :numel])
    _, kl, delta = denoise_step.forward(
        x[:, :numel], policy[:, :numel], reference[:, :numel], table, index, 3.0, noise[:, :numel], None, 1.0, True
    )
    weight = (table.double()[0, 1] / table.double()[0, 2]).square()
    torch.testing.assert_close(kl.double(), weight * delta.double().square().mean(1), rtol=1e-6, atol=0)


@needs_native
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_a_sample_is_the_same_alone_and_among_others(guidance_scale: float) -> None:
    shape = (3, 16411)
    together, alone = (
        every_result((5, *shape), guidance_scale, DTYPES[0]),
        every_result((1, *shape), guidance_scale, DTYPES[0]),
    )
    for name, value in alone.items():
        whole = together[name]
        rows = torch.stack([whole[0], whole[5]]) if len(value) == 2 else whole[:1]
        assert torch.equal(rows, value), name


def all_floats_near_halves(dtype: torch.dtype) -> Tensor:
    """Every value of `dtype`, the ties between neighbors, and the floats right beside both."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = values[values.isfinite()].sort().values
    ties = (finite[1:].double() + finite[:-1].double()).div(2).float()
    exact = torch.cat([values, ties, torch.tensor([65519.996, 65520.0, 65536.0, 3.4e38, 1e-45])])
    infinity = torch.tensor(torch.inf)
    return torch.cat([exact, exact.nextafter(infinity), exact.nextafter(-infinity)])


def identity(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` through an op that multiplies by one."""
    table, index = torch.tensor([[1.0, 0.0]]), torch.zeros(1, dtype=torch.int64)
    return posterior_mean.forward(values[None], values[None], table, index, 1.0, dtype)[0]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_halves_are_rounded_to_the_nearest_and_ties_to_even(dtype: torch.dtype, instruction_sets: list[str]) -> None:
    values = all_floats_near_halves(dtype)
    expected = values.to(dtype)
    assert expected.isinf().any()
    assert expected.isnan().any()
    for name in instruction_sets:
        native.limit_instruction_set(name)
        found = identity(values, dtype)
        assert torch.equal(found.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(found.view(torch.int16)[number], expected.view(torch.int16)[number])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_half_is_read_exactly(dtype: torch.dtype, instruction_sets: list[str]) -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for name in instruction_sets:
        native.limit_instruction_set(name)
        torch.testing.assert_close(identity(halves, torch.float32), halves.float(), rtol=0, atol=0, equal_nan=True)


@needs_native
def test_an_output_of_several_huge_pages_is_written_whole() -> None:
    values = torch.randn(1_500_001)
    assert torch.equal(identity(values, torch.float32), values)
    assert torch.equal(identity(values.bfloat16(), torch.bfloat16), values.bfloat16())


@needs_native
@pytest.mark.usefixtures("cached_traffic")
@pytest.mark.parametrize("traffic", [0, 2**62])
def test_what_is_not_needed_is_empty_and_changes_nothing_else(traffic: int) -> None:
    native.limit_cached_traffic(traffic)
    x, noise, grad = torch.randn(3, 2, 720).unbind()
    policy, reference = torch.randn(2, 4, 720).unbind()
    table, index = torch.tensor([[0.9, -0.3, 0.2]]), torch.zeros(2, dtype=torch.int64)
    x_prev, kl, delta = denoise_step.forward(x, policy, reference, table, index, 3.0, noise, None, 1.0, True)
    half = policy.half()
    *same, nothing = denoise_step.forward(x, policy, reference, table, index, 3.0, noise, None, 1.0, False)
    assert (torch.equal(same[0], x_prev), torch.equal(same[1], kl), nothing.shape) == (True, True, (0,))
    *_, nothing = denoise_step.forward(x, half, reference, table, index, 3.0, noise, None, 1.0, False)
    assert nothing.dtype == torch.float16

    settings, full, half = (table, index, 3.0, 1.0), torch.float32, torch.bfloat16
    both = denoise_step.backward(grad, torch.ones(2), delta, *settings, full, half)
    only_x = denoise_step.backward(grad, torch.ones(2), delta.new_empty(0), *settings, full, None)
    only_policy = denoise_step.backward(grad, torch.ones(2), delta, *settings, None, half)
    settings = (table[:, :2], index, 3.0)
    mean_both = posterior_mean.backward(grad, *settings, full, half)
    mean_x = posterior_mean.backward(grad, *settings, full, None)
    mean_output = posterior_mean.backward(grad, *settings, None, half)
    for (first, second), x_alone, second_alone in ((both, only_x, only_policy), (mean_both, mean_x, mean_output)):
        assert (first.dtype, second.dtype, second.shape) == (torch.float32, torch.bfloat16, (4, 720))
        assert torch.equal(x_alone[0], first)
        assert (x_alone[1].shape, x_alone[1].dtype) == ((0,), grad.dtype)
        assert torch.equal(second_alone[1], second)
        assert second_alone[0].shape == (0,)


@needs_native
def test_a_row_without_the_network_does_not_read_it() -> None:
    table, index = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 1])
    x, output = torch.ones(2, 600), torch.ones(4, 600)
    output[0], output[2] = torch.nan, torch.inf
    x0 = posterior_mean.forward(x, output, table, index, 7.5, torch.float32)
    assert torch.equal(x0, torch.tensor([2.0, 4.0])[:, None].expand(2, 600))
    grad = torch.tensor([torch.inf, 1.0])[:, None].expand(2, 600)
    _, grad_output = posterior_mean.backward(grad, table, index, 7.5, torch.float32, torch.float32)
    assert torch.equal(grad_output, torch.tensor([0.0, -19.5, 0.0, 22.5])[:, None].expand(4, 600))


@needs_native
def test_a_row_without_noise_has_a_gradient_where_the_kl_is_not_part_of_the_loss() -> None:
    table, index = torch.tensor([[0.5, 2.0, 0.0]]), torch.zeros(2, dtype=torch.int64)
    grad, delta, grad_kl = torch.ones(2, 300), torch.ones(2, 300), torch.tensor([0.0, 1.0])
    settings = (table, index, 1.0, 1.0, torch.float32, torch.float32)
    grad_x, grad_policy = denoise_step.backward(grad, grad_kl, delta, *settings)
    assert torch.equal(grad_x, torch.full((2, 300), 0.5))
    assert torch.equal(grad_policy, torch.tensor([2.0, torch.inf])[:, None].expand(2, 300))


@needs_native
def test_results_are_plainly_contiguous_where_an_input_has_odd_strides() -> None:
    x = torch.randn(2, 1, 6, 5).as_strided((2, 1, 6, 5), (30, 1, 5, 1))
    assert x.is_contiguous()
    table, index = torch.rand(1, 3), torch.zeros(2, dtype=torch.int64)
    x_prev, _, delta = denoise_step.forward(x, x, x, table, index, 1.0, x, None, 1.0, True)
    grads = denoise_step.backward(x, torch.ones(2), x, table, index, 1.0, 1.0, *DTYPES[:2])
    x0 = posterior_mean.forward(x, x, table[:, :2], index, 1.0, torch.float16)
    mean_grads = posterior_mean.backward(x, table[:, :2], index, 1.0, *DTYPES[:2])
    for result in (x_prev, delta, *grads, x0, *mean_grads):
        assert result.stride() == (30, 30, 5, 1)


@needs_native
def test_results_are_on_the_device_of_the_inputs_and_not_on_the_default_one() -> None:
    x, index = torch.ones(2, 300), torch.zeros(2, dtype=torch.int64)
    table, dtypes = torch.tensor([[2.0, 3.0, 1.0]]), (torch.float32, torch.bfloat16)
    with torch.device("meta"):
        results = [philox.words(Draw(index, 300)), philox.normal(Draw(index, 300))]
        results += denoise_step.forward(x, x, x, table, index, 1.0, x, None, 1.0, True)
        results += denoise_step.forward(x, x, x, table, index, 1.0, None, index, 1.0, False)
        results += denoise_step.backward(x, x[:, 0], x, table, index, 1.0, 1.0, *dtypes)
        results += denoise_step.backward(x, x[:, 0], x, table, index, 1.0, 1.0, None, None)
        results += [posterior_mean.forward(x, x, table[:, :2], index, 1.0, torch.float16)]
        results += posterior_mean.backward(x, table[:, :2], index, 1.0, *dtypes)
        loss = discounted_loss(x, x, index[:, None].expand(2, 300), gamma=0.5, alpha=0.25)
        assert torch.empty(1).device.type == "meta"
    assert {result.device.type for result in (*results, loss)} == {"cpu"}
    assert (loss.item(), results[2].unique().item()) == (-0.75, 6.0)


@needs_native
def test_strided_inputs_and_a_double_table_give_the_same_bits() -> None:
    wide, table = torch.randn(2, 5, 400).transpose(1, 2), torch.rand(4, 3, dtype=torch.float64)
    policy, reference = torch.randn(2, 2, 800, 5).unbind()
    index, seed = torch.tensor([1, 2, 3, 0])[::2], torch.tensor([1, 2, 3, 4])[::2]
    policy, reference = policy[:, ::2], reference[:, ::2]
    strided = denoise_step.forward(wide, policy, reference, table, index, 1.0, None, seed, 1.0, True)
    plain = denoise_step.forward(
        *(t.clone(memory_format=torch.contiguous_format) for t in (wide, policy, reference)),
        table.float(),
        index.clone(),
        1.0,
        None,
        seed.clone(),
        1.0,
        True,
    )
    for found, expected in zip(strided, plain, strict=True):
        assert found.is_contiguous()
        assert torch.equal(found, expected)


@needs_native
def test_an_index_is_read_as_pytorch_reads_it() -> None:
    table, x = torch.tensor([[1.0, 0.0], [5.0, 0.0]]), torch.ones(2, 3)
    x0 = posterior_mean.forward(x, x, table, torch.tensor([-2, -1]), 1.0, torch.float32)
    assert torch.equal(x0, torch.tensor([[1.0], [5.0]]).expand(2, 3))
    for outside in (2, -3, 2**62):
        index = torch.tensor([0, outside])
        with pytest.raises(IndexError, match="2 steps"):
            posterior_mean.forward(x, x, table, index, 1.0, torch.float32)
        with pytest.raises(IndexError, match="2 steps"):
            posterior_mean.backward(x, table, index, 1.0, torch.float32, torch.float32)
        rows = torch.rand(2, 3)
        with pytest.raises(IndexError, match="2 steps"):
            denoise_step.forward(x, x, x, rows, index, 1.0, x, None, 1.0, True)
        with pytest.raises(IndexError, match="2 steps"):
            denoise_step.backward(x, x[:, 0], x, rows, index, 1.0, 1.0, torch.float32, torch.float32)


@needs_native
def test_a_dtype_that_the_library_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match=r"float8_e5m2.*impl='reference'"):
        identity(torch.ones(3), torch.float8_e5m2)


@needs_native
@pytest.mark.parametrize("op", ["denoise_step", "posterior_mean"])
def test_what_the_ops_cannot_run_has_a_reason(op: str) -> None:
    unavailable = module(op, "native").unavailable
    assert unavailable(torch.device("cpu"), torch.float32) is None
    assert "reference" in unavailable(torch.device("cpu"), torch.float64)
    assert "CPU" in unavailable(torch.device("cuda"), torch.float32)
