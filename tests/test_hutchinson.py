"Hutchinson's estimators against the dense Hessian, in float64"
import math

import pytest,torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call,hessian
from torch.nn.attention import SDPBackend,sdpa_kernel
from adahessian_fastai.averaging import average_diag
from adahessian_fastai.hutchinson import gaussian_like,hutchinson_diag,hutchinson_samples,hutchinson_trace,rademacher_like
from adahessian_fastai.hvp import gradient,graph_product,hessian_product

ROUNDING = 1e-10     # relative, for sums of some hundred products in float64
N_PROBES = 4000      # the standard error of a mean is then 1.6% of a single probe's standard deviation
N_SIGMA = 5          # false alarm of one entry among thousands: below 1e-3


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.att,self.out = nn.MultiheadAttention(4, 2, batch_first=True),nn.Linear(4,2)
    def forward(self, x): return self.out(self.att(x,x,x, need_weights=False)[0].mean(1))


def problems():
    "name -> (model, input, target) with a few dozen parameters each"
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(4,5), nn.Tanh(), nn.Linear(5,3))
    conv = nn.Sequential(nn.Conv2d(1,2,3), nn.GELU(), nn.Flatten(), nn.Linear(8,3))
    return dict(mlp=(mlp, torch.randn(6,4)), conv=(conv, torch.randn(6,1,4,4)), attention=(Attention(), torch.randn(3,4,4)))


def loss_and_dense(name):
    model,x = problems()[name]
    model,x = model.double(),x.double()
    y = torch.arange(len(x))%2
    names,params = zip(*model.named_parameters())
    sizes,shapes = [p.numel() for p in params],[p.shape for p in params]
    def flat_loss(v):
        ps = {n: o.view(s) for n,o,s in zip(names, v.split(sizes), shapes)}
        return F.cross_entropy(functional_call(model, ps, (x,)), y)
    with sdpa_kernel(SDPBackend.MATH): H = hessian(flat_loss)(torch.cat([p.detach().flatten() for p in params]))
    def loss():
        with sdpa_kernel(SDPBackend.MATH): return F.cross_entropy(model(x), y)
    return loss,list(params),H


def flat(ts): return torch.cat([t.flatten() for t in ts])

@pytest.fixture(params=['mlp','conv','attention'])
def problem(request): return loss_and_dense(request.param)


def test_products_equal_the_dense_hessian(problem):
    loss,params,H = problem
    product = hessian_product(loss, params)
    for seed in range(3):
        v = [torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype) for p in params]
        assert torch.allclose(flat(product(v)), H@flat(v), rtol=ROUNDING, atol=ROUNDING)


def test_graph_product_is_the_same_code(problem):
    loss,params,H = problem
    v = [torch.randn_like(p) for p in params]
    on_graph = graph_product(gradient(loss(), params, create_graph=True), params)
    for a,b in zip(on_graph(v), hessian_product(loss, params)(v)): assert torch.equal(a,b)


@pytest.mark.parametrize('probe', ['rademacher','gaussian'])
def test_diagonal_converges_within_its_standard_error(problem, probe):
    loss,params,H = problem
    product = graph_product(gradient(loss(), params, create_graph=True), params)
    g = torch.Generator().manual_seed(1)
    samples = torch.stack([flat(s) for s in hutchinson_samples(product, params, N_PROBES, probe, g)])
    err = samples.std(0)/math.sqrt(N_PROBES)
    off = (samples.mean(0)-H.diag()).abs()
    assert (off<=N_SIGMA*err+ROUNDING).all()
    assert off.norm()/H.diag().norm()<0.2
    spread = H.square().sum(1)-H.diag().square() if probe=='rademacher' else H.square().sum(1)+H.diag().square()
    assert torch.allclose(samples.var(0), spread, rtol=0.3, atol=1e-6)   # var of a var over 4000 probes: some percent


def test_trace_and_its_error(problem):
    loss,params,H = problem
    product = graph_product(gradient(loss(), params, create_graph=True), params)
    tr,err = hutchinson_trace(product, params, 1000, generator=torch.Generator().manual_seed(2))
    assert abs(tr-H.trace())<N_SIGMA*err
    assert err==pytest.approx(math.sqrt(2*(H.square().sum()-H.diag().square().sum())/1000), rel=0.15)
    assert hutchinson_trace(product, params, 1)[1]==math.inf


@pytest.mark.parametrize('seed', range(5))
def test_one_rademacher_probe_is_exact_on_a_diagonal_hessian(seed):
    p = torch.randn(50, dtype=torch.double, requires_grad=True)
    product = hessian_product(lambda: (p**4).sum()-(p**3).sum(), [p])
    est, = hutchinson_diag(product, [p], generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(est, (12*p**2-6*p).detach(), rtol=ROUNDING)


def test_both_signs_occur_and_no_row_sums():
    "A probe stuck at one sign would return row sums: all 0 here, where the diagonal is 1"
    H = torch.eye(10).double() - torch.ones(10,10).double()/10
    est, = hutchinson_diag(lambda v: [H@v[0]], [torch.zeros(10).double()], 4000, generator=torch.Generator().manual_seed(0))
    assert (est-0.9).abs().max()<0.05
    for f in (rademacher_like,gaussian_like):
        z = f(torch.zeros(10000), torch.Generator().manual_seed(0))
        assert 4700<(z>0).sum()<5300 and abs(z.var()-1)<0.06   # 6 and 4 standard deviations


def test_equal_shapes_get_different_probes():
    "L = a·b has a zero diagonal; the same probe for both would estimate 1"
    a,b = (torch.ones(1, requires_grad=True) for _ in range(2))
    ests = [flat(hutchinson_diag(hessian_product(lambda: (a*b).sum(), [a,b]), [a,b])) for _ in range(64)]
    assert {e[0].item() for e in ests}=={-1.,1.}


SHAPES = [(), (7,), (10,10), (3,5), (33,1), (2,1,3), (4,1,3,3), (2,3,1,1), (2,3,2,2,2), (0,3)]

@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('block_length', [1,4,32,1000])
def test_averages_keep_shape_and_mean(shape, block_length):
    d = torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    for signed in (False,True):
        res = average_diag(d, block_length, signed)
        want = d if signed or d.ndim<2 else d.abs()
        assert res.shape==d.shape and torch.allclose(res.sum(), want.sum())
        if d.ndim==2 and d.numel() and block_length>1:
            blocks = res.flatten().split(block_length)
            assert all((b==b[0]).all() for b in blocks)
            assert all(torch.isclose(b[0],w.mean()) for b,w in zip(blocks, want.flatten().split(block_length)))
