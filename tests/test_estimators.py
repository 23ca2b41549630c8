"Estimators against dense Hessians in float64, the arguments that choose among them, and what a step makes of them"
import copy,math,warnings

import pytest,torch
import torch.nn.functional as F
from fastai.basics import DataLoaders,Learner,MSELossFlat,nn,partial,set_seed
from fastai.callback.all import GradientAccumulation,MixUp
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Lookahead
from adahessian_fastai.adahessian import AdaHessian,AdaHessianWrapper,adahessian_paper as adahessian
from adahessian_fastai.cg import CG,LineSearch
from adahessian_fastai.curvature import GaussNewton,Hessian
from adahessian_fastai.estimators import ControlVariate,GNB,Given,Hutchinson,seeded
from adahessian_fastai.hutchinson import control_variate_samples,gaussian_like,hutchinson_samples,mean_and_noise,rademacher_like,sample_mean
from adahessian_fastai.learner import trainable_params
from adahessian_fastai.optimizer import due
from adahessian_fastai.problem import Problem
from adahessian_fastai.schedule import Budget,Every
from adahessian_fastai.steppers import average_sqr_diag_hessian,signed_average

# A mean may be off by this many of its standard errors; one in 10^8 is, and there are some hundred entries
STANDARD_ERRORS = 6
# The same numbers in float64, added up in another order
ROUNDING = 1e-10


def problem(seed=3, bs=12):
    "A network that was trained a little, with labels that it cannot learn: curvature of both signs"
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3,4), nn.Tanh(), nn.Linear(4,3)).double()
    x,y = 2*torch.randn(bs,3).double(),torch.randint(3, (bs,))
    with torch.no_grad():
        for p in net.parameters(): p.mul_(2)
    opt = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(20):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    net.zero_grad()
    return net,x,y


def flat(ts): return torch.cat([t.detach().flatten() for t in ts])


curvatures = dict(hessian=Hessian, ggn=GaussNewton)


def evaluation(net, x, y):
    out = net(x)
    return Problem(list(net.parameters()), F.cross_entropy(out, y), out, y, F.cross_entropy)


def matrix(net, x, y, curvature):
    "Dense Hessian or Gauss-Newton matrix by torch.func"
    names,ps = zip(*[(k,p.detach()) for k,p in net.named_parameters()])
    sizes = [p.numel() for p in ps]
    def out(v): return torch.func.functional_call(net, {k: o.view_as(p) for k,o,p in zip(names, v.split(sizes), ps)}, (x,))
    v = flat(ps)
    if curvature=='hessian': return torch.func.hessian(lambda v: F.cross_entropy(out(v), y))(v)
    J = torch.func.jacrev(lambda v: out(v).flatten())(v)
    H = torch.func.hessian(lambda z: F.cross_entropy(z.view(len(x),-1), y))(out(v).flatten())
    return J.T@H@J


def samples(kind, n, n_samples=1, probe=rademacher_like, curvature='hessian', center=None, f=sample_mean, seed=0):
    net,x,y = problem()
    gen,c = torch.Generator().manual_seed(seed),curvatures[curvature]()
    est = dict(hutchinson=lambda: Hutchinson(c, n_samples, probe), control_variate=lambda: ControlVariate(c, n_samples, probe),
        gnb=lambda: GNB(n_samples))[kind]()
    def one(): return est(evaluation(net, x, y), list(net.parameters()), lambda d: gen, lambda ps: center)
    return [one().diag if f is sample_mean else tuple(one()[:2]) for _ in range(n)]


@pytest.mark.parametrize('curvature', curvatures)
def test_products_equal_the_dense_matrix(curvature):
    net,x,y = problem()
    M = matrix(net, x, y, curvature)
    ps = list(net.parameters())
    product = curvatures[curvature]()(evaluation(net, x, y), ps, 3).product
    for seed in range(3):
        v = torch.randn(len(M), generator=torch.Generator().manual_seed(seed)).double()
        split = [o.view_as(p) for o,p in zip(v.split([p.numel() for p in ps]), ps)]
        assert torch.allclose(flat(product(split)), M@v, atol=ROUNDING)


