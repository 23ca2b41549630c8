"The forward pass at θ - ρm/‖m‖ or θ + ρg/‖g‖: a literal twin, and parameters that are never seen where they do not belong"
import math,pickle,warnings
import pytest,torch,torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from functools import partial
from torch import nn
from fastai.basics import DataLoader,DataLoaders,Learner
from adahessian_fastai.all import AdaHessian,AdaHessianWrapper,adahessian as modern,m_sassha,sassha
from adahessian_fastai.steppers import Perturbation,perturbed
from helpers_learner import HYPERS,ROUNDING,Noted,data,distance,fit,given,learner,mlp,one_loss,split,state_of
from twin import Twin

RHO = 0.1
# `MixedPrecision` turns predictions into float32
FLOAT_PRED = 1e-5


def moved(params, lr=0.05, along='momentum', rho=RHO, mom=0.9, sqr_mom=0.99, eps=1e-2, wd=0., hessian_power=1., **kwargs):
    "`adahessian` with a perturbation of either form"
    return AdaHessianWrapper(AdaHessian(params, lr, mom, sqr_mom, eps, wd, hessian_power), perturb=Perturbation(rho, along), **kwargs)


class Moved(Twin):
    "The twin, but gradient and curvature are those of the moved point"
    along = 'momentum'
    def step(self, losses, **hypers):
        home = [p.data.clone() for p in self.params]
        d = [-m for m in self.m]
        if self.along=='gradient': d = [sum(o)/len(losses) for o in zip(*[torch.autograd.grad(loss(), self.params) for loss in losses])]
        norm = sum((o**2).sum() for o in d)**0.5
        if norm>0:
            for p,o in zip(self.params, d): p.data = p.data+RHO*o/norm
        if self.t%self.update_each==0:
            g,diag = self.curvature(losses)
            self.h += 1
        else: g,diag = [sum(o)/len(losses) for o in zip(*[torch.autograd.grad(loss(), self.params) for loss in losses])],None
        for p,o in zip(self.params, home): p.data = o
        self.t += 1
        for i,p in enumerate(self.params): self.move(i, p, g[i], None if diag is None else diag[i], {**self.groups[0], **hypers})


def twin_of(model, steps, along='momentum', params=None, hypers=HYPERS, **kwargs):
    twin = Moved([dict(params=list(params or model.parameters()), **hypers)], given(), **kwargs)
    twin.along,i = along,0
    for batches in steps:
        n = sum(len(y) for _,y in batches)
        twin.step([partial(one_loss, model, F.cross_entropy, x, y, i+j, len(y)*len(batches)/n) for j,(x,y) in enumerate(batches)])
        i += len(batches)
    return model


def trained(model, x, y, n=1, cbs=None, along='momentum', **kwargs):
    learn = learner(model, x, y, opt_func=partial(moved, along=along), probe=given(), cbs=cbs, **kwargs)
    learn.wd_bn_bias = True
    return fit(learn, n)

def dropping(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5,7), nn.Dropout(0.3), nn.Tanh(), nn.Linear(7,3)).double()

BOTH = pytest.mark.parametrize('along', ['momentum','gradient'])
X,Y = data(36)


@BOTH
@pytest.mark.parametrize('kwargs', [{}, dict(hypers={**HYPERS, 'wd': 0.1}), dict(update_each=3)], ids=str)
@pytest.mark.parametrize('net', [mlp,dropping])
def test_against_a_literal_twin(along, kwargs, net):
    "Step and decay at the unmoved point, with the same dropout masks in both passes"
    found = trained(net(), X, Y, along=along, **kwargs).model
    want = twin_of(net(), [[b] for b in split(X, Y, 6)], along, **kwargs)
    assert distance(found, want)<ROUNDING
    plain = fit(learner(net(), X, Y, probe=given(), **kwargs)).model
    assert distance(found, plain)>1e-4


@BOTH
@pytest.mark.parametrize('hvp', ['reverse','forward','finite_difference'])
@pytest.mark.filterwarnings('ignore')
def test_every_way_to_curvature_sees_the_moved_point(along, hvp):
    "A one-sided difference has half of the digits"
    found = trained(mlp(), X, Y, along=along, hvp=hvp).model
    assert distance(found, twin_of(mlp(), [[b] for b in split(X, Y, 6)], along))<(1e-5 if hvp=='finite_difference' else ROUNDING)


