"Parameters that join, leave, are shared, unused or flat: who moves, who waits, and by how much"
import pytest,torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.optimizer import Adam
from fastai.torch_core import params
from functools import partial
from torch import nn
from adahessian_fastai.all import adahessian,adahessian_paper,hessian_free,sassha
from adahessian_fastai.learner import trainable_params
from helpers_learner import HYPERS,ROUNDING,Noted,data,distance,fit,given,learner,mlp,one_loss,plain,split
from twin import Twin

def two_groups(m): return [params(m[0])+params(m[1]), params(m[3])]

def grouped(*args, **kwargs):
    learn = learner(*args, **kwargs)
    learn.splitter = two_groups
    return learn

def copies(ps): return [p.detach().clone() for p in ps]

def same(before, ps): return all(torch.equal(a,b) for a,b in zip(before,ps))


def head_only(model, x, y, probe, twin=None):
    "A plain loop over one epoch that moves the last layer alone"
    twin = twin or Twin([dict(params=list(model[3].parameters()), **HYPERS)], probe)
    for i,(a,b) in enumerate(split(x,y,6)): twin.step([partial(one_loss, model, F.cross_entropy, a, b, i)])
    return twin


@pytest.mark.parametrize('how', ['freeze','requires_grad_'])
def test_frozen_parameters_do_not_move_and_the_others_train_as_if_alone(how):
    "The norm layer is frozen too, which fastai's `freeze` does only without `train_bn`"
    x,y = data(24)
    learn = grouped(mlp(), x, y, probe=given())
    learn.train_bn = False
    if how=='freeze': learn.freeze()
    else:
        for p in two_groups(learn.model)[0]: p.requires_grad_(False)
    before = copies(two_groups(learn.model)[0])
    fit(learn)
    want = mlp()
    for p in two_groups(want)[0]: p.requires_grad_(False)
    head_only(want, x, y, given())
    assert same(before, two_groups(learn.model)[0])
    assert distance(learn.model, want)<ROUNDING and distance(want, mlp())>0.1


@pytest.mark.parametrize('update_each', [1,5])
def test_thaw_in_the_middle(update_each):
    "Frozen for an epoch, then `unfreeze`: averages begin anew, as they do in fastai, and the new parameters are estimated at once"
    x,y = data(24)
    learn = grouped(mlp(), x, y, probe=(probe:=given()), update_each=update_each)
    learn.train_bn = False
    learn.freeze()
    fit(learn)
    middle = copies(learn.model.parameters())
    n = learn.opt.n_estimates
    learn.unfreeze()
    due = Noted('after_backward', lambda l: l.opt.n_estimates)
    fit(learn.add_cb(due))
    assert due.notes[0]==n+1
    assert not any(torch.equal(a,b) for a,b in zip(middle, learn.model.parameters()))
    if update_each==1:
        want,p2 = mlp(),given()
        for p in two_groups(want)[0]: p.requires_grad_(False)
        head_only(want, x, y, p2)
        for p in want.parameters(): p.requires_grad_(True)
        plain(want, [[b] for b in split(x,y,6)], probe=p2)
        assert distance(learn.model, want)<ROUNDING


@pytest.mark.parametrize('update_each', [1,4])
def test_thaw_by_hand_keeps_the_averages_of_the_others(update_each):
    "`requires_grad_(True)` in the middle of an epoch: the newcomer starts at its first estimate, nobody else notices"
    x,y = data(36)
    class Thaw(Callback):
        run_valid = False
        def before_batch(self):
            if self.train_iter==2: self.model[0].weight.requires_grad_(True)
    model = mlp()
    start = model[0].weight.detach().clone()
    moved = Noted('after_batch', lambda l: not torch.equal(start, l.model[0].weight))
    learn = learner(model, x, y, update_each=update_each, cbs=[Thaw(),moved])
    learn.create_opt()
    model[0].weight.requires_grad_(False)
    fit(learn)
    states = learn.opt.opt.state
    assert moved.notes==[False,False,True,True,True,True]
    assert states[model[0].weight]['step']==4 and states[model[3].weight]['step']==6
    assert states[model[3].weight]['hess_step']==(6 if update_each==1 else 2)


def test_gradual_unfreezing_with_mixed_precision_and_accumulation(cpu_amp):
    "freeze, fit, freeze_to, fit, unfreeze, fit: each group moves exactly when it may"
    x,y = data(30)
    learn = learner(mlp(norm=nn.BatchNorm1d), x, y, n_acc=2).to_fp16()
    learn.splitter = lambda m: [params(m[0]),params(m[1]),params(m[3])]
    learn.train_bn = False
    for n in (2,1,0):
        learn.freeze_to(n)
        before = [copies(g) for g in learn.opt.param_lists]
        fit(learn)
        assert [same(b,g) for b,g in zip(before, learn.opt.param_lists)]==[i<n for i in range(3)]


