"""What adamw_8bit declares. It runs on the CPU alone; bench/ measures it through the optimizers that call it."""

from __future__ import annotations

from sqdf_fast.kernels.spec import Spec

SPEC = Spec()
