"Moved to `replay` and `batch`"
from ._moved import moved

__getattr__ = moved(__name__, forward_state='replay.snapshot', replaying='replay.restored', undisturbed='replay.preserving',
    noted='batch.noted', as_it_was='batch.batch_of')