def test_a_freeze_in_the_middle_of_an_accumulation_drops_it():
    "Half of a step belongs to a model that is no more: gradient and estimate go together"
    x,y = data(18)
    learn = grouped(mlp(), x, y, n_acc=2)
    fit(learn)
    assert learn.opt.n_batches==1 and learn.opt.diags
    learn.freeze()
    assert learn.opt.n_batches==0 and not learn.opt.diags
    assert all(p.grad.abs().sum()==0 for p in learn.model.parameters() if p.grad is not None)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a,self.b,self.head = nn.Linear(5,5),nn.Linear(5,5),nn.Linear(5,3)
        self.b.weight = self.a.weight
    def forward(self, x): return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize('in_two_groups', [False,True])
def test_tied_weights_are_one_parameter(in_two_groups):
    "Also where a splitter names them in two groups: one probe, one step"
    x,y = data(24)
    learn = learner(Tied().double(), x, y, probe=given())
    if in_two_groups: learn.splitter = lambda m: [params(m.a), params(m.b)+params(m.head)]
    want = plain(Tied().double(), [[b] for b in split(x,y,6)])
    assert distance(fit(learn).model, want)<ROUNDING


class Sometimes(nn.Module):
    "`extra` is used only in batches whose number is odd, `never` never"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body,self.extra,self.never = nn.Linear(5,3),nn.Linear(5,3),nn.Linear(2,2)
        self.n = 0
    def forward(self, x):
        out = self.body(x)
        if self.training:
            if self.n%2: out = out+self.extra(x).tanh()
            self.n += 1
        return out


@pytest.mark.parametrize('update_each', [1,2,3])
def test_parameters_that_some_batches_do_not_use(update_each):
    "Unused, it stays where it is. With its first gradient it asks for an estimate, however its uses and the estimates fall"
    x,y = data(36)
    model = Sometimes().double()
    never = copies(model.never.parameters())
    extra = Noted('after_batch', lambda l: l.model.extra.weight.detach().clone())
    learn = fit(learner(model, x, y, probe=given(), update_each=update_each, cbs=[extra]))
    assert same(never, model.never.parameters()) and all(p.grad is None for p in model.never.parameters())
    assert torch.equal(extra.notes[0], Sometimes().double().extra.weight)
    assert not torch.equal(extra.notes[-1], extra.notes[0])
    moved = [not torch.equal(a,b) for a,b in zip(extra.notes, extra.notes[1:])]
    assert moved==[update_each==1, False, True, False, True]
    assert learn.opt.n_estimates=={1: 6, 2: 4, 3: 2}[update_each]


def test_unused_in_some_batches_equals_the_plain_loop():
    "A parameter of zero gradient and zero curvature in the reference, where `torch.autograd` finds none"
    x,y = data(24)
    class Used(Sometimes):
        def forward(self, x): return super().forward(x)+0*self.extra(x).square()+0*self.never(x[:,:2]).sum()
    learn = fit(learner(Used().double(), x, y, probe=given()))
    want = plain(Used().double(), [[b] for b in split(x,y,6)])
    assert distance(want, Used().double())>0.05
    assert distance(learn.model, want)<ROUNDING


class Linearly(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body,self.shift = nn.Linear(5,3),nn.Parameter(torch.zeros(3))
    def forward(self, x): return self.body(x)


def test_zero_curvature_is_zero_and_not_an_error():
    "A loss that is linear in `shift`: its denominator is `eps` alone"
    x,y = data(6)
    model = Linearly().double()
    learn = learner(model, x, y, loss_func=lambda pred,y: F.cross_entropy(pred, y) + 1e-3*model.shift.sum())
    fit(learn)
    state = learn.opt.opt.state[model.shift]
    assert state['hess_step']==1 and state['sqr_avg_diag_hessian'].abs().sum()==0
    assert torch.allclose(model.shift, torch.full_like(model.shift, -HYPERS['lr']*1e-3/HYPERS['eps']))


def adam_with_power(p, grads, sqr_mom=HYPERS['sqr_mom'], mom=HYPERS['mom'], lr=HYPERS['lr'], eps=HYPERS['eps']):
    m,v = torch.zeros_like(p),torch.zeros_like(p)
    for t,g in enumerate(grads, 1):
        m,v = mom*m+(1-mom)*g,sqr_mom*v+(1-sqr_mom)*g**2
        p = p - lr*(m/(1-mom**t))/((v/(1-sqr_mom**t)).sqrt()+eps)
    return p


def test_opt_out_trains_on_squared_gradients():
    "The embedding as with Adam, whose second moment it has; the rest keeps its curvature. The choice survives `freeze_to`"
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9,4), nn.Flatten(), nn.Linear(12,3)).double()
    x = torch.randint(9, (24,3), generator=torch.Generator().manual_seed(0))
    y = data(24)[1]
    net = model()
    start = net[0].weight.detach().clone()
    grads = Noted('after_backward', lambda l: net[0].weight.grad.clone())
    learn = learner(net, x, y, probe=given(), cbs=[grads])
    learn.create_opt()
    learn.opt.opt_out(net[0])
    fit(learn)
    assert (net[0].weight-adam_with_power(start, grads.notes)).abs().max()<ROUNDING
    assert {p for p in trainable_params(learn.opt) if learn.opt.state[p].get('do_hessian', True)}==set(net[2].parameters())
    learn.freeze_to(0)
    assert {p for p in trainable_params(learn.opt) if learn.opt.state[p].get('do_hessian', True)}==set(net[2].parameters())


