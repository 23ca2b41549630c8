"Gauss-Newton products and the Fisher diagonal, against dense matrices in float64"
import pytest, torch, torch.nn.functional as F
from torch import nn
from adahessian_fastai.hvp import flat, unflat
from adahessian_fastai.ggn import *

EXACT = dict(rtol=1e-9, atol=1e-11)  # float64, two orders of summation
F64 = torch.float64

class TwoHeads(nn.Module):
    "Two outputs from one body, and a parameter that nothing uses"
    def __init__(self):
        super().__init__()
        self.body,self.a,self.b,self.unused = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 2), nn.Parameter(torch.zeros(2))
    def forward(self, x):
        h = self.body(x).tanh()
        return self.a(h), self.b(h)

class Transposed(nn.Module):
    "Classes along the last axis, a weight that is a transposed view, and a channels-last convolution"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.w = nn.Parameter(torch.randn(3, 12).t())
    def forward(self, x): return (self.conv(x.to(memory_format=torch.channels_last)).tanh().flatten(1)@self.w).unsqueeze(1).expand(-1, 2, -1)*1.

def ce_two(zs, y): return F.cross_entropy(zs[0], y) + 3*F.mse_loss(zs[1], torch.ones_like(zs[1]))*zs[0].pow(2).mean()
def mlp(): return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
def bn_net(): return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
y7 = torch.tensor([0,1,2,2,1,0,1])
onehot = F.one_hot(y7, 3).to(F64)
cases = dict(ce=(mlp, (7,5), lambda zs: F.cross_entropy(zs[0], y7)),  # chkstyle: ignore-node
    ce_sum=(mlp, (7,5), lambda zs: F.cross_entropy(zs[0], y7, reduction='sum')),
    mse=(mlp, (7,5), lambda zs: F.mse_loss(zs[0], onehot)),
    huber=(mlp, (7,5), lambda zs: F.huber_loss(zs[0], onehot, delta=.3)),
    batch_norm=(bn_net, (7,5), lambda zs: F.cross_entropy(zs[0], y7)),
    multi_output=(TwoHeads, (7,5), lambda zs: ce_two(zs, y7)),
    transposed=(Transposed, (7,2,3,3), lambda zs: F.cross_entropy(zs[0].transpose(1,2), y7[:,None].expand(-1,2))))

def setup(name):
    "Model, parameters, inputs, loss of the outputs, all in float64"
    make,shape,loss = cases[name]
    torch.manual_seed(0)
    model = make().double()
    return model, list(model.parameters()), torch.randn(*shape, dtype=F64), loss

def dense_ggn(model, params, x, loss):
    "`JᵀHJ` written out, by reverse mode row after row"
    zs = output_tensors(model(x))
    sizes = [z.numel() for z in zs]
    z0 = torch.cat([z.detach().flatten() for z in zs])
    J = []
    for z in zs:
        for o in z.flatten():
            gs = torch.autograd.grad(o, params, retain_graph=True, allow_unused=True)
            J.append(flat([torch.zeros_like(p) if g is None else g for g,p in zip(gs, params)]))
    H = torch.autograd.functional.hessian(lambda f: loss([o.view(z.shape) for o,z in zip(f.split(sizes), zs)]), z0)
    J = torch.stack(J)
    return J.T@H@J

def dense(product, params):
    "The matrix of a product, column after column"
    n = sum(p.numel() for p in params)
    return torch.stack([flat(product(unflat(e, params))) for e in torch.eye(n, dtype=F64)], 1)

jvps = dict(reverse=lambda m,ps,x: None,  # chkstyle: ignore-node
    dual=lambda m,ps,x: dual_jvp(model_forward(m, ps, x), ps),
    linear=lambda m,ps,x: linear_jvp(model_forward(m, ps, x), ps))

@pytest.mark.parametrize('jvp', list(jvps))
@pytest.mark.parametrize('name', list(cases))
def test_product_is_the_dense_matrix(name, jvp):
    if (name,jvp)==('batch_norm','linear'): pytest.skip("linearising a layer that moves its own buffers is tested below")
    model,ps,x,loss = setup(name)
    want = dense_ggn(model, ps, x, loss)
    out = model(x)
    got = dense(ggn_product(out, loss(output_tensors(out)), ps, jvp=jvps[jvp](model, ps, x)), ps)
    assert want.abs().max() > 1e-3
    assert torch.allclose(got, want, **EXACT)

