"Gauss-Newton products and the Fisher diagonal, against dense matrices in float64"
import pytest, torch, torch.nn.functional as F
from fastai.torch_core import TensorBase
from torch import nn
from adahessian_fastai.hvp import flat, unflat
from adahessian_fastai.ggn import *
from helpers_learner import Once

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
    model,ps,x,loss = setup(name)
    want = dense_ggn(model, ps, x, loss)
    out = model(x)
    try: J = jvps[jvp](model, ps, x)
    except RuntimeError as e: # A version that does not replay a layer which moves its own buffers
        assert (name,jvp)==('batch_norm','linear') and 'overwrites' in str(e)
        return
    got = dense(ggn_product(out, loss(output_tensors(out)), ps, jvp=J), ps)
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

def test_a_loss_without_curvature_has_a_zero_product():
    model,ps,x,_ = setup('ce')
    out = model(x)
    assert not any(o.any() for o in ggn_product(out, (out-10).abs().mean(), ps)(ps))
    w = torch.ones(2, requires_grad=True)
    assert not any(o.any() for o in ggn_product([w*1.], (w*2).sum(), [w, torch.ones(3, requires_grad=True)])([torch.ones(2), torch.ones(3)]))

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
    with pytest.raises(RuntimeError, match='random'): linear_jvp(plain, ps)

@pytest.mark.parametrize('cell', [nn.RNNCell, nn.GRUCell])
def test_a_linearised_pass_that_is_right_only_once_is_refused(cell):
    "The replay of a recurrent cell overwrites what was recorded: its second product is off by some 20 %"
    torch.manual_seed(0)
    model,x = cell(5, 4).double(),torch.randn(7, 5, dtype=F64)
    ps = list(model.parameters())
    try: jvp = linear_jvp(model_forward(model, ps, x), ps)
    except RuntimeError as e: assert 'overwrites' in str(e)
    else: assert adjoint_error(jvp, output_tensors(model(x)), ps) < 1e-9   # a version that replays it well

# --- outputs that are computed from each other

class Deep(nn.Module):
    "Features, a part of them, logits of both and a code that is cut in two; `kind` says what is returned"
    def __init__(self, kind):
        super().__init__()
        self.kind,self.a,self.b,self.c = kind,nn.Linear(5, 4),nn.Linear(4, 3),nn.Linear(4, 6)
    def forward(self, x):
        h = self.a(x).tanh()
        mu,logvar = self.c(h).chunk(2, 1)
        z = self.b(h) + mu*logvar
        return dict(features=(z,h), supervision=(h,z,mu), code=[z,mu,logvar], twice=(z,z), view=(z,z.flatten(),h.view(-1)), unread=(h.relu(),h,z,mu),
            all=dict(h=h, mu=mu, z=z, logvar=logvar))[self.kind]

def onto(z): return z.view(-1, 3) if z.ndim==1 else z
# losses of the list of outputs; the dense matrix treats the list as independent variables
deep = dict(features=lambda zs: F.cross_entropy(zs[0], y7),  # chkstyle: ignore-node
    supervision=lambda zs: F.cross_entropy(zs[1], y7) + .3*F.cross_entropy(zs[0], y7) + F.mse_loss(zs[2], onehot),
    code=lambda zs: F.mse_loss(zs[0], onehot) - .5*(1+zs[2]-zs[1].pow(2)-zs[2].exp()).mean(),
    twice=lambda zs: F.cross_entropy(zs[0], y7),
    view=lambda zs: F.cross_entropy(onto(zs[1]), y7) + zs[2].pow(2).mean(),
    unread=lambda zs: F.cross_entropy(zs[2], y7) + zs[3].pow(2).mean(),
    all=lambda zs: F.cross_entropy(zs[2], y7)*zs[0].pow(2).mean() + (zs[1]*zs[3]).pow(2).sum())

