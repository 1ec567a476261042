"""SeRpEnt's resampling: the banded integer clock, compression of a sequence to its emitted elements, and restoration.
`reference.py` is the PyTorch form in use; docs/serpent_layer.md says what it computes."""
from .reference import TICK_BITS, TICKS, banded_clock, compress, decompress, gaussian_mass

__all__ = ["TICK_BITS", "TICKS", "banded_clock", "compress", "decompress", "gaussian_mass"]
