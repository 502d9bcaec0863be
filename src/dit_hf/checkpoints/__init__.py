"""Checkpoints of the DiT family's code bases, in and out: one key table a family, used in both directions."""

from .diffusers_dit import DIFFUSERS
from .dit import DIT
from .family import Family
from .lightningdit import LIGHTNINGDIT
from .repa import REPA
from .sit import SIT


FAMILIES: dict[str, Family] = {family.name: family for family in (DIT, SIT, REPA, LIGHTNINGDIT, DIFFUSERS)}
