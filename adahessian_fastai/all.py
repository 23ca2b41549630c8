"Everything a notebook needs: `from adahessian_fastai.all import *`"
from .hvp import *
from .hutchinson import *
from .averaging import *
from .spectrum import *
from .cg import *
from .toys import *
from .ggn import *
from .inverse import *
from .gnb import *
from .estimators import *
from .learner import *
from .steppers import *
from .adahessian import *
from .hessian_free import *
from .sophia import *
from .diagnostics import *
from .compare import compare_optimizers,comparison_table,plot_comparison  # chkstyle: ignore