def test_the_test_problem_has_curvature_of_both_signs_and_the_gauss_newton_one_has_not():
    net,x,y = problem()
    H,G = (matrix(net, x, y, k).diagonal() for k in ('hessian','ggn'))
    assert (H<0).any() and (H>0).any() and (G>=0).all() and (H-G).norm()/H.norm()>0.05


ROWS = {'plain': ('hutchinson', {}, 'hessian'), 'gaussian': ('hutchinson', dict(probe=gaussian_like), 'hessian'),  # chkstyle: ignore-node
    'n=4': ('hutchinson', dict(n_samples=4), 'hessian'), 'ggn': ('hutchinson', dict(curvature='ggn'), 'ggn'),
    'gnb': ('gnb', {}, 'ggn'), 'gnb n=2': ('gnb', dict(n_samples=2), 'ggn'),
    'control variate': ('control_variate', dict(probe=gaussian_like), 'hessian'),
    'control variate, ggn': ('control_variate', dict(probe=gaussian_like, curvature='ggn'), 'ggn')}

@pytest.mark.parametrize('row', ROWS)
def test_unbiased(row):
    kind,kw,curvature = ROWS[row]
    net,x,y = problem()
    d = matrix(net, x, y, curvature).diagonal()
    if kind=='control_variate':     # any guess will do, a bad one too
        gen = torch.Generator().manual_seed(5)
        kw = {**kw, 'center': [torch.randn(p.shape, generator=gen).double()*d.abs().max() for p in net.parameters()]}
    n = 1500
    D = torch.stack([flat(s) for s in samples(kind, n, **kw)])
    assert D.std(0).max()>0
    assert ((D.mean(0)-d).abs() <= STANDARD_ERRORS*D.std(0)/n**0.5 + ROUNDING).all()
    if kind!='gnb': assert (D<0).any() and (D>0).any()
    else: assert (D>=0).all()


def dense_case():
    "A Hessian with its diagonal, as a matrix, and the squares beside the diagonal summed by row"
    H = matrix(*problem(), 'hessian')
    return H,H.diagonal(),H.square().sum(1)-H.diagonal()**2


def test_variances_are_those_of_the_formulas():
    "Rademacher: Σ_{j≠i} H²; Gaussian: 2(H_ii-c_i)² more. So a perfect guess brings Gaussian probes down to Rademacher ones, and no further"
    H,d,off = dense_case()
    product = lambda v: [H@v[0]]
    for probe,c,var in ((rademacher_like,None,off), (gaussian_like,None,off+2*d**2), (gaussian_like,d/2,off+2*(d/2)**2), (gaussian_like,d,off)):
        gen = torch.Generator().manual_seed(0)
        kw = dict(n_samples=10000, probe=probe, generator=gen)
        found = hutchinson_samples(product, [d], **kw) if c is None else control_variate_samples(product, [d], [c], **kw)
        # the total over all entries: the variance of a variance is large for products of Gaussians
        assert abs(torch.stack([s[0] for s in found]).var(0).sum()/var.sum()-1)<0.05


def test_a_control_variate_changes_nothing_with_rademacher_probes():
    net,*_ = problem()
    c = [torch.ones_like(p) for p in net.parameters()]
    a,b = (flat(samples(k, 1, center=c)[0]) for k in ('hutchinson','control_variate'))
    assert torch.allclose(a, b, atol=ROUNDING)


@pytest.mark.parametrize('n', [2,3,4,5])
def test_mean_and_noise(n):
    "e has mean zero and the variance of the error, so D²-e² is unbiased for d²; odd numbers of samples included"
    H,d,_ = dense_case()
    draw = lambda seed: hutchinson_samples(lambda v: [H@v[0]], [d], n, generator=torch.Generator().manual_seed(seed))
    D,e = (torch.stack([o[i][0] for o in map(mean_and_noise, map(draw, range(3000)))]) for i in (0,1))
    assert torch.allclose(D[7], sample_mean(draw(7))[0], atol=ROUNDING)
    assert (e.mean(0).abs() <= STANDARD_ERRORS*e.std(0)/len(e)**0.5 + ROUNDING).all()
    assert abs(e.var(0).sum()/D.var(0).sum()-1)<0.1
    sq = D**2-e**2
    assert ((sq.mean(0)-d**2).abs() <= STANDARD_ERRORS*sq.std(0)/len(sq)**0.5 + ROUNDING).all()
    biased = (D**2).mean(0)-d**2
    assert biased.sum()>0.5*D.var(0).sum()      # what is taken away is not nothing
    assert (sq<0).any()                         # and single terms may be negative


