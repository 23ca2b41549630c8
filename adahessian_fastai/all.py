"Everything a notebook needs: `from adahessian_fastai.all import *`. What only other modules need is left in its own"
from .hvp import check_symmetric,difference_error,difference_product,flat,gradient,graph_product,hessian_product  # chkstyle: ignore
from .hvp import hvp_methods,real_parameters,substituted,twice_differentiable,unflat  # chkstyle: ignore
from .hutchinson import *
from .averaging import average_diag,block_mean,check_block_length  # chkstyle: ignore
from .spectrum import *
from .cg import *
from .toys import *
from .ggn import best_jvp,dual_jvp,fisher_diagonal,fresh_ggn_product,ggn_product,linear_jvp  # chkstyle: ignore
from .ggn import loss_hessian,model_forward,reverse_jvp  # chkstyle: ignore
from .losses import Rule,gnb_samples,known_hessian,label_noise,losses  # chkstyle: ignore
from .problem import MeanProblem,Problem  # chkstyle: ignore
from .curvature import GaussNewton,Hessian  # chkstyle: ignore
from .estimators import ControlVariate,Estimate,GNB,Given,Hutchinson,Preconditioner  # chkstyle: ignore
from .batch import Batches,LearnerProblem  # chkstyle: ignore
from .schedule import Budget,Every  # chkstyle: ignore
from .steppers import Perturbation,adahessian_step,average_diag_hessian,average_sqr_diag_hessian,denominator  # chkstyle: ignore
from .steppers import perturbed,sophia_step  # chkstyle: ignore
from .optimizer import CurvatureOptimizer  # chkstyle: ignore
from .adahessian import AdaHessian,AdaHessianWrapper,adahessian,adahessian_paper  # chkstyle: ignore
from .sassha import m_sassha,sassha  # chkstyle: ignore
from .hessian_free import HessianFree,hessian_free  # chkstyle: ignore
from .sophia import Sophia,sophia,win_rate  # chkstyle: ignore
from .diagnostics import CurvatureRecorder,curvature_stats,edge_of_stability,overestimate,own_diagonal,plot_noise  # chkstyle: ignore
from .stability import Stability,trained_lr  # chkstyle: ignore
from .compare import compare_optimizers,comparison_table,plot_comparison  # chkstyle: ignore
from fastai.learner import Learner as _Learner
from ._help import add_all_notes as _add_all_notes

_add_all_notes(globals(), _Learner) # Help shows what stands beside each parameter
