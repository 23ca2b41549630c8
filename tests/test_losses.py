"Gauss-Newton-Bartlett against dense Gauss-Newton matrices in float64, for every loss that it knows"
import pytest,torch
import torch.nn.functional as F
from fastai.basics import Callback,CrossEntropyLossFlat,DataLoaders,Learner,MSELossFlat,nn,partial
from fastai.callback.all import GradientAccumulation
from fastai.losses import BCEWithLogitsLossFlat,FocalLossFlat,LabelSmoothingCrossEntropyFlat
from adahessian_fastai.adahessian import adahessian
from adahessian_fastai.estimators import Evaluation
from adahessian_fastai.losses import gnb_samples,label_noise

# A mean over draws may be off by this many of its standard errors; one in 10^8 is, and there are some hundred entries
STANDARD_ERRORS = 6
N_DRAWS = 2000
# The Hessian of a loss at its outputs in float64, computed twice in different ways
ROUNDING = 1e-10
# fastai's flattened losses go through float32
FLOAT32 = 1e-7


def setup(n_out=3, bs=5, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2,3), nn.Tanh(), nn.Linear(3,n_out)).double()
    return net,torch.randn(bs,2).double()


def dense(net, x, loss, shape=lambda z: z):
    "Diagonal of JᵀHJ by torch.func, and H at the outputs"
    names,ps = zip(*[(k,p.detach()) for k,p in net.named_parameters()])
    out = lambda *ps: torch.func.functional_call(net, dict(zip(names, ps)), (x,)).flatten()
    J = torch.cat([j.flatten(1) for j in torch.func.jacrev(out, tuple(range(len(ps))))(*ps)], 1)
    H = torch.func.hessian(lambda z: loss(shape(z)))(out(*ps))
    return (J.T@H@J).diagonal(),H


def flat(ts): return torch.cat([t.flatten() for t in ts])


W3 = torch.tensor([1.,2.,0.5]).double()
Y = torch.tensor([0,2,1,1,2])
YI = torch.tensor([0,-100,1,1,-100])
SOFT = torch.tensor([[.2,.3,.5],[1,0,0],[0,.5,.5],[.1,.8,.1],[0,0,1]]).double()
REAL = torch.linspace(-1,1,15).double().view(5,3)
BITS = (REAL>0).double()
CASES = {  # chkstyle: ignore-node
    'cross-entropy': (nn.CrossEntropyLoss(), Y), 'sum': (nn.CrossEntropyLoss(reduction='sum'), Y),
    'class weights': (nn.CrossEntropyLoss(W3), Y), 'ignored rows': (nn.CrossEntropyLoss(), YI),
    'another ignore_index': (nn.CrossEntropyLoss(ignore_index=2), Y),
    'label smoothing': (nn.CrossEntropyLoss(label_smoothing=0.2), Y),
    'all at once': (nn.CrossEntropyLoss(W3, label_smoothing=0.2), YI),
    'all at once, sum': (nn.CrossEntropyLoss(W3, label_smoothing=0.2, reduction='sum'), YI),
    'soft targets': (nn.CrossEntropyLoss(), SOFT), 'soft targets, weights, smoothing': (nn.CrossEntropyLoss(W3, label_smoothing=0.1), SOFT),
    'fastai flat': (CrossEntropyLossFlat(), Y), 'fastai flat, weights': (CrossEntropyLossFlat(weight=W3.float(), label_smoothing=0.1), Y),
    'fastai smoothing, flat': (LabelSmoothingCrossEntropyFlat(), Y), 'fastai smoothing, weights, flat': (LabelSmoothingCrossEntropyFlat(eps=0.3, weight=W3.float()), Y),
    'function': (F.cross_entropy, Y), 'partial': (partial(F.cross_entropy, label_smoothing=0.3), Y),
    'mse': (nn.MSELoss(), REAL), 'mse sum': (nn.MSELoss(reduction='sum'), REAL), 'mse flat': (MSELossFlat(), REAL),
    'bce': (nn.BCEWithLogitsLoss(), BITS), 'bce flat': (BCEWithLogitsLossFlat(), BITS),
    'bce weights': (nn.BCEWithLogitsLoss(weight=W3, pos_weight=W3.flip(0)), BITS),
    'bce sum': (nn.BCEWithLogitsLoss(reduction='sum'), BITS)}


@pytest.mark.parametrize('name', CASES)
def test_covariance_at_the_outputs_is_the_hessian_of_the_loss(name):
    loss,y = CASES[name]
    net,x = setup()
    _,H = dense(net, x, lambda z: loss(z, y), lambda z: z.view(5,3))
    draw,gen = label_noise(loss, net(x), y),torch.Generator().manual_seed(0)
    us = torch.stack([draw(gen).flatten() for _ in range(N_DRAWS)])
    products = us[:,:,None]*us[:,None,:]
    error = (products.mean(0)-H).abs()
    assert H.abs().max()>1e-3
    assert (error <= STANDARD_ERRORS*products.std(0)/N_DRAWS**0.5 + (FLOAT32 if 'flat' in name else ROUNDING)).all()