def test_debiased_average_converges_to_the_square_of_the_diagonal_and_the_plain_one_does_not():
    "Through the optimizer's own stats, at parameters that do not move"
    net,x,y = problem()
    ps = list(net.parameters())
    d = matrix(net, x, y, 'hessian').diagonal()
    found = {}
    for debiased in (False,True):
        opt = adahessian(ps, lr=0., sqr_mom=0.999, n_samples=2, debiased=debiased, signed_blocks=True, block_length=1)
        for _ in range(600):
            opt.differentiate(F.cross_entropy(net(x), y))
            opt.step()
            opt.zero_grad()
        found[debiased] = flat([opt.state[p]['sqr_avg_diag_hessian'] for p in ps])/(1-0.999**600)
    error = {k: ((v-d**2).norm()/(d**2).norm()).item() for k,v in found.items()}
    assert error[True]<0.15 and error[False]>2*error[True]


def fit(n=4, seed=0, lr=0.1, **kw):
    "Parameters after `n` steps; the probes are decided by the seed"
    net,x,y = problem()
    torch.manual_seed(seed)
    opt = adahessian(list(net.parameters()), lr=lr, **kw)
    for _ in range(n):
        out = net(x)
        loss = F.cross_entropy(out, y)
        opt.differentiate(Problem(list(net.parameters()), loss, out, y, F.cross_entropy))
        opt.step()
        opt.zero_grad()
    return flat(net.parameters()),opt


NEW = dict(signed=dict(signed=True), signed_blocks=dict(signed_blocks=True), debiased=dict(debiased=True, n_samples=2),
    control_variate=dict(signed=True, estimator='control_variate', probe='gaussian'), gnb=dict(estimator='gnb'), ggn=dict(curvature='ggn'),
    gnb_signed=dict(estimator='gnb', signed=True), ggn_control=dict(curvature='ggn', signed=True, estimator='control_variate', probe='gaussian'),
    gnb_debiased=dict(estimator='gnb', debiased=True, n_samples=3), gnb_two=dict(estimator='gnb', n_samples=2))

def test_every_argument_and_combination_takes_another_way():
    others = dict(default={}, two=dict(n_samples=2), two_signed=dict(n_samples=2, signed_blocks=True), gaussian_signed=dict(signed=True, probe='gaussian'))
    ends = {k: fit(**kw)[0] for k,kw in {**others, **NEW}.items()}
    assert all(v.isfinite().all() for v in ends.values())
    same = [(a,b) for a in ends for b in ends if a<b and torch.allclose(ends[a], ends[b], atol=1e-8)]
    assert same==[]
    assert all(torch.equal(ends[k], fit(**kw)[0]) for k,kw in NEW.items())      # and the same way again


@pytest.mark.parametrize('kw,match', [
    (dict(estimator='magic'), "estimator='magic'"), (dict(curvature='fisher'), "curvature='fisher'"),
    (dict(estimator='control_variate', signed=True, probe='rademacher'), "probe='gaussian'"), (dict(estimator='control_variate', probe='gaussian'), 'signed=True'),
    (dict(estimator='gnb', probe='gaussian'), 'takes no probe'), (dict(debiased=True), 'n_samples >= 2'),
    (dict(debiased=True, n_samples=2, signed=True), 'choose one'), (dict(signed=True, signed_blocks=False), 'signed blocks'),
    (dict(debiased=True, n_samples=2, signed_blocks=False), 'signed blocks'), (dict(hessian_bs=0), 'hessian_bs=0'),
    (dict(hessian_bs=1.5), 'hessian_bs=1.5'), (dict(hessian_bs=True), 'hessian_bs=True'), (dict(hessian_bs=0.), 'hessian_bs=0.0')],
    ids=lambda o: None if isinstance(o,dict) else o)
def test_what_makes_no_sense_is_refused_when_the_optimizer_is_made(kw, match):
    with pytest.raises(ValueError, match=match): adahessian([nn.Parameter(torch.zeros(2))], **kw)


