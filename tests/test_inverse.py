"Damped solves against dense linear algebra"
import pytest,torch
from torch import nn

from adahessian_fastai.hvp import hessian_product
from adahessian_fastai.inverse import *
from adahessian_fastai.hvp import flat
from adahessian_fastai.spectrum import dense_hessian,extreme_eigenvalues,hessian_times_gradient

TOL = 1e-10  # asked of conjugate gradients in float64; the solution is then good to TOL times the condition number

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    model,X,Y = nn.Sequential(nn.Linear(4,6), nn.Tanh(), nn.Linear(6,3)).double(),torch.randn(30,4).double(),torch.randint(0,3,(30,))
    loss,params = (lambda: nn.functional.cross_entropy(model(X), Y)),list(model.parameters())
    return loss,params,dense_hessian(loss, params)

def test_newton_step_of_a_network(net):
    loss,params,H = net
    _,g = hessian_times_gradient(loss, params)
    product = hessian_product(loss, params)
    lam = -extreme_eigenvalues(product, params, which='smallest', generator=torch.Generator().manual_seed(0)).values[0].item()
    assert lam > 0
    sol = solve(product, g, damping=lam+.1, tol=TOL, max_iter=500)
    exact = torch.linalg.solve(H+(lam+.1)*torch.eye(len(H)), flat(g))
    assert torch.allclose(flat(sol.x), exact, atol=1e-7) and sol.reason=='tolerance' and sol.residual <= 10*TOL
    assert [o.shape for o in sol.x]==[p.shape for p in params]

def test_negative_curvature_is_refused(net):
    loss,params,_ = net
    _,g = hessian_times_gradient(loss, params)
    with pytest.raises(ValueError, match='not positive definite, got damping=0.0'): solve(hessian_product(loss, params), g, max_iter=500)

def test_count_residual_and_cap():
    A,count = torch.diag(torch.logspace(-3, 0, 40, dtype=torch.double)),[0]
    def product(v):
        count[0] += 1
        return [A@v[0]]
    b = [torch.ones(40, dtype=torch.double)]
    sol = solve(product, b, max_iter=5)
    assert sol.reason=='max_iter' and sol.n_products==count[0]
    assert abs(sol.residual-(A@sol.x[0]-b[0]).norm()/b[0].norm()) < 1e-12 and sol.residual > 1e-3

def test_zero_right_hand_side():
    sol = solve(lambda v: v, [torch.zeros(3)])
    assert torch.equal(sol.x[0], torch.zeros(3)) and sol.residual==0
