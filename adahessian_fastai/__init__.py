"""Second-order optimizers for fastai: AdaHessian, Sophia and Hessian-free behind one argument of the Learner

Modules:

- `adahessian_fastai.cg`: Solve with a curvature product: preconditioned CG, its stopping rules, backtracking, line search, damping
- `adahessian_fastai.ggn`: Products of a vector with the generalized Gauss-Newton matrix, with everything cached that does not depend on the vector
- `adahessian_fastai.hessian_free`: `opt_func=hessian_free`: Newton-type steps by conjugate gradients, for full batches and large ones"""

__version__ = "0.0.1"
