"""All families of the matrix, in the order of the table."""

from __future__ import annotations

from tests.architectures import decoders, encoders, experts, recurrent, vision, vision_language

FAMILIES = (
    *decoders.FAMILIES,
    *experts.FAMILIES,
    *recurrent.FAMILIES,
    *encoders.FAMILIES,
    *vision.FAMILIES,
    *vision_language.FAMILIES,
)
BY_NAME = {family.name: family for family in FAMILIES}
