"The table of losses against dense Hessians in float64, and Gauss-Newton-Bartlett against dense Gauss-Newton matrices"
import itertools,pytest,torch
import torch.nn.functional as F
from fastai.basics import Callback,CrossEntropyLossFlat,DataLoaders,Learner,MSELossFlat,nn,partial,set_seed
from fastai.callback.all import CutMix,GradientAccumulation,MixUp
from fastai.losses import BCEWithLogitsLossFlat,FocalLossFlat,LabelSmoothingCrossEntropyFlat
from adahessian_fastai.adahessian import adahessian_paper as adahessian
from adahessian_fastai.losses import Rule,gnb_samples,known_hessian,label_noise,loss_count,losses
from adahessian_fastai.problem import Problem

# A mean over draws may be off by this many of its standard errors; one in 10^8 is, and there are some hundred entries
STANDARD_ERRORS = 6
N_DRAWS = 2000
# The Hessian of a loss at its outputs in float64, computed twice in different ways
ROUNDING = 1e-10
# fastai's flattened losses go through float32
FLOAT32 = 1e-7
# Outputs of half precision are rounded once on the way in and once on the way out
HALF_ROUNDINGS = 4


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
    'fastai smoothing, flat': (LabelSmoothingCrossEntropyFlat(), Y),
    'fastai smoothing, weights, flat': (LabelSmoothingCrossEntropyFlat(eps=0.3, weight=W3.float()), Y),
    'function': (F.cross_entropy, Y), 'partial': (partial(F.cross_entropy, label_smoothing=0.3), Y),
    'mse': (nn.MSELoss(), REAL), 'mse sum': (nn.MSELoss(reduction='sum'), REAL), 'mse flat': (MSELossFlat(), REAL),
    'bce': (nn.BCEWithLogitsLoss(), BITS), 'bce flat': (BCEWithLogitsLossFlat(), BITS),
    'bce weights': (nn.BCEWithLogitsLoss(weight=W3, pos_weight=W3.flip(0)), BITS),
    'bce sum': (nn.BCEWithLogitsLoss(reduction='sum'), BITS)}


def hessian_at(loss, z, y):
    "The Hessian of `loss` at the outputs `z`, by torch.func"
    return torch.func.hessian(lambda o: loss(o.view_as(z), y))(z.flatten())


def matrix_of(product, z):
    "The matrix behind `product`, whose vectors are lists of one tensor like `z`"
    eye = torch.eye(z.numel(), dtype=z.dtype)
    return torch.stack([product([e.view_as(z)])[0].flatten() for e in eye], 1)


@pytest.mark.parametrize('name', CASES)
def test_closed_form_is_the_hessian_of_the_loss(name):
    loss,y = CASES[name]
    net,x = setup()
    z = net(x)
    _,H = dense(net, x, lambda z: loss(z, y), lambda z: z.view(5,3))
    bound = FLOAT32 if 'flat' in name else ROUNDING
    for outputs in (z, [z], (z,)): assert (matrix_of(known_hessian(loss, outputs, y), z)-H).abs().max()<=bound


def covariance(draw, z, n_labels, monkeypatch, name):
    "Exact covariance of what `draw` gives, by going through all labels of all rows; `name` is torch's function that draws them"
    total,ps = 0.,[]
    def labels(p, *args, **kwargs):
        ps.append(p)
        return now
    monkeypatch.setattr(torch, name, labels)
    for ys in itertools.product(range(n_labels), repeat=z.numel() if name=='bernoulli' else len(z)):
        now = torch.tensor(ys).view_as(z).to(z.dtype) if name=='bernoulli' else torch.tensor(ys)[:,None]
        u = draw(None).flatten()
        chance = torch.where(now==1, ps[-1], 1-ps[-1]).prod() if name=='bernoulli' else ps[-1].gather(1, now).prod()
        total = total + chance*torch.outer(u, u)
    return total


