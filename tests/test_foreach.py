"The step on lists of tensors against the loop over steppers that defines it"
import copy,itertools,math

import pytest,torch
from fastai.basics import partial
from fastai.optimizer import Optimizer,average_grad,step_stat,weight_decay
from torch import nn

import adahessian_fastai.steppers as room
from adahessian_fastai.adahessian import AdaHessian,AdaHessianWrapper,adahessian_paper as adahessian
from adahessian_fastai.learner import look
from adahessian_fastai.sophia import sophia
from adahessian_fastai.steppers import adahessian_step,average_sqr_diag_hessian,list_forms,loop_step,portions,update

ROUNDING = 1e-8 # Relative, double precision: rounding that 20 steps of training amplify (measured up to 1e-10); a wrong term shows at 1e-3

def net(): return nn.Sequential(nn.Conv2d(2,3,3,bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27,5), nn.Tanh(), nn.Linear(5,2)).double()

def split(m): return [list(m[:2].parameters()), list(m[2:].parameters())]

def run(loop, n=20, out=(), freeze=(), twist=None, **kwargs):
    "Train for `n` steps, by the loop where `loop` says so; returns optimizer and parameters"
    torch.manual_seed(0)
    m,x,y = net(),torch.randn(8,2,5,5).double(),torch.randint(2, (8,))
    opt = adahessian(split(m), **{'lr': 0.05, 'eps': 1e-3, **kwargs})
    opt.set_hyper('lr', slice(0.01,0.05))
    for p in [list(m.parameters())[i] for i in out]: opt.opt_out(p)
    if loop: opt.opt.cbs.append(lambda p,**kw: None) # a stepper that nobody knows
    assert (list_forms(opt.opt.cbs) is None)==loop
    for i in range(n):
        for j,p in enumerate(m.parameters()): p.requires_grad_(j not in freeze or i>=3)
        if twist: twist(i, opt)
        opt.differentiate(nn.functional.cross_entropy(m(x), y))
        opt.step()
        opt.zero_grad()
    return opt,list(m.parameters())

def compare(**kwargs):
    (a,ps),(b,qs) = run(False, **kwargs),run(True, **kwargs)
    for p,q in zip(ps, qs):
        assert (p-q).norm() <= ROUNDING*q.norm()
        s,t = a.state[p],b.state[q]
        assert set(s)==set(t)
        for k in s:
            if isinstance(s[k], torch.Tensor): assert (s[k]-t[k]).norm() <= ROUNDING*t[k].norm(), k
            else: assert s[k]==t[k], k

@pytest.mark.parametrize('decouple_wd,hessian_power,kind', [*itertools.product((True,False), (1.,0.5,0.), ({},dict(signed=True),dict(debiased=True, n_samples=2)))], ids=str)
def test_parity(decouple_wd, hessian_power, kind): compare(decouple_wd=decouple_wd, hessian_power=hessian_power, wd=0.05, **kind)

@pytest.mark.parametrize('kwargs', [dict(update_each=3), dict(out=(0,5)), dict(freeze=(0,1)), dict(freeze=(2,), update_each=4, out=(1,)), dict(wd=0.),
    dict(debiased=True, n_samples=2, out=(0,5)), dict(update_each=(6,5)), dict(signed=True, update_each=3, out=(3,)),
    dict(block_length=1, average_kernels=False)], ids=str)
def test_parity_of_missing_estimates_and_opt_outs(kwargs): compare(**kwargs)

@pytest.mark.parametrize('old', [False,True], ids=['state','state of an older version'])
def test_negative_debiased_averages_survive_a_checkpoint(old):
    "The root of their absolute value is taken, also where the state does not say that they may be negative"
    kept = {}
    def twist(i, opt):
        if i!=12: return
        sd = copy.deepcopy(opt.state_dict())
        kept[len(kept)] = min(s['sqr_avg_diag_hessian'].min() for s in sd['state'])
        for s in sd['state']: old and s.pop('negative')
        opt.load_state_dict(sd)
    compare(twist=twist, debiased=True, n_samples=2, update_each=5)
    assert len(kept)==2 and all(v<0 for v in kept.values())