def test_a_number_in_place_of_a_perturbation_is_its_rho():
    w = nn.Parameter(torch.ones(2))
    assert AdaHessianWrapper(AdaHessian([w], 0.1), perturb=0.1).perturb.rho==0.1
    with pytest.raises(ValueError, match='rho'): AdaHessianWrapper(AdaHessian([w], 0.1), perturb='momentum')

def test_the_factory_says_rho():
    "`rho` is the cheap form; 0 and `None` are none"
    one = fit(learner(mlp(), X, Y, probe=given(), rho=RHO)).model
    assert distance(one, trained(mlp(), X, Y).model)==0
    a,b,c = (fit(learner(mlp(), X, Y, probe=given(), **k)).model for k in ({},dict(rho=0),dict(rho=None)))
    assert distance(a, b)==distance(a, c)==0


@BOTH
def test_accumulation_keeps_one_point(along):
    "By `n_acc` and by fastai's callback. Along the gradient each batch has a gradient of its own to go up, so this is for the momentum"
    steps = [split(X, Y, 6)[:3],split(X, Y, 6)[3:]]
    by_count = trained(mlp(), X, Y, along=along, n_acc=3).model
    by_callback = trained(mlp(), X, Y, along=along, cbs=[GradientAccumulation(18)]).model
    assert distance(by_count, by_callback)<ROUNDING
    if along=='momentum': assert distance(by_count, twin_of(mlp(), steps))<ROUNDING


@BOTH
def test_batch_norm_moves_its_statistics_once(along):
    "As often as in the twin, which makes one forward pass of a batch; along the gradient it is that at the unmoved point"
    norm = lambda: mlp(norm=nn.BatchNorm1d)
    model = trained(norm(), X, Y, along=along).model
    assert model[1].num_batches_tracked==6
    one = trained(norm(), X[:6], Y[:6], along=along).model[1]
    want = norm()
    want(X[:6])
    assert torch.allclose(one.running_mean, want[1].running_mean, atol=ROUNDING)


@BOTH
def test_half_precision(cpu_amp, along):
    "With a loss scale; weights stay float64, and the predictions become float32"
    learn = learner(mlp(), X, Y, opt_func=partial(moved, along=along), probe=given()).to_fp16(init_scale=2.**10)
    learn.remove_cb(learn.mixed_precision)
    class NoCast(MixedPrecision):
        def before_batch(self):
            self.autocast = torch.autocast('cpu', enabled=False)
            self.autocast.__enter__()
    learn.add_cb(NoCast(init_scale=2.**10))
    assert distance(fit(learn).model, twin_of(mlp(), [[b] for b in split(X, Y, 6)], along))<FLOAT_PRED


@BOTH
def test_frozen_layers_stay(along):
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    model[0].requires_grad_(False)
    where = []
    class Look(Callback):
        run_valid = False
        def before_backward(self): where.append([p.detach().clone() for p in self.model[0].parameters()])
    trained(model, X, Y, along=along, cbs=[Look()])
    assert all(torch.equal(p, o) for s in where for p,o in zip(s, before))
    want = mlp()
    assert distance(model, twin_of(want, [[b] for b in split(X, Y, 6)], along, params=[p for m in (want[1],want[3]) for p in m.parameters()]))<ROUNDING


# Where the parameters are, and when

EVENTS = 'before_fit before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch before_validate after_epoch after_fit'.split()
INSIDE = ['after_pred','after_loss','before_backward']
places = [] # In a method of a class it is not put back

def homes(n_acc=1, along='momentum', cb=None, seed=0):
    "A Learner, and the parameters after each step"
    after = []
    class After(Callback):
        run_valid,order = False,90
        def before_fit(self): after.append([p.detach().clone() for p in self.model.parameters()])
        def after_step(self): after.append([p.detach().clone() for p in self.model.parameters()])
    learn = learner(mlp(seed), X, Y, opt_func=partial(moved, along=along), probe=given(), cbs=[After(), *([cb] if cb else [])], n_acc=n_acc)
    return learn,after


@BOTH
def test_the_parameters_are_moved_inside_and_nowhere_else(along):
    "Distance ρ from home in the forward pass from the second step on, along the gradient in the second of two; validation sees the parameters themselves"
    class Where(Callback):
        order = 80
        def __call__(self, when):
            if when in EVENTS: places.append((when, self.training, [p.detach().clone() for p in self.model.parameters()]))
    places.clear()
    learn,after = homes(along=along, cb=Where())
    fit(learn)
    n,once,n_inside = 0,set(),0
    for when,training,ps in places:
        if when=='after_step': n += 1
        far = sum((p-o).square().sum() for p,o in zip(ps, after[n])).sqrt().item()
        inside = training and when in INSIDE and (n>0 and along=='momentum' or (when,n) in once)
        assert far==pytest.approx(RHO, rel=1e-9) if inside else far==0, (when, n, far)
        n_inside += inside
        if along=='gradient' and training and when in INSIDE: once ^= {(when,n)}
    assert n_inside==len(INSIDE)*(5 if along=='momentum' else 6)