def test_opt_out_of_everything_takes_no_estimate():
    x,y = data(24)
    learn = learner(mlp(), x, y)
    learn.create_opt()
    learn.opt.opt_out(learn.model)
    fit(learn)
    assert learn.opt.n_estimates==0 and distance(learn.model, mlp())>0.05


def test_another_splitter_gives_other_groups():
    "`create_opt` after a change of the splitter, discriminative rates included"
    x,y = data(24)
    learn = fit(learner(mlp(), x, y, probe=given()))
    learn.splitter = two_groups
    learn.create_opt()
    assert len(learn.opt.param_lists)==2 and learn.opt.n_steps==0
    before = copies(learn.model.parameters())
    fit(learn, lr=[0.,0.1])
    moved = [not torch.equal(a,b) for a,b in zip(before, learn.model.parameters())]
    assert moved==[False]*4+[True]*2


def test_a_group_added_by_hand():
    x,y = data(24)
    model = mlp()
    learn = learner(model, x, y)
    learn.splitter = lambda m: [params(m[3])]
    learn.create_opt()
    fit(learn)
    learn.opt.param_lists = learn.opt.param_lists+[params(model[0])]
    learn.opt.hypers.append({**learn.opt.hypers[0], 'lr': 0.01})
    start = model[0].weight.detach().clone()
    with learn.no_bar(),learn.no_logging(): learn.fit(1, lr=[0.05,0.01])
    assert not torch.equal(start, model[0].weight) and learn.opt.opt.state[model[0].weight]['step']==4


def test_a_square_of_gradients_weighs_one_in_a_dense_start():
    "Estimates weigh less there, as there are more of them"
    p,q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = adahessian_paper([p,q], update_each=10, dense=20)
    opt.opt_out(q)
    opt.differentiate((p**4).sum()+(q**4).sum())
    opt.step()
    assert opt.state[p]['hess_step']==0.1 and opt.state[q]['hess_step']==1


class WithTeacher(nn.Module):
    "In training each forward pass moves a frozen teacher a quarter of the way to its pupil: in place, or by new data"
    def __init__(self, in_place):
        super().__init__()
        self.pupil,self.teacher,self.in_place = mlp(),mlp(1).requires_grad_(False),in_place
    def forward(self, x):
        for p,t in zip(self.pupil.parameters(), self.teacher.parameters()) if self.training else ():
            if self.in_place: t.data.lerp_(p.data, 0.25)
            else: t.data = t.data.lerp(p.data, 0.25)
        return self.pupil(x)+self.teacher(x)

def taught(in_place, **kwargs):
    "Two epochs of six batches"
    return fit(learner(WithTeacher(in_place), *data(36), **kwargs), 2)

@pytest.mark.parametrize('in_place', [True,False])
@pytest.mark.parametrize('kwargs', [dict(hvp='forward'), dict(hessian_bs=1.), dict(n_acc=2, hvp='forward')])
def test_a_frozen_teacher_moves_once_in_each_batch(in_place, kwargs):
    "Evaluated again, the batch has the teacher that it had: as the products that need no second evaluation say"
    a,b = (taught(in_place, probe=given(), **o) for o in (kwargs, {**kwargs, 'hvp':'reverse'}))
    assert distance(a.model, b.model)<ROUNDING

@pytest.mark.parametrize('in_place', [True,False])
@pytest.mark.parametrize('opt_func', [sassha, hessian_free, partial(hessian_free, keep_graph=False), partial(adahessian, rho=0)])
def test_a_report_or_another_evaluation_does_not_teach(in_place, opt_func):
    "With a rate of 0 the teacher is 0.75**12 of the distance away in the end, which a summary does not change"
    learn = taught(in_place, opt_func=opt_func, hypers=dict(lr=0.))
    def away(i=None): return [t-p for p,t in zip(learn.model.pupil.parameters(), i or learn.model.teacher.parameters())]
    start = away([*mlp(1).parameters()])
    for _ in range(2):
        for a,b in zip(away(), start): torch.testing.assert_close(a, b*0.75**12, rtol=1e-12, atol=1e-15)
        learn.curvature_summary()

