"Products with the Hessian by every way against finite differences and dense Hessians, in float64, and what a graph tells"
import math,pytest,torch
import torch.autograd.forward_ad as fwAD, torch.nn.functional as F
from functools import partial
from fastai.basics import Callback,DataLoaders,Learner,MSELossFlat,TensorBase,nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations,weight_norm
from torch.utils.checkpoint import checkpoint
from adahessian_fastai.adahessian import adahessian_paper as adahessian
from adahessian_fastai.hvp import *
from adahessian_fastai.hvp import dual_substitutes,substitutes
from helpers_learner import Cube,Once

# Two exact products differ by rounding alone
EXACT = 1e-10
# A difference of fourth order with h = 1e-3 of functions whose sixth derivative is at most some thousands; 1e-7 was seen
DIFFERENCE = 1e-6
# torch has the slope of a hard sigmoid, 1/6, in single precision
SIXTH = 1e-7
# A check on one probe may be off by a factor, not by an order of magnitude
FACTOR = 4


def randn(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
def relative(a, b): return (total_norm([x-y for x,y in zip(a, b)])/total_norm(b)).item()

def by_differences(loss, params, v, h=1e-3):
    "Product by a difference of fourth order"
    def at(k):
        with moved(params, v, k*h): return [torch.zeros_like(p) if g is None else g for g,p in zip(gradient(loss(), params), params)]
    return [(8*(a-b)-(c-d))/(12*h) for a,b,c,d in zip(at(1), at(-1), at(2), at(-2))]


def of_function(f, shape=(4,6)):
    "A loss with all kinds of second derivatives through `f`"
    x,w = randn(*shape).requires_grad_(),randn(*shape, seed=1)
    def loss():
        y = f(x)
        return (y*w.flatten()[:y.numel()].view(y.shape)).sum() + (y*y).sum()/2
    return loss,[x]

def of_module(make, shape, out=lambda o: o):
    torch.manual_seed(0)
    net,x = make().double(),randn(*shape, seed=2).requires_grad_()
    def loss():
        y = out(net(x))
        return (y*y/2+y.sin()).sum()
    return loss,[*net.parameters(), x]

def of_loss(f, y):
    z = randn(4,3).requires_grad_()
    return lambda: f(z*z.tanh()+z, y),[z]


def spd(x): return x[:4,:4]@x[:4,:4].T + torch.eye(4).double()

Y,REAL = torch.tensor([0,2,1,1]),randn(4,3, seed=9)
BITS = (REAL>0).double()
SIGNS = 2*BITS-1
FUNCTIONS = {  # chkstyle: ignore-node
    **{n: getattr(F, n) for n in ('silu','mish','gelu','elu','selu','celu','tanh','sigmoid','softplus','softsign','tanhshrink')},
    'logsigmoid': F.logsigmoid, 'hardswish': F.hardswish, 'hardsigmoid': F.hardsigmoid,
    'hardsigmoid in place': lambda x: F.hardsigmoid(x*x-x, inplace=True)*x, 'logit': lambda x: torch.logit(x.sigmoid()**2),
    'softmax': lambda x: x.softmax(-1), 'logsumexp': lambda x: x.logsumexp(-1), 'cumsum': lambda x: x.exp().cumsum(-1),
    'cumprod': lambda x: x.cumprod(-1), 'cumprod with a zero': lambda x: (x-x[0,1]).cumprod(-1)+x.exp(), 'prod': lambda x: x.prod(-1),
    'norm': lambda x: x.norm(dim=-1), 'normalize': lambda x: F.normalize(x, dim=-1), 'std': lambda x: x.std(-1), 'var': lambda x: x.var(-1),
    'atan2': lambda x: torch.atan2(x, x.exp()), 'fft': lambda x: torch.fft.fft(x).abs(), 'sort': lambda x: x.exp().sort(-1)[0],
    'unfold': lambda x: F.unfold(x.view(1,1,4,6).exp(), 2)[0,:,:6], 'median': lambda x: x.exp().median(-1)[0],
    'bicubic': lambda x: F.interpolate(x.view(1,1,4,6)**2, scale_factor=.5, mode='bicubic'),
    'layer_norm': lambda x: F.layer_norm(x, (6,)), 'rms_norm': lambda x: F.rms_norm(x, (6,)),
    'scatter_add': lambda x: torch.zeros_like(x).scatter_add(1, torch.arange(24).view(4,6)%3, x.exp()),
    'det': lambda x: torch.det(spd(x)), 'logdet': lambda x: torch.logdet(spd(x)), 'slogdet': lambda x: torch.linalg.slogdet(spd(x))[1],
    'solve': lambda x: torch.linalg.solve(spd(x), x), 'solve_ex': lambda x: torch.linalg.solve_ex(spd(x), x)[0],
    'tensorsolve': lambda x: torch.linalg.tensorsolve(spd(x), x[:,0]), 'inv': lambda x: torch.linalg.inv(spd(x)),
    'cholesky': lambda x: torch.linalg.cholesky(spd(x)), 'eigvalsh': lambda x: torch.linalg.eigvalsh(spd(x)),
    'solve_triangular': lambda x: torch.linalg.solve_triangular(torch.linalg.cholesky(spd(x)), x, upper=False),
    'svdvals': torch.linalg.svdvals, 'pinv': lambda x: torch.linalg.pinv(x).T, 'matrix_exp': lambda x: torch.matrix_exp(spd(x)/5),
    'weight_norm': lambda x: torch._weight_norm(x.sin(), x[:,:1].exp(), 0),
    'weight_norm, last': lambda x: torch._weight_norm(x, x[:1].exp(), 1),
    'weight_norm, one': lambda x: torch._weight_norm(x, x[0,0].exp(), -1)}
MODULES = {  # chkstyle: ignore-node
    'linear': (lambda: nn.Sequential(nn.Linear(6,4), nn.Tanh()), (3,6)), 'bilinear': (lambda: Twice(nn.Bilinear(6,6,3)), (3,6)),
    'conv': (lambda: nn.Conv2d(2,3,2), (2,2,4,4)), 'transposed conv': (lambda: nn.ConvTranspose1d(2,3,2), (2,2,4)),
    'batch norm': (lambda: nn.BatchNorm2d(2), (3,2,3,3)), 'instance norm': (lambda: nn.InstanceNorm1d(2, affine=True), (3,2,5)),
    'group norm': (lambda: nn.GroupNorm(2,4), (3,4,5)), 'layer norm': (lambda: nn.LayerNorm(5), (3,5)), 'prelu': (nn.PReLU, (3,5)),
    'rms norm': (lambda: nn.RMSNorm(5), (3,5)), 'max pool': (lambda: nn.MaxPool2d(2), (2,2,4,4)), 'lstm': (lambda: nn.LSTM(4,3), (3,2,4)),
    'gru cell': (lambda: nn.GRUCell(4,3), (2,4)), 'weight norm, old': (lambda: weight_norm(nn.Linear(4,3)), (3,4)),
    'weight norm, old, one for all': (lambda: weight_norm(nn.Linear(4,3), dim=None), (3,4)),
    'weight norm': (lambda: parametrizations.weight_norm(nn.Linear(4,3)), (3,4)),
    'weight norm, conv': (lambda: parametrizations.weight_norm(nn.Conv1d(2,3,2)), (3,2,4)),
    'orthogonal': (lambda: parametrizations.orthogonal(nn.Linear(4,4)), (3,4)),
    'squeeze and excitation': (lambda: nn.Sequential(nn.Conv2d(2,4,1), nn.Hardswish(), nn.Conv2d(4,2,1), nn.Hardsigmoid()), (2,2,3,3)),
    'a block of a llama': (lambda: Llama(6), (3,6)),
    'mamba-like': (lambda: nn.Sequential(nn.Conv1d(2,4,2), nn.SiLU(), nn.GroupNorm(2,4)), (2,2,5))}
LOSSES = {  # chkstyle: ignore-node
    'mse': (nn.MSELoss(), REAL), 'mse sum': (nn.MSELoss(reduction='sum'), REAL), 'mse of a callback': (lambda z,y: F.mse_loss(y, z), REAL),
    'mse by name': (lambda z,y: F.mse_loss(input=z, target=y), REAL), 'mse broadcast': (lambda z,y: F.mse_loss(z[:,:1], y), REAL),
    'mse none': (lambda z,y: F.mse_loss(z, y, reduction='none').mean(), REAL), 'huber': (nn.HuberLoss(delta=.5), REAL),
    'huber sum': (nn.HuberLoss('sum'), REAL), 'smooth l1': (nn.SmoothL1Loss(), REAL), 'soft margin': (nn.SoftMarginLoss(), SIGNS),
    'soft margin sum': (nn.SoftMarginLoss(reduction='sum'), SIGNS), 'bce': (nn.BCEWithLogitsLoss(), BITS),
    'cross-entropy': (nn.CrossEntropyLoss(label_smoothing=.1), Y), 'poisson': (nn.PoissonNLLLoss(), BITS),
    'kl': (lambda z,y: F.kl_div(z.log_softmax(-1), y.softmax(-1)), REAL), 'multi-label': (nn.MultiLabelSoftMarginLoss(), BITS),
    'gaussian': (lambda z,y: F.gaussian_nll_loss(z, y, z.exp()), REAL)}
CASES = {k: (of_function, f) for k,f in FUNCTIONS.items()}
CASES |= {k: (of_module, *m) for k,m in MODULES.items()} | {k: (of_loss, *m) for k,m in LOSSES.items()}


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
    def forward(self, x): return self.layer(x, x.tanh())

class Llama(nn.Module):
    "Root mean square norm and a gated SiLU network, on a residual"
    def __init__(self, d):
        super().__init__()
        self.norm,self.gate,self.up,self.down = nn.RMSNorm(d),nn.Linear(d, 2*d),nn.Linear(d, 2*d),nn.Linear(2*d, d)
    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y))*self.up(y))


