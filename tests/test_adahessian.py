"The optimizer against its literal twin, in float64: every option, every argument, and the route through a Learner"
import copy,gc,math,weakref

import pytest,torch
import torch.nn.functional as F
from fastai.basics import Callback,DataLoaders,Learner,nn,partial,set_seed
import fastai.callback.all  # chkstyle: ignore
from adahessian_fastai.all import Problem,adahessian as as_it_comes,adahessian_paper as adahessian,hessian_free,m_sassha,sassha,sophia
from adahessian_fastai.adahessian import AdaHessian,AdaHessianWrapper,lr_for
from adahessian_fastai.learner import own_lr
from adahessian_fastai.optimizer import due
from adahessian_fastai.steppers import Perturbation
from helpers_learner import data,fit,learner
from twin import AsItComes,Twin

# 50 steps of a contracting map amplify the last bit of float64 (1e-16) by less than 1e4
ROUNDING = 1e-12
# Lengths of gradients are compared in float32, so one that is shortened is shortened to seven digits
SINGLE = 1e-8
HYPERS = dict(lr=0.1, mom=0.9, sqr_mom=0.99, eps=1e-3, wd=0.02, hessian_power=1.)


def net(seed=0):
    "Conv and linear layers; 48×5 weights do not divide into blocks of 32"
    torch.manual_seed(seed)
    layers = nn.Conv2d(1,3,3),nn.Tanh(),nn.Flatten(),nn.Linear(48,5),nn.Tanh(),nn.Linear(5,2)
    return nn.Sequential(*layers).double()


def batches(n, bs=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(bs,1,6,6, generator=g).double(), torch.randint(2, (bs,), generator=g)) for _ in range(n)]


def prober(seed=2):
    "Rademacher probes from a generator of the test's own, in the order in which they are asked for"
    g = torch.Generator().manual_seed(seed)
    return lambda p,_: torch.randint(2, p.shape, generator=g).to(p)*2-1


def distance(model, other): return max((a-b).abs().max().item() for a,b in zip(model.parameters(), other.parameters()))


CASES = [dict(), dict(update_each=3), dict(n_samples=4), dict(hessian_power=0.5), dict(decouple_wd=False), dict(n_acc=3),
    dict(block_length=1), dict(update_each=3, n_samples=4, n_acc=3, hessian_power=0.5, decouple_wd=False)]

@pytest.mark.parametrize('case', CASES, ids=lambda c: ','.join(f'{k}={v}' for k,v in c.items()) or 'defaults')
def test_fifty_steps_equal_the_twin(case):
    ours,theirs = net(),net()
    hypers = {**HYPERS, **{k: v for k,v in case.items() if k in HYPERS}}
    opts = {k: v for k,v in case.items() if k not in HYPERS}
    n_acc = opts.get('n_acc', 1)
    opt = adahessian(list(ours.parameters()), **hypers, **opts, probe=prober())
    opts.pop('n_acc', None)
    twin = Twin([dict(params=list(theirs.parameters()), **hypers)], prober(), **{'block_length': 32, **opts})
    data = batches(n_acc)
    for _ in range(50):
        for x,y in data: opt.differentiate(F.cross_entropy(ours(x),y), n_items=len(x))
        opt.step()
        opt.zero_grad()
        twin.step([lambda x=x,y=y: F.cross_entropy(theirs(x),y) for x,y in data])
    assert distance(ours, net())>0.1
    assert distance(ours, theirs)<ROUNDING


def test_two_groups_with_different_hypers_equal_the_twin():
    ours,theirs = net(),net()
    split = lambda m: [list(m[0].parameters()), list(m[3:].parameters())]
    other = dict(lr=0.02, mom=0.7, sqr_mom=0.9, eps=1e-2, wd=0.1, hessian_power=0.7)
    opt = adahessian(split(ours), **HYPERS, probe=prober())
    for k,v in other.items(): opt.set_hyper(k, [HYPERS[k],v])
    groups = [dict(params=ps, **hp) for ps,hp in zip(split(theirs), [HYPERS,other])]
    twin = Twin(groups, prober())
    (x,y), = batches(1)
    for _ in range(50):
        opt.differentiate(F.cross_entropy(ours(x),y))
        opt.step()
        opt.zero_grad()
        twin.step([lambda: F.cross_entropy(theirs(x),y)])
    assert distance(ours, theirs)<ROUNDING