def test_signed_step_against_a_literal_twin():
    "30 steps of the signed variant written out: m̂ / (|ĉ|^k + ϵ), blocks averaged with their signs"
    hp = dict(lr=0.1, mom=0.8, sqr_mom=0.9, eps=1e-3, wd=0.01, hessian_power=0.7)
    probe = lambda seed: (lambda g: lambda p,_: rademacher_like(p, g))(torch.Generator().manual_seed(seed))
    ours,x,y = problem()
    theirs = copy.deepcopy(ours)
    opt = adahessian(list(ours.parameters()), signed=True, block_length=5, probe=probe(3), **hp)
    draw,ps = probe(3),list(theirs.parameters())
    m,c = [torch.zeros_like(p) for p in ps],[torch.zeros_like(p) for p in ps]
    for t in range(1,31):
        opt.differentiate(F.cross_entropy(ours(x), y))
        opt.step()
        opt.zero_grad()
        zs = [draw(p, None) for p in ps]
        gs = torch.autograd.grad(F.cross_entropy(theirs(x), y), ps, create_graph=True)
        hz = torch.autograd.grad(sum((g*z).sum() for g,z in zip(gs, zs)), ps)
        for i,p in enumerate(ps):
            d = zs[i]*hz[i]
            if d.ndim==2: d = torch.cat([b.mean().expand_as(b) for b in d.flatten().split(5)]).view_as(d)
            p.data -= hp['lr']*hp['wd']*p.data
            m[i] = hp['mom']*m[i] + (1-hp['mom'])*gs[i].detach()
            c[i] = hp['sqr_mom']*c[i] + (1-hp['sqr_mom'])*d
            denom = (c[i]/(1-hp['sqr_mom']**t)).abs()**hp['hessian_power'] + hp['eps']
            p.data -= hp['lr']*m[i]/(1-hp['mom']**t)/denom
    assert (flat(ours.parameters())-flat(theirs.parameters())).abs().max()<ROUNDING*max(1, flat(theirs.parameters()).abs().max())


def test_control_variate_takes_its_guess_from_the_state():
    _,opt = fit(n=3, signed=True, estimator='control_variate', probe='gaussian', sqr_mom=0.9, lr=0.01)
    p = trainable_params(opt)[0]
    s = opt.state[p]
    assert s['hess_step']==3
    assert torch.allclose(signed_average(opt, [p])[0], s['avg_diag_hessian']/(1-0.9**3))
    fresh = adahessian([nn.Parameter(torch.ones(2))], signed=True, estimator='control_variate', probe='gaussian')
    assert torch.equal(signed_average(fresh, trainable_params(fresh))[0], torch.zeros(2))


def test_probes_are_independent_between_parameters_estimates_and_ranks(monkeypatch):
    "Two layers of one shape in L = Σab: the true diagonal is zero, and equal probes would estimate one"
    a,b = nn.Parameter(torch.full((512,),2.)),nn.Parameter(torch.full((512,),3.))
    torch.manual_seed(0)
    opt = adahessian([a,b], n_samples=1)
    draws = {}
    for rank in range(3):
        monkeypatch.setattr('adahessian_fastai.learner.rank_distrib', lambda: rank)
        for opt.n_estimates in range(3):
            draw = opt.estimator.draw(opt.counts.rng())
            for k,p in dict(a=a, b=b).items(): draws[rank,opt.n_estimates,k] = draw(p, None)
    zs = list(draws.values())
    correlation = torch.stack(zs)@torch.stack(zs).T/512
    assert (correlation-torch.eye(len(zs))).abs().max() < STANDARD_ERRORS/512**0.5
    opt.n_estimates = 0
    opt.differentiate((a*b).sum())
    assert abs(opt.diags[a].mean()) < STANDARD_ERRORS/512**0.5


def test_the_users_seed_decides_the_probes_and_the_global_generator_stays():
    draws = []
    for seed in (1,1,2):
        set_seed(seed)
        opt,state = adahessian([nn.Parameter(torch.zeros(50))]),torch.get_rng_state()
        draws.append(opt.estimator.draw(opt.counts.rng())(torch.zeros(50), None))
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def learner(net=None, bs=16, n=64, loss=None, **kw):
    torch.manual_seed(0)
    x = torch.randn(n,3)
    net = net or nn.Sequential(nn.Linear(3,8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8,2))
    dls = DataLoaders.from_dsets(list(zip(x, (x[:,0]>0).long())), [], bs=bs, num_workers=0)
    return Learner(dls, net, loss or CrossEntropyLossFlat(), **kw)


