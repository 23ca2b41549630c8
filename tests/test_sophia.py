"Sophia against its algorithm written out, its arguments, and the route through a Learner"
import copy,math

import pytest,torch
import torch.nn.functional as F
from fastai.basics import CrossEntropyLossFlat,DataLoaders,L,Learner,nn,partial,set_seed
from fastai.callback.all import GradientClip
from adahessian_fastai.hutchinson import rademacher_like
from adahessian_fastai.adahessian import AdaHessianWrapper
from adahessian_fastai.estimators import Given
from adahessian_fastai.learner import own_lr
from adahessian_fastai.problem import Problem
from adahessian_fastai.sophia import sophia,sophia_step,win_rate

# 40 contracting steps amplify the last bit of float64 (1e-16) by less than 1e4
ROUNDING = 1e-12


def problem(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3,4), nn.Tanh(), nn.Linear(4,3)).double(),torch.randn(12,3).double(),torch.randint(3, (12,))


def step(opt, net, x, y):
    out = net(x)
    loss = F.cross_entropy(out, y)
    opt.differentiate(Problem(list(net.parameters()), loss, out, y, F.cross_entropy))
    opt.step()
    opt.zero_grad()


class Twin:
    "Algorithm 3 of arXiv 2305.14342, one parameter after the other"
    def __init__(self, ps, estimate, lr, b1, b2, gamma, lam, eps, k):
        self.ps,self.estimate,self.lr,self.b1,self.b2,self.gamma,self.lam,self.eps,self.k = ps,estimate,lr,b1,b2,gamma,lam,eps,k
        self.m,self.h,self.t,self.clipped = [torch.zeros_like(p) for p in ps],[torch.zeros_like(p) for p in ps],0,[]

    def step(self, loss):
        self.t += 1
        gs = torch.autograd.grad(loss(), self.ps)
        ĥ = self.estimate() if self.t%self.k==1 or self.k==1 else None
        for i,(p,g) in enumerate(zip(self.ps, gs)):
            self.m[i] = self.b1*self.m[i] + (1-self.b1)*g
            if ĥ is not None: self.h[i] = self.b2*self.h[i] + (1-self.b2)*ĥ[i]
            p.data = p.data - self.lr*self.lam*p.data
            ratio = self.m[i]/torch.maximum(self.gamma*self.h[i], torch.full_like(p, self.eps))
            self.clipped.append((ratio.abs()>=1).double().mean().item())
            p.data = p.data - self.lr*torch.clip(ratio, -1, 1)


@pytest.mark.parametrize('kw', [dict(), dict(rho=2.), dict(update_each=1, mom=0.5, sqr_mom=0.8, rho=1., wd=0.02), dict(eps=0.05, update_each=3)],
    ids=['defaults','large rho','each step','large eps'])
def test_forty_steps_equal_algorithm_3_with_hutchinson(kw):
    ours,x,y = problem()
    theirs = copy.deepcopy(ours)
    probe = lambda: (lambda g: lambda p,_: rademacher_like(p, g))(torch.Generator().manual_seed(1))
    opt = sophia(list(ours.parameters()), lr=0.01, estimator='hutchinson', probe=probe(), **kw)
    draw,ps = probe(),list(theirs.parameters())
    loss = lambda: F.cross_entropy(theirs(x), y)
    def estimate():
        zs = [draw(p, None) for p in ps]
        gs = torch.autograd.grad(loss(), ps, create_graph=True)
        return [z*h for z,h in zip(zs, torch.autograd.grad(gs, ps, zs))]
    twin = Twin(ps, estimate, 0.01, kw.get('mom',0.965), kw.get('sqr_mom',0.99), kw.get('rho',0.04), kw.get('wd',0.1), kw.get('eps',1e-12), kw.get('update_each',10))
    for _ in range(40):
        step(opt, ours, x, y)
        twin.step(loss)
    assert max((a-b).abs().max() for a,b in zip(ours.parameters(), ps))<ROUNDING
    assert 0<sum(twin.clipped)/len(twin.clipped)<1
    last = sum((torch.abs(m)<torch.clamp(twin.gamma*h, min=twin.eps)).sum().item() for m,h in zip(twin.m, twin.h))/sum(p.numel() for p in ps)
    assert win_rate(opt)==[last]


