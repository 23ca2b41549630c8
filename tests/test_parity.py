"Beside the AdaHessians of timm, torch_optimizer and pytorch_optimizer: the same probes give the same steps where they are right, and the dense truth decides where they differ"
import pytest,torch
import torch.nn.functional as F
from fastai.basics import nn
from adahessian_fastai.adahessian import adahessian_paper as adahessian

# The formulas are the same, the order of operations is not: one unit in the last place of float32 (1e-7) of what moved, amplified by 50 steps
FLOAT32 = 1e-4
# Exact in real numbers, computed in float32
ROUNDING = 1e-5
SCALE = 65536.      # where fastai's and PyTorch's loss scale starts


def timm_adahessian(): return pytest.importorskip('timm.optim').Adahessian
def jettify_adahessian(): return pytest.importorskip('torch_optimizer').Adahessian
def kozistr_adahessian(): return pytest.importorskip('pytorch_optimizer').AdaHessian


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1,3,3), nn.Tanh(), nn.Flatten(), nn.Linear(48,5), nn.Tanh(), nn.Linear(5,2))


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(16,1,6,6, generator=g),torch.randint(2, (16,), generator=g)


def timm_probe():
    "timm's own seed; the user's has no effect there"
    g = torch.Generator().manual_seed(2147483647)
    return lambda p,_: torch.randint(0, 2, p.size(), generator=g)*2.-1.


def global_probe(): return lambda p,_: torch.randint_like(p, 2)*2.-1.


def ours_after(n, probe, lr=0.05, n_groups=1, **kw):
    m,(x,y) = net(),batch()
    ps = list(m.parameters())
    opt = adahessian(ps if n_groups==1 else [ps[:2],ps[2:]], lr=lr, probe=probe, **kw)
    torch.manual_seed(5)
    for _ in range(n):
        opt.differentiate(F.cross_entropy(m(x), y))
        opt.step()
        opt.zero_grad()
    return m


def theirs_after(n, make, n_groups=1, **kw):
    m,(x,y) = net(),batch()
    ps = list(m.parameters())
    opt = make(ps if n_groups==1 else [dict(params=ps[:2]),dict(params=ps[2:])], **{'lr': 0.05, **kw})
    torch.manual_seed(5)
    for _ in range(n):
        opt.zero_grad()
        F.cross_entropy(m(x), y).backward(create_graph=True)
        opt.step()
        for p in ps: p.grad = None     # the cycle of parameter and gradient
    return m


def distance(a, b): return max((p-q).abs().max().item() for p,q in zip(a.parameters(), b.parameters()))


def moved(m): return distance(m, net())


TIMM = dict(defaults=({}, dict(eps=1e-4)), betas=(dict(mom=0.7, sqr_mom=0.9), dict(betas=(0.7,0.9), eps=1e-4)),  # chkstyle: ignore-node
    power=(dict(hessian_power=0.5), dict(hessian_power=0.5, eps=1e-4)), decay=(dict(wd=0.1), dict(weight_decay=0.1, eps=1e-4)),
    samples=(dict(n_samples=3), dict(n_samples=3, eps=1e-4)), kernels=(dict(average_kernels=True), dict(avg_conv_kernel=True, eps=1e-4)),
    groups=(dict(n_groups=2), dict(n_groups=2, eps=1e-4)), eps=(dict(eps=1e-2), dict(eps=1e-2)))

@pytest.mark.filterwarnings('ignore:Using backward')
@pytest.mark.parametrize('case', TIMM)
def test_fifty_steps_equal_timm(case):
    own,other = TIMM[case]
    make = timm_adahessian()
    ours = ours_after(50, timm_probe(), **{'wd': 0., 'block_length': 1, 'average_kernels': False, **own})
    theirs = theirs_after(50, make, **other)
    assert moved(ours)>0.1 and distance(ours, theirs)<FLOAT32*max(1, moved(ours))


JETTIFY = dict(defaults=(dict(hessian_power=0.5), {}), power=({}, dict(hessian_power=1.)),  # chkstyle: ignore-node
    decay=(dict(hessian_power=0.5, wd=0.1), dict(weight_decay=0.1)), betas=(dict(hessian_power=0.5, mom=0.7, sqr_mom=0.9), dict(betas=(0.7,0.9))))

@pytest.mark.filterwarnings('ignore:Using backward')
@pytest.mark.parametrize('case', JETTIFY)
def test_fifty_steps_equal_torch_optimizer(case):
    "Kernels of 4-D parameters are averaged there, always; the default power is ½"
    own,other = JETTIFY[case]
    make = jettify_adahessian()
    ours = ours_after(50, global_probe(), **{'wd': 0., 'block_length': 1, **own})
    assert moved(ours)>0.1 and distance(ours, theirs_after(50, make, **other))<FLOAT32


