"""Bytes that an op has to move: every streamed input read once, every streamed output written once.

With N elements in x and e bytes an element:

    denoise_step    forward   reads x, policy (2N), reference (2N), noise if given; writes x_prev, delta
                    backward  reads d x_prev, delta; writes d x, d policy (2N)
    posterior_mean  forward   reads x, model_output (2N); writes x0
                    backward  reads d x0; writes d x, d model_output (2N)
    philox          forward   writes the noise
    both            forward + backward

delta = m - m_ref is what the forward leaves to the backward: whoever runs the two as two passes moves it twice.
Per-sample numbers (coefficients, KL, seeds) are left out: a few bytes a sample. discounted_loss has nothing else,
so its bytes are not counted: it is a matter of launches.
"""

from __future__ import annotations

from fused_ops.cases import Problem

_TENSORS = {
    ("denoise_step", "forward"): 7,
    ("denoise_step", "backward"): 5,
    ("posterior_mean", "forward"): 4,
    ("posterior_mean", "backward"): 4,
    ("philox", "forward"): 1,
    ("philox", "backward"): 0,
    ("discounted_loss", "forward"): 0,
    ("discounted_loss", "backward"): 0,
}


def tensors_moved(problem: Problem, direction: str) -> int:
    """How many times N elements are read or written."""
    if direction == "both":
        return tensors_moved(problem, "forward") + tensors_moved(problem, "backward")
    noise = 1 if problem.noise == "given" and direction == "forward" else 0
    return _TENSORS[problem.op, direction] + noise


def bytes_moved(problem: Problem, direction: str) -> int:
    """Bytes read and written; 0 for an op that streams nothing."""
    return tensors_moved(problem, direction) * problem.elements * problem.dtype.itemsize


def formula(problem: Problem, direction: str) -> str:
    """The count as the report shows it."""
    return f"{tensors_moved(problem, direction)} N e, N = {problem.elements}, e = {problem.dtype.itemsize}"
