"Moved to `batch`"
from ._moved import moved

__getattr__ = moved(__name__, n_rows='batch.n_rows', take_rows='batch.take_rows')
