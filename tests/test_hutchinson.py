"Hutchinson's estimators against the dense Hessian, in float64"
import math
from functools import partial

import pytest,torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call,hessian
from torch.nn.attention import SDPBackend,sdpa_kernel
from adahessian_fastai.averaging import average_all,average_diag,block_mean,check_block_length
from adahessian_fastai.diagnostics import ProbeStats
from adahessian_fastai.hutchinson import *
from adahessian_fastai.hvp import gradient,graph_product,hessian_product
from adahessian_fastai.problem import MeanProblem,Problem
from adahessian_fastai.spectrum import mean_product

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


def literal(d, shared):
    "Mean of |d| over all entries with the same number in `shared`, entry by entry"
    out,flat = torch.zeros_like(d),d.abs().flatten()
    for i,k in enumerate(shared): out.view(-1)[i] = flat[shared==k].mean()
    return out

VECTOR,MATRIX,CONV1,CONV2,CONV3 = (7,),(3,5),(2,3,4),(2,2,3,3),(2,1,2,2,2)
SHARED = [(MATRIX, 'row', 5), ((1,7), 'row', 7), ((4,1), 'row', 1), (MATRIX, 4, 4), (MATRIX, {2: 4}, 4), (MATRIX, {1: 2}, 32),
    (VECTOR, {1: 3}, 3), (VECTOR, {1: 'row'}, 7), (VECTOR, {1: 100}, 100), (CONV1, {3: 2}, 2), (CONV1, {3: 3}, 3), (CONV1, 'row', 4),
    (CONV1, {3: 'kernel'}, 4), (CONV2, {4: 3}, 3), (CONV2, {4: 9}, 9), (CONV2, {4: 18}, 18), (CONV2, {2: 'row'}, 9), (CONV3, {5: 8}, 8),
    (CONV3, {5: 'kernel'}, 8), (CONV3, 1, 8)]