@pytest.mark.parametrize('name', ['ce','mse','multi_output','transposed'])
def test_fresh_product_is_the_dense_matrix_and_follows_the_parameters(name):
    model,ps,x,loss = setup(name)
    product = fresh_ggn_product(model_forward(model, ps, x), loss, ps)
    assert torch.allclose(dense(product, ps), dense_ggn(model, ps, x, loss), **EXACT)
    with torch.no_grad():
        for p in ps: p.mul_(1.5)
    assert torch.allclose(dense(product, ps), dense_ggn(model, ps, x, loss), **EXACT)

@pytest.mark.slow
def test_compiled_product_is_the_dense_matrix():
    model,ps,x,loss = setup('ce')
    product = fresh_ggn_product(model_forward(model, ps, x), loss, ps, compiled=True)
    assert torch.allclose(dense(product, ps), dense_ggn(model, ps, x, loss), **EXACT)

def test_subset_of_the_parameters_is_a_block_of_the_matrix():
    model,ps,x,loss = setup('ce')
    full,part,n = dense_ggn(model, ps, x, loss), ps[2:], sum(p.numel() for p in ps[:2])
    out = model(x)
    for jvp in (None, dual_jvp(model_forward(model, part, x), part), linear_jvp(model_forward(model, part, x), part)):
        assert torch.allclose(dense(ggn_product(out, loss([out]), part, jvp=jvp), part), full[n:,n:], **EXACT)

def test_matrix_is_symmetric_positive_semidefinite_where_the_hessian_is_not():
    model,ps,x,loss = setup('ce')
    out = model(x)
    G = dense(ggn_product(out, loss([out]), ps), ps)
    assert torch.allclose(G, G.T, **EXACT) and torch.linalg.eigvalsh(G).min() > -1e-12
    H = torch.autograd.functional.hessian(lambda v: loss(model_forward(model, ps, x)(unflat(v, ps))), flat(ps).detach())
    assert torch.linalg.eigvalsh(H).min() < -1e-3

@pytest.mark.parametrize('kwargs,targets', [({}, y7), (dict(reduction='sum'), y7), (dict(ignore_index=2), y7), (dict(label_smoothing=.2), y7),
    (dict(weight=torch.tensor([1.,2.,5.], dtype=F64)), y7), (dict(weight=torch.tensor([1.,2.,5.], dtype=F64), reduction='sum', ignore_index=1), y7)])
def test_closed_form_of_the_cross_entropy(kwargs, targets):
    model,_,x,_ = setup('ce')
    out,f = output_tensors(model(x)), nn.CrossEntropyLoss(**kwargs)
    u = [torch.randn_like(out[0])]
    closed = known_hessian(f, out, targets)
    assert torch.allclose(closed(u)[0], loss_hessian(f(out[0], targets), out)(u)[0], **EXACT)

def test_closed_form_along_another_axis_and_for_the_squared_error():
    z = [torch.randn(2, 4, 3, dtype=F64, requires_grad=True)]
    y,u = torch.randint(0, 3, (2,4)), [torch.randn(2, 4, 3, dtype=F64)]
    want = loss_hessian(F.cross_entropy(z[0].flatten(0,1), y.flatten()), z)(u)[0]
    assert torch.allclose(known_hessian(nn.CrossEntropyLoss(), z, y, axis=-1)(u)[0], want, **EXACT)
    for red in ('mean','sum'):
        want = loss_hessian(F.mse_loss(z[0], torch.zeros_like(z[0]), reduction=red), z)(u)[0]
        assert torch.allclose(known_hessian(nn.MSELoss(reduction=red), z, torch.zeros_like(z[0]))(u)[0], want, **EXACT)

@pytest.mark.parametrize('f,y', [(nn.L1Loss(), y7), (nn.CrossEntropyLoss(reduction='none'), y7), (nn.CrossEntropyLoss(), onehot),
    (nn.CrossEntropyLoss(weight=torch.ones(3), label_smoothing=.1), y7), (nn.MSELoss(), y7), (lambda a,b: 0, y7), (nn.CrossEntropyLoss(), (y7,y7))])
