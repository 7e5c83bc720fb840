"""The flags of this workload, and what it trains without a configuration file: light, so that --help is quick."""

from __future__ import annotations

from trunkline.models.token_image.jit_flags import DEFAULTS, FLAGS

__all__ = ["DEFAULTS", "FLAGS"]