@pytest.mark.parametrize('name', ['cross-entropy', 'all at once', 'mse', 'bce weights'])
def test_mean_is_the_dense_gauss_newton_diagonal(name):
    loss,y = CASES[name]
    net,x = setup()
    d,_ = dense(net, x, lambda z: loss(z, y), lambda z: z.view(5,3))
    out,gen = net(x),torch.Generator().manual_seed(1)
    D = torch.stack([flat(s) for s in gnb_samples(out, list(net.parameters()), label_noise(loss, out, y), N_DRAWS, gen)])
    assert (D>=0).all()
    assert ((D.mean(0)-d).abs() <= STANDARD_ERRORS*D.std(0)/N_DRAWS**0.5 + ROUNDING).all()
    assert (D.mean(0)-d).norm()/d.norm() < 0.1


def test_every_draw_is_exact_for_one_output_and_squared_error():
    net,x = setup(n_out=1, bs=1)
    y = torch.zeros(1,1).double()
    d,_ = dense(net, x, lambda z: F.mse_loss(z, y), lambda z: z.view(1,1))
    out = net(x)
    for s in gnb_samples(out, list(net.parameters()), label_noise(nn.MSELoss(), out, y), 3): assert torch.allclose(flat(s), d, atol=ROUNDING)


def test_batch_size_factor():
    "Copies of one row leave a mean loss and its curvature as they are; squaring the mean gradient without a factor would not"
    net,x = setup(bs=1)
    for bs in (1,4,32):
        xs,y = x.expand(bs,2),torch.zeros(bs, dtype=torch.long)
        d,_ = dense(net, x, lambda z: F.cross_entropy(z, y[:1]), lambda z: z.view(1,3))
        out,gen = net(xs),torch.Generator().manual_seed(bs)
        D = torch.stack([flat(s) for s in gnb_samples(out, list(net.parameters()), label_noise(nn.CrossEntropyLoss(), out, y), N_DRAWS, gen)])
        assert ((D.mean(0)-d).abs() <= STANDARD_ERRORS*D.std(0)/N_DRAWS**0.5 + ROUNDING).all()


def test_sequences_count_tokens_and_not_sentences():
    "(batch, time, classes) as in a language model, with padding that is ignored; and (batch, classes, height, width)"
    torch.manual_seed(0)
    z = torch.randn(2,4,3).double()
    y = torch.tensor([[0,1,2,-100],[1,-100,-100,-100]])
    image,mask = z.transpose(1,2).reshape(2,3,2,2),y.view(2,2,2)
    for out,loss,target in ((z, CrossEntropyLossFlat(), y), (image, CrossEntropyLossFlat(axis=1), mask), (image, nn.CrossEntropyLoss(), mask)):
        H = torch.func.hessian(lambda o: loss(o.view_as(out), target))(out.flatten())
        draw,gen = label_noise(loss, out, target),torch.Generator().manual_seed(0)
        us = torch.stack([draw(gen).flatten() for _ in range(N_DRAWS)])
        products = us[:,:,None]*us[:,None,:]
        assert H.abs().max()>1e-3
        assert ((products.mean(0)-H).abs() <= STANDARD_ERRORS*products.std(0)/N_DRAWS**0.5 + FLOAT32).all()


def test_loss_scale_changes_nothing():
    net,x = setup()
    out = net(x)
    draws = [next(gnb_samples(out, list(net.parameters()), label_noise(nn.CrossEntropyLoss(), out, Y), 1, torch.Generator().manual_seed(3), scale))
        for scale in (1.,65536.)]
    assert torch.allclose(flat(draws[0]), flat(draws[1]), rtol=1e-12)


def test_a_frozen_and_an_unused_parameter():
    net,x = setup()
    unused = nn.Parameter(torch.ones(2).double())
    out = net(x)
    s = next(gnb_samples(out, [net[2].weight, unused], label_noise(nn.CrossEntropyLoss(), out, Y)))
    assert s[0].abs().sum()>0 and torch.equal(s[1], torch.zeros(2).double())


def learner(loss, n_out, targets, opt_func, net=None):
    "A Learner on 64 random points"
    torch.manual_seed(0)
    x = torch.randn(64,2)
    dls = DataLoaders.from_dsets(list(zip(x, targets(x))), [], bs=16, num_workers=0)
    return Learner(dls, net or nn.Linear(2,n_out), loss, opt_func=opt_func)


@pytest.mark.parametrize('loss,n_out,targets', [(CrossEntropyLossFlat(), 2, lambda x: (x[:,0]>0).long()), (MSELossFlat(), 1, lambda x: x[:,:1]),
    (BCEWithLogitsLossFlat(), 2, lambda x: (x>0).float()), (LabelSmoothingCrossEntropyFlat(), 2, lambda x: (x[:,0]>0).long())],
    ids=['ce','mse','bce','smoothing'])
