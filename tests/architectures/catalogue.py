"""All families of the matrix, in the order of the table."""

from __future__ import annotations

import sys

from tests.architectures import decoders, diffusion, encoders, experts, recurrent, vision, vision_language

FAMILIES = (
    *decoders.FAMILIES,
    *experts.FAMILIES,
    *recurrent.FAMILIES,
    *encoders.FAMILIES,
    *vision.FAMILIES,
    *vision_language.FAMILIES,
    *diffusion.FAMILIES,
)
BY_NAME = {family.name: family for family in FAMILIES}
# diffusers has no release for Python 3.10 that goes with huggingface-hub 2.
HERE = [family.name for family in FAMILIES if sys.version_info >= (3, 11) or family not in diffusion.FAMILIES]