KOZISTR = dict(defaults=({}, {}), decay=(dict(wd=0.1), dict(weight_decay=0.1)), l2=(dict(wd=0.1, decouple_wd=False), dict(weight_decay=0.1, weight_decouple=False)),  # chkstyle: ignore-node
    samples=(dict(n_samples=3), dict(num_samples=3)), power=(dict(hessian_power=0.5), dict(hessian_power=0.5)))

@pytest.mark.filterwarnings('ignore:Using backward')
@pytest.mark.parametrize('case', KOZISTR)
def test_fifty_steps_equal_pytorch_optimizer(case):
    own,other = KOZISTR[case]
    make = kozistr_adahessian()
    ours = ours_after(50, global_probe(), **{'wd': 0., 'block_length': 1, 'average_kernels': False, **own})
    assert moved(ours)>0.1 and distance(ours, theirs_after(50, make, eps=1e-4, **other))<FLOAT32


# Where they differ: quadratics with a known diagonal, for which one Rademacher probe is exact

A = torch.tensor([2.,3.,1.,0.5])
def quadratic(p): return (A*p**2).sum()/2


def steps_on_a_quadratic(opt, p, n, differentiate=lambda loss: loss.backward(create_graph=True)):
    "Curvature that each step must have divided by: lr·m̂/|step|, with one gradient for all steps"
    found = []
    for _ in range(n):
        with torch.no_grad(): p.copy_(torch.ones(4))
        opt.zero_grad()
        differentiate(quadratic(p))
        g = p.grad.detach().clone()
        opt.step()
        found.append(g/(1-p.detach()))
        if p.grad.grad_fn is not None: p.grad = None
    return found


def ours_on_a_quadratic(n, **kw):
    p = nn.Parameter(torch.ones(4))
    opt = adahessian([p], lr=1., wd=0., eps=1e-16, **kw)
    return steps_on_a_quadratic(opt, p, n, opt.differentiate)


def test_pytorch_optimizer_corrects_by_steps_and_not_by_estimates():
    "With an estimate every 4th step, step t ≤ 4 divides by |diagonal|/√t (nearly: 0.999^t); ours by the diagonal itself"
    p = nn.Parameter(torch.ones(4))
    make = kozistr_adahessian()
    theirs = steps_on_a_quadratic(make([p], lr=1., update_period=4), p, 4)
    ours = ours_on_a_quadratic(4, update_each=4)
    for t in range(4):
        assert torch.allclose(ours[t], A, rtol=ROUNDING*10)
        too_small = ((1-0.999)/(1-0.999**(t+1)))**0.5
        assert torch.allclose(theirs[t], A*too_small, rtol=ROUNDING*10)
    assert too_small<0.51


def test_timm_adds_an_estimate_once_for_each_step():
    "An estimate that is used for 3 steps enters its average 3 times, so later ones weigh less beside it; ours counts each once"
    make = timm_adahessian()
    p = nn.Parameter(torch.ones(1))
    opt = make([p], lr=0., betas=(0.9,0.5), update_each=3)
    q = nn.Parameter(torch.ones(1))
    own = adahessian([q], lr=0., mom=0.9, sqr_mom=0.5, wd=0., update_each=3)
    for t in range(4):
        c = 1. if t<3 else 10.      # the curvature changes at step 4, which is the second estimate
        for o,w in ((opt,p),(own,q)):
            loss = (c*w**2).sum()/2
            o.zero_grad()
            loss.backward(create_graph=True) if o is opt else o.differentiate(loss)
            o.step()
            if o is opt: p.grad = None
    theirs = opt.state[p]['exp_hessian_diag_sq']/(1-0.5**4)
    ours = own.state[q]['sqr_avg_diag_hessian']/(1-0.5**2)
    assert torch.allclose(ours, torch.tensor([(0.25*1+0.5*100)/0.75]))                                  # two estimates
    assert torch.allclose(theirs, torch.tensor([((0.0625+0.125+0.25)*1+0.5*100)/0.9375]))               # three of the first, one of the second
    assert not torch.allclose(theirs, ours, rtol=0.1)


@pytest.mark.filterwarnings('ignore:Using backward')
@pytest.mark.parametrize('make', [timm_adahessian,jettify_adahessian,kozistr_adahessian])
def test_the_loss_scale_stays_in_their_curvature(make):
    "`GradScaler` unscales `p.grad` in place before the step; the product that the others then take is still 65536 times too large"
    p = nn.Parameter(torch.ones(4))
    cls = make()
    def scaled(loss):
        (loss*SCALE).backward(create_graph=True)
        with torch.no_grad(): p.grad.div_(SCALE)
    kw = dict(hessian_power=1.) if make is jettify_adahessian else {}
    theirs = steps_on_a_quadratic(cls([p], lr=1., eps=1e-16, **kw), p, 1, scaled)[0]
    # the product of the scaled graph, divided in place with it or not: never the diagonal
    q = nn.Parameter(torch.ones(4))
    opt = adahessian([q], lr=1., wd=0., eps=1e-16)
    def ours_scaled(loss):
        opt.differentiate(loss*SCALE, scale=SCALE)
        q.grad.div_(SCALE)
    ours = steps_on_a_quadratic(opt, q, 1, ours_scaled)[0]
    assert torch.allclose(ours, A, rtol=ROUNDING*10)
    assert torch.allclose(theirs, A*SCALE, rtol=1e-2) or (theirs/A).min()>100


