"""Checkpoints of the DiT family's code bases: one row of data per family, used to read and to write."""

from .ddt import DDT
from .diffusers_dit import DIFFUSERS
from .dit import DIT
from .family import Family
from .jit import JIT
from .lightningdit import LIGHTNINGDIT
from .meanflow import MEANFLOW
from .rae import RAE, RAE_LIGHTNINGDIT
from .repa import REPA
from .repae import REPAE
from .sit import SIT
from .soflow import SOFLOW


# In the order in which a checkpoint is compared with them: the most specific marks first, the family without any last.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(DIFFUSERS, JIT, DDT, RAE, RAE_LIGHTNINGDIT),
        *(SOFLOW, MEANFLOW, REPAE, REPA, LIGHTNINGDIT, SIT, DIT),
    )
}