def problem(name):
    make,*args = CASES[name]
    loss,params = make(*args)
    if name=='lstm': return of_module(*args, out=lambda o: o[0])
    return loss,params


@pytest.mark.parametrize('name', CASES)
def test_exact_ways_agree_and_are_the_derivative_of_the_gradient(name):
    loss,params = problem(name)
    v = [randn(*p.shape, seed=i+20) for i,p in enumerate(params)]
    truth,reverse = by_differences(loss, params, v),hessian_product(loss, params)(v)
    grads,forward = dual_gradient(loss, params, v)
    assert total_norm(truth)>1e-3 and relative(reverse, truth)<=DIFFERENCE
    assert relative(forward, reverse)<=EXACT
    assert relative(grads, gradient(loss(), params))<=(SIXTH if 'hardsigmoid' in name or 'squeeze' in name else EXACT)
    assert not any(o.requires_grad for o in (*grads, *forward))
    check_symmetric(hessian_product(loss, params), params, torch.Generator().manual_seed(0), tol=EXACT)


@pytest.mark.parametrize('seed', range(3))
def test_a_block_of_a_llama_against_the_dense_hessian(seed):
    torch.manual_seed(seed)
    net,x = Llama(3).double(),randn(4,3, seed=seed)
    names,params = zip(*net.named_parameters())
    sizes = [p.numel() for p in params]
    def of(v): return torch.func.functional_call(net, {n: o.view(p.shape) for n,p,o in zip(names, params, v.split(sizes))}, x).pow(2).mean()
    H = torch.func.hessian(of)(torch.cat([p.detach().flatten() for p in params]))
    for method in ('reverse','forward'):
        product = hessian_product(lambda: net(x).pow(2).mean(), params, method)
        assert relative([flat(product(unflat(e, params))) for e in torch.eye(len(H)).double()], list(H))<=EXACT


