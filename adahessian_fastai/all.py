"Everything a notebook needs: `from adahessian_fastai.all import *`. What only other modules need is left in its own"
from .hvp import difference_product,flat,gradient,graph_product,hessian_product,hvp_methods,unflat  # chkstyle: ignore
from .hutchinson import *
from .averaging import *
from .spectrum import *
from .cg import *
from .toys import *
from .ggn import best_jvp,dual_jvp,fisher_diagonal,fresh_ggn_product,ggn_product,linear_jvp,loss_hessian,model_forward,reverse_jvp  # chkstyle: ignore
from .losses import Rule,gnb_samples,known_hessian,label_noise,losses  # chkstyle: ignore
from .estimators import Evaluation,curvatures,estimators  # chkstyle: ignore
from .learner import twice_differentiable  # chkstyle: ignore
from .steppers import *
from .adahessian import AdaHessian,AdaHessianWrapper,adahessian  # chkstyle: ignore
from .hessian_free import HessianFree,hessian_free  # chkstyle: ignore
from .sophia import *
from .diagnostics import CurvatureRecorder,SuggestedLR,curvature_stats,overestimate,own_diagonal,plot_noise  # chkstyle: ignore
from .compare import compare_optimizers,comparison_table,plot_comparison  # chkstyle: ignore