def test_closed_form_declines_what_it_does_not_know(f, y): assert known_hessian(f, [torch.zeros(7,3)], y) is None

def test_a_loss_without_curvature_has_a_zero_product():
    model,ps,x,_ = setup('ce')
    out = model(x)
    assert not any(o.any() for o in ggn_product(out, (out-10).abs().mean(), ps)(ps))
    w = torch.ones(2, requires_grad=True)
    assert not any(o.any() for o in ggn_product([w*1.], (w*2).sum(), [w, torch.ones(3, requires_grad=True)])([torch.ones(2), torch.ones(3)]))

class Once(torch.autograd.Function):
    "A cube with a first derivative and no second"
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return 3*ctx.saved_tensors[0]**2*g

def test_a_missing_second_derivative_raises_where_autograd_would_drop_it():
    w = torch.ones(3, requires_grad=True)
    out = Once.apply(w*2)
    with pytest.raises(RuntimeError, match='not differentiable twice'): ggn_product(out, out.pow(2).sum(), [w])

def test_outputs_without_a_graph_are_named():
    with pytest.raises(ValueError, match='outputs'): ggn_product(torch.zeros(2), torch.zeros(()), [torch.zeros(2)])

def test_terms_beside_the_outputs_have_no_part_in_the_matrix():
    model,ps,x,loss = setup('ce')
    out = model(x)
    with_l2 = loss([out]) + sum(p.pow(2).sum() for p in ps)
    assert torch.allclose(dense(ggn_product(out, with_l2, ps), ps), dense_ggn(model, ps, x, loss), **EXACT)

def test_cached_product_runs_no_forward_pass():
    model,ps,x,loss = setup('ce')
    calls = []
    model.register_forward_hook(lambda *a: calls.append(1))
    out = model(x)
    product = ggn_product(out, loss([out]), ps)
    for _ in range(3): product(ps)
    assert len(calls) == 1

@pytest.mark.parametrize('reduction', ['mean','sum'])
@pytest.mark.parametrize('n', [1,7])
def test_fisher_diagonal_is_that_of_the_explicit_matrix(n, reduction):
    model,ps,x,_ = setup('ce')
    x,y = x[:n],y7[:n]
    g = torch.stack([flat(torch.autograd.grad(F.cross_entropy(model(o[None]), t[None]), ps)) for o,t in zip(x, y)])
    want = (g.T@g).diagonal()/(n if reduction=='mean' else 1)
    out = model(x)
    got = flat(fisher_diagonal(out, F.cross_entropy(out, y, reduction=reduction), ps, reduction=reduction))
    assert torch.allclose(got, want, **EXACT)

def test_random_signs_estimate_the_fisher_diagonal():
    model,ps,x,loss = setup('ce')
    out = model(x)
    exact = flat(fisher_diagonal(out, loss([out]), ps))
    errs = [(flat(fisher_diagonal(out, loss([out]), ps, n_probes=n, generator=torch.Generator().manual_seed(1)))-exact).norm()/exact.norm() for n in (10,4000)]
    assert errs[1] < .1 and errs[1] < errs[0]/3   # the error falls like 1/sqrt(n)

def test_convolutions_go_forward(): assert best_jvp(Transposed()) == 'dual' and best_jvp(mlp()) == 'reverse'

def test_random_masks_are_those_of_the_graph_or_refused():
    "Dropout: dual numbers replay the mask, the linearised pass cannot and says so"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4,8), nn.Dropout(.5), nn.Linear(8,2))
    x,ps = torch.randn(5,4),list(model.parameters())
    v,state = [torch.randn_like(p) for p in ps],torch.get_rng_state()
    out = output_tensors(model(x))
    plain = model_forward(model, ps, x)
    def forward(values):
        torch.set_rng_state(state)
        return plain(values)
    assert torch.allclose(dual_jvp(forward, ps)(v)[0], reverse_jvp(out, ps)(v)[0], atol=1e-6)
    linear = linear_jvp(plain, ps)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match='random'): linear(v)
    assert torch.equal(before, torch.get_rng_state())