@pytest.mark.parametrize('jvp', list(jvps))
@pytest.mark.parametrize('kind', list(deep))
def test_outputs_are_variables_of_their_own(kind, jvp):
    torch.manual_seed(1)
    model,x,loss = Deep(kind).double(),torch.randn(7, 5, dtype=F64),deep[kind]
    ps = list(model.parameters())
    want = dense_ggn(model, ps, x, loss)
    out = model(x)
    zs = output_tensors(out)
    G = dense(ggn_product(out, loss(zs), ps, jvp=jvps[jvp](model, ps, x)), ps)
    assert want.abs().max() > 1e-3 and torch.allclose(G, want, **EXACT)
    if kind not in ('code','all'): assert torch.linalg.eigvalsh(G).min() > -1e-12   # the loss is convex in the outputs
    assert all(not (z._backward_hooks or getattr(z.grad_fn, '_backward_hooks', None)) for z in zs)

def test_features_beside_the_logits_change_nothing():
    "The way through the logits counts once"
    torch.manual_seed(0)
    a,b,x = nn.Linear(5, 4).double(),nn.Linear(4, 3).double(),torch.randn(7, 5, dtype=F64)
    ps = [*a.parameters(), *b.parameters()]
    h = a(x).tanh()
    z = b(h)
    loss = F.cross_entropy(z, y7)
    both,one = (dense(ggn_product(o, loss, ps), ps) for o in ((z,h), z))
    assert (both.diagonal()/one.diagonal()).max().item() == pytest.approx(1., abs=1e-12) and torch.allclose(both, one, **EXACT)
    d_both,d_one = (flat(fisher_diagonal(o, loss, ps)) for o in ((z,h), z))
    assert torch.allclose(d_both, d_one, **EXACT)

def test_an_output_that_is_not_read_has_zero_rows():
    torch.manual_seed(0)
    model,x = Deep('unread').double(),torch.randn(7, 5, dtype=F64)
    zs = output_tensors(model(x))
    u = loss_hessian(deep['unread'](zs), zs)([torch.ones_like(z) for z in zs])
    assert [bool(o.any()) for o in u] == [False, False, True, True]

def test_the_second_derivative_stops_at_outputs_too():
    "The loss reads h and z=h² as h·z: the Hessian for (h,z) is [[0,1],[1,0]], though z hangs on h"
    w = torch.tensor([3.], dtype=F64, requires_grad=True)
    h = w*1
    z = h**2
    H = loss_hessian((h*z).sum(), [h,z])
    one,zero = torch.ones(1, dtype=F64),torch.zeros(1, dtype=F64)
    assert H([one,zero]) == [zero,one] and H([zero,one]) == [one,zero]

class WithLoss(nn.Module):
    "A model that returns its loss, or terms of it, with or without its predictions"
    def __init__(self, kind):
        super().__init__()
        self.kind,self.net = kind,nn.Linear(5, 3)
    def forward(self, x):
        z = self.net(x)
        loss,l2 = F.cross_entropy(z, y7),z.pow(2).mean()
        return dict(beside=(loss,z), terms=(dict(ce=loss, l2=l2), z), alone=loss, only_terms=(loss,l2), tuple=(loss,))[self.kind]

@pytest.mark.parametrize('kind,loss', [('beside', lambda o: o[0]*3.), ('terms', lambda o: (o[0]['ce']+o[0]['l2'])*3)])
def test_a_loss_among_the_outputs_is_no_output(kind, loss):
    torch.manual_seed(0)
    model,x = WithLoss(kind).double(),torch.randn(7, 5, dtype=F64)
    ps,out = list(model.parameters()),model(x)
    def bare(zs): return 3*(F.cross_entropy(zs[0], y7) + (zs[0].pow(2).mean() if kind=='terms' else 0))
    want = dense_ggn(model.net, ps, x, bare)
    assert torch.allclose(dense(ggn_product(out, loss(out), ps), ps), want, **EXACT)
    assert torch.allclose(flat(fisher_diagonal(out, loss(out), ps)), flat(fisher_diagonal(out[1], loss(out), ps)), **EXACT)