@pytest.mark.parametrize('name', ['cross-entropy', 'all at once', 'soft targets, weights, smoothing'])
def test_covariance_over_all_labels_of_a_softmax(name, monkeypatch):
    loss,y = CASES[name]
    z = torch.randn(3,3, generator=torch.Generator().manual_seed(0)).double()
    C = covariance(label_noise(loss, z, y[:3]), z, 3, monkeypatch, 'multinomial')
    assert (C-hessian_at(loss, z, y[:3])).abs().max()<=ROUNDING


@pytest.mark.parametrize('name', ['bce', 'bce weights', 'bce sum'])
def test_covariance_over_all_labels_of_a_binary_loss(name, monkeypatch):
    loss,y = CASES[name]
    z = torch.randn(2,3, generator=torch.Generator().manual_seed(0)).double()
    C = covariance(label_noise(loss, z, y[:2]), z, 2, monkeypatch, 'bernoulli')
    assert (C-hessian_at(loss, z, y[:2])).abs().max()<=ROUNDING


def test_where_every_row_is_ignored_curvature_is_zero_as_the_gradient_is():
    z,y = torch.randn(3,2).double().requires_grad_(),torch.full((3,), -100)
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(W3[:2]), nn.CrossEntropyLoss(label_smoothing=.1)):
        assert torch.autograd.grad(loss(z, y), z)[0].eq(0).all()
        assert matrix_of(known_hessian(loss, z, y), z).eq(0).all() and label_noise(loss, z, y)().eq(0).all()
        assert loss_count(loss, y)==0.


NO_CLASSES,NO_ENTRIES = torch.zeros(0).long(),torch.zeros(0,3)

@pytest.mark.parametrize('loss,y', [(nn.CrossEntropyLoss(), NO_CLASSES), (nn.CrossEntropyLoss(), NO_ENTRIES), (nn.MSELoss(), NO_ENTRIES),
    (nn.MSELoss(reduction='sum'), NO_ENTRIES), (nn.BCEWithLogitsLoss(), NO_ENTRIES), (LabelSmoothingCrossEntropyFlat(), NO_CLASSES)])
def test_an_empty_batch(loss, y):
    z = torch.zeros(0,3)
    assert known_hessian(loss, z, y)([z])[0].shape==(0,3) and label_noise(loss, z, y)().shape==(0,3) and loss_count(loss, y)==0.


def test_one_class_has_no_curvature():
    z,y = torch.randn(4,1),torch.zeros(4).long()
    assert known_hessian(F.cross_entropy, z, y)([torch.ones(4,1)])[0].eq(0).all() and label_noise(F.cross_entropy, z, y)().eq(0).all()


def test_a_single_row_without_a_batch_dimension():
    z,y = torch.randn(3).double(),torch.tensor(1)
    assert (matrix_of(known_hessian(F.cross_entropy, z, y), z)-hessian_at(F.cross_entropy, z, y)).abs().max()<=ROUNDING
    assert label_noise(F.cross_entropy, z, y)().shape==(3,)


@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
@pytest.mark.parametrize('loss,y', [(nn.CrossEntropyLoss(), Y), (nn.CrossEntropyLoss(W3.float()), YI), (nn.MSELoss(), REAL),
    (nn.BCEWithLogitsLoss(), BITS)])
def test_outputs_of_half_precision(loss, y, dtype):
    "Everything in between has single precision, and what comes back has the dtype of the outputs, as a backward pass wants it"
    z,u = torch.randn(5,3).to(dtype),torch.randn(5,3).to(dtype)
    y = y.float() if y.is_floating_point() else y
    Hu,exact = known_hessian(loss, z, y)([u])[0],known_hessian(loss, z.float(), y)([u.float()])[0]
    noise,single = [label_noise(loss, o, y)(torch.Generator().manual_seed(0)) for o in (z, z.float())]
    for low,high in ((Hu, exact), (noise, single)):
        bound = HALF_ROUNDINGS*torch.finfo(dtype).eps*high.abs() + torch.finfo(dtype).tiny
        assert low.dtype==dtype and ((low.float()-high).abs()<=bound).all()