class Diary(Callback):
    "The batches and hyperparameters that a Learner used"
    run_valid = False
    def before_fit(self): self.entries = []
    def before_step(self): self.entries.append((self.x, self.y, dict(self.opt.hypers[-1])))


def one_cycle(opt_func, data, *lr):
    "Two epochs; the net, and the batches with the hyperparameters that they were trained with"
    dls = DataLoaders(data, data[:2])
    dls._device = torch.device('cpu')
    diary,model = Diary(),net()
    loss_func = lambda pred,y: F.cross_entropy(pred,y).float()   # fastai's Recorder averages float32
    learn = Learner(dls, model, loss_func, opt_func=partial(opt_func, probe=prober()), wd_bn_bias=True, cbs=diary)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(2, *lr)
    assert len({hp['lr'] for *_,hp in diary.entries})==2*len(data) and len({hp['mom'] for *_,hp in diary.entries})>40
    return model,diary.entries


def test_fit_one_cycle_equals_the_twin():
    (ours,entries),theirs = one_cycle(partial(adahessian, **HYPERS), batches(25), 0.2),net()
    twin = Twin([dict(params=list(theirs.parameters()), **HYPERS)], prober())
    for x,y,hp in entries: twin.step([lambda: F.cross_entropy(theirs(x),y)], **hp)
    assert distance(ours, theirs)<ROUNDING


def test_fit_one_cycle_with_nothing_given_equals_the_twin():
    "Every default and the learning rate untouched; the inputs of one batch are so large that its gradient is shortened and the step bounded"
    data = [(x*3 if i==17 else x/10,y) for i,(x,y) in enumerate(batches(25))]
    (ours,entries),theirs = one_cycle(as_it_comes, data),net()
    twin = AsItComes([dict(params=list(theirs.parameters()))], prober())
    for x,y,hp in entries: twin.step([lambda: F.cross_entropy(theirs(x),y)], **hp)
    for name in ('rho','dense','clip','cap','spike'):
        other = net()
        twin = AsItComes([dict(params=list(other.parameters()))], prober(), **{name: dict(rho=0., dense=0).get(name, 1e9)})
        for x,y,hp in entries: twin.step([lambda: F.cross_entropy(other(x),y)], **hp)
        assert distance(ours, other)>1e-6, f"{name} makes no difference here"
    assert distance(ours, net())>0.1 and distance(ours, theirs)<SINGLE


def test_first_step_by_hand():
    "L = x³ summed at (3,1): g = (27,3), H = diag(18,6), and bias corrections cancel the dampening"
    p = nn.Parameter(torch.tensor([3.,1.]).double())
    opt = adahessian([p], lr=0.1, eps=0.5, wd=0.01)
    opt.differentiate((p**3).sum())
    opt.step()
    start,newton = (torch.tensor(o, dtype=torch.double) for o in ([3.,1.],[27/(18+0.5),3/(6+0.5)]))
    want = start*(1-0.1*0.01) - 0.1*newton
    assert (p-want).abs().max()<ROUNDING


def run(n_steps=12, **kwargs):
    "The weights after a few steps from the same start, with the same batches"
    model = net()
    torch.manual_seed(5)
    opt = adahessian(list(model.parameters()), **{**HYPERS, **kwargs})
    for x,y in batches(n_steps):
        opt.differentiate(F.cross_entropy(model(x),y), n_items=len(x))
        if opt.n_batches<opt.n_acc: continue
        opt.step()
        opt.zero_grad()
    return model

ARGS = dict(lr=0.05, mom=0.5, sqr_mom=0.9, eps=1e-2, wd=0.5, hessian_power=0.5, decouple_wd=False, n_acc=2, block_length=8,
    update_each=2, n_samples=2, probe='gaussian', average_kernels=False)

@pytest.mark.parametrize('name', ARGS)
def test_every_argument_changes_the_trajectory(name):
    assert distance(run(), run())==0
    assert distance(run(), run(**{name: ARGS[name]}))>1e-6


BAD = dict(lr=-1., mom=1., sqr_mom=1.5, eps=0., wd=-0.1, hessian_power=2., block_length=0, update_each=0, n_samples=0, n_acc=0,
    probe='sobol', curvature='magic', estimator='magic', hvp='magic')