def quiet_fit(learn, n=1, **kw):
    with learn.no_bar(),learn.no_logging(): learn.fit(n, **kw)


@pytest.mark.parametrize('kw', [{}, dict(estimator='gnb'), dict(curvature='ggn')], ids=['hessian','gnb','ggn'])
def test_a_part_of_the_batch_leaves_no_trace(kw):
    "Buffers and random numbers are as if nothing had been"
    kept = {}
    for bs in (None,0.25):
        set_seed(3)
        learn = learner(opt_func=partial(adahessian, hessian_bs=bs, lr=0., wd=0., **kw))
        quiet_fit(learn)
        kept[bs] = [b.clone() for b in learn.model.buffers()] + [torch.get_rng_state().float()]
        assert learn.opt.n_estimates==4 and learn.opt.n_dropped==0
    assert all(torch.equal(a, b) for a,b in zip(kept[None], kept[0.25]))


def test_curvature_on_some_rows_has_the_mean_of_all():
    "A linear model at fixed parameters: the average over many quarters of batches tends to the dense diagonal over all data"
    learn = learner(nn.Linear(3,2), opt_func=partial(adahessian, hessian_bs=0.25, lr=0., wd=0., block_length=1, signed=True, sqr_mom=0.9999))
    x,y = map(torch.stack, zip(*learn.dls.train_ds))
    d = matrix(learn.model, x, y, 'hessian').diagonal()
    quiet_fit(learn, 150)
    ps = list(learn.model.parameters())
    assert learn.opt.n_estimates==600
    assert (flat(signed_average(learn.opt, ps))-d).norm()/d.norm()<0.15


@pytest.mark.parametrize('kw', [{}, dict(estimator='gnb'), dict(curvature='ggn')], ids=['hessian','gnb','ggn'])
def test_all_rows_are_the_batch_itself(kw):
    found = []
    for bs in (None,16):
        set_seed(3)
        learn = learner(nn.Linear(3,1), n=16, loss=MSELossFlat(), opt_func=partial(adahessian, hessian_bs=bs, lr=0., wd=0., block_length=1, **kw))
        quiet_fit(learn)
        found.append(learn.opt.state[learn.model.weight]['sqr_avg_diag_hessian'])
    assert torch.equal(*found)


def test_the_forward_pass_sees_fewer_rows():
    seen = []
    class Count(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)
    quiet_fit(learner(Count(3,2), opt_func=partial(adahessian, hessian_bs=0.25, update_each=2)))
    assert seen==[16,4,16,16,4,16]


def test_mixup_and_a_part_of_the_batch_are_refused():
    with pytest.raises(ValueError, match='MixUp'): quiet_fit(learner(opt_func=partial(adahessian, hessian_bs=4)), cbs=MixUp())


def test_inputs_whose_rows_are_not_those_of_the_targets_are_refused():
    "Inputs of PyTorch's recurrent layers begin with time: rows would be steps of it, in another order"
    class TimeFirst(nn.Linear):
        def forward(self, x): return super().forward(x)[-1]
    x,y = torch.randn(5,16,3),torch.randint(2, (16,))
    learn = Learner(DataLoaders([(x,y)], []), TimeFirst(3,2), CrossEntropyLossFlat(), opt_func=partial(adahessian, hessian_bs=3))
    with pytest.raises(ValueError, match='5 rows of inputs for 16 of targets'): quiet_fit(learn)


@pytest.mark.parametrize('kw', [dict(hessian_bs=1.), dict(curvature='ggn'), dict(estimator='control_variate', signed=True, probe='gaussian')],
    ids=['part','ggn','control'])