def test_more_rows_than_half_precision_counts():
    "70,000 is infinite in float16"
    z,y = torch.zeros(70_000,2).half(),torch.zeros(70_000).long()
    Hu = known_hessian(nn.CrossEntropyLoss(reduction='mean'), z, y)([torch.ones(70_000,2).half().mul_(torch.tensor([2.**10,0.]))])[0]
    assert Hu[:,0].float().mean().item()==pytest.approx(2.**10/4/70_000, rel=HALF_ROUNDINGS*torch.finfo(torch.half).eps)


def test_a_row_that_is_not_finite_stays_alone():
    "torch's samplers raise on it, and on a GPU they end the process"
    z = torch.randn(3,2)
    z[1,0] = float('nan')
    for loss,y in ((nn.CrossEntropyLoss(), torch.zeros(3).long()), (nn.BCEWithLogitsLoss(), torch.zeros(3,2))):
        u = label_noise(loss, z, y)()
        assert u[1,0].isnan() and u[[0,2]].isfinite().all()


SHAPES = {  # chkstyle: ignore-node
    'volume': (CrossEntropyLossFlat(axis=1, weight=W3.float()), (2,3,2,2,3), (2,2,2,3)),
    'picture': (CrossEntropyLossFlat(axis=1, weight=W3.float()), (2,3,2,4), (2,2,4)),
    'mask with a channel': (CrossEntropyLossFlat(axis=1, weight=W3.float()), (2,3,2,4), (2,1,2,4)),
    'not flattened': (CrossEntropyLossFlat(flatten=False, weight=W3.float()), (2,3,4), (2,4)),
    'mse, flat': (MSELossFlat(), (4,1), (4,)), 'mse, broadcast': (nn.MSELoss(), (4,1), (4,)),
    'mse sum, broadcast': (nn.MSELoss(reduction='sum'), (4,1), (4,)), 'mse sum, one target': (nn.MSELoss(reduction='sum'), (4,), (1,)),
    'bce, flat weights': (BCEWithLogitsLossFlat(weight=torch.rand(6)), (3,2), (3,2)),
    'bce, pos_weight': (BCEWithLogitsLossFlat(flatten=False, pos_weight=W3.float()), (4,3), (4,3))}

@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.filterwarnings('ignore:Using a target size')
def test_shapes_as_the_loss_pairs_them(name):
    gen,(loss,z,y) = torch.Generator().manual_seed(0),SHAPES[name]
    z = torch.randn(z, generator=gen)
    y = torch.randint(3, y, generator=gen) if isinstance(loss, CrossEntropyLossFlat) else torch.randint(2, y, generator=gen).float()
    H = hessian_at(loss, z, y)
    assert H.abs().max()>1e-3 and (matrix_of(known_hessian(loss, z, y), z)-H).abs().max()<=FLOAT32


class Distilled:
    "A loss that keeps another one in `func` and computes something else"
    def __init__(self): self.func,self.axis,self.flatten = nn.CrossEntropyLoss(),-1,True
    def __call__(self, z, y): return 5*self.func(z, y)


class Halved(nn.CrossEntropyLoss):
    def forward(self, z, y): return super().forward(z, y)/2


@pytest.mark.parametrize('loss', [Distilled(), Halved(), partial(CrossEntropyLossFlat()), partial(nn.MSELoss(), torch.zeros(3)),
    partial(F.cross_entropy, ignore=1), partial(F.mse_loss, weight=torch.ones(3)), CrossEntropyLossFlat(flatten=False, axis=1), nn.L1Loss(),
    F.l1_loss, lambda z,y: z.sum(), CrossEntropyLossFlat])