@pytest.mark.parametrize('name', BAD)
def test_invalid_arguments_are_named(name):
    with pytest.raises(ValueError, match=f'{name}.*{name}={BAD[name]!r}'): adahessian([nn.Parameter(torch.ones(1))], **{name: BAD[name]})


def test_thirds_of_a_batch_equal_the_whole():
    "The mean of z⊙Hz over thirds is that of the whole batch when all see the same probe"
    fixed = lambda p,_: torch.randint(2, p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p)*2-1
    whole,thirds = net(),net()
    opts = [adahessian(list(m.parameters()), **HYPERS, n_acc=n, probe=fixed) for m,n in ((whole,1),(thirds,3))]
    for x,y in batches(20, bs=12):
        opts[0].differentiate(F.cross_entropy(whole(x),y))
        for xb,yb in zip(x.split([3,4,5]), y.split([3,4,5])): opts[1].differentiate(F.cross_entropy(thirds(xb),yb), n_items=len(xb))
        for o in opts:
            o.step()
            o.zero_grad()
    assert distance(whole, net())>0.1
    assert distance(whole, thirds)<ROUNDING


def test_update_each_pays_for_a_graph_only_when_due():
    model,dues = net(),[]
    opt = adahessian(list(model.parameters()), lr=0.1, update_each=3)
    for x,y in batches(7):
        dues.append(bool(due(opt)[0]))
        opt.differentiate(F.cross_entropy(model(x),y))
        assert bool(opt.diags)==dues[-1]
        assert all(p.grad.grad_fn is None and not p.grad.requires_grad for p in model.parameters())
        opt.step()
        opt.zero_grad()
    assert dues==[True,False,False,True,False,False,True]
    assert opt.n_estimates==3
    assert {s['hess_step'] for s in opt.state.values()}=={3}


def test_no_graph_survives_a_step():
    "A tensor that the graph has saved dies with the backward pass, though the loss is still held"
    model,(x,y) = net(),batches(1)[0]
    opt = adahessian(list(model.parameters()), lr=0.1)
    for _ in range(3):
        inner = []
        h = model[4].register_forward_hook(lambda m,i,o: inner.append(weakref.ref(o)))
        loss = F.cross_entropy(model(x),y)
        h.remove()
        gc.disable()
        try:
            opt.differentiate(loss)
            del loss
            assert inner[0]() is None
        finally: gc.enable()
        opt.step()
        opt.zero_grad()


def test_sparse_gradients_are_refused_before_anything_changed():
    emb = nn.Embedding(4,2, sparse=True)
    before = emb.weight.detach().clone()
    opt = adahessian(list(emb.parameters()))
    with pytest.raises(ValueError, match='sparse=False'): opt.differentiate(emb(torch.tensor([1,2])).pow(2).sum())
    assert emb.weight.grad is None and torch.equal(emb.weight,before) and opt.n_estimates==0


@pytest.mark.parametrize('kwargs', [dict(estimator='gnb'),dict(curvature='ggn')], ids=str)
def test_sparse_gradients_are_refused_in_every_way(kwargs):
    emb,loss_func,y = nn.Embedding(4,2, sparse=True),nn.MSELoss(),torch.ones(2,2)
    ps = list(emb.parameters())
    opt,out = adahessian(ps, **kwargs),emb(torch.tensor([1,2]))
    with pytest.raises(ValueError, match='sparse=False'): opt.differentiate(Problem(ps, loss_func(out, y), out, y, loss_func))
    with pytest.raises(ValueError, match='sparse=False'): hessian_free(ps).step(lambda: (emb(torch.tensor([1,2])).pow(2).sum(), emb.weight))


def test_a_sparse_embedding_may_be_frozen():
    x,y = data(12)
    body = nn.Sequential(nn.Embedding(6,4, sparse=True), nn.Flatten(), nn.Linear(20,3)).double()
    body[0].weight.requires_grad_(False)
    assert fit(learner(body, x.abs().clamp(max=5).long(), y)).opt.n_steps==2


