"""Second-order optimizers for fastai: AdaHessian, Sophia and Hessian-free behind one argument of the Learner

Modules:

- `adahessian_fastai.adahessian`: Momentum divided by a moving average of the Hessian's diagonal, as `opt_func` of a `Learner`
- `adahessian_fastai.averaging`: Smoothing a noisy diagonal over kernels of a convolution, rows or blocks of a matrix, blocks of anything
- `adahessian_fastai.batch`: What "the loss of this batch" means: the one definition that optimizers and diagnostics ask
- `adahessian_fastai.cg`: Solve with a curvature product: preconditioned CG, when to stop, line search, damping
- `adahessian_fastai.compare`: Train the same problem with several optimizers and see what each reaches, how fast, and in how much memory
- `adahessian_fastai.curvature`: Which matrix, which way to its products, and which networks allow it
- `adahessian_fastai.diagnostics`: Curvature of any Learner: products, and a callback that watches a training run
- `adahessian_fastai.estimators`: How a diagonal is estimated: random probes, a control variate, sampled labels
- `adahessian_fastai.ggn`: Products of a vector with the generalized Gauss-Newton matrix, with everything cached that can be
- `adahessian_fastai.hessian_free`: `opt_func=hessian_free`: Newton-type steps by conjugate gradients, for full batches and large ones
- `adahessian_fastai.hutchinson`: The diagonal and the trace of a matrix from a few products with random vectors
- `adahessian_fastai.hvp`: Products of a vector with the Hessian of a loss, and a look at the graph they come from
- `adahessian_fastai.learner`: The one place where fastai's training loop learns about curvature
- `adahessian_fastai.losses`: One table of losses whose Hessian at the outputs is known, with its products and its noise
- `adahessian_fastai.optimizer`: Obtains the curvature that steppers ask for: the conductor of problem, estimator, schedule and steps
- `adahessian_fastai.problem`: A loss as a function of parameters, for estimators, solvers and line searches
- `adahessian_fastai.replay`: Evaluate a module again and leave no trace of it
- `adahessian_fastai.sassha`: Sharpness-aware AdaHessian: curvature and gradient are taken uphill
- `adahessian_fastai.schedule`: When an estimate is taken, and on how much of the batch
- `adahessian_fastai.sophia`: Momentum divided by a rarely estimated diagonal, with every entry of the step clipped at the learning rate
- `adahessian_fastai.spectrum`: The Hessian written out, its extreme eigenvalues, trace and spectral density, all from products
- `adahessian_fastai.stability`: How large a learning rate may be for the optimizer at hand, and a table of the curvature of each layer
- `adahessian_fastai.steppers`: What an optimizer does with an estimated diagonal, as fastai stats and steppers
- `adahessian_fastai.toys`: Two dimensions, a known answer and a picture: Rosenbrock, Rastrigin and quadratics
- `adahessian_fastai.translation`: English to German with 29 000 pairs, small enough for one processor"""

__version__ = "0.0.1"