def test_what_only_looks_like_a_known_loss_is_declined(loss):
    z = torch.zeros(2,3)
    assert known_hessian(loss, z, torch.zeros(2).long()) is None
    with pytest.raises(ValueError, match="estimator='hutchinson'"): label_noise(loss, z, torch.zeros(2).long())


def test_closed_form_declines_without_a_word():
    z,y = torch.zeros(2,3),torch.zeros(2).long()
    assert known_hessian(nn.CrossEntropyLoss(reduction='none'), z, y) is None
    assert known_hessian(nn.CrossEntropyLoss(), [z,z], y) is None and known_hessian(nn.CrossEntropyLoss(), z, (y,y)) is None
    assert known_hessian(nn.CrossEntropyLoss(), z, None) is None and known_hessian(None, z, y) is None


COUNTS = [(nn.CrossEntropyLoss(), Y, 5), (F.cross_entropy, YI, 3), (partial(F.cross_entropy, ignore_index=2), Y, 3),
    (CrossEntropyLossFlat(), YI.view(5,1), 3), (nn.CrossEntropyLoss(W3), YI, 5.), (nn.CrossEntropyLoss(), SOFT, 5),
    (nn.CrossEntropyLoss(), torch.zeros(2,3,4,4), 32), (nn.MSELoss(), REAL, 15), (BCEWithLogitsLossFlat(), BITS, 15),
    (LabelSmoothingCrossEntropyFlat(), YI, 5), (nn.L1Loss(), REAL, 5), (lambda z,y: z.sum(), {'a': REAL}, 5), (nn.MSELoss(), (), 1),
    (nn.L1Loss(), torch.tensor(1.), 1)]

@pytest.mark.parametrize('loss,y,n', COUNTS)
def test_count_is_what_the_mean_divides_by(loss, y, n): assert loss_count(loss, y)==loss_count(loss, (y,))==n


@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(W3), nn.MSELoss()], ids=['ce','weights','mse'])
def test_means_of_parts_weighed_by_count_are_the_mean_of_all(loss):
    z,y = torch.randn(5,3).double(),REAL if isinstance(loss, nn.MSELoss) else YI
    parts = [(z[:2],y[:2]),(z[2:],y[2:])]
    ns = [loss_count(loss, b) for _,b in parts]
    assert sum(n*loss(*p) for n,p in zip(ns, parts)).item()/sum(ns)==pytest.approx(loss(z, y).item(), rel=ROUNDING)


@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_the_way_out_of_a_mixed_loss_works(cb):
    "Mixing puts a method in the place of the loss: it cannot be entered in a table, and the error does not say so"
    learn = image_learner(partial(adahessian, estimator='gnb'))
    with learn.no_bar(),learn.no_logging():
        with pytest.raises(ValueError, match="use estimator='hutchinson'") as e: learn.fit(1, cbs=cb())
        assert 'losses[' not in str(e.value)
        learn = image_learner(partial(adahessian, estimator='hutchinson'))
        learn.fit(1, cbs=cb())
    assert learn.opt.n_estimates==2 and all(p.isfinite().all() for p in learn.model.parameters())


def image_learner(opt_func):
    "A Learner on 8 random pictures, two batches"
    torch.manual_seed(0)
    dls = DataLoaders.from_dsets([(torch.randn(1,4,4),i%2) for i in range(8)], [], bs=4, num_workers=0)
    return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(16,2)), CrossEntropyLossFlat(), opt_func=opt_func)


class Poisson(nn.Module):
    "Negative log-likelihood of counts whose logarithmic mean is `z`; its second derivative is the mean"
    def forward(self, z, y): return (z.exp()-y*z).mean()