@pytest.mark.parametrize('value', [math.nan,math.inf], ids=str)
def test_a_loss_that_is_not_finite_changes_nothing(value, recwarn):
    model = net()
    opt = adahessian(list(model.parameters()), lr=0.1)
    for i,(x,y) in enumerate(batches(8)):
        before,state = copy.deepcopy(model.state_dict()),copy.deepcopy(opt.state_dict()['state'])
        bad = i in (0,3,4,5)
        opt.differentiate(F.cross_entropy(model(x),y)*(value if bad else 1))
        opt.step()
        opt.zero_grad()
        same = all(torch.equal(before[k],v) for k,v in model.state_dict().items())
        assert same==bad
        if bad and i: assert all(torch.equal(a[k],b[k]) for a,b in zip(state,opt.state_dict()['state']) for k in a if torch.is_tensor(a[k]))
    assert opt.n_skipped==4 and opt.n_steps==4
    assert len([w for w in recwarn if 'not finite' in str(w.message)])==1


def test_an_estimate_that_is_not_finite_is_dropped_alone(recwarn):
    "x^1.5 at 0 has the gradient 0 and an infinite second derivative"
    p,q = nn.Parameter(torch.tensor([1.])),nn.Parameter(torch.tensor([1.]))
    opt = adahessian([p,q], lr=0.1, wd=0.)
    for at in (1.,0.):
        q.data.fill_(at)
        opt.differentiate((p**2 + q.abs()**1.5).sum())
        opt.step()
        opt.zero_grad()
    assert opt.n_dropped==1 and opt.n_steps==2 and (opt.state[p]['hess_step'],opt.state[q]['hess_step'])==(2,1)
    assert p<0.9 and opt.state[p]['step']==2


def test_the_global_random_state_is_only_looked_at():
    set_seed(3)
    before = torch.get_rng_state()
    opt = adahessian([p := nn.Parameter(torch.ones(5))], lr=0.1)
    opt.differentiate((p**4).sum())
    opt.step()
    assert torch.equal(before, torch.get_rng_state())
    seeds = [(set_seed(s), adahessian([p]).seed)[1] for s in (1,1,2)]
    assert seeds[0]==seeds[1]!=seeds[2]


def test_probes_differ_between_parameters_and_estimates():
    ps = [torch.zeros(64),torch.zeros(64)]
    opt = adahessian([nn.Parameter(p) for p in ps])
    seen = []
    for n in range(2):
        opt.n_estimates = n
        draw = opt.estimator.draw(opt.counts.rng())
        seen += [draw(p, None) for p in ps]
    assert all((a*b).sum().abs()<5*8 for i,a in enumerate(seen) for b in seen[:i])   # 5 standard deviations of a sum of 64 signs
    assert all(set(s.tolist())=={-1.,1.} for s in seen)


# What the arguments are by default and together

RATES = [(dict(), 0.15, 225), (dict(n_samples=2), 0.1, 100), (dict(curvature='ggn'), 0.1, 100), (dict(debiased=True, n_samples=2), 0.1, 100),
    (dict(signed_blocks=True), 0.1, 100), (dict(signed=True), 0.05, 100), (dict(signed=True, estimator='control_variate'), 0.05, 100),
    (dict(estimator='gnb'), 0.05, 100)]

@pytest.mark.parametrize('kwargs,lr,steps', RATES, ids=[str(o[0]) for o in RATES])
def test_rates_of_the_variants(kwargs, lr, steps):
    "Also where another rate is given; the paper's is the same for all of them"
    def rates(opt): return opt.hypers[0]['lr'],opt.default_lr,opt.opt.default_steps
    ps = [nn.Parameter(torch.ones(1))]
    opt = as_it_comes(ps, **kwargs)
    assert rates(opt)==(lr if steps==225 else lr/5,lr,steps) # A loop of one's own has the rate of 225 steps
    assert lr_for(opt)[:2]==(lr,steps) and rates(as_it_comes(ps, 0.3, **kwargs))==(0.3,lr,steps)
    assert rates(adahessian(ps, **kwargs))==rates(adahessian(ps, None, **kwargs))==(0.15,0.15,None)

@pytest.mark.parametrize('kwargs,lr', [(dict(estimator='gnb'), 0.05), (dict(signed=True), 0.05), (dict(curvature='ggn'), 0.1)], ids=str)
def test_the_rate_of_a_variant_falls_with_the_length_of_a_training(kwargs, lr):
    "As the inverse square from 100 steps on, to a fifth; a training of trained weights takes two thirds of it"
    opt = as_it_comes([nn.Parameter(torch.ones(1))], **kwargs)
    for n,share in ((None,1), (1,1), (100,1), (150,4/9), (200,1/4), (10_000,1/5)):
        for trained in (False,True): assert own_lr(opt, n, trained)==pytest.approx(lr*share*(2/3 if trained else 1), rel=0.05) # Two digits
    paper = adahessian([nn.Parameter(torch.ones(1))], **kwargs)
    assert own_lr(paper, 1)==own_lr(paper, 10_000)==0.15

