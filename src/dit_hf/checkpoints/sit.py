"""SiT (https://github.com/willisma/SiT): DiT's keys, trained as flow matching from noise at 0 to data at 1."""

from dataclasses import replace

from .dit import DIT


SIT = replace(DIT, name="sit", flow_matching=True, data_at_one=True)
