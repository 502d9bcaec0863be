"""Checkpoints of the DiT family's code bases: one row of data per family, used to read and to write."""

from .diffusers_dit import DIFFUSERS
from .dit import DIT
from .family import Family
from .lightningdit import LIGHTNINGDIT
from .repa import REPA
from .sit import SIT


# In the order in which a checkpoint is compared with them: the most specific marks first, the family without any last.
FAMILIES: dict[str, Family] = {family.name: family for family in (DIFFUSERS, REPA, LIGHTNINGDIT, SIT, DIT)}