def test_forty_steps_equal_algorithm_3_with_gnb():
    "Labels from the optimizer's own generators; the paper's B·ĝ² with the gradient of the mean loss at those labels"
    ours,x,y = problem()
    theirs = copy.deepcopy(ours)
    opt = sophia(list(ours.parameters()), lr=0.01, rho=1.)
    ps,labels = list(theirs.parameters()),{}
    def estimate():
        logits = theirs(x)
        y_hat = torch.multinomial(logits.detach().softmax(-1), 1, generator=labels['rng'](logits.device)).squeeze(1)
        return [len(x)*g**2 for g in torch.autograd.grad(F.cross_entropy(logits, y_hat), ps)]
    twin = Twin(ps, estimate, 0.01, 0.965, 0.99, 1., 0.1, 1e-12, 10)
    for _ in range(40):
        labels['rng'] = copy.deepcopy(opt).counts.rng()
        step(opt, ours, x, y)
        twin.step(lambda: F.cross_entropy(theirs(x), y))
    assert opt.n_estimates==4
    assert max((a-b).abs().max() for a,b in zip(ours.parameters(), ps))<ROUNDING


def test_first_step_without_bias_correction():
    "m = 0.035 g and h = 0.01 ĥ, so the ratio is 87.5 g/ĥ for ρ = 0.04: large gradients are clipped, small ones are not"
    p = nn.Parameter(torch.tensor([1.,1.], dtype=torch.double))
    opt = sophia([p], lr=0.1, estimator='hutchinson', wd=0.)
    c = torch.tensor([100.,1.]).double()
    opt.differentiate((c*(p-1.001)**2/2).sum() + (torch.tensor([0.,3.]).double()*p).sum())
    opt.step()
    assert torch.allclose(p.detach(), torch.tensor([1+0.1*87.5*0.001, 1-0.1]).double())


def end(**kw):
    net,x,y = problem()
    torch.manual_seed(3)
    opt = sophia(list(net.parameters()), **{'lr': 0.01, 'update_each': 2, **kw})
    for _ in range(5): step(opt, net, x, y)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


CHANGES = dict(lr=0.02, mom=0.5, sqr_mom=0.5, rho=1., wd=0.5, update_each=1, estimator='hutchinson', eps=0.1, n_samples=2, block_length=4)

@pytest.mark.parametrize('name', CHANGES)
def test_every_argument_changes_the_run(name):
    base = dict(rho=20.)
    assert not torch.allclose(end(**base), end(**{**base, name: CHANGES[name]}), atol=1e-9)


@pytest.mark.parametrize('kw', [dict(curvature='ggn'), dict(probe='gaussian'), dict(estimator='control_variate', probe='gaussian')], ids=['ggn','gaussian','control'])
def test_arguments_of_the_hutchinson_estimator_change_the_run(kw):
    base = dict(rho=0.5, estimator='hutchinson')
    assert not torch.allclose(end(**base), end(**{**base, **kw}), atol=1e-9)


@pytest.mark.parametrize('kw,match', [(dict(rho=0.), 'rho must be a number > 0'), (dict(rho=[0.1,-1.]), 'rho must be a number > 0'), (dict(lr=-1.), 'lr must be'),
    (dict(mom=1.), 'mom must be'), (dict(update_each=0), 'update_each=0'), (dict(estimator='magic'), "estimator='magic'"), (dict(probe='gaussian'), 'takes no probe')],
    ids=['rho','rhos','lr','mom','update_each','estimator','probe'])
def test_wrong_arguments_are_named(kw, match):
    with pytest.raises(ValueError, match=match): sophia([nn.Parameter(torch.ones(1))], **kw)


def learner(shuffle=True, **kw):
    torch.manual_seed(0)
    x = torch.randn(128,3)
    dls = DataLoaders.from_dsets(list(zip(x, (x[:,0]>0).long())), [], bs=16, num_workers=0, shuffle=shuffle)
    return Learner(dls, nn.Sequential(nn.Linear(3,8), nn.ReLU(), nn.Linear(8,2)), CrossEntropyLossFlat(), **kw)


def loss_of(learn):
    x,y = map(torch.stack, zip(*learn.dls.train_ds))
    return F.cross_entropy(learn.model(x), y).item()