def test_parity_under_schedules_and_without_decay_of_some():
    def twist(i, opt):
        hypers = dict(lr=0.02*(1+math.sin(i)), mom=0.8+0.005*i, sqr_mom=0.9+0.004*i, eps=1e-3*(1+i), wd=0.01*i, hessian_power=1-0.04*i)
        opt.set_hypers(**hypers)
        if i==0: opt.state[opt.all_params()[1][0]]['do_wd'] = False
    compare(twist=twist)

@pytest.mark.parametrize('size', [1,7,10**9])
def test_portions_do_not_matter(size, monkeypatch):
    "One operation per entry is the same however tensors are cut"
    _,ref = run(False)
    monkeypatch.setattr(room, 'cpu_portion', size)
    for p,q in zip(run(False)[1], ref): assert torch.equal(p, q)

def test_portions_cover_every_entry_once():
    rows = [(torch.arange(n),)*4+(torch.arange(n),None) for n in (5,1,12,0,3)]
    got = [row for part in portions(rows, 4) for row in part]
    assert torch.cat([r[0] for r in got]).tolist()==torch.cat([r[0] for r in rows]).tolist()
    assert all(torch.equal(r[0], r[4]) and r[5] is None for r in got)
    assert max(sum(r[0].numel() for r in part) for part in portions(rows, 4)) < 8

def test_layouts_that_cannot_be_cut():
    "Channels last and transposed parameters, with gradients of another layout"
    def build():
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(4,3,5,5).to(memory_format=torch.channels_last)), nn.Parameter(torch.randn(6,8).T)]
        for p in ps: p.grad = torch.randn(p.shape)
        hyper = dict(lr=0.1, mom=0.9, sqr_mom=0.99, eps=1e-3, wd=0.1, hessian_power=1.)
        return ps,[(p,{},hyper,torch.rand(p.shape),None) for p in ps]
    (ps,a),(qs,b) = build(),build()
    cbs = AdaHessian([nn.Parameter(torch.ones(1))], lr=0.1).cbs
    for _ in range(3): update(a, cbs), loop_step(b, cbs)
    for p,q in zip(ps, qs): torch.testing.assert_close(p, q) # float32: the default tolerance of its rounding

@pytest.mark.parametrize('signed', [False,True])
def test_estimates_of_other_weights(signed):
    "In lists and one by one, three times a tenth and once a whole: β₂ to the power of the weights that were counted"
    def build():
        g = torch.Generator().manual_seed(0)
        ps = [nn.Parameter(torch.randn(3,4, generator=g).double()) for _ in range(2)]
        for p in ps: p.grad = torch.randn(p.shape, generator=g).double()
        hyper = dict(lr=0.1, mom=0.9, sqr_mom=0.8, eps=1e-3, wd=0.1, hessian_power=1.)
        return ps,[(p,{},hyper,torch.rand(p.shape, generator=g).double()+1,None) for p in ps]
    (ps,a),(qs,b) = build(),build()
    cbs = AdaHessian([nn.Parameter(torch.ones(1))], lr=0.1, signed=signed).cbs
    for weight in (0.1,0.1,0.1,1):
        for row in (*a,*b): row[1]['hess_weight'] = weight
        update(a, cbs), loop_step(b, cbs)
    name = 'avg_diag_hessian' if signed else 'sqr_avg_diag_hessian'
    for p,q,(_,s,*_),(_,t,_,d,_) in zip(ps, qs, a, b):
        assert (p-q).abs().max()<ROUNDING and s['hess_step']==t['hess_step']==pytest.approx(1.3)
        for o in (s,t): assert (o[name]-(1-0.8**1.3)*(d if signed else d**2)).abs().max()<ROUNDING