@pytest.mark.filterwarnings('ignore:Using backward')
def test_timm_cannot_thaw_a_layer():
    p,q = nn.Parameter(torch.ones(4)),nn.Parameter(torch.ones(4), requires_grad=False)
    opt = timm_adahessian()([p,q], lr=0.1)
    q.requires_grad_(True)
    (quadratic(p)+quadratic(q)).backward(create_graph=True)
    with pytest.raises(AttributeError, match='hess'): opt.step()
    a,b = nn.Parameter(torch.ones(4)),nn.Parameter(torch.ones(4), requires_grad=False)
    own = adahessian([a,b], lr=0.1)
    b.requires_grad_(True)
    own.differentiate(quadratic(a)+quadratic(b))
    own.step()
    assert (b<1).all()


def test_timm_ignores_the_users_seed():
    make = timm_adahessian()
    def draws(seed, opt): return torch.randint(0, 2, (64,), generator=opt.generator)
    opts = []
    for seed in (1,2):
        torch.manual_seed(seed)
        opts.append((make([nn.Parameter(torch.ones(4))]),adahessian([nn.Parameter(torch.ones(4))])))
    assert torch.equal(*[draws(0, o) for o,_ in opts])
    assert not torch.equal(*[o.estimator.draw(o.counts.rng())(torch.zeros(64), None) for _,o in opts])


@pytest.mark.filterwarnings('ignore:Using backward')
def test_torch_optimizer_gives_a_3d_parameter_the_curvature_of_another_one():
    "There is no rule for 1-D convolutions, and the value of the parameter before is taken"
    make = jettify_adahessian()
    first,conv = nn.Parameter(torch.ones(1)),nn.Parameter(torch.ones(1,1,2))
    opt = make([first,conv], lr=0.1)
    trace = []
    get_trace,opt.get_trace = opt.get_trace,lambda *a: trace.append(get_trace(*a)) or trace[-1]
    ((7*first**2).sum()/2 + (2*conv**2).sum()/2).backward(create_graph=True)
    opt.step()
    assert trace[0][1].item()==7.       # the truth is 2
    a,b = nn.Parameter(torch.ones(1)),nn.Parameter(torch.ones(1,1,2))
    own = adahessian([a,b], lr=0.1)
    own.differentiate((7*a**2).sum()/2 + (2*b**2).sum()/2)
    assert torch.equal(own.pending.diags[b], torch.full((1,1,2), 2.))
    with pytest.raises(UnboundLocalError):
        opt = make([conv], lr=0.1)
        conv.grad = None
        (2*conv**2).sum().backward(create_graph=True)
        opt.step()


@pytest.mark.filterwarnings('ignore:Using backward')
@pytest.mark.parametrize('make', [timm_adahessian,jettify_adahessian,kozistr_adahessian])
def test_a_parameter_without_curvature_stops_them(make):
    p,b = nn.Parameter(torch.ones(4)),nn.Parameter(torch.ones(1))
    opt = make()([p,b], lr=0.1)
    (quadratic(p)+b.sum()).backward(create_graph=True)
    with pytest.raises(RuntimeError, match='grad_fn|require grad'): opt.step()
    q,c = nn.Parameter(torch.ones(4)),nn.Parameter(torch.ones(1))
    own = adahessian([q,c], lr=0.1)
    own.differentiate(quadratic(q)+c.sum())
    own.step()
    assert (q<1).all() and torch.equal(own.state[c]['sqr_avg_diag_hessian'], torch.zeros(1))


def test_torch_optimizer_seeds_the_whole_process():
    make = jettify_adahessian()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    make([nn.Parameter(torch.ones(1))], seed=3)
    assert not torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    adahessian([nn.Parameter(torch.ones(1))])
    assert torch.equal(state, torch.get_rng_state())


def test_pytorch_optimizers_probes_have_both_signs_now():
    "Up to 3.9 the Rademacher probes were all -1 and the 'diagonal' the row sums; with this version 50 steps equal ours, and this is why"
    make = kozistr_adahessian()
    p = nn.Parameter(torch.ones(2))
    M = torch.tensor([[2.,-1.],[-1.,3.]])
    opt,found = make([p], lr=0.),[]
    for _ in range(200):
        opt.zero_grad()
        (p@M@p/2).backward(create_graph=True)
        opt.step()
        found.append(opt.state[p]['hessian'].clone())
        p.grad = None
    assert torch.stack(found).unique(dim=0).tolist()==[[1.,2.],[3.,4.]]     # diagonal ∓ 1, where row sums would be (1,2) always
