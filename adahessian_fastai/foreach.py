"Moved to `steppers`"
from ._moved import moved

__getattr__ = moved(__name__, portions='steppers.portions', foreach_step='steppers.foreach_step', loop_step='steppers.loop_step',
    update='steppers.update', cpu_portion='steppers.cpu_portion')
