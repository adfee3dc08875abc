"""The Triton implementations: their tests in the interpreter, their noise, and what holds without Triton."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.kernel_targets import INTERPRETED, OPS, slow_interpreted, targets

from sqdf_fast.kernels import denoise_step, discounted_loss, philox_normal
from sqdf_fast.kernels import triton as shared
from sqdf_fast.kernels.philox import philox_uint32
from sqdf_fast.kernels.philox.reference import philox_4x32

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def python(*arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("which", "least"), [("not slow", 240), pytest.param("slow", 40, marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_the_tests_of_every_implementation_pass_in_the_interpreter(which, least):
    """A process of its own, since Triton decides when a kernel is decorated whether it is interpreted."""
    if INTERPRETED:
        return  # this is that process
    files = [str(HERE / f"test_{name}.py") for name in (*OPS, "op", "triton")]
    arguments = "-q", "-p", "no:cacheprovider", "-k", "triton-cpu", "-m", which
    done = python("-m", "pytest", *arguments, *files, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (passed,) = re.findall(r"^(\d+) passed, \d+ deselected[^\n]* in ", done.stdout, re.MULTILINE)
    assert int(passed) >= least


@pytest.mark.parametrize("numel", [1, 127, 1024, pytest.param(16384 + 3, marks=slow_interpreted)])
def test_noise_equals_the_reference(target, numel):
    seed = torch.tensor([7, -(2**63), 2**62 + 12345])
    words = philox_uint32(seed.to(target.device), numel, impl=target.impl).cpu()
    assert torch.equal(words, philox_uint32(seed, numel, impl="reference"))
    normals = philox_normal(seed.to(target.device), (numel,), impl=target.impl).cpu()
    assert (normals - philox_normal(seed, (numel,), impl="reference")).abs().max() <= 2e-6


def test_no_noise_for_no_samples_or_elements(target):
    seed = torch.tensor([1, 2], device=target.device)
    assert philox_normal(seed[:0], (4,), impl=target.impl).shape == (0, 4)
    assert philox_normal(seed, (0,), impl=target.impl).shape == (2, 0)


def test_bits_do_not_depend_on_where_a_tensor_starts(target):
    generator = torch.Generator().manual_seed(0)
    x, policy, reference = (torch.randn(2, 4096, generator=generator) for _ in range(3))
    table, seed = torch.tensor([[1.02, -0.031, 0.17]]), torch.tensor([3, 4])
    rest = table, torch.zeros(2, dtype=torch.int64)

    def shifted(t):
        memory = torch.empty(t.numel() + 1, device=target.device)
        memory[1:] = t.flatten()
        return memory[1:].view_as(t)

    found = [
        denoise_step(
            *(place(t) for t in (x, policy, reference)),
            *(t.to(target.device) for t in rest),
            seed=seed.to(target.device),
            impl=target.impl,
        )
        for place in (lambda t: t.to(target.device), shifted)
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("mask", [False, True])
def test_loss_over_more_terms_than_a_block(target, mask):
    generator = torch.Generator().manual_seed(0)
    reward, kl = torch.randn(3, 211, generator=generator), torch.rand(3, 211, generator=generator)
    remaining = torch.randint(0, 999, (3, 211), generator=generator)
    settings = {"gamma": 0.997, "alpha": 2.0, "mask_nonpositive": mask}
    expected = discounted_loss(reward.double(), kl.double(), remaining, **settings, impl="reference")
    terms = [t.to(target.device).requires_grad_(t.is_floating_point()) for t in (reward, kl, remaining)]
    loss = discounted_loss(*terms, **settings, impl=target.impl)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    counted = (reward > 0) if mask else torch.ones_like(reward, dtype=torch.bool)
    weight = torch.where(counted, 0.997 ** remaining.double(), 0.0)
    torch.testing.assert_close(terms[0].grad.cpu().double(), -weight / 633, rtol=2e-6, atol=0)
    torch.testing.assert_close(terms[1].grad.cpu(), counted * 2.0 / 633, rtol=2e-6, atol=0)


if any(target.impl == "triton" for target in targets()):
    # Kernels by themselves, where they can run at all: what an op shows only on tensors too large for a test.
    from sqdf_fast.kernels.denoise_step.triton import kl_kernel
    from sqdf_fast.kernels.philox.triton import word_pairs
    from sqdf_fast.kernels.triton import BLOCK, jit, tl

    @jit
    def last_words_kernel(seed, even, odd, i_piece, BLOCK: tl.constexpr):  # noqa: N803
        b_even, b_odd = word_pairs(tl.load(seed), tl.program_id(0) + i_piece, BLOCK)
        o_pair = tl.arange(0, BLOCK // 4)[:, None] * 2 + tl.arange(0, 2)
        tl.store(even + o_pair, b_even.to(tl.int32, bitcast=True))
        tl.store(odd + o_pair, b_odd.to(tl.int32, bitcast=True))

    triton_targets = pytest.mark.parametrize(
        "device", [target.device for target in targets() if target.impl == "triton"], ids="triton-{}".format
    )

    @triton_targets
    def test_counters_reach_the_end_of_the_largest_sample(device):
        seed = torch.tensor([-12345678901234567], device=device)
        even, odd = (torch.empty(BLOCK // 2, dtype=torch.int32, device=device) for _ in range(2))
        last_words_kernel[(1,)](seed, even, odd, 2**34 // BLOCK - 1, BLOCK)
        counter = torch.zeros(BLOCK // 4, 4, dtype=torch.int64)
        counter[:, 0] = torch.arange(2**32 - BLOCK // 4, 2**32)
        key = torch.stack([seed.cpu() & 0xFFFFFFFF, (seed.cpu() >> 32) & 0xFFFFFFFF], dim=-1)
        expected = philox_4x32(counter, key)
        found = torch.stack([even.view(-1, 2), odd.view(-1, 2)], dim=2).flatten(1).cpu().to(torch.int64) & 0xFFFFFFFF
        assert torch.equal(found, expected)

    @triton_targets
    @pytest.mark.parametrize("pieces", [1, 1024, 2500])
    def test_kl_sums_any_number_of_pieces(device, pieces):
        """2500 pieces are a sample of 2.5 million elements."""
        generator = torch.Generator().manual_seed(0)
        partial = torch.rand(2, pieces, generator=generator).to(device)
        table = torch.tensor([[1.0, 0.3, 0.2], [1.0, -0.5, 0.1]], device=device)
        index, kl = torch.tensor([1, 0], device=device), torch.empty(2, device=device)
        elements = pieces * BLOCK - 5
        kl_kernel[(2,)](partial, table, index, kl, 0.7, elements, pieces, len(table), *table.stride(), BLOCK)
        ratio = (table[index, 1] / table[index, 2]).double()
        expected = 0.7 * ratio**2 * partial.double().sum(1) / elements
        torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=0)


def test_why_triton_cannot_run(monkeypatch):
    cuda, half = torch.device("cuda"), torch.float32
    monkeypatch.setattr(shared, "_INTERPRETED", False)
    monkeypatch.setenv("CC", "cc")
    assert shared.unavailable(cuda, half) is None
    assert shared.unavailable(CPU, half) == "needs a CUDA device"
    assert shared.unavailable(cuda, torch.float64) == "float64 runs in the reference only"
    monkeypatch.setattr(shared, "_INTERPRETED", True)
    assert shared.unavailable(CPU, half) is None
    assert shared.unavailable(torch.device("meta"), half) == "needs a CUDA device"
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "install gcc or set CC" in shared.unavailable(cuda, half)
    monkeypatch.setattr(shared, "triton", None)
    assert "pip install 'sqdf-fast[cuda]'" in shared.unavailable(cuda, half)


@pytest.mark.slow
def test_importing_the_ops_imports_no_triton_kernel_and_their_modules_need_no_triton():
    program = f"""
import importlib, sys
import torch
import sqdf_fast.kernels
print([name for name in sys.modules if name.startswith("sqdf_fast") and ("triton" in name or "spec" in name)])
sys.modules["triton"] = None
for op in {OPS}:
    module = importlib.import_module(f"sqdf_fast.kernels.{{op}}.triton")
    print(module.unavailable(torch.device("cuda"), torch.float32))
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    missing = "triton is not installed: pip install 'sqdf-fast[cuda]'"
    assert done.stdout.splitlines() == ["[]", *[missing] * len(OPS)]
