"Where the names of earlier modules live now; the old paths go with version 0.1"
import warnings
from importlib import import_module

def moved(
    module:str, # `__name__` of an earlier module
    **names # 'module.name' of today for each earlier name
): # A module's `__getattr__`
    "Look names up in their new places, with a word on where these are"
    def getattr_(name):
        if name not in names: raise AttributeError(f"module {module!r} has no attribute {name!r}")
        room,new = names[name].split('.')
        warnings.warn(f"`{module}.{name}` is `adahessian_fastai.{room}.{new}` now", DeprecationWarning, stacklevel=2)
        return getattr(import_module(f'adahessian_fastai.{room}'), new)
    return getattr_