def test_the_way_out_of_a_loss_of_ones_own_works():
    torch.manual_seed(0)
    z,y = torch.randn(4,2).double(),torch.ones(4,2).double()
    with pytest.raises(ValueError, match=r'losses\[Poisson\] = Rule\(noise') as e: label_noise(Poisson(), z, y)
    def hessian(f, z, y, axis): return lambda u: z.exp()/z.numel()*u
    def noise(f, z, y, axis): return lambda generator=None: (torch.poisson(z.exp(), generator=generator)-z.exp())/z.numel()**.5
    try:
        losses[Poisson] = Rule(hessian, noise)
        H = hessian_at(Poisson(), z, y)
        assert (matrix_of(known_hessian(Poisson(), z, y), z)-H).abs().max()<=ROUNDING
        draw,gen = label_noise(Poisson(), z, y),torch.Generator().manual_seed(0)
        us = torch.stack([draw(gen).flatten() for _ in range(N_DRAWS)])
        products = us[:,:,None]*us[:,None,:]
        assert ((products.mean(0)-H).abs() <= STANDARD_ERRORS*products.std(0)/N_DRAWS**0.5).all()
        assert loss_count(Poisson(), y)==4.
    finally: del losses[Poisson]
    assert 'Poisson' in str(e.value)


@pytest.mark.parametrize('n', [0, -1, True, 1.5, None])
def test_number_of_draws_is_checked_at_once(n):
    with pytest.raises(ValueError, match='n_samples'): gnb_samples(torch.zeros(1), [], None, n_samples=n)


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
    samples = gnb_samples(out, list(net.parameters()), label_noise(nn.MSELoss(), out, y), 3)
    for s in samples: assert torch.allclose(flat(s), d, atol=ROUNDING)


def test_batch_size_factor():
    "Copies of one row leave a mean loss and its curvature as they are; squaring the mean gradient without a factor would not"
    net,x = setup(bs=1)
    for bs in (1,4,32):
        xs,y = x.expand(bs,2),torch.zeros(bs, dtype=torch.long)
        d,_ = dense(net, x, lambda z: F.cross_entropy(z, y[:1]), lambda z: z.view(1,3))
        out,gen = net(xs),torch.Generator().manual_seed(bs)
        samples = gnb_samples(out, list(net.parameters()), label_noise(nn.CrossEntropyLoss(), out, y), N_DRAWS, gen)
        D = torch.stack([flat(s) for s in samples])
        assert ((D.mean(0)-d).abs() <= STANDARD_ERRORS*D.std(0)/N_DRAWS**0.5 + ROUNDING).all()


def test_sequences_count_tokens_and_not_sentences():
    "(batch, time, classes) as in a language model, with padding that is ignored; and (batch, classes, height, width)"
    torch.manual_seed(0)
    z = torch.randn(2,4,3).double()
    y = torch.tensor([[0,1,2,-100],[1,-100,-100,-100]])
    image,mask = z.transpose(1,2).reshape(2,3,2,2),y.view(2,2,2)
    cases = (z, CrossEntropyLossFlat(), y), (image, CrossEntropyLossFlat(axis=1), mask), (image, nn.CrossEntropyLoss(), mask)
    for out,loss,target in cases:
        H = torch.func.hessian(lambda o: loss(o.view_as(out), target))(out.flatten())
        draw,gen = label_noise(loss, out, target),torch.Generator().manual_seed(0)
        us = torch.stack([draw(gen).flatten() for _ in range(N_DRAWS)])
        products = us[:,:,None]*us[:,None,:]
        assert H.abs().max()>1e-3
        assert ((products.mean(0)-H).abs() <= STANDARD_ERRORS*products.std(0)/N_DRAWS**0.5 + FLOAT32).all()


def test_loss_scale_changes_nothing():
    net,x = setup()
    out,params,gen = net(x),list(net.parameters()),lambda: torch.Generator().manual_seed(3)
    noise = label_noise(nn.CrossEntropyLoss(), out, Y)
    draws = [next(gnb_samples(out, params, noise, 1, gen(), scale)) for scale in (1.,65536.)]
    assert torch.allclose(flat(draws[0]), flat(draws[1]), rtol=1e-12)