def test_which_steppers_are_standard():
    for signed,decouple_wd in itertools.product((True,False), repeat=2):
        cbs = AdaHessian([nn.Parameter(torch.ones(1))], lr=0.1, signed=signed, decouple_wd=decouple_wd).cbs
        assert len(list_forms(cbs))==len(cbs) and list_forms([*cbs, print]) is None and list_forms(cbs[:3]) is None
    undamped = [weight_decay, partial(average_grad, dampening=False), step_stat, average_sqr_diag_hessian, adahessian_step]
    assert list_forms(undamped) is None
    assert len(list_forms(sophia([nn.Parameter(torch.ones(1))]).opt.cbs))==4

def test_steppers_of_the_user_are_called():
    seen = []
    def spy(p, **kwargs): seen.append(p)
    p = nn.Parameter(torch.tensor([3.,1.]))
    base = AdaHessian([p], lr=0.1, wd=0.)
    opt = AdaHessianWrapper(Optimizer([p], [*base.cbs, spy], **base.hypers[0]))
    opt.differentiate((p**3).sum())
    opt.step()
    assert len(seen)==1 and seen[0] is p
    assert torch.allclose(p.detach(), torch.tensor([2.85,0.95]), atol=1e-4)

def test_state_goes_on_with_either():
    (a,_),(b,_) = run(False, n=5),run(True, n=5)
    assert {k for s in a.state.values() for k in s}=={k for s in b.state.values() for k in s}

def test_finite():
    def all_finite(tensors): return not any(map(math.isnan, look([], tensors)[1]))
    assert all_finite([torch.ones(3), torch.zeros(0)]) and all_finite([]) and all_finite([torch.full((4,), 3e38)])
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in (torch.float, torch.double, torch.bfloat16): assert not all_finite([torch.ones(3), torch.tensor([1.,bad], dtype=dtype)])
    assert all_finite([torch.full((4,), 6e4, dtype=torch.float16)])

@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16, torch.float, torch.double])
@pytest.mark.parametrize('size', [4,10**9])
def test_dtypes(dtype, size, monkeypatch):
    "Numbers of the step do not change the type of a state, and are not rounded to another one"
    monkeypatch.setattr(room, 'cpu_portion', size)
    hyper = dict(lr=0.1, mom=0.9, sqr_mom=0.99, eps=1e-3, wd=0.1, hessian_power=1.)
    def build():
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(n, dtype=torch.double).to(dtype)) for n in (7,5,0,1)]
        for p in ps: p.grad = torch.randn(p.shape, dtype=torch.double).to(dtype)
        return ps,[(p,{},hyper,(torch.rand(p.shape)+0.5).to(dtype),None) for p in ps]
    (ps,a),(qs,b) = build(),build()
    cbs = AdaHessian([nn.Parameter(torch.ones(1))], lr=0.1).cbs
    for _ in range(3): update(a, cbs), loop_step(b, cbs)
    for p,q in zip(ps, qs): torch.testing.assert_close(p, q, rtol=20*torch.finfo(dtype).eps, atol=20*torch.finfo(dtype).eps) # three steps of rounding
    for (_,s,*_),(_,t,*_) in zip(a, b): assert {k: getattr(v, 'dtype', v) for k,v in s.items()}=={k: getattr(v, 'dtype', v) for k,v in t.items()}

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_one_bad_entry_changes_nothing(bad):
    "A gradient is looked at as a whole before the first portion moves"
    opt,ps = run(False, n=3)
    for p in ps: p.grad = torch.ones_like(p)
    ps[-1].grad[-1] = bad
    before = copy.deepcopy([(p.detach(), opt.state[p]) for p in ps])
    with pytest.warns(UserWarning, match='not finite'): opt.step()
    for (q,old),p in zip(before, ps):
        assert torch.equal(p, q) and set(old)==set(opt.state[p])
        assert all(torch.equal(v, opt.state[p][k]) if isinstance(v, torch.Tensor) else v==opt.state[p][k] for k,v in old.items())
    assert (opt.n_steps,opt.n_skipped)==(3,1)