@pytest.mark.parametrize('shape,block_length,run', SHARED)
def test_what_shares_a_value(shape, block_length, run):
    "Each run of as many entries, row-major"
    d = torch.randn(shape, dtype=torch.double)
    assert torch.allclose(average_diag(d, block_length), literal(d, torch.arange(d.numel())//run), rtol=ROUNDING)
    assert torch.allclose(average_diag(d.abs(), block_length, signed=True), average_diag(d, block_length), rtol=ROUNDING)


def test_one_setting_for_rows_of_any_length():
    "The variance of noise falls n-fold for a row of n entries, and a word that did not occur stays at zero"
    torch.manual_seed(0)
    for n in (3,64,1000):
        averaged = average_diag(torch.randn(500,n), 'row', signed=True)
        assert (averaged==averaged[:,:1]).all() and abs(n*averaged[:,0].var()-1) < N_SIGMA*(2/500)**.5
    d = torch.randn(4,50)
    d[2] = 0
    assert average_diag(d, 'row')[2].eq(0).all() and average_diag(d, 32)[2].ne(0).any()


@pytest.mark.parametrize('shape,kw', [(MATRIX, dict(block_length=1)), (MATRIX, dict(block_length={2: 1})),
    (CONV1, dict(average_kernels=False)), (CONV1, dict(block_length={3: 1}))])
def test_switched_off(shape, kw):
    d = torch.randn(shape)
    assert torch.equal(average_diag(d, **kw), d.abs()) and torch.equal(average_diag(d, signed=True, **kw), d)


def test_a_dict_is_stronger_than_average_kernels():
    d = torch.randn(2,3,4)
    assert torch.equal(average_diag(d, {3: 'kernel'}, average_kernels=False), average_diag(d))
    assert torch.equal(average_diag(d[0,0], {2: 4}), d[0,0])


@pytest.mark.parametrize('shape', [(0,), (0,4), (4,0), (0,2,3), (2,0,3)])
def test_parameters_without_entries(shape):
    for block_length in (2, 'row', {1: 2, 2: 2, 3: 2}): assert average_diag(torch.zeros(shape), block_length).shape==shape


@pytest.mark.parametrize('wrong', [0, -1, True, 2.5, math.nan, math.inf, None, 'rows', 'kernel', [2], {2: 'kernel'}, {3: 'row'}, {2: 0},
    {1: None}, {'2': 4}, {0: 4}])
def test_a_wrong_block_length_is_named_for_every_shape(wrong):
    for shape in ((), (3,), (3,3), (1,2,3)):
        with pytest.raises(ValueError, match='block_length'): average_diag(torch.ones(shape), wrong)
    with pytest.raises(ValueError, match='block_length'): check_block_length(wrong)
    if not isinstance(wrong, dict):
        with pytest.raises(ValueError, match='block_length'): block_mean(torch.ones(3), wrong)


P = [torch.zeros(2), torch.zeros(1,3)]
def same(v): return [o.clone() for o in v]

def around_p(product, params, n_samples): return control_variate_samples(product, params, P, n_samples)

@pytest.mark.parametrize('n', [0, -3, True, 1.5, math.nan, math.inf, None, '2', torch.tensor(0)])
@pytest.mark.parametrize('f', [hutchinson_samples, hutchinson_diag, hutchinson_trace, around_p])
def test_a_wrong_number_of_samples_is_named_at_once(f, n):
    with pytest.raises(ValueError, match='n_samples'): f(same, P, n_samples=n)


@pytest.mark.parametrize('center', [[], P[:1], P[::-1], [torch.zeros(2), torch.zeros(3)]])
def test_a_center_of_another_shape_is_refused_and_not_broadcast(center):
    with pytest.raises(ValueError, match='center must be tensors of the shapes'): control_variate_samples(same, P, center)


def test_products_and_probes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match='shorter'): hutchinson_diag(lambda v: v[:1], P)
    with pytest.raises(ValueError, match='probe must give a tensor like'): hutchinson_diag(same, P, probe=lambda p,g: torch.ones(1))
    with pytest.raises(ValueError, match="probe='uniform'"): hutchinson_diag(same, P, probe='uniform')
    with pytest.raises(ValueError, match='complex64'): hutchinson_diag(same, [torch.zeros(2, dtype=torch.cfloat)])


def test_numbers_of_other_libraries_and_no_parameters():
    import numpy as np
    for n in (np.int64(3), torch.tensor(3)): assert hutchinson_trace(same, P, n_samples=n)==(5.,0.)
    assert hutchinson_diag(same, [])==[] and torch.equal(block_mean(torch.tensor([1.,3.]), np.int32(2)), torch.tensor([2.,2.]))


def test_samples_are_drawn_one_at_a_time():
    seen = []
    samples = hutchinson_samples(lambda v: seen.append(0) or same(v), P, 5)
    assert not seen
    next(samples)
    assert len(seen)==1 and len(list(samples))==4


AVERAGES = [{}, dict(signed=True), dict(block_length=7), dict(block_length='row'), dict(block_length={1: 3, 3: 'kernel'}), dict(average_kernels=False)]

@pytest.mark.parametrize('kwargs', AVERAGES, ids=str)
def test_many_diagonals_are_averaged_as_one_by_one(kwargs):
    "Small and large ones, several of one shape or one, of two types, and by a function of one's own"
    g = torch.Generator().manual_seed(0)
    shapes = [(9,70), (4,3,3,3), (5,), (9,70), (4,3,3,3), (4,2,3), (5,), (300,300), (300,300), (9,70), (1,)]
    ds = [torch.randn(*o, generator=g, dtype=torch.double if i%4==3 else torch.float) for i,o in enumerate(shapes)]
    of = partial(average_diag, **kwargs)
    for average in (of, lambda d: of(d)+1):
        for got,d in zip(average_all(ds, average), ds, strict=True): assert torch.equal(got, average(d)) and got.dtype==d.dtype
    assert average_all([], of)==[]


@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.half])
def test_many_samples_in_half_precision(dtype):
    "Each is exactly 3; summed in half precision, 2000 of them gave 0.5 and 3.7"
    p = torch.ones(3, dtype=dtype)
    def product(v): return [3*o for o in v]
    mean,noise = mean_and_noise(hutchinson_samples(product, [p], 2000))
    assert hutchinson_diag(product, [p], 2000)[0].tolist()==mean[0].tolist()==mean_product(lambda b: product, range(1000))([p])[0].tolist()==[3.]*3
    assert mean[0].dtype==noise[0].dtype==dtype and not noise[0].any() and ProbeStats(product, [p], 1000).mean[0].tolist()==[3.]*3
    q = torch.ones(1, dtype=dtype, requires_grad=True)
    both = MeanProblem([Problem([q], 3*q.sum()) for _ in range(1000)])
    assert (g := both.gradient()[0]).item()==pytest.approx(3., rel=1e-4) and g.dtype==dtype

def test_a_mean_leaves_the_samples_as_they_are():
    samples = [[torch.full((2,), float(k))] for k in (1,3,5)]
    assert torch.equal(sample_mean(samples)[0], torch.full((2,), 3.))
    assert [o.tolist() for o, in samples]==[[1.,1.],[3.,3.],[5.,5.]]