def test_accumulation_weighs_estimates_as_one_batch(kw):
    "Two accumulated halves are the batch of both, in curvature too; with a diagonal Hessian no probe matters"
    class Diagonal(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
        def forward(self, x): return self.w.expand(len(x),3)
    if 'probe' in kw: kw = {**kw, 'probe': lambda p,g: torch.ones_like(p)*2**0.5}
    found = []
    for bs,cbs in ((32,[]),(16,[GradientAccumulation(32)])):
        torch.manual_seed(0)
        x = torch.randn(64,3)
        dls = DataLoaders.from_dsets(list(zip(x, x**2)), [], bs=bs, num_workers=0, shuffle=False)
        learn = Learner(dls, Diagonal(), MSELossFlat(), opt_func=partial(adahessian, lr=0., wd=0., **kw))
        quiet_fit(learn, cbs=cbs)
        s = learn.opt.state[learn.model.w]
        found.append(s.get('sqr_avg_diag_hessian', s.get('avg_diag_hessian')))
        assert s['hess_step']==2
    assert torch.allclose(*found, rtol=1e-5)


def test_noise_record():
    "One ratio for each group and estimate; exact estimates have none, and four times the samples halve the noise"
    net,x,y = problem()
    H,d,off = dense_case()
    n0 = sum(p.numel() for p in net[0].parameters())
    mean = {}
    for n in (8,32):
        opt = adahessian([list(net[0].parameters()), list(net[2].parameters())], lr=0., n_samples=n, update_each=2)
        for _ in range(80):
            opt.differentiate(F.cross_entropy(net(x), y))
            opt.step()
            opt.zero_grad()
        steps,ratios = zip(*opt.noise_record)
        assert steps==tuple(range(0,80,2)) and all(r.shape==(2,) for r in ratios)
        mean[n] = torch.stack(ratios).square().median(0).values
    want = torch.tensor([(d[o].square().sum()/off[o].sum()).item() for o in (slice(n0),slice(n0,None))])
    for n in mean: assert ((mean[n]/n/want).log().abs()<0.7).all()       # within a factor of two
    assert ((mean[32]/mean[8]-4).abs()<2).all()


def test_noise_record_of_exact_estimates_and_of_single_samples():
    p,q = nn.Parameter(torch.ones(3)),nn.Parameter(torch.ones(2))
    for n in (1,2):
        opt = adahessian([[p],[q]], n_samples=n)
        opt.opt_out(q)
        opt.differentiate((p**3).sum()+(q**3).sum())
        opt.step()
        opt.zero_grad()
        if n==1: assert not opt.noise_record
        else: assert opt.noise_record[0][0]==0 and opt.noise_record[0][1][0]==float('inf') and opt.noise_record[0][1][1].isnan()


def test_an_estimate_that_is_not_finite_leaves_no_record_of_its_noise():
    p = nn.Parameter(torch.ones(3))
    opt = adahessian([p], n_samples=2, probe=lambda p,g: torch.full_like(p, math.nan))
    opt.differentiate((p**3).sum())
    with pytest.warns(UserWarning, match='not finite for 1 of 1'): opt.step()
    assert opt.n_dropped==1 and not opt.noise_record


def test_pending_noise_is_accumulated_saved_and_forgotten():
    net,x,y = problem()
    ps = list(net.parameters())
    make = lambda: adahessian(ps, n_samples=2, debiased=True, n_acc=2)
    torch.manual_seed(0)
    opt = make()
    opt.differentiate(F.cross_entropy(net(x[:6]), y[:6]), n_items=6)
    torch.manual_seed(5)
    other = make()
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert all(torch.equal(other.noises[p], opt.noises[p]) for p in ps)
    for o in (opt,other):
        for p in ps: p.grad = None
        o.differentiate(F.cross_entropy(net(x[6:]), y[6:]), n_items=6)
    assert all(torch.equal(other.noises[p], opt.noises[p]) for p in ps)
    opt.zero_grad()
    assert opt.noises=={}


@pytest.mark.parametrize('kw', [{}, dict(signed=True)], ids=['squares','signed'])
def test_opted_out_parameters_train_on_their_gradients(kw):
    "The first step has the length of Adam's, for either sign of the gradient, and costs no graph when all are out"
    p = nn.Parameter(torch.tensor([3.,-1.]))
    opt = adahessian([p], lr=0.1, wd=0., **kw)
    opt.opt_out(p)
    assert not due(opt)[0]
    opt.differentiate((p**3).sum()*torch.tensor(1.)-30*p[0])
    g = p.grad.clone()
    opt.step()
    assert torch.allclose(p.detach(), torch.tensor([3.,-1.])-0.1*g.sign(), atol=1e-4) and opt.n_estimates==0


@pytest.mark.parametrize('kw', [{}, dict(estimator='gnb', hessian_bs=0.5), dict(signed=True, n_acc=2)], ids=['default','gnb','signed'])
def test_lookahead_around_adahessian_in_a_learner(kw):
    "As `ranger` does with RAdam: slow weights move half of the way every k steps, and the curvature arrives inside"
    learn = learner(opt_func=lambda ps,lr: Lookahead(adahessian(ps, lr=lr, **kw), k=3, alpha=0.5), lr=0.1)
    x,y = map(torch.stack, zip(*learn.dls.train_ds))
    at = lambda: F.cross_entropy(learn.model.eval()(x), y).item()
    before = at()
    quiet_fit(learn, 6)
    inner = learn.opt.opt
    steps = 24//kw.get('n_acc',1)
    assert isinstance(inner, AdaHessianWrapper) and inner.n_estimates==24 and inner.n_steps==steps and learn.opt.count==steps
    assert at()<0.8*before


def test_lookahead_equals_its_rule():
    p,q = (nn.Parameter(torch.tensor([3.,1.])) for _ in range(2))
    fast,look = adahessian([q], lr=0.1),Lookahead(adahessian([p], lr=0.1), k=2, alpha=0.5)
    for i in range(2):
        for o,w in ((fast,q),(look,p)):
            o.differentiate((w**3).sum())
            o.step()
            o.zero_grad()
    assert torch.allclose(p.detach(), (torch.tensor([3.,1.])+q.detach())/2)


def test_a_wrapper_reads_from_its_steppers_what_they_average():
    p = nn.Parameter(torch.zeros(2,2))
    assert AdaHessianWrapper(AdaHessian([p], lr=0.1, signed=True)).smooth.keywords['signed'] is True
    assert AdaHessianWrapper(AdaHessian([p], lr=0.1)).smooth.keywords['signed'] is False
    assert average_sqr_diag_hessian in AdaHessian([p], lr=0.1).cbs


DISTRIBUTED = dict(gnb=dict(estimator='gnb'), part=dict(hessian_bs=0.5), debiased=dict(debiased=True, n_samples=2), ggn=dict(curvature='ggn'),
    control=dict(estimator='control_variate', probe='gaussian', signed=True))

def one_rank(rank, folder):
    "Train each variant on this rank's own data; write the weights and what was estimated"
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    found = {}
    for name,kw in DISTRIBUTED.items():
        torch.manual_seed(0)
        net = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(3,8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8,2)), broadcast_buffers=False)
        x = torch.randn(64,3, generator=torch.Generator().manual_seed(rank))
        dls = DataLoaders.from_dsets(list(zip(x, (x[:,0]>0).long())), [], bs=16, num_workers=0)
        learn = Learner(dls, net, CrossEntropyLossFlat(), opt_func=partial(adahessian, lr=0.01, **kw))
        quiet_fit(learn, 2)
        states = [[s[k] for k in ('sqr_avg_diag_hessian','avg_diag_hessian') if k in s][0] for s in learn.opt.state_dict()['state']]
        found[name] = [p.detach() for p in net.parameters()],states,learn.opt.n_estimates,[r for _,r in learn.opt.noise_record]
    torch.save(found, f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_variants_keep_two_processes_together(tmp_path):
    "Each rank has data, probes, labels and rows of its own; weights and averages stay equal bit by bit"
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    a,b = (torch.load(tmp_path/f'{i}.pt') for i in range(2))
    for name in DISTRIBUTED:
        assert a[name][2]==b[name][2]==8
        for i in (0,1,3): assert all(torch.equal(p, q) for p,q in zip(a[name][i], b[name][i])), name
        assert all((s!=0).any() for s in a[name][1])
    assert len(a['debiased'][3])==8


# Half precision keeps 11 bits; squares of sums of some hundred products
HALF = 5e-3

@pytest.mark.parametrize('kw', [{}, *DISTRIBUTED.values()], ids=['default', *DISTRIBUTED])
def test_the_loss_scale_leaves_every_estimate_as_it_is(kw, cpu_amp):
    "float16 on the CPU, loss scale 65536: the averages of the same parameters are those of float32"
    found = []
    for half in (False,True):
        torch.manual_seed(0)
        x = torch.randn(64,3)
        net = nn.Sequential(nn.Linear(3,8), nn.Tanh(), nn.Linear(8,2))
        dls = DataLoaders.from_dsets(list(zip(x, (x[:,0]>0).long())), [], bs=16, num_workers=0, shuffle=False)
        learn = Learner(dls, net, CrossEntropyLossFlat(), opt_func=partial(adahessian, lr=0., wd=0., **kw))
        if half: learn.to_fp16()
        quiet_fit(learn)
        s = learn.opt.state[net[0].weight]
        found.append(s.get('sqr_avg_diag_hessian', s.get('avg_diag_hessian')))
        assert (learn.opt.n_estimates,learn.opt.n_dropped,learn.opt.n_skipped)==(4,0,0)
    assert (found[0]-found[1]).norm()/found[0].norm()<HALF


def test_given_takes_the_step_that_the_exact_diagonal_gives():
    "Hutchinson is exact on a diagonal Hessian, so both must step alike, through accumulation and loss scale too"
    def stepped(estimator, scale):
        x = nn.Parameter(torch.tensor([3.,1.], dtype=torch.double))
        opt = adahessian([x], lr=0.1, n_acc=2, estimator=estimator, block_length=1)
        for k in (1.,2.): opt.differentiate(scale*k*(x**3).sum(), scale=scale)
        x.grad /= scale # as GradScaler does
        opt.step()
        return x.detach()
    ks = iter((1.,2.))
    given = Given(lambda problem, params: [next(ks)*6*p for p in params])
    assert (stepped(given, 8.)-stepped('hutchinson', 8.)).abs().max()<1e-12


@pytest.mark.parametrize('kw', [dict(estimator=Hutchinson(n_samples=4), n_samples=1), dict(estimator=GNB(2), n_samples=1),
    dict(estimator=Hutchinson(Hessian('forward')), hvp='reverse'), dict(estimator=Hutchinson(Hessian('forward')), hvp='auto'),
    dict(estimator=Hutchinson(probe='gaussian'), probe='rademacher'), dict(estimator=Hutchinson(GaussNewton()), curvature='hessian'),
    dict(curvature=Hessian('forward'), hvp='reverse'), dict(curvature=GaussNewton('along'), hvp='reverse'),
    dict(estimator='gnb', curvature='hessian')], ids=lambda o: ','.join(o))
def test_a_keyword_beside_an_object_is_never_ignored(kw):
    "Even where it says what is usual, for the object may have it otherwise"
    with pytest.raises(ValueError, match='takes no'): adahessian([nn.Parameter(torch.zeros(2))], **kw)

def test_what_is_usual_may_be_said_beside_a_name():
    for kw in (dict(hvp='reverse'), dict(hvp='auto'), dict(probe='rademacher')): adahessian([nn.Parameter(torch.zeros(2))], estimator='gnb', **kw)

def test_a_device_has_one_generator_however_it_is_spelled():
    rng = seeded(3)
    assert rng('cpu') is rng(torch.device('cpu'))


def test_an_estimate_that_is_dropped_everywhere_has_no_noise():
    p = nn.Parameter(torch.ones(2))
    opt = adahessian([p], n_samples=2, probe=lambda o,_: torch.full_like(o, math.inf))
    opt.differentiate((p**4).sum())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        opt.step()
    assert opt.n_dropped==1 and len(opt.noise_record)==0

def test_the_noise_of_a_group_leaves_out_what_was_dropped():
    p,q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = adahessian([p,q], n_samples=2, probe=lambda o,_: torch.full_like(o, math.inf) if o is p else torch.randn_like(o))
    opt.differentiate((p**4).sum()+(q**4).sum())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        opt.step()
    assert opt.n_dropped==1 and opt.noise_record[0][1].isfinite().all()


def test_objects_say_what_they_were_made_with():
    class Mine(Every): pass
    said = [repr(o) for o in (Mine(3), Hessian('auto'), GaussNewton(closed=True), GNB(3), Every(10, dense=(20,4)), Budget(.25), CG(max_iter=3), LineSearch())]
    assert said==['Mine(update_each=3)', "Hessian(method='auto')", 'GaussNewton(closed=True)', 'GNB(n_samples=3)', 'Every(update_each=10, dense=(20, 4))',
        'Budget(overhead=0.25)', 'CG(max_iter=3)', 'LineSearch()']