@BOTH
@pytest.mark.parametrize('when', EVENTS)
def test_a_file_at_any_event_holds_the_unmoved_parameters(when, along, tmp_path):
    "And training goes on as if nothing had been written"
    class Keep(Callback):
        order = 70
        def keep(self):
            self.learn.path = tmp_path
            self.learn.save('now')
    cb = Keep()
    setattr(cb, when, cb.keep)
    learn,after = homes(along=along, cb=cb)
    fit(learn)
    held = torch.load(tmp_path/'models/now.pth', weights_only=False)['model']
    assert any(all(torch.equal(a, b) for a,b in zip(held.values(), o)) for o in after)
    assert distance(learn.model, trained(mlp(), X, Y, along=along).model)==0


class Stopped(Exception): pass

@BOTH
@pytest.mark.parametrize('ex', [Stopped,KeyboardInterrupt])
@pytest.mark.parametrize('when', [*INSIDE,'after_backward','before_step','loss','forward'])
def test_what_ends_a_batch_leaves_the_parameters_unmoved(when, ex, along):
    "Bit for bit those after the last step; the next fit starts from there"
    class Stop(Callback):
        run_valid,order,on = False,70,True
        def stop(self):
            if self.on and self.train_iter==3: raise ex('stopped')
    cb = Stop()
    if hasattr(Callback, when) or '_' in when: setattr(cb, when, cb.stop)
    learn,after = homes(along=along, cb=cb)
    if when=='loss':
        inner = learn.loss_func
        learn.loss_func = lambda *a: (cb.stop() if learn.training else None) or inner(*a)
    if when=='forward': learn.model.register_forward_hook(lambda *a: cb.stop() if learn.training else None)
    with pytest.raises(ex): fit(learn)
    assert learn.opt.n_steps==3 and all(torch.equal(p, o) for p,o in zip(learn.model.parameters(), after[-1]))
    assert learn.opt.perturb.kept==[] and all(p.grad is None for p in learn.model.parameters())
    Stop.on = cb.on = False
    fit(learn)
    assert learn.opt.n_steps==9


@BOTH
def test_lr_find_leaves_everything_where_it_was(along, tmp_path):
    learn = trained(mlp(), X, Y, along=along, path=tmp_path)
    before,lr = state_of(learn),learn.opt.hypers[0]['lr']
    with learn.no_bar(): learn.lr_find(num_it=5, show_plot=False)
    learn.opt.set_hyper('lr', lr) # Each fit sets it anew
    assert state_of(learn)==before


def test_a_plain_loop_moves_along_the_momentum_by_hand():
    "`ahead` before the forward pass, `back` before the step: what the Learner's context does"
    model = mlp()
    opt = moved(model.parameters(), probe=given(), **{k: v for k,v in HYPERS.items() if k!='lr'})
    for i,(x,y) in enumerate(split(X, Y, 6)):
        opt.perturb.ahead(opt)
        opt.differentiate(one_loss(model, F.cross_entropy, x, y, i))
        opt.perturb.back()
        opt.step()
        opt.zero_grad()
    assert distance(model, twin_of(mlp(), [[b] for b in split(X, Y, 6)]))<ROUNDING


def test_a_move_is_no_inplace_change_to_autograd():
    "Back before the backward pass: the graph does not mind"
    p = nn.Parameter(torch.ones(3))
    move = Perturbation(0.5)
    move.move([p], [torch.ones(3)], 1.)
    loss = (p**3).sum()
    move.back()
    loss.backward()
    assert torch.equal(p.detach(), torch.ones(3))


@BOTH
def test_autocast_is_left_as_often_as_entered(cpu_amp, along):
    "Also where a class of the user's own stands in for `MixedPrecision`: one entry too few, and casts of old weights would be used again"
    class Own(MixedPrecision): pass
    def nesting():
        n = torch.autocast_increment_nesting()
        torch.autocast_decrement_nesting()
        return n
    before = nesting()
    learn = fit(learner(mlp().float(), X.float(), Y, opt_func=partial(moved, along=along), probe=given(), cbs=[Own(init_scale=2.**6)]))
    assert nesting()==before and learn.opt.n_steps==6


