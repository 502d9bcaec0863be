"""The commands of `dit-hf`, one module each; the scripts under `conversion/` and `examples/` call the same `main`. The
page's is `dit_hf.space.command`, which prepares the environment before torch is imported."""

# The package imports diffusers' models quietly; imported otherwise, the libraries they find installed warn of each
# other.
from .. import DiTClassCondPipeline as DiTClassCondPipeline
