"Moved to `cg`"
from ._moved import moved

__getattr__ = moved(__name__, Solution='cg.Solution', solve='cg.solve')