NORMS = dict(old=weight_norm, parametrized=parametrizations.weight_norm, columns=partial(weight_norm, dim=1))

@pytest.mark.parametrize('make', NORMS.values(), ids=NORMS)
def test_a_double_backward_that_is_wrong_is_found_by_two_products(make):
    torch.manual_seed(0)
    net,x = make(nn.Linear(4,3)).double(),randn(5,4)
    params,loss = list(net.parameters()),lambda: net(x).tanh().pow(2).sum()
    plain,v = graph_product(gradient(loss(), params, create_graph=True), params),[randn(*p.shape, seed=3) for p in params]
    if relative(plain(v), by_differences(loss, params, v))<=DIFFERENCE: pytest.skip('torch has repaired its double backward')
    for seed in range(10):
        with pytest.raises(RuntimeError, match='not symmetric'): check_symmetric(plain, params, torch.Generator().manual_seed(seed))
        check_symmetric(hessian_product(loss, params), params, torch.Generator().manual_seed(seed), tol=EXACT)


def test_asymmetry_is_the_share_of_the_matrix_whatever_its_size():
    "Its mean square over directions is ‖H-Hᵀ‖²/‖H‖²"
    gen = torch.Generator().manual_seed(0)
    for n in (5,300):
        H = randn(n,n, seed=n)
        H = H+H.T + .1*(H-H.T)
        shares = []
        for _ in range(400):
            u,v = (torch.randn(n, generator=gen, dtype=torch.double) for _ in range(2))
            shares.append(asymmetry([u], [v], [H@u], [H@v])**2)
        assert 1/FACTOR < torch.tensor(shares).mean()/((H-H.T).norm()/H.norm())**2 < FACTOR
    assert asymmetry([torch.ones(2)], [torch.ones(2)], [torch.zeros(2)], [torch.zeros(2)])==0.
    assert math.isnan(asymmetry([torch.ones(2)], [torch.ones(2)], [torch.full((2,), math.nan)], [torch.ones(2)]))
    with pytest.raises(RuntimeError, match='not symmetric'): check_symmetric(lambda v: [o*math.nan for o in v], [torch.ones(2)])


def test_chunked_cross_entropy_is_computed_without_its_options():
    options = getattr(torch.nn, 'LinearCrossEntropyOptions', getattr(F, 'LinearCrossEntropyOptions', None))
    if not hasattr(F, 'linear_cross_entropy'): pytest.skip('this torch has no linear_cross_entropy')
    x,W = randn(4,5),randn(3,5, seed=1).requires_grad_()
    with substituted():
        chunked = F.linear_cross_entropy(x, W, Y, **({} if options is None else dict(options=options())))
        seen = gradient(chunked, [W], create_graph=True)
    v = [randn(3,5, seed=2)]
    assert relative(graph_product(seen, [W])(v), hessian_product(lambda: F.cross_entropy(x@W.T, Y), [W])(v))<=EXACT


def scripted():
    @torch.jit.script
    def f(w): return (torch.tanh(w)*torch.sigmoid(w)).sum()
    return f

@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('f', [scripted, lambda: lambda x: torch.scatter_reduce(x, 1, torch.zeros(4,6).long(), x.exp(), 'prod').sum(),
    lambda: lambda x: torch.triangular_solve(x.exp(), spd(x))[0].sum()], ids=['script','scatter_reduce','triangular_solve'])