def test_a_cleared_state_keeps_what_was_said_of_parameters():
    "And drops an accumulation, which the state was for; a gradient from elsewhere stays, and other optimizers are as they were"
    p,said = nn.Parameter(torch.ones(2)),dict(force_train=True, do_wd=False, do_hessian=False)
    opt = adahessian([p], n_acc=2)
    opt.state[p].update(said, step=3)
    opt.differentiate((p**2).sum())
    opt.clear_state()
    assert opt.state[p]==said and p.grad is None and opt.n_batches==0
    p.grad = torch.ones(2)
    opt.clear_state()
    assert torch.equal(p.grad, torch.ones(2)) and Adam([p], lr=0.1)._keep_on_clear==['force_train','do_wd']

def test_what_is_frozen_may_opt_out():
    a,b = nn.Linear(2,2).requires_grad_(False),nn.Linear(2,2)
    opt = adahessian([*a.parameters(), *b.parameters()])
    opt.opt_out(a)
    assert [opt.state[p].get('do_hessian', True) for p in (*a.parameters(), *b.parameters())]==[False,False,True,True]


def test_what_was_asked_for_in_vain_is_not_asked_for_alone_in_the_next_step():
    "One estimate in two steps; p is not in the third batch, where one is due, and has it with the next one of q"
    p,q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt,n = adahessian([p,q], lr=1e-3, update_each=2, dense=0, rho=0),[]
    for both in (True,True,False,True,True):
        opt.differentiate((p**4).sum()+(q**4).sum() if both else (q**4).sum())
        n.append((opt.n_estimates, p in opt.diags, q in opt.diags))
        opt.step()
        opt.zero_grad()
    assert n==[(1,True,True), (1,False,False), (2,True,True), (2,False,False), (3,True,True)]


class Frozen(Callback):
    "Freezes the first layer in the third batch, before the forward pass or after it"
    def __init__(self, when): setattr(self, when, self.freeze)
    def freeze(self):
        if self.training and self.train_iter==2: self.model[0].requires_grad_(False)


@pytest.mark.parametrize('kwargs', [dict(), dict(hvp='forward'), dict(hvp='finite_difference'), dict(curvature='ggn'), dict(curvature='ggn', hvp='forward'),
    dict(estimator='gnb'), dict(hessian_bs=4), dict(n_samples=2, debiased=True), dict(opt_func=sassha), dict(opt_func=hessian_free)],
    ids=lambda o: '-'.join(getattr(v, '__name__', str(v)) for v in o.values()) or 'default')
def test_a_layer_that_is_frozen_between_the_passes_of_a_batch(kwargs):
    "It keeps its weights from that batch on, and the others train as if it had been frozen before"
    def run(when):
        hypers = dict(lr=1.) if kwargs.get('opt_func') is hessian_free else HYPERS
        learn = learner(mlp(), *data(24), cbs=[Frozen(when)], hypers=hypers, **kwargs)
        learn.train_bn = False
        return fit(learn)
    late,early = run('after_pred'),run('before_batch')
    assert distance(late.model, early.model)<ROUNDING and distance(late.model, mlp())>0.01


@pytest.mark.parametrize('n_acc', [1,2])
def test_a_gradient_that_is_dropped_as_its_parameter_was_frozen_is_not_dropped_in_silence(n_acc, recwarn):
    "Halves in turn: within a turn of as many batches as a step has, nothing is lost, which is what the warning advises"
    def run(turn):
        halves = nn.ModuleList([nn.Linear(5,3),nn.Linear(5,3)]).double()
        start = copies(halves.parameters())
        opt,(x,y) = adahessian_paper(halves.parameters(), n_acc=n_acc, lr=0.1),data(24)
        for i,(a,b) in enumerate([*zip(x.split(6), y.split(6))]*2):
            for j,h in enumerate(halves): h.requires_grad_(j==i//turn%2)
            opt.differentiate(F.cross_entropy(halves[i//turn%2](a), b), n_items=len(b))
            if opt.n_batches<n_acc: continue
            opt.step()
            opt.zero_grad()
        return [not same([a], [p]) for a,p in zip(start, halves.parameters())]
    assert run(n_acc)==[True]*4 and not [w for w in recwarn if 'were frozen' in str(w.message)]
    if n_acc==2: assert run(1)==[False,False,True,True] and [w for w in recwarn if '2 parameters were frozen' in str(w.message)]
