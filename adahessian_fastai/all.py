"Everything a notebook needs: `from adahessian_fastai.all import *`"
from .hvp import *
from .hutchinson import *
from .averaging import *
from .learner import *
from .steppers import *
from .adahessian import *