@pytest.mark.parametrize('lrs,k', [((0.1,0.001),0.01), ((0.05,0.05),1.), ((0.,0.),1.)])
def test_a_group_that_steps_less_moves_less(lrs, k):
    "The momentum of a group counts by its rate, relative to the largest; without any rate all count alike"
    model = nn.Sequential(nn.Linear(5,7), nn.Tanh(), nn.Linear(7,3)).double()
    opt = moved([list(model[0].parameters()),list(model[2].parameters())])
    opt.set_hyper('lr', list(reversed(lrs)))
    ps = list(model.parameters())
    home = [p.detach().clone() for p in ps]
    for p in ps: opt.state[p]['grad_avg'] = torch.randn_like(p)
    ms = [opt.state[p]['grad_avg']*(k if i<2 else 1.) for i,p in enumerate(ps)]
    norm = sum(m.square().sum() for m in ms)**0.5
    opt.perturb.ahead(opt)
    assert all(torch.allclose(p, o-RHO*m/norm, atol=1e-12) for p,o,m in zip(ps, home, ms))
    opt.perturb.back()
    assert all(torch.equal(p, o) for p,o in zip(ps, home))


def test_a_perturbation_serves_two_optimizers():
    "Each has its own, so the second is told as well that its loop moves nothing"
    made,p = Perturbation(0.1),nn.Parameter(torch.ones(2))
    first,second = (AdaHessianWrapper(AdaHessian([p], lr=0.1), perturb=made) for _ in range(2))
    first.perturb.rho = 0.3
    with perturbed(first): first.differentiate((p**4).sum())
    first.step()
    assert second.perturb.rho==made.rho==0.1
    second.differentiate((p**4).sum())
    with pytest.warns(UserWarning, match='rho=0.1 does nothing'): second.step()

def test_a_context_within_a_context_moves_once():
    "The inner one puts the parameters home, from where the outer one moved them"
    p = nn.Parameter(torch.ones(2))
    opt = AdaHessianWrapper(AdaHessian([p], 0.1), perturb=Perturbation(0.5))
    opt.state[p]['grad_avg'] = torch.ones(2)
    with perturbed(opt):
        there = p.detach().clone()
        with perturbed(opt): assert torch.equal(p, there) and not torch.equal(p, torch.ones(2))
    assert torch.equal(p, torch.ones(2)) and not opt.perturb.kept

@pytest.mark.parametrize('along', ['momentum','gradient'])
def test_a_direction_of_length_zero_moves_nothing(along):
    "As where a batch has no gradient, before there is a momentum"
    p,perturb = nn.Parameter(torch.ones(2)),Perturbation(0.5, along)
    perturb.move([p], [torch.zeros(2)], 1.)
    assert p.tolist()==[1.,1.]

def test_along_the_gradient_with_attention():
    "The graph at the other point is one that can be differentiated twice"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin,self.att,self.out = nn.Linear(5,8),nn.MultiheadAttention(8, 2, batch_first=True),nn.Linear(8,3)
        def forward(self, x):
            z = self.lin(x)[:,None].expand(-1,4,-1)
            return self.out(self.att(z, z, z, need_weights=False)[0].mean(1))
    torch.manual_seed(0)
    x,y = data(12, dtype=torch.float)
    learn = fit(Learner(DataLoaders.from_dsets(list(zip(x, y)), list(zip(x, y)), bs=6, num_workers=0), Net(), F.cross_entropy, opt_func=sassha))
    assert learn.opt.n_estimates and not learn.opt.n_skipped


class Bounded(nn.Module):
    "Rows that the forward pass shortens to a length of 1: as `nn.Embedding(max_norm=1)` does, by new data, or in the data that is there"
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.rows,self.out,self.how = nn.Embedding(6,4, max_norm=1. if how=='max_norm' else None).double(),nn.Linear(4,3).double(),how
    def forward(self, x):
        if self.how=='new data': self.rows.weight.data = torch.renorm(self.rows.weight.data, 2, 0, 1.)
        if self.how=='in the data': self.rows.weight.data.renorm_(2, 0, 1.)
        return self.out(self.rows(x).mean(1))