HYPERS_OF = dict(lr=0.15, mom=0.9, sqr_mom=0.999, eps=1e-4, wd=1e-4, hessian_power=1., clip=3., cap=0.1, spike=2.)

@pytest.mark.parametrize('opt_func,other,rho,schedule', [(as_it_comes, dict(), 0.2, (10,20)), (adahessian, dict(clip=0., cap=0., spike=0.), 0., (1,0))],
    ids=['as it comes','paper'])
@pytest.mark.parametrize('given', [dict(), dict(clip=7.), dict(cap=7.), dict(spike=7.), dict(eps=0.1, sqr_mom=0.5)], ids=str)
def test_defaults_and_what_overrides_them(opt_func, other, rho, schedule, given):
    opt = opt_func([nn.Parameter(torch.ones(1))], **given)
    assert dict(opt.hypers[0])=={**HYPERS_OF, **other, **given}
    assert opt.perturb.rho==rho and (opt.when.update_each,opt.when.dense)==schedule

@pytest.mark.parametrize('name', ['clip','cap','spike'])
def test_no_bound_is_a_bound_of_none(name): assert as_it_comes([nn.Parameter(torch.ones(1))], **{name: None}).hypers[0][name]==0.

def steppers(**kwargs): return AdaHessian([nn.Parameter(torch.ones(1))], 0.1, **kwargs)

@pytest.mark.parametrize('steps,kwargs,said', [
    (dict(), dict(estimator='control_variate'), 'use signed=True'), (dict(signed=True), dict(debiased=True, n_samples=2), 'choose one'),
    (dict(), dict(debiased=True), 'n_samples >= 2, got n_samples=1'), (dict(signed=True), dict(signed_blocks=False), 'needs signed blocks'),
    (dict(), dict(debiased=True, n_samples=2, signed_blocks=False), 'needs signed blocks'), (dict(), dict(signed_blocks='x'), 'signed_blocks'),
    (dict(), dict(debiased='x'), 'debiased'), (dict(), dict(average_kernels='x'), 'average_kernels'), (dict(), dict(block_length=0), 'block_length')], ids=str)
def test_averages_that_do_not_go_together(steps, kwargs, said):
    with pytest.raises(ValueError, match=said): AdaHessianWrapper(steppers(**steps), **kwargs)

@pytest.mark.parametrize('name', ['signed','decouple_wd'])
def test_switches_of_the_steppers(name):
    with pytest.raises(ValueError, match=name): steppers(**{name: 'x'})

def test_the_wrapper_wraps_an_optimizer():
    "With a perturbation of its own"
    opt = AdaHessianWrapper(steppers(), debiased=True, n_samples=2, perturb=(given := Perturbation(0.3)))
    assert opt.debiased and opt.perturb is not given and opt.perturb.rho==0.3
    with pytest.raises(TypeError, match='wraps an optimizer'): AdaHessianWrapper([nn.Parameter(torch.ones(1))])

@pytest.mark.parametrize('kwargs,want', [(dict(), False), (dict(debiased=True, n_samples=2), True), (dict(signed_blocks=True), True)], ids=str)
def test_blocks_have_a_sign_where_their_average_does(kwargs, want):
    found = [AdaHessianWrapper(steppers(**o), **kwargs).smooth.keywords['signed'] for o in ({},*([dict(signed=True)] if 'debiased' not in kwargs else []))]
    assert found==[want,True][:len(found)]

def test_a_rate_of_zero_is_a_rate_that_was_given():
    for f in (as_it_comes,adahessian,sophia,sassha,m_sassha): assert f([nn.Parameter(torch.ones(2))], 0.).hypers[0]['lr']==0.

def test_an_estimator_of_ones_own_has_the_rate_that_others_have():
    "One that says nothing of samples or curvature"
    class Own:
        def __call__(self, *args): return None
        def surround(self, *args): return None
    opt = as_it_comes([nn.Parameter(torch.ones(2))], estimator=Own())
    assert (opt.default_lr,opt.opt.default_steps)==(0.1,100)