def both_ways(rows, n=3, clip=0., cap=0., signed=False):
    "Parameters of `rows() -> (parameters, work)` after `n` steps in lists, and after as many one by one"
    cbs = AdaHessian([nn.Parameter(torch.ones(1))], lr=0.1, signed=signed).cbs
    (ps,a),(qs,b) = rows(),rows()
    for row in (*a,*b): row[2].update(clip=clip, cap=cap)
    for _ in range(n): update(a, cbs), loop_step(b, cbs)
    return ps,qs

def a_hyper(): return dict(lr=0.1, mom=0.9, sqr_mom=0.8, eps=1e-3, wd=0.1, hessian_power=1.)

def test_noise_of_other_weights():
    "What is subtracted has the weight of what it is subtracted from"
    def rows():
        p,hyper = nn.Parameter(torch.ones(3).double()),a_hyper()
        p.grad = torch.tensor([1.,2.,3.]).double()
        return [p],[(p,{'hess_weight': 0.1},hyper,torch.full((3,), 2.).double(),torch.full((3,), 1.).double())]
    (p,),(q,) = both_ways(rows)
    assert (p-q).abs().max()<1e-8

@pytest.mark.parametrize('kwargs', [dict(clip=3.), dict(cap=0.1), dict(clip=3., cap=0.1)], ids=str)
def test_bounds_of_a_step_that_is_zero(kwargs):
    "A parameter whose gradients have been zero stays where it is, and the others move"
    def rows():
        ps,hyper = [nn.Parameter(torch.ones(3)) for _ in range(2)],{**a_hyper(), 'wd': 0.}
        for p,g in zip(ps, (0.,1.)): p.grad = torch.full((3,), g)
        return ps,[(p,{},hyper,torch.ones(3),None) for p in ps]
    for a,b in both_ways(rows, **kwargs): assert a.tolist()==[1.]*3 and b.isfinite().all() and (b<1).all()

def test_a_large_parameter_with_a_gradient_of_another_layout(monkeypatch):
    "It is not cut"
    monkeypatch.setattr(room, 'cpu_portion', 7)
    def rows():
        p = nn.Parameter(torch.ones(6,8))
        p.grad = torch.arange(48.).view(8,6).T
        return [p],[(p,{},a_hyper(),torch.ones(6,8),None)]
    (p,),(q,) = both_ways(rows)
    torch.testing.assert_close(p, q)

def test_parameters_of_two_dtypes_in_one_group():
    "Those of one type alone are stepped together, as `eps` is rounded to it"
    def rows():
        ps,hyper = [nn.Parameter(torch.ones(3, dtype=o)) for o in (torch.half,torch.double)],{**a_hyper(), 'eps': 1e-8}
        for p in ps: p.grad = torch.ones_like(p)
        return ps,[(p,{},hyper,torch.full_like(p, 1e-8 if p.dtype==torch.double else 1., requires_grad=False),None) for p in ps]
    ps,qs = both_ways(rows)
    assert (ps[1]-qs[1]).abs().max()<1e-8 and [p.dtype for p in ps]==[torch.half,torch.double]

def test_a_large_parameter_with_a_bound_is_not_cut(monkeypatch):
    "The bound is in root mean squares of the whole tensor"
    monkeypatch.setattr(room, 'cpu_portion', 4)
    def rows():
        p = nn.Parameter(torch.zeros(8))
        p.grad = torch.tensor([1.]*4 + [100.]*3 + [1000.])
        return [p],[(p,{},a_hyper(),torch.ones(8),None)]
    (p,),(q,) = both_ways(rows, clip=1.5)
    torch.testing.assert_close(p, q)