def test_a_frozen_and_an_unused_parameter():
    net,x = setup()
    unused = nn.Parameter(torch.ones(2).double())
    out = net(x)
    s = next(gnb_samples(out, [net[2].weight, unused], label_noise(nn.CrossEntropyLoss(), out, Y)))
    assert s[0].abs().sum()>0 and torch.equal(s[1], torch.zeros(2).double())


def learner(loss, n_out, targets, opt_func, net=None):
    "A Learner on 64 random points, in an order that the seed fixes"
    set_seed(0)
    x = torch.randn(64,2)
    dls = DataLoaders.from_dsets(list(zip(x, targets(x))), [], bs=16, num_workers=0)
    return Learner(dls, net or nn.Linear(2,n_out), loss, opt_func=opt_func)


def sides(x): return (x[:,0]>0).long()

@pytest.mark.parametrize('loss,n_out,targets', [(CrossEntropyLossFlat(), 2, sides), (MSELossFlat(), 1, lambda x: x[:,:1]),
    (BCEWithLogitsLossFlat(), 2, lambda x: (x>0).float()), (LabelSmoothingCrossEntropyFlat(), 2, sides)],
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
    opt.differentiate(Problem(ps, loss, out, Y, F.cross_entropy))
    with pytest.raises(RuntimeError, match='second time'): torch.autograd.grad(loss, ps)
    assert all(not p.grad.requires_grad for p in ps) and len(opt.pending.diags)==4


def test_in_a_plain_loop_what_is_missing_is_named():
    net,x = setup()
    for kw,said in ((dict(estimator='gnb'),'outputs, targets, loss_func'), (dict(curvature='ggn'),'needs the outputs')):
        opt = adahessian(list(net.parameters()), **kw)
        with pytest.raises(ValueError, match=said): opt.differentiate(F.cross_entropy(net(x), Y))


def test_accumulated_batches_weigh_as_one(monkeypatch):
    "fastai's GradientAccumulation over two halves leaves the mean of the diagonals of both"
    seen = []
    class See(Callback):
        order = 100
        def before_step(self): seen.append({k: self.opt.pending.diags[p].clone() for k,p in self.model.named_parameters()})
    def fixed(outputs, params, draw, *args): return gnb_samples(outputs, params, lambda g: torch.full_like(outputs, 0.1), *args)
    monkeypatch.setattr('adahessian_fastai.estimators.gnb_samples', fixed)
    for cbs in ([],[GradientAccumulation(32)]):
        learn = learner(MSELossFlat(), 1, lambda x: x[:,:1], partial(adahessian, estimator='gnb', lr=0.))
        learn.dls.train.shuffle = False
        with learn.no_bar(),learn.no_logging(): learn.fit(1, cbs=[See(), *cbs])
    singles,pairs = seen[:4],seen[4:]
    assert len(pairs)==2
    for k in singles[0]: assert torch.allclose(pairs[0][k], (singles[0][k]+singles[1][k])/2, rtol=1e-5)


@pytest.mark.parametrize('loss,match', [(nn.L1Loss(), 'CrossEntropyLoss, MSELoss, BCEWithLogitsLoss'), (lambda z,y: z.sum(), 'hutchinson'),
    (FocalLossFlat(), "estimator='hutchinson'"), (nn.CrossEntropyLoss(reduction='none'), "reduction")], ids=['l1','lambda','focal','none'])
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


@pytest.mark.parametrize('dtype', [torch.double, torch.bfloat16, torch.half])
def test_probabilities_of_another_precision_than_the_outputs(dtype):
    "As `torch.from_numpy` gives them; 1/4 and 3/4 are exact in each"
    z,t = torch.randn(4,2),torch.tensor([[.25,.75]]*4)
    of = partial(known_hessian, nn.CrossEntropyLoss(weight=torch.tensor([1.,3.])))
    v = torch.randn(4,2)
    assert torch.equal(of(z, t.to(dtype))([v])[0], of(z, t)([v])[0])