@pytest.mark.parametrize('kw', [{}, dict(estimator='hutchinson'), dict(n_acc=2), dict(hessian_bs=0.5, n_samples=2)], ids=['gnb','hutchinson','n_acc','part'])
def test_fit_one_cycle(kw):
    learn = learner(opt_func=partial(sophia, **kw))
    before = loss_of(learn)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(8, 0.03, cbs=GradientClip(1.))
    steps = 64//kw.get('n_acc',1)
    assert learn.opt.n_steps==steps and learn.opt.n_estimates==-(-steps//10)*kw.get('n_acc',1)
    assert loss_of(learn)<0.5*before and 0<=win_rate(learn.opt)[0]<=1
    assert isinstance(learn.opt, AdaHessianWrapper) and (len(learn.opt.noise_record)>0)==('n_samples' in kw)


def test_default_learning_rate():
    "More for a training of a few steps, and the same as in a loop of one's own for a long one"
    learn = learner(opt_func=sophia)
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    assert learn.lr==1.5e-3 and learn.opt.hypers[0]['lr']==3e-3
    assert own_lr(learn.opt, 0)==own_lr(learn.opt)==1.5e-3 and own_lr(learn.opt, trained=True)==1e-3
    assert own_lr(learn.opt, 225)==1.5e-3 and own_lr(learn.opt, 10_000)==1e-3==sophia([nn.Parameter(torch.ones(1))]).hypers[0]['lr']


def test_a_saved_run_continues_bit_by_bit(tmp_path):
    def run(n, **kw):
        set_seed(0, reproducible=True)
        learn = learner(False, opt_func=sophia, path=tmp_path)
        with learn.no_bar(),learn.no_logging(): learn.fit(n, 0.01)
        return learn
    def go_on(learn):
        set_seed(7, reproducible=True)
        with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.01)
        return [p.detach().clone() for p in learn.model.parameters()]
    learn = run(2)
    learn.save('half')
    whole = go_on(learn)
    other = learner(False, opt_func=sophia, path=tmp_path)
    other.create_opt()
    other.load('half')
    assert all(torch.equal(a, b) for a,b in zip(whole, go_on(other)))


def test_negative_and_missing_curvature_gives_the_sign_of_momentum():
    p = torch.zeros(3)
    sophia_step(p, lr=0.1, rho=0.04, eps=1e-12, grad_avg=torch.tensor([1e-3,-1e-3,5.]), avg_diag_hessian=torch.tensor([-7.,0.,1e-9]))
    assert torch.allclose(p, torch.tensor([-0.1,0.1,-0.1]))


def test_every_setting_arrives():
    opt = sophia([nn.Parameter(torch.ones(2))], None, .8, .9, .5, .2, 7, eps=1e-3, n_acc=2, n_samples=4, hessian_bs=.5, dense=(3,2), block_length=8,
        average_kernels=True)
    assert opt.hypers[0]==dict(lr=1e-3, mom=.8, sqr_mom=.9, rho=.5, wd=.2, eps=1e-3) and (opt.n_acc,opt.estimator.n_samples)==(2,4)
    assert {k: vars(opt.when)[k] for k in ('update_each','hessian_bs','dense','probes')}==dict(update_each=7, hessian_bs=.5, dense=3, probes=2)
    assert opt.smooth.keywords==dict(block_length=8, signed=True, average_kernels=True)


def test_defaults_are_those_of_the_paper():
    opt = sophia([nn.Parameter(torch.ones(2))])
    assert opt.hypers[0]==dict(lr=1e-3, mom=.965, sqr_mom=.99, rho=.04, wd=.1, eps=1e-12) and opt.when.update_each==10
    assert opt.smooth.keywords==dict(block_length=1, signed=True, average_kernels=False)


def test_the_win_rate_is_that_of_each_group_with_averages():
    "m = 0.035·2a and h = 0.01·2, so an entry below 2/7 is not clipped for ρ = 1, whatever its sign"
    a,b = nn.Parameter(torch.tensor([0.1,-0.2,-1.,2.])),nn.Parameter(torch.ones(2))
    opt = sophia([[a],[b]], rho=1., wd=0., estimator='hutchinson')
    opt.differentiate((a**2).sum())
    opt.step()
    first,second = win_rate(opt)
    assert first==0.5 and math.isnan(second)


@pytest.mark.parametrize('foreach', [True,False])
def test_a_model_in_float16_does_not_divide_by_nothing(foreach):
    "`eps` of 1e-12 is zero there: an entry without gradient and curvature stays where it is"
    w = nn.Parameter(torch.tensor([1.,2.]).half())
    opt = sophia([w], lr=0.01, wd=0., estimator=Given(lambda problem,params: [torch.tensor([0.,1.]).half()]))
    if not foreach: opt.opt.cbs = L(*opt.opt.cbs, lambda p, **kwargs: None)
    opt.differentiate((w*torch.tensor([0.,1.]).half()).sum())
    opt.step()
    assert w[0]==1. and w[1]<2. and w.isfinite().all()
