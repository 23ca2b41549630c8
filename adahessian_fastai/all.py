"Everything a notebook needs: `from adahessian_fastai.all import *`. What the rooms need of each other only is left in them"
from .hvp import difference_product,flat,gradient,graph_product,hessian_product,hvp_methods,unflat  # chkstyle: ignore
from .hutchinson import *
from .averaging import *
from .spectrum import *
from .cg import *
from .toys import *
from .ggn import *
from .inverse import *
from .gnb import *
from .estimators import Evaluation,curvatures,estimators  # chkstyle: ignore
from .learner import twice_differentiable  # chkstyle: ignore
from .steppers import *
from .adahessian import AdaHessian,AdaHessianWrapper,adahessian  # chkstyle: ignore
from .hessian_free import *
from .sophia import *
from .diagnostics import *
from .compare import compare_optimizers,comparison_table,plot_comparison  # chkstyle: ignore
