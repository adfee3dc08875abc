"""Loaded first in the process that runs are forked from: libraries narrate their loading, users need their errors."""

from __future__ import annotations

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