@pytest.mark.parametrize('how', ['max_norm','new data','in the data'])
def test_what_the_forward_pass_writes_into_weights_stays(how):
    "Rows of length 1 at the moved point are as long, but for the move, at the parameters themselves; other entries come back to the bit"
    g = torch.Generator().manual_seed(0)
    x,lengths,last = torch.randint(5, (60,3), generator=g),[],[]
    def look(learn):
        w = learn.model.rows.weight.detach()
        lengths.append(w[:5].norm(dim=1).max().item())
        last.append(w[5].clone())
    learn = learner(Bounded(how), x, x[:,0]%3, opt_func=moved, lr=0.1, hypers={}, rho=0.2, cbs=[Noted('before_step', look)])
    long = Bounded(how).rows.weight[:5].norm(dim=1).max().item()
    fit(learn, 2)
    assert long>1.5 and max(lengths[1:])<1.25 and learn.opt.n_estimates==20
    if how=='max_norm': assert all(torch.equal(o, last[0]) for o in last) # The row that no batch has


@pytest.mark.parametrize('rows', [None,.5])
@pytest.mark.parametrize('opt_func', [modern,m_sassha,sassha])
def test_what_the_forward_pass_does_to_weights_it_does_once_a_batch(opt_func, rows):
    "It takes 3 % of the weights in each of six batches, at a rate of 0, and at a point that is a little off"
    class Decays(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
        def forward(self, x):
            if self.training: self.net[0].weight.data.mul_(.97)
            return self.net(x)
    learn = fit(learner(Decays(), *data(36), opt_func=opt_func, hypers={}, lr=0., wd=0., hessian_bs=rows), lr=0.)
    n_times = (learn.model.net[0].weight/mlp()[0].weight).log()/math.log(.97)
    assert learn.opt.n_steps==6 and n_times.median().item()==pytest.approx(6, abs=0.05)


calls = [] # In a method of a class it is not put back

class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()
    def forward(self, x):
        calls.append(self.training)
        return self.net(x)

def counted(**kwargs):
    "Forward passes of two batches in training"
    calls.clear()
    fit(learner(Counting(), *data(12), **kwargs))
    return sum(calls)

@pytest.mark.parametrize('rho,n', [(0,2),(None,2),(0.1,4)])
def test_no_distance_needs_no_second_pass(rho, n): assert counted(opt_func=sassha, hypers={}, rho=rho)==n


def test_every_setting_of_sassha_arrives():
    opt = sassha([nn.Parameter(torch.ones(2))], None, .8, .9, .1, .2, .3, .7, update_each=7, n_acc=2, clip=1., cap=2., spike=3., along='momentum', n_samples=4,
        hessian_bs=.5, dense=(3,2))
    assert opt.hypers[0]==dict(lr=.15, mom=.8, sqr_mom=.9, eps=.1, wd=.2, hessian_power=.7, clip=1., cap=2., spike=3.)
    assert {k: vars(opt.when)[k] for k in ('update_each','hessian_bs','dense','probes')}==dict(update_each=7, hessian_bs=.5, dense=3, probes=2)
    assert (opt.perturb.rho,opt.perturb.along,opt.n_acc,opt.estimator.n_samples)==(.3,'momentum',2,4)


def test_defaults_of_sassha_and_its_cheap_form():
    for f,rho,clip,along in ((sassha,.2,0.,'gradient'), (m_sassha,.1,3.,'momentum')):
        opt = f([nn.Parameter(torch.ones(2))])
        assert opt.hypers[0]==dict(lr=.15, mom=.9, sqr_mom=.999, eps=1e-4, wd=5e-4, hessian_power=.5, clip=clip, cap=.1, spike=2.)
        assert (opt.perturb.rho,opt.perturb.along,opt.when.update_each)==(rho,along,10) and repr(opt).startswith(f'{f.__name__}: ')

def stepped(rho, inside):
    w = nn.Parameter(torch.tensor([1.,-2.], dtype=torch.double))
    opt = AdaHessianWrapper(AdaHessian([w], 0.1), perturb=Perturbation(rho))
    for i in range(6):
        with perturbed(opt):
            opt.differentiate((w**4).sum())
            if inside(i): opt.step()
        if not inside(i): opt.step()
        opt.zero_grad()
    return w

@pytest.mark.parametrize('inside', [lambda i: True, lambda i: i>2, lambda i: i%2==0], ids=['all','later','in turn'])
@pytest.mark.parametrize('rho', [0.2,1.])
def test_a_step_inside_perturbed_is_one_from_the_true_parameters(rho, inside):
    assert torch.equal(stepped(rho, inside), stepped(rho, lambda i: False))

def test_a_gradient_outside_of_perturbed_is_warned_of():
    w = nn.Parameter(torch.tensor([1.,-2.]))
    opt = AdaHessianWrapper(AdaHessian([w], 0.1), perturb=Perturbation(0.2))
    def step(inside):
        with perturbed(opt):
            loss = (w**4).sum()
            if inside: opt.differentiate(loss)
        if not inside: opt.differentiate(loss)
        opt.step()
        opt.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        step(True)
        step(True)
    with pytest.warns(UserWarning, match='inside `perturbed`'): step(False)

def test_an_error_inside_perturbed_is_all_that_is_said():
    w = nn.Parameter(torch.tensor([1.,-2.]))
    opt = AdaHessianWrapper(AdaHessian([w], 0.1), perturb=Perturbation(0.2))
    opt.differentiate((w**4).sum())
    opt.step()
    before = w.detach().clone()
    with warnings.catch_warnings(),pytest.raises(KeyError):
        warnings.simplefilter('error')
        with perturbed(opt): raise KeyError
    assert torch.equal(w, before)

def test_copies_are_made_anew_where_the_parameters_have_another_type():
    "And they are in no pickle"
    w = nn.Parameter(torch.tensor([1.,-2.], dtype=torch.half))
    perturb = Perturbation(0.5)
    for dtype in (torch.half, torch.double, torch.double):
        w.data = w.data.to(dtype)+torch.tensor(1e-9, dtype=torch.double).to(dtype)
        before = w.detach().clone()
        perturb.move([w], [torch.ones(2, dtype=dtype)], 1.)
        assert not torch.equal(w, before)
        perturb.back()
        assert torch.equal(w, before)
    assert perturb.room and not pickle.loads(pickle.dumps(perturb)).room

class Squares(nn.Module):
    "A batch has one row of coefficients of squares, so that curvature differs from batch to batch and changes its sign"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.,-2.]).double())
    def forward(self, x): return (x*self.w**2).sum(1)