@pytest.mark.parametrize('kind', ['alone','only_terms','tuple'])
def test_a_model_that_returns_nothing_but_its_loss_is_told(kind):
    model = WithLoss(kind)
    out = model(torch.randn(7, 5))
    with pytest.raises(ValueError, match="nothing but its own loss.*curvature='hessian'"):
        ggn_product(out, sum(output_tensors(out)), list(model.parameters()))

def test_numbers_in_which_the_loss_is_not_linear_are_outputs():
    "Two residuals as numbers: G = JᵀJ·2"
    w = torch.tensor([1.,2.], dtype=F64, requires_grad=True)
    r = w[0]*w[1], w[0]-w[1]
    G = dense(ggn_product(r, r[0]**2+r[1]**2, [w]), [w])
    J = torch.tensor([[2.,1.],[1.,-1.]], dtype=F64)
    assert torch.allclose(G, 2*J.T@J, **EXACT)

# --- forward mode that is wrong in silence

def scripted():
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.jit.script(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))

class Roi(nn.Module):
    "Pooled regions of a feature map, by an operator of torchvision without a forward derivative"
    def __init__(self):
        super().__init__()
        self.conv,self.out = nn.Conv2d(1, 2, 3, padding=1),nn.Linear(8, 3)
    def forward(self, x):
        from torchvision.ops import roi_align
        boxes = torch.tensor([[i, 0., 0., 4., 4.] for i in range(len(x))], dtype=x.dtype)
        return self.out(roi_align(self.conv(x).tanh(), boxes, 2).flatten(1))

class Frozen(nn.Module):
    "A layer that runs under `no_grad`"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(5, 6),nn.Linear(6, 3)
    def forward(self, x):
        with torch.no_grad(): h = self.a(x).tanh()
        return self.b(h) + self.b(self.a(x).tanh())

OFF = 1e-3   # what the check lets pass; float32 rounding is below 1e-5 here

@pytest.mark.parametrize('make,shape', [(Roi, (7,1,6,6)), (Frozen, (7,5))])
def test_a_wrong_forward_derivative_is_found(make, shape):
    torch.manual_seed(0)
    model,x = make(),torch.randn(*shape)
    ps = list(model.parameters())
    out = output_tensors(model(x))
    try: error = adjoint_error(linear_jvp(model_forward(model, ps, x), ps), out, ps)
    except (RuntimeError,NotImplementedError): error = 1.   # a version that says so
    assert error > 10*OFF
    if make is Frozen: assert adjoint_error(reverse_jvp(out, ps), out, ps) < OFF   # the other has no second derivative

@pytest.mark.parametrize('make', [mlp, bn_net, scripted])
@pytest.mark.parametrize('way', [dual_jvp, linear_jvp])
def test_a_right_forward_derivative_passes(make, way):
    torch.manual_seed(0)
    model,x = make().eval(),torch.randn(7, 5)
    ps = list(model.parameters())
    try: assert adjoint_error(way(model_forward(model, ps, x), ps), output_tensors(model(x)), ps) < OFF
    except RuntimeError: assert make is scripted   # not every version differentiates these forwards

def test_dual_numbers_reach_parameters_wherever_they_live():
    "A factor that belongs to no module"
    model,ps,x,loss = setup('ce')
    s = torch.tensor(.5, dtype=F64, requires_grad=True)
    def outputs(): return output_tensors(model(x)*s.exp(), graph=False)
    every,out = [*ps, s],outputs()
    v = [torch.randn_like(p) for p in every]
    assert torch.allclose(dual_jvp(lambda _: outputs(), every)(v)[0], reverse_jvp(out, every)(v)[0], **EXACT)
    assert all(torch.autograd.forward_ad.unpack_dual(p).tangent is None for p in every)
    with pytest.raises(ValueError, match='no parameters of these shapes'): model_forward(model, every, x)

def test_generators_of_parameters():
    "They serve more than one product; of parameters that are used up a Jacobian would be zero"
    torch.manual_seed(0)
    net,x = nn.Linear(3,2).double(),torch.randn(4,3,dtype=torch.double)
    ps = list(net.parameters())
    v = [torch.randn_like(p) for p in ps]
    want = dual_jvp(model_forward(net, ps, x), ps)(v)[0]
    J = dual_jvp(model_forward(net, net.parameters(), x), net.parameters())
    for found in (J(v)[0], J(v)[0], linear_jvp(model_forward(net, net.parameters(), x), ps)(v)[0]): assert torch.allclose(found, want)