def test_through_a_learner(loss, n_out, targets):
    learn = learner(loss, n_out, targets, partial(adahessian, estimator='gnb', lr=0.1))
    x = torch.stack([o[0] for o in learn.dls.train_ds])
    at = lambda: loss(learn.model(x), targets(x)).item()
    before = at()
    with learn.no_bar(),learn.no_logging(): learn.fit(3)
    assert learn.opt.n_estimates==12 and at()<0.8*before


def test_no_double_backward_is_needed_and_no_kernel_switched():
    "Attention runs in its fused kernel, whose second derivative does not exist"
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.l,self.seen = nn.Linear(2,8),[]
        def forward(self, x):
            q = self.l(x)[:,None,None].expand(-1,1,4,8)
            self.seen.append(torch.backends.cuda.flash_sdp_enabled())
            return F.scaled_dot_product_attention(q, q, q)[:,0,0,:2]
    fit = partial(learner, CrossEntropyLossFlat(), 2, lambda x: (x[:,0]>0).long())
    for estimator,fused in (('gnb',True),('hutchinson',False)):
        learn = fit(partial(adahessian, estimator=estimator), net=Attention())
        with learn.no_bar(),learn.no_logging(): learn.fit(1)
        assert set(learn.model.seen)=={fused} and learn.opt.n_estimates==4


def test_graph_is_gone_after_the_backward_pass():
    net,x = setup()
    ps = list(net.parameters())
    opt = adahessian(ps, estimator='gnb')
    out = net(x)
    loss = F.cross_entropy(out, Y)
    opt.differentiate(loss, at=Evaluation(loss, out, Y, F.cross_entropy))
    with pytest.raises(RuntimeError, match='second time'): torch.autograd.grad(loss, ps)
    assert all(not p.grad.requires_grad for p in ps) and len(opt.diags)==4


def test_in_a_plain_loop_what_is_missing_is_named():
    net,x = setup()
    for kw in (dict(estimator='gnb'), dict(curvature='ggn')):
        opt = adahessian(list(net.parameters()), **kw)
        with pytest.raises(ValueError, match='needs (the )?outputs'): opt.differentiate(F.cross_entropy(net(x), Y))


def test_accumulated_batches_weigh_as_one(monkeypatch):
    "fastai's GradientAccumulation over two halves leaves the mean of the diagonals of both"
    seen = []
    class See(Callback):
        order = 100
        def before_step(self): seen.append({k: self.opt.diags[p].clone() for k,p in self.model.named_parameters()})
    fixed = lambda f: (lambda outputs, params, draw, n, gen, scale: f(outputs, params, lambda g: torch.full_like(outputs, 0.1), n, gen, scale))
    monkeypatch.setattr('adahessian_fastai.estimators.gnb_samples', fixed(gnb_samples))
    for cbs in ([],[GradientAccumulation(32)]):
        learn = learner(MSELossFlat(), 1, lambda x: x[:,:1], partial(adahessian, estimator='gnb', lr=0.))
        learn.dls.train.shuffle = False
        with learn.no_bar(),learn.no_logging(): learn.fit(1, cbs=[See(), *cbs])
    singles,pairs = seen[:4],seen[4:]
    assert len(pairs)==2
    for k in singles[0]: assert torch.allclose(pairs[0][k], (singles[0][k]+singles[1][k])/2, rtol=1e-5)


@pytest.mark.parametrize('loss,match', [(nn.L1Loss(), 'CrossEntropyLoss, MSELoss, BCEWithLogitsLoss'), (FocalLossFlat(), "estimator='hutchinson'"),
    (lambda z,y: z.sum(), 'hutchinson'), (nn.CrossEntropyLoss(reduction='none'), "reduction")], ids=['l1','focal','lambda','none'])
def test_other_losses_get_a_clear_error(loss, match):
    net,x = setup()
    with pytest.raises(ValueError, match=match): label_noise(loss, net(x), Y)


def test_several_outputs_get_a_clear_error():
    net,x = setup()
    with pytest.raises(ValueError, match='one output'): label_noise(nn.MSELoss(), (net(x),net(x)), REAL)


@pytest.mark.slow
def test_a_compiled_model_stays_compiled():
    "Its backward pass runs twice on one graph; nothing is differentiated twice, so nothing has to run uncompiled"
    seen = []
    class Look(nn.Module):
        def forward(self, x):
            seen.append(torch.compiler.is_compiling())
            return x
    net = nn.Sequential(nn.Linear(2,4), Look(), nn.Linear(4,2))
    learn = learner(CrossEntropyLossFlat(), 2, lambda x: (x[:,0]>0).long(), partial(adahessian, estimator='gnb'), net=torch.compile(net))
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    assert learn.opt.n_estimates==4 and seen and all(seen)