def test_a_wrong_forward_derivative_is_refused_and_the_way_out_works(f):
    f,x = f(),randn(4,6).requires_grad_()
    for _ in range(3): gradient(f(x), [x])
    v = [randn(4,6, seed=1)]
    with pytest.raises(RuntimeError, match="use hvp='reverse'"): hessian_product(lambda: f(x), [x], 'forward')(v)
    assert relative(hessian_product(lambda: f(x), [x], 'reverse')(v), by_differences(lambda: f(x), [x], v))<=DIFFERENCE


def test_a_function_without_forward_derivative_says_so():
    x = randn(3).requires_grad_()
    with pytest.raises(NotImplementedError): dual_gradient(lambda: Cube.apply(x).sum(), [x], [torch.ones_like(x)])
    assert relative(hessian_product(lambda: Cube.apply(x).sum(), [x])([torch.ones_like(x)]), [6*x.detach()])<=EXACT


@pytest.mark.parametrize('make', [nn.MSELoss, MSELossFlat])
def test_fastai_tensors_have_tangents_too(make):
    net,x,y = nn.Linear(3,1).double(),randn(5,3).as_subclass(TensorBase),randn(5,1, seed=1).as_subclass(TensorBase)
    params,loss = list(net.parameters()),make()
    v = [randn(*p.shape, seed=3) for p in params]
    of = lambda: loss(net(x), y).as_subclass(torch.Tensor)
    assert relative(dual_gradient(of, params, v)[1], hessian_product(of, params)(v))<=EXACT


def test_a_frozen_part_is_a_constant_in_both_orders():
    x = randn(3).requires_grad_()
    def loss(freeze):
        with torch.no_grad(): s = x.exp()
        return (x**2*(s if freeze=='no_grad' else x.detach().exp())).sum()
    for freeze in ('no_grad','detach'):
        of = partial(loss, freeze)
        assert relative(dual_gradient(of, [x], [torch.ones_like(x)])[1], [2*x.detach().exp()])<=EXACT
        assert relative(hessian_product(of, [x])([torch.ones_like(x)]), [2*x.detach().exp()])<=EXACT


def test_power_iteration_of_spectral_norm_in_training():
    "It writes to buffers under `no_grad`, with `out=`"
    torch.manual_seed(0)
    net,x = parametrizations.spectral_norm(nn.Linear(4,3)).double(),randn(5,4)
    params,state = list(net.parameters()),{k: b.clone() for k,b in net.named_buffers()}
    def loss():
        with torch.no_grad():
            for k,b in net.named_buffers(): b.copy_(state[k])
        return net(x).pow(2).sum()
    v = [randn(*p.shape, seed=3) for p in params]
    assert relative(dual_gradient(loss, params, v)[1], hessian_product(loss, params)(v))<=EXACT


def test_nothing_is_replaced_inside_a_checkpoint():
    "What is computed again there would be computed in the other form, with other tensors saved: a wrong gradient without a word"
    x,W = randn(5,3),randn(3,3, seed=1).requires_grad_()
    loss = lambda: checkpoint(lambda w: F.hardsigmoid(x@w), W, use_reentrant=False).pow(2).sum()
    plain = gradient(loss(), [W])
    with substituted(): assert relative(gradient(loss(), [W]), plain)==0
    with pytest.raises(RuntimeError, match='hardsigmoid_backward'): hessian_product(loss, [W])([W.detach()])


def test_functions_are_replaced_beside_other_hooks_on_saved_tensors():
    x = randn(50).mul(4).requires_grad_()
    with torch.autograd.graph.save_on_cpu(): hv = hessian_product(lambda: F.hardsigmoid(x).pow(2).sum(), [x])([torch.ones_like(x)])
    assert relative(hv, [(x.detach().abs()<3)/18])<=SIXTH


@pytest.mark.filterwarnings('ignore:size_average')
def test_losses_of_forward_mode_understand_all_arguments():
    x,y = randn(6),randn(6, seed=1).sign()
    for kw in (dict(reduce=False), dict(size_average=False), dict(reduction='none'), dict(reduction='sum'), {}):
        assert torch.allclose(dual_substitutes[F.soft_margin_loss](x, y, **kw), F.soft_margin_loss(x, y, **kw))
    for kw in (dict(weight=x.abs()), dict(delta=.3), dict(delta=.3, reduction='sum')):
        assert torch.allclose(dual_substitutes[F.huber_loss](x, y, **kw), F.huber_loss(x, y, **kw))


def test_forward_mode_goes_through_a_checkpoint():
    x,W = randn(5,3),randn(3,3, seed=1).requires_grad_()
    loss = lambda: checkpoint(lambda w: F.silu(x@w), W, use_reentrant=False).pow(2).sum()
    v = [randn(3,3, seed=2)]
    for method in ('reverse','forward'):
        try: hv = hessian_product(loss, [W], method)(v)
        except NotImplementedError: pytest.skip('this version of PyTorch has no forward mode for a checkpoint')
        assert relative(hv, by_differences(loss, [W], v))<=DIFFERENCE