def test_steps_of_sassha_equal_its_algorithm():
    "Curvature at the moved point is a row times 2, and each probe gives it exactly; its average is one of absolute values"
    rows = torch.tensor([[1.,2.],[-3.,1.],[2.,-1.],[-1.,-4.]]).double()
    learn = fit(learner(Squares(), rows, torch.zeros(4), bs=1, loss_func=lambda p,y: p.mean(), opt_func=sassha, hypers={}, lr=0.1, update_each=1,
        clip=0, cap=0))
    w,m,h = torch.tensor([1.,-2.]).double(),0.,0.
    for t,c in enumerate(rows, 1):
        there = w+0.2*c*w/(c*w).norm()
        m,h = 0.9*m+0.1*2*c*there,0.999*h+0.001*2*c.abs()
        w = w*(1-0.1*5e-4)-0.1*m/(1-0.9**t)/((h/(1-0.999**t)).sqrt()+1e-4)
    assert torch.allclose(learn.model.w.detach(), w, rtol=1e-10)


@pytest.mark.parametrize('bad', [0,2])
@pytest.mark.parametrize('opt_func', [sassha,m_sassha,modern,partial(sassha, hvp='forward')], ids=['sassha','m_sassha','adahessian','forward'])
def test_a_batch_that_is_not_finite_moves_nothing(opt_func, bad):
    "Neither in the first step, where each parameter is looked at for writes, nor in an embedding whose forward pass writes at each"
    class Bounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.out = nn.Embedding(4, 3, max_norm=1.),nn.Linear(3, 1)
        def forward(self, x): return self.out(self.emb(x[:,0].long())*x[:,1:])
    torch.manual_seed(0)
    x,y = torch.cat([torch.arange(16)[:,None]%4, torch.ones(16,1)], 1),torch.randn(16,1)
    x[4*bad,1] = math.nan
    class Seen(Callback):
        kept = None
        def before_batch(self):
            if self.training and self.iter==bad: self.kept = [p.detach().clone() for p in self.model.out.parameters()]
        def after_batch(self):
            if self.training and self.iter==bad: self.same = all(torch.equal(p, o) for p,o in zip(self.model.out.parameters(), self.kept))
    learn = Learner(DataLoaders(*2*[DataLoader(list(zip(x, y)), bs=4)]), Bounded(), nn.MSELoss(), opt_func=opt_func, cbs=(seen := Seen()))
    with learn.no_bar(),learn.no_logging(),pytest.warns(UserWarning, match='step skipped'): learn.fit(1, 0.01)
    assert seen.same and learn.opt.n_skipped==1 and learn.opt.n_steps==3 and all(p.isfinite().all() for p in learn.model.parameters())
