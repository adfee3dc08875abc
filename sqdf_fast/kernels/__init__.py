"""Fused ops: one folder per op, every implementation side by side, one public function each.

The ops are in the folder kernels/ of the repository, which a wheel installs here. It has no `__init__.py`: Python
started in the checkout must not take it for the `kernels` distribution, which other libraries look for.
"""

from __future__ import annotations

from pathlib import Path

_CHECKOUT = Path(__file__).parents[2]
if (_CHECKOUT / "CMakeLists.txt").is_file():  # a checkout, installed in editable mode or not at all
    __path__.append(str(_CHECKOUT / "kernels"))

from sqdf_fast.kernels.denoise_step import denoise_step, denoise_step_staged, denoise_step_vjp
from sqdf_fast.kernels.discounted_loss import discounted_loss
from sqdf_fast.kernels.philox import philox_normal
from sqdf_fast.kernels.posterior_mean import posterior_mean, posterior_mean_vjp

__all__ = [
    "denoise_step",
    "denoise_step_staged",
    "denoise_step_vjp",
    "discounted_loss",
    "philox_normal",
    "posterior_mean",
    "posterior_mean_vjp",
]