def test_the_mode_is_gone_afterwards_even_after_an_error():
    x = torch.ones(1, requires_grad=True)
    for context in (substituted(), dual_numbers([x], [torch.ones(1)])):
        with pytest.raises(ZeroDivisionError):
            with context: 1/0
        assert type(F.hardsigmoid(x).grad_fn).__name__=='HardsigmoidBackward0' and fwAD._current_level==-1
    assert set(substitutes)<set(dual_substitutes)


def test_dual_numbers_leave_values_and_versions_alone():
    x = randn(5).requires_grad_()
    before,version = x.detach().clone(),x._version
    y = (x**2).sum()
    dual_gradient(lambda: (x**3).sum(), [x], [torch.ones_like(x)])
    assert torch.equal(x, before) and x._version==version and fwAD._current_level==-1
    assert torch.equal(gradient(y, [x])[0], 2*before)
    with pytest.raises(ZeroDivisionError):
        with moved([x], [torch.ones_like(x)], .1): 1/0
    assert torch.equal(x, before) and x._version==version


def test_a_graph_that_is_deeper_than_pythons_stack():
    y = x = torch.ones(1, requires_grad=True)
    for _ in range(20_000): y = y+1
    assert len(graph_nodes(y))==20_001 and len(graph_nodes([y,None,x]))==20_001


def test_once_differentiable_is_found_where_autograd_overlooks_it():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return ctx.save_for_backward(x) or x**2
        @staticmethod
        @once_differentiable
        def backward(ctx, g): return 2*ctx.saved_tensors[0]*g
    x = torch.ones(2, requires_grad=True)
    curved,last = (Once.apply(x)**2).sum(),Once.apply(x).sum()+(x**3).sum()
    for grads in (gradient(curved, [x], create_graph=True), [*gradient(last, [x], create_graph=True), last]):
        with pytest.raises(RuntimeError, match="hvp='finite_difference'"): check_twice(grads)
    check_twice([*gradient((x**3).sum(), [x], create_graph=True), (x**3).sum(), None])


def test_reentrant_checkpoints_are_found_and_the_way_out_works():
    net,x = nn.Sequential(nn.Linear(3,3), nn.Tanh()).double(),randn(4,3).requires_grad_()
    run = lambda reentrant: checkpoint(net, x, use_reentrant=reentrant).pow(2).sum()
    with pytest.raises(ValueError, match='use_reentrant=False'): check_checkpoints(run(True))
    check_checkpoints(run(False))
    params,v = list(net.parameters()),[randn(*p.shape, seed=1) for p in net.parameters()]
    assert relative(hessian_product(lambda: run(False), params)(v), hessian_product(lambda: net(x).pow(2).sum(), params)(v))<=EXACT


def test_hooks_come_back_after_an_error():
    x,seen = torch.ones(2, requires_grad=True),[]
    x.register_hook(seen.append)
    with pytest.raises(ZeroDivisionError):
        with hooks_disabled([x]):
            gradient((x**2).sum(), [x])
            assert not seen
            1/0
    gradient((x**2).sum(), [x])
    assert len(seen)==1


def test_norms_and_steps_at_the_edges():
    assert total_norm([]).item()==0. and total_norm([torch.zeros(0)]).item()==0. and total_norm([torch.zeros(0), torch.ones(4)]).item()==2.
    assert total_norm([torch.full((4,), 3e4).half()]).item()==6e4 and total_norm([torch.ones(4).bfloat16(), torch.ones(5)]).item()==3.
    assert total_norm([torch.full((16,), 3e4).half()]).item()==pytest.approx(12e4) # Not a number of half precision
    assert rounding([])==0. and rounding([torch.ones(1), torch.ones(1).half(), torch.ones(1).double()])==2**-10
    assert step_size([], [])==1. and step_size([torch.zeros(0)], [torch.zeros(0)])==1.
    assert step_size([torch.zeros(1)], [torch.tensor([2.])])==pytest.approx(2**-11.5/2)
    with moved([], [], .1): pass


@pytest.mark.parametrize('method', ['one-sided','central'])
def test_differences_agree_with_the_exact_product(method):
    "In double precision h is 1e-8 one-sided and 2e-6 central, so 7 and 9 digits are right"
    loss,params = problem('a block of a llama')
    v = [randn(*p.shape, seed=5) for p in params]
    product = difference_product(loss, params, gradient(loss(), params) if method=='one-sided' else None)
    assert relative(product(v), hessian_product(loss, params)(v)) < {'one-sided': 1e-6, 'central': 1e-8}[method]