def test_samples_of_unequal_outputs_are_refused():
    net,x = nn.Linear(3,2),torch.randn(4,3)
    z = net(x)
    for outputs in ((z, z.square().mean()), (z, z[:2]*1.)):
        with pytest.raises(ValueError, match='samples along dimension 0'):
            fisher_diagonal(outputs, F.cross_entropy(z, torch.zeros(4).long()) + sum(o.square().sum() for o in outputs[1:]), list(net.parameters()))

def test_dual_products_need_no_gradients_switched_on():
    model,params,x,_ = setup('ce')
    v,forward = [torch.ones_like(p) for p in params],model_forward(model, params, x)
    with torch.no_grad(): Jv = dual_jvp(forward, params)(v)
    assert torch.allclose(Jv[0], reverse_jvp(forward(params), params)(v)[0], **EXACT) and Jv[0].any()

def test_products_of_fastai_tensors_are_plain():
    model,params,x,_ = setup('ce')
    forward = model_forward(model, params, x.as_subclass(TensorBase))
    v = [torch.ones_like(p) for p in params]
    for jvp in (dual_jvp(forward, params), reverse_jvp(forward(params), params)): assert type(jvp(v)[0]) is torch.Tensor

def test_a_jacobian_of_zeros_has_no_error():
    p = torch.ones(2, requires_grad=True)
    assert adjoint_error(lambda v: [torch.zeros(2)], [p*0], [p])==0. and adjoint_error(lambda v: [torch.zeros(2)], [p*1], [p])==1.

def test_a_direction_may_be_a_tuple():
    model,params,x,loss = setup('ce')
    G,v = fresh_ggn_product(model_forward(model, params, x), loss, params),[torch.ones_like(p) for p in params]
    assert torch.equal(flat(G(tuple(v))), flat(G(v)))

def test_reduction_of_the_fisher_diagonal_is_one_of_two():
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match='reduction must be one of'): fisher_diagonal(p*1, (p*1).sum(), [p], reduction='max')

def test_a_function_whose_backward_pass_is_linear_on_both_sides_of_zero_only():
    "`logcumsumexp` takes the logarithm of what it gets, by sign: its Jacobian has entries `exp(x_j)` over sums of them"
    x = torch.tensor([0.3,-1.,2.], dtype=torch.double, requires_grad=True)
    share = torch.stack([torch.cat([x[:i+1].softmax(0), x.new_zeros(2-i)]) for i in range(3)]).detach()
    v = torch.tensor([1.,-2.,0.5], dtype=torch.double)
    assert torch.allclose(reverse_jvp([torch.logcumsumexp(x, 0)], [x])([v])[0], share@v, **EXACT)

def test_outputs_in_which_the_loss_is_linear_are_outputs_all_the_same():
    "Inputs 1 and 3: no curvature along z=x, and its squared gradients 1 and 9; those of y² at y=2x are 4² and 36²"
    a,b = (torch.tensor([o], dtype=F64, requires_grad=True) for o in (1.,2.))
    x,one = torch.tensor([1.,3.], dtype=F64),torch.ones(1, dtype=F64)
    z,y = a*x,b*x
    loss = (z+y**2).mean()
    assert [o.item() for o in fisher_diagonal([z,y], loss, [a,b])]==[(1+9)/2,(16+1296)/2]
    assert ggn_product([z,y], loss, [a,b])([one,one])==[0.,2*(1+9)/2] and ggn_product(z, z.mean(), [a])([one])==[0.]

def test_squares_in_half_precision_are_added_up_in_single():
    "320 samples with the gradient 1: bfloat16 would count to 256"
    w = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    z = w*torch.ones(320, dtype=torch.bfloat16)
    d, = fisher_diagonal(z, z.sum(), [w], reduction='sum')
    assert d.dtype==torch.bfloat16 and d.item()==320