@pytest.mark.parametrize('central', [False, True])
@pytest.mark.parametrize('act', [nn.GELU, nn.Tanh, nn.Softplus])
def test_two_steps_tell_the_error_of_a_difference(act, central):
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Linear(8,32), act(), nn.Linear(32,32), act(), nn.Linear(32,1)),torch.randn(64,8)
    params,loss = list(net.parameters()),lambda: net(x).pow(2).mean()
    v,grads = [torch.randn_like(p) for p in params],None if central else gradient(loss(), params)
    error = relative(difference_product(loss, params, grads)(v), hessian_product(loss, params)(v))
    assert 1/FACTOR < difference_error(loss, params, v, grads)/error < FACTOR


@pytest.mark.parametrize('seed', range(5))
def test_two_steps_have_nothing_in_common_across_kinks(seed):
    torch.manual_seed(seed)
    net,x = nn.Sequential(nn.Linear(8,256), nn.ReLU(), nn.Linear(256,256), nn.ReLU(), nn.Linear(256,1)),torch.randn(256,8)
    params,loss = list(net.parameters()),lambda: net(x).pow(2).mean()
    v,grads = [torch.randn_like(p).sign() for p in params],gradient(loss(), params)
    error = relative(difference_product(loss, params, grads)(v), hessian_product(loss, params)(v))
    assert error>.05 and difference_error(loss, params, v, grads)>error/FACTOR/FACTOR


def test_error_of_a_difference_that_is_zero_or_not_finite():
    x = torch.ones(2, requires_grad=True)
    assert difference_error(lambda: x.sum(), [x], [torch.ones(2)])==0.
    assert difference_error(lambda: (x**2).sum(), [x], [torch.zeros(2)])==0.
    assert math.isnan(difference_error(lambda: (x*math.nan).pow(2).sum(), [x], [torch.ones(2)]))


class Filter(nn.Module):
    "A complex filter in Fourier space, the kind of layer that has complex parameters"
    def __init__(self):
        super().__init__()
        self.lin,self.w = nn.Linear(4,4),nn.Parameter(torch.randn(3, dtype=torch.cfloat))
    def forward(self, x): return torch.fft.irfft(torch.fft.rfft(self.lin(x))*self.w, n=4)


def test_complex_parameters_are_refused_and_the_way_out_works():
    torch.manual_seed(0)
    x,y = torch.randn(8,4),torch.randn(8,4)
    with pytest.raises(ValueError, match=r'parameter 2 of shape \(3,\) is torch.complex64: call `real_param'):
        check_real([*Filter().lin.parameters(), Filter().w])
    with pytest.raises(ValueError, match='complex64'): flat([Filter().w])
    net = Filter()
    same = net(x)
    assert real_parameters(net) is net and torch.equal(net(x), same) and [p.dtype for p in net.parameters()]==[torch.float]*4
    check_real(net.parameters())
    net = real_parameters(net.double())
    params,loss = list(net.parameters()),lambda: F.mse_loss(net(x.double()).tanh(), y.double())
    v = [randn(*p.shape, seed=1) for p in params]
    truth = by_differences(loss, params, v)
    for method in ('reverse','forward'): assert relative(hessian_product(loss, params, method)(v), truth)<=DIFFERENCE
    again = real_parameters(Filter())
    again.load_state_dict(net.float().state_dict())
    assert torch.equal(again(x), net(x))


def test_an_optimizer_steps_on_real_and_imaginary_parts():
    "L = 3 Re(w)² + 5 Im(w)² has the diagonal (6,10), which one Rademacher probe finds"
    seen = {}
    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1+1j]))
        def forward(self, x): return (3*self.w.real**2+5*self.w.imag**2).expand(len(x),1)
    class See(Callback):
        def before_step(self): seen.update({n: self.opt.pending.diags[p].item() for n,p in self.model.named_parameters()})
    dls = DataLoaders.from_dsets([(torch.zeros(1),torch.zeros(1))]*4, [], bs=4, num_workers=0)
    learn = Learner(dls, real_parameters(Bowl()), lambda z,y: z.mean(), opt_func=adahessian, cbs=See())
    with learn.no_bar(),learn.no_logging(): learn.fit(1, .1)
    assert list(seen.values())==[6.,10.]


@pytest.mark.parametrize('value', [0, -1, True, torch.tensor(True), 2.5, float('nan'), None, '3', [1]])
def test_counts_are_checked_by_name(value):
    with pytest.raises(ValueError, match='n_samples'): check_count('n_samples', value)

def test_counts_of_other_libraries_are_numbers():
    import numpy as np
    assert [check_count('n', o) for o in (2, np.int64(2), torch.tensor(2), np.uint8(2))]==[2]*4 and check_count('n', 0, least=0)==0

# What stands for several tensors, and what only looks like it

def single(): return torch.tensor([1.,2.], dtype=torch.double, requires_grad=True)

@pytest.mark.parametrize('check,value', [(check_number,10**400), (check_number,torch.ones(2)), (check_number,'1'), (check_switch,2),
    (check_switch,torch.tensor([True,False]).numpy()), (check_switch,'yes'), (partial(check_choice, choices=dict(a=1)),['a'])])
def test_values_that_cannot_work_are_refused_by_name(check, value):
    with pytest.raises(SettingError, match='^setting must be '): check('setting', value)


def test_a_tolerance_of_symmetry_is_not_negative():
    with pytest.raises(SettingError, match='tol must be'): check_symmetric(lambda v: v, [torch.ones(2)], tol=-1)


def test_a_pair_may_be_two_equal_numbers(): assert check_pair('bounds', (1,1), rising=True)==(1.,1.)


@pytest.mark.parametrize('f', [lambda w,l: gradient(l(), w), lambda w,l: hessian_product(l, w), lambda w,l: graph_product(gradient(l(), [w], True), w),
    lambda w,l: dual_gradient(l, w, w), lambda w,l: difference_product(l, w), lambda w,l: unflat(w, w), lambda w,l: check_symmetric(lambda v: v, w)])
def test_a_single_tensor_is_no_list(f):
    "Its rows are other tensors, on which no loss depends: a Hessian of zeros"
    w = single()
    with pytest.raises(ValueError, match=r'params must be several tensors, such as \[w\]'): f(w, lambda: (w**3).sum())

def test_generators_serve_more_than_once():
    w,v = single(),[torch.ones(2, dtype=torch.double)]
    loss,want = lambda: (w**3).sum(),[6*w.detach()]
    product = graph_product(gradient(loss(), iter([w]), create_graph=True), iter([w]))
    for _ in range(2): assert torch.equal(product(v)[0], want[0])
    assert torch.equal(dual_gradient(loss, iter([w]), v)[1][0], want[0]) and torch.equal(unflat(torch.ones(2), iter([w]))[0], torch.ones(2).double())
    check_symmetric(product, iter([w]))

def test_complex_parameters_are_refused_by_products():
    z = torch.ones(2, dtype=torch.cfloat, requires_grad=True)
    with pytest.raises(ValueError, match='real_parameters'): hessian_product(lambda: z.abs().square().sum(), [z])

def test_tied_complex_parameters_stay_tied():
    net = nn.ModuleDict(dict(a=nn.Linear(2,2,bias=False,dtype=torch.cfloat), b=nn.Linear(2,2,bias=False,dtype=torch.cfloat)))
    net.b.weight = net.a.weight
    before = net.a.weight.detach().clone()
    ps = list(real_parameters(net).parameters())
    assert len(ps)==2 and torch.equal(net.a.weight, before)
    with torch.no_grad(): ps[0].add_(1)
    assert torch.equal(net.a.weight, net.b.weight) and torch.equal(net.a.weight, before+1)

@pytest.mark.parametrize('dim', [-3,-2,-1,0,1,2,None])
@pytest.mark.parametrize('norm', [weight_norm,parametrizations.weight_norm])
def test_weight_norm_along_any_dimension(norm, dim):
    torch.manual_seed(0)
    net,x = norm(nn.Conv1d(2,3,2).double(), dim=dim),torch.randn(2,2,5,dtype=torch.double)
    want = net(x)
    with twice_differentiable(net): assert torch.allclose(net(x), want, atol=1e-12)
    with substituted(): assert torch.allclose(net(x), want, atol=1e-12)

def tied():
    "An embedding whose weight is the output layer's too, and a loss of it"
    torch.manual_seed(0)
    e,out = nn.Embedding(4, 3).double(),nn.Linear(3, 4, bias=False).double()
    out.weight = e.weight
    return [*e.parameters(),*out.parameters()],lambda: F.cross_entropy(out(e(torch.arange(4)).tanh()), torch.tensor([1,2,3,0]))

@pytest.mark.parametrize('method', ['reverse','forward','finite_difference'])
def test_a_tensor_that_stands_there_twice_is_refused_and_the_advice_works(method):
    ps,loss = tied()
    with pytest.raises(ValueError, match='each tensor once'): hessian_product(loss, ps, method)
    once = list(dict.fromkeys(ps))
    want = torch.autograd.functional.hessian(lambda w: F.cross_entropy(w.tanh()@w.T, torch.tensor([1,2,3,0])), once[0].detach()).reshape(12,12)
    v = torch.randn(4,3, dtype=torch.double)
    assert torch.allclose(hessian_product(loss, once, method)([v])[0].flatten(), want@v.flatten(), atol=1e-5)

@pytest.mark.parametrize('params,name', [(nn.Linear(2,1),'Linear'), (nn.Sequential(nn.Linear(2,1)),'Linear'), (nn.Linear(2,1).named_parameters(),'tuple'),
    (nn.Linear(2,1).state_dict(),'str'), (3.,'float'), ([None],'NoneType')])
def test_what_is_no_tensor_is_named(params, name):
    with pytest.raises(ValueError, match=f'params must be tensors.*{name}'): hessian_product(lambda: None, params)

def test_a_loss_that_was_evaluated_already_is_refused():
    w = torch.ones(2, requires_grad=True)
    from adahessian_fastai.spectrum import dense_hessian,hessian_times_gradient
    for f in (hessian_product,dense_hessian,hessian_times_gradient,graph_gradient,difference_product):
        with pytest.raises(ValueError, match='loss must be a function'): f((w**2).sum(), [w])
    for f in (dual_gradient,difference_error):
        with pytest.raises(ValueError, match='loss must be a function'): f((w**2).sum(), [w], [torch.ones(2)])

@pytest.mark.parametrize('v', [[torch.ones(2)], [torch.ones(2),torch.ones(3),torch.ones(1)], [torch.ones(2),torch.ones(2)], [1.,1.]])
def test_a_direction_of_another_shape_is_refused(v):
    a,b = torch.ones(2, requires_grad=True),torch.ones(3, requires_grad=True)
    product = graph_product(gradient((a**3).sum()+(b**3).sum(), [a,b], create_graph=True), [a,b])
    with pytest.raises(ValueError, match='v must be tensors of the shapes'): product(v)
    assert [o.tolist() for o in product([torch.ones(2),torch.ones(3)])]==[[6.]*2,[6.]*3]

def test_symmetry_of_complex_parameters_is_not_asked():
    with pytest.raises(ValueError, match='real parameters'): check_symmetric(lambda v: v, [torch.ones(2, dtype=torch.cfloat)])


def test_what_is_marked_as_differentiable_once_is_refused_and_not_zero():
    "Where it is the last function, autograd finds no second derivative and no fault; the way out has 6x"
    from adahessian_fastai.spectrum import dense_hessian,hessian_times_gradient
    p = torch.tensor([1.,2.], dtype=torch.double, requires_grad=True)
    def loss(): return Once.apply(p).sum()
    for f in (lambda: hessian_product(loss, [p])([torch.ones_like(p)]), lambda: dense_hessian(loss, [p]), lambda: hessian_times_gradient(loss, [p])):
        with pytest.raises(RuntimeError, match="once_differentiable.*finite_difference"): f()
    assert (hessian_product(loss, [p], 'finite_difference')([torch.ones_like(p)])[0]-6*p).abs().max()<DIFFERENCE


@pytest.mark.parametrize('method', ['reverse','forward','finite_difference'])
def test_directions_of_other_shapes_are_refused(method):
    a,b = (randn(3, seed=i).requires_grad_() for i in (0,1))
    product = hessian_product(lambda: ((a+b)**4).sum(), [a,b], method)
    one,three = torch.ones(1, dtype=torch.double),torch.ones(3, dtype=torch.double)
    for v in ([one,three], [three], [three[:,None],three], [1.,three], [three]*3, three):
        with pytest.raises(ValueError, match='v must be tensors of the shapes'): product(v)
    assert torch.equal(product(o for o in [three,0*three])[0], product([three,0*three])[0])


def test_a_wrong_third_derivative_of_torch_is_told():
    "A gradient penalty through a layer norm: 45 % off in the dense Hessian, without a word; the way out is exact to its digits"
    from adahessian_fastai.spectrum import dense_hessian
    torch.manual_seed(0)
    net,x = nn.Sequential(nn.Linear(2,3), nn.LayerNorm(3), nn.Linear(3,1)).double(),randn(4,2).requires_grad_()
    ps = list(net.parameters())
    def loss(): return torch.autograd.grad(net(x).sum(), x, create_graph=True)[0].square().sum()
    with pytest.warns(UserWarning, match="layer norm.*finite_difference"): wrong = dense_hessian(loss, ps)
    v = [randn(*p.shape, seed=i) for i,p in enumerate(ps)]
    right = by_differences(loss, ps, v)
    assert relative(hessian_product(loss, ps, 'finite_difference')(v), right)<1e-5<0.01<relative(unflat(wrong@flat(v), ps), right)


def test_the_last_of_the_products_that_were_announced_frees_the_graph():
    w = torch.ones(2, requires_grad=True)
    def product(n): return graph_product(graph_gradient(lambda: (w**3).sum(), [w]), [w], n)
    for n in (1,3):
        f = product(n)
        assert all(f([w])[0].tolist()==[6.,6.] for _ in range(n))
        with pytest.raises(RuntimeError, match='second time'): f([w])
    f = product(None)
    assert all(f([w])[0].tolist()==[6.,6.] for _ in range(5))


def test_a_kink_between_two_steps_is_an_infinite_error():
    "The product by the shorter step is zero, by the longer one it is not"
    p = nn.Parameter(torch.zeros(1))
    def loss(): return F.relu(p-1.5*torch.finfo(p.dtype).eps**.5).sum()
    assert difference_product(loss, [p], [torch.zeros(1)])([torch.ones(1)])==[0.]
    assert difference_error(loss, [p], [torch.ones(1)], [torch.zeros(1)])==math.inf


def test_the_error_of_a_difference_by_hand():
    "The gradient x³ at zero, where the product is zero: h² comes out, 4h² at twice the step, and a central difference divides by three"
    p = nn.Parameter(torch.zeros(1, dtype=torch.double))
    one,zero = torch.ones_like(p, requires_grad=False),torch.zeros_like(p, requires_grad=False)
    errors = [difference_error(lambda: (p**4/4).sum(), [p], [one], grads) for grads in (None,[zero])]
    assert errors==pytest.approx([1.,3.])
