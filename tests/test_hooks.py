"Hooks see what they would see with Adam, whatever is evaluated beside; what trains only now and then has an age of its own"
import random,pytest,torch,torch.nn.functional as F
import torch.utils.checkpoint as checkpoints
from fastai.callback.core import Callback
from fastai.callback.hook import ActivationStats,HookCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import FocalLossFlat
from fastai.callback.mixup import CutMix,MixUp
from fastai.optimizer import Adam,OptimWrapper
from functools import partial
from torch import nn
from adahessian_fastai.all import adahessian,adahessian_paper,hessian_free,m_sassha,sassha,sophia
from helpers_learner import HYPERS,data,fit,given,learner,mlp

# The same numbers in another order of sums, in float64
EXACT = 1e-12

# The rate is 0: all see the same weights for ever, and what hooks see is that of one model
STILL = {**HYPERS, 'lr': 0.}
VARIANTS = dict(  # chkstyle: ignore-node
    reverse={}, samples4=dict(n_samples=4), rows=dict(hessian_bs=0.5), forward=dict(hvp='forward'), difference=dict(hvp='finite_difference'),
    auto=dict(hvp='auto'), ggn=dict(curvature='ggn'), ride=dict(curvature='ggn', hvp='forward'), ggn_auto=dict(curvature='ggn', hvp='auto'),
    gnb=dict(estimator='gnb'), gnb4=dict(estimator='gnb', n_samples=4), control=dict(estimator='control_variate', probe='gaussian', signed=True),
    sparse=dict(update_each=2), n_acc=dict(n_acc=2), n_acc_rows=dict(n_acc=2, hessian_bs=4), rows_ggn=dict(hessian_bs=0.5, curvature='ggn'))


def adam(params, lr, **kwargs): return Adam(params, lr=lr, wd=0.)


def seen(hook, opt_func=adahessian, model=None, n=2, **kwargs):
    "What `hook(model)` notes down in two epochs of three batches, and the Learner"
    model = model or mlp()
    notes = hook(model)
    own = dict(opt_func=adam, hypers=dict(lr=0.)) if opt_func is adam else dict(hypers=STILL)
    learn = learner(model, *data(18), **own, **kwargs)
    learn.dls = DataLoaders(learn.dls.train, DataLoader([], bs=6), device=torch.device('cpu'))
    return [o for o in notes(fit(learn, n))],learn


def backward_notes(model):
    "Gradients that full backward hooks and their forerunners get, for each module"
    notes = []
    def note(name, m, *gs): notes.append((name, *[None if o is None else o.detach().clone() for g in gs for o in g]))
    for n,m in model.named_children():
        m.register_full_backward_hook(partial(note, n))
        m.register_full_backward_pre_hook(partial(note, f'before {n}'))
    return lambda _: notes


def forward_notes(model):
    "Outputs that forward hooks get, and how often a list, a number in a closure and a global number say that they were called"
    notes,n = [],0
    def note(m, x, y):
        nonlocal n
        global n_calls
        n,n_calls = n+1,n_calls+1
        notes.append(y.detach().clone())
    for m in model.children(): m.register_forward_hook(note)
    global n_calls
    n_calls = 0
    return lambda _: [*notes, torch.tensor([len(notes),n,n_calls])]

n_calls = 0


def same(a, b):
    def one(x, y):
        if isinstance(x, tuple): return same(x, y)
        return (x-y).abs().max()<EXACT if isinstance(x, torch.Tensor) else x==y
    return len(a)==len(b) and all(map(one, a, b))


def alone(notes):
    "Of two batches that make a step, each of four modules noted twice, the second one enters the running mean with a half"
    return [(name, *[None if g is None else g*(1+i//8%2) for g in gs]) for i,(name,*gs) in enumerate(notes)]


@pytest.fixture(scope='module')
def with_adam(): return {f: seen(f, adam)[0] for f in (backward_notes,forward_notes)}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('notes', [backward_notes,forward_notes], ids=['backward','forward'])
def test_module_hooks_see_what_they_see_with_adam(notes, name, with_adam):
    "As often, and the same numbers"
    kwargs = {'probe': given(), **VARIANTS[name]}
    if VARIANTS[name].get('estimator'): kwargs = VARIANTS[name]
    found,learn = seen(notes, **kwargs)
    if learn.opt.n_acc>1 and notes is backward_notes: found = alone(found)
    assert learn.opt.n_estimates and same(found, with_adam[notes])


def means(model):
    "fastai's `ActivationStats` and a `HookCallback`, which hook every layer from outside"
    class Means(HookCallback):
        run_valid,notes = False,[]
        def hook(self, m, i, o): return o.detach().mean().item()
        def after_batch(self): self.notes.append([*self.hooks.stored])
    cbs = [ActivationStats(modules=[*model]),Means(modules=[*model])]
    return cbs,lambda: [*map(list, cbs[0].stats),*cbs[1].notes]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', VARIANTS)
def test_the_hooks_of_callbacks_see_what_they_see_with_adam(name):
    def stats(opt_func, **kwargs):
        model = mlp()
        cbs,notes = means(model)
        seen(lambda m: lambda _: [], opt_func, model, cbs=cbs, **kwargs)
        return [float(v) if isinstance(v, float) else repr(v) for o in notes() for v in o]
    want = stats(adam)
    assert len(want)==2*6*4 and stats(adahessian, **VARIANTS[name])==want


DIAGS = ['reverse','samples4','rows','forward','difference','ggn','ride','gnb','gnb4','control']

@pytest.mark.parametrize('hook', ['full','pre'])
@pytest.mark.parametrize('name', DIAGS)
def test_a_hook_that_halves_the_gradient_does_not_change_the_curvature(name, hook):
    "A hook of a module, and of a parameter"
    def average(halve):
        model = mlp()
        if halve and hook=='full': model[2].register_full_backward_hook(lambda m,gi,go: tuple(g/2 for g in gi))
        if halve and hook=='pre': model[2].register_full_backward_pre_hook(lambda m,go: tuple(g/2 for g in go))
        if halve: model[3].weight.register_hook(lambda g: g/2)
        opt = seen(lambda m: lambda _: [], model=model, n=1, **VARIANTS[name])[1].opt
        states = [opt.state[p] for p in model.parameters()]
        return [s.get('sqr_avg_diag_hessian', s.get('avg_diag_hessian')) for s in states],[s['grad_avg'] for s in states]
    (d,g),(halved_d,halved_g) = average(False),average(True)
    assert same(halved_d, d)
    assert same(halved_g, [o/2 if i<5 else o for i,o in enumerate(g)]) # Four before the hooked layer, and the parameter itself


# Parameters that train only now and then

def two_halves(f):
    "A plain loop on two halves that train in turn, or as `f` says, under one optimizer"
    torch.manual_seed(0)
    halves = [nn.Linear(4,3),nn.Linear(4,3)]
    opt = adahessian([p for m in halves for p in m.parameters()], **{**HYPERS, 'lr': 1e-3, 'dense': 0, **f})
    return halves,opt


def one_step(opt, half, x, y):
    opt.differentiate(F.cross_entropy(half(x), y))
    n = len(opt.diags)
    opt.step()
    opt.zero_grad()
    return n


@pytest.mark.parametrize('turns,n_estimates', [([0,1],7), ([0,0,1],9), ([0,0,0,0,0,0,0,0,0,1],7)], ids=['in turn','two to one','ten to one'])
@pytest.mark.filterwarnings('ignore:No parameter moves')
def test_each_half_has_an_estimate_for_each_ten_of_its_own_steps(turns, n_estimates):
    "Also where it was asked for one while it did not train; one that came along with the other's estimate waits ten steps from then on"
    halves,opt = two_halves(dict(update_each=10))
    x,y = data(8, (4,), dtype=torch.float)
    own = [[],[]] # For each half, in which of its own steps it had an estimate
    for i in range(60):
        k,before = turns[i%len(turns)],[opt.state[next(h.parameters())].get('hess_step', 0) for h in halves]
        one_step(opt, halves[k], x, y)
        own[k].append(opt.state[next(halves[k].parameters())].get('hess_step', 0)>before[k])
    for o in own: assert all(any(o[i:i+12]) for i in range(len(o)-12)) # Ten steps, one that shows that it was missed, and the next one
    assert opt.n_estimates==n_estimates


@pytest.mark.parametrize('dense', [0,20])
def test_a_part_that_waits_for_an_estimate_asks_for_none_where_it_is_absent(dense):
    "Trained at one step between two estimates, and never again, it costs nothing"
    def run(at):
        halves,opt = two_halves(dict(update_each=10, dense=dense))
        x,y = data(8, (4,), dtype=torch.float)
        for i in range(100): one_step(opt, halves[i==at], x, y)
        return opt.n_estimates
    assert run(33)==run(None)=={0: 10, 20: 28}[dense]


def test_experts_that_are_rarely_chosen_cost_an_estimate_or_two_a_choice():
    "Four that are chosen at 2 % of the steps had one at four of five steps"
    torch.manual_seed(0)
    experts,out = nn.ModuleList(nn.Linear(4,5) for _ in range(8)),nn.Linear(5,3)
    opt = adahessian([*experts.parameters(), *out.parameters()], **{**HYPERS, 'lr': 1e-3, 'dense': 20, 'update_each': 10})
    x,y = data(8, (4,), dtype=torch.float)
    g,n_choices,choices = random.Random(1),0,[.02]*4+[.5]*4
    for i in range(400):
        chosen = [j for j,p in enumerate(choices) if g.random()<p] or [4]
        n_choices += sum(j<4 for j in chosen)
        opt.differentiate(F.cross_entropy(out(sum(experts[j](x).tanh() for j in chosen)), y))
        opt.step()
        opt.zero_grad()
    assert 20<n_choices<50 and opt.n_estimates<20+38+2*n_choices+20 # Their own, and for the others in their dense starts


def test_layers_that_are_left_out_now_and_then_have_their_estimates_together():
    "The period is kept by all: one that was left out comes along with the others' next estimate, and has their age from then on"
    ps = [nn.Parameter(torch.ones(2)) for _ in range(12)]
    opt,left_out = adahessian_paper(ps, lr=1e-4, update_each=10),torch.Generator().manual_seed(0)
    for i in range(200):
        on = [p for j,p in enumerate(ps) if j==0 or i%10==0 or torch.rand(1, generator=left_out)>0.2]
        opt.differentiate(sum((p**4).sum() for p in on))
        assert bool(opt.diags)==(i%10==0)
        opt.step()
        opt.zero_grad()
    assert {opt.state[p]['hess_step'] for p in ps}=={20} and {opt.state[p]['age'] for p in ps}<={*range(191-9,201)}


def test_generator_and_critic_of_a_learner_have_as_many_estimates():
    "One Learner, the halves in turn by `requires_grad_`, as `GANTrainer` switches them"
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(5,3).double(),nn.Linear(5,3).double()
        def forward(self, x): return self.a(x)+self.b(x)
    class Switch(Callback):
        run_valid = False
        def before_batch(self):
            for i,m in enumerate((self.model.a,self.model.b)): m.requires_grad_(self.train_iter%2==i)
    learn = fit(learner(Halves(), *data(24), cbs=[Switch()], update_each=10), 10)
    assert learn.opt.n_steps==40
    assert {s['hess_step'] for s in learn.opt.state.values()}=={2} and {s['age'] for s in learn.opt.state.values()}=={20}


@pytest.mark.filterwarnings('ignore:No parameter moves')
def test_a_budget_does_not_compare_one_half_with_the_other():
    "A step of the first costs 10 units, of the second 1, and an estimate as much again: 1.0 steps, so half of the time is a period of 2"
    from adahessian_fastai.schedule import Budget
    now = [0.]
    halves,opt = two_halves(dict(budget=Budget(0.5, clock=lambda: now[0])))
    x,y = data(8, (4,), dtype=torch.float)
    for i in range(60):
        cost = (10,1)[i%2]
        opt.differentiate(F.cross_entropy(halves[i%2](x), y))
        now[0] += cost*(2 if opt.diags else 1)
        opt.step()
        opt.zero_grad()
    assert opt.when.done and opt.update_each[1]==2


# Curvature that is not a number, in one parameter

class Distance(nn.Module):
    "A norm at zero: its gradient is defined as zero, its curvature is not a number"
    def __init__(self):
        super().__init__()
        self.w,self.lin = nn.Parameter(torch.zeros(4, dtype=torch.double)),nn.Linear(5,3).double()
    def forward(self, x): return self.lin(x)+self.w.norm()


def test_only_the_parameter_without_a_finite_curvature_is_dropped():
    learn = learner(Distance(), *data(12))
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.warns(UserWarning, match='not finite for 1 of 3 parameters'): fit(learn)
    w,*lin = learn.model.parameters()
    assert w.abs().max()==0 and 'hess_step' not in learn.opt.state[w]
    assert all((p-o).abs().min()>0 for p,o in zip(lin, before[1:])) and (learn.opt.n_steps,learn.opt.n_skipped)==(2,0)


def test_a_step_that_moves_nothing_is_a_skipped_step():
    class Alone(Distance):
        def forward(self, x): return x[:,:3].detach()+self.w.norm()
    learn = learner(Alone(), *data(12))
    with pytest.warns(UserWarning, match='No parameter moves'): fit(learn)
    assert (learn.opt.n_steps,learn.opt.n_skipped)==(0,2)


# Contexts that are entered twice, and checkpoints

class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(5,7).double(),nn.Linear(7,3).double()
    def forward(self, x): return self.b(checkpoints.checkpoint(lambda x: self.a(x).tanh(), x, use_reentrant=False))


def plain_copy():
    m = Checkpointed()
    m.forward = lambda x: m.b(m.a(x).tanh())
    return m


def trained(model, **kwargs):
    torch.manual_seed(0)
    return [p.detach() for p in fit(learner(model(), *data(18), probe=given(), **kwargs)).model.parameters()]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kwargs', [{}, dict(hvp='forward'), dict(hvp='finite_difference'), dict(hvp='auto'), dict(curvature='ggn'),
    dict(curvature='ggn', hvp='auto')], ids=str)
def test_checkpoints_that_are_not_reentrant_change_nothing(kwargs):
    assert same(trained(Checkpointed, **kwargs), trained(plain_copy, **kwargs))


def test_what_checkpoints_cannot_do_names_a_way_that_works_there():
    with pytest.raises(ValueError, match="hvp='reverse'"): trained(Checkpointed, curvature='ggn', hvp='forward')
    trained(Checkpointed, curvature='ggn', hvp='reverse')


class Synced(nn.Module):
    "One synchronised norm that is used twice"
    def __init__(self, norm=nn.SyncBatchNorm):
        super().__init__()
        self.m = nn.Sequential(nn.Linear(5,7), norm(7), nn.Tanh(), nn.Linear(7,3)).double()
    def forward(self, x): return self.m(x)+self.m(-x)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('hvp', ['reverse','forward','finite_difference','auto'])
def test_synchronised_norms_on_one_process(hvp):
    "They are ordinary ones there"
    assert same(trained(Synced, hvp=hvp), trained(partial(Synced, nn.BatchNorm1d), hvp=hvp))


# What does not fit together is told, and the way out works

class Own(Learner):
    def _do_one_batch(self):
        self.pred = self.model(*self.xb)
        self.loss_grad = self.loss_func(self.pred, *self.yb)
        self.loss = self.loss_grad.clone()
        if not self.training: return
        self._backward()
        self.opt.step()
        self.opt.zero_grad()


class Mended(Own):
    def _do_one_batch(self):
        if not self.training: return super()._do_one_batch()
        with self.opt.forward_context(self): super()._do_one_batch()


class AsAdvised(Own):
    def _do_one_batch(self):
        with self.opt.forward_context(self): super()._do_one_batch()


def built(cls=Learner, loss_func=F.cross_entropy, cbs=(), dtype=torch.float, shape=(5,), **kwargs):
    x,y = data(12, shape, dtype=dtype)
    net = nn.Sequential(nn.Flatten(), *mlp(n_in=x[0].numel())).to(dtype)
    return cls(learner(net, x, y).dls, net, loss_func, cbs=list(cbs), **kwargs)


@pytest.mark.parametrize('opt', [adahessian,sophia])
def test_an_optimizer_inside_another_wrapper(opt):
    with pytest.raises(ValueError, match='without `OptimWrapper`'): fit(built(opt_func=partial(OptimWrapper, opt=opt)))
    fit(built(opt_func=opt))


@pytest.mark.parametrize('opt', [adahessian,sophia])
def test_groups_as_dicts(opt):
    with pytest.raises(ValueError, match="groups in PyTorch's form"): fit(built(opt_func=opt, splitter=lambda m: [dict(params=[*m.parameters()])]))
    fit(built(opt_func=opt, splitter=lambda m: [[*m.parameters()]]))


def test_a_learner_with_a_batch_of_its_own():
    with pytest.raises(ValueError, match=r'put `with self.opt.forward_context\(self\):` around its body'): fit(built(Own, opt_func=adahessian))
    learn = fit(built(Mended, opt_func=adahessian))
    assert learn.opt.n_steps==learn.opt.n_estimates==2


@pytest.mark.parametrize('opt', [adahessian, partial(adahessian, n_acc=3), hessian_free], ids=['adahessian','n_acc','hessian_free'])
def test_the_context_of_a_batch_is_for_training_alone(opt):
    "Around validation too it moves nothing and drops nothing: losses, steps and weights are those of Learner"
    runs = []
    for cls in (Learner,Mended,AsAdvised):
        torch.manual_seed(0)
        runs.append(fit(built(cls, opt_func=opt), 3))
    first = [o.recorder.values for o in runs]
    assert first[0]==first[1]==first[2] and len({o.opt.n_steps for o in runs})==1
    assert all(torch.equal(p, q) for o in runs[1:] for p,q in zip(runs[0].model.parameters(), o.model.parameters()))


@pytest.mark.parametrize('opt', [sophia,partial(adahessian, estimator='gnb')])
@pytest.mark.parametrize('what', ['mixup','cutmix','focal'])
def test_labels_that_cannot_be_drawn(opt, what):
    "The way out is one that works there"
    from fastai.losses import CrossEntropyLossFlat
    kwargs = dict(loss_func=FocalLossFlat()) if what=='focal' else dict(loss_func=CrossEntropyLossFlat(), cbs=[MixUp() if what=='mixup' else CutMix()], shape=(1,4,4))
    with pytest.raises(ValueError, match="use estimator='hutchinson'"): fit(built(opt_func=opt, **kwargs))
    fit(built(opt_func=partial(opt, estimator='hutchinson'), **kwargs))


@pytest.mark.parametrize('kwargs', [dict(), dict(hvp='forward'), dict(estimator='gnb'), dict(hvp='finite_difference')], ids=str)
@pytest.mark.parametrize('opt_func', [adahessian,m_sassha,sassha], ids=lambda f: f.__name__)
def test_a_module_hook_that_stops_the_gradient_stops_it_for_all(opt_func, kwargs):
    "The pass whose gradient is stepped with has the hooks of the modules, wherever the parameters are in it"
    learn = learner(mlp(), *data(24), opt_func=opt_func, **kwargs)
    learn.model[1].register_full_backward_hook(lambda m,gin,gout: tuple(g*0 for g in gin))
    fit(learn)
    first,(head,start) = learn.model[0].weight,(learn.model[3].weight,mlp())
    assert torch.equal(first, start[0].weight) and (head-start[3].weight).abs().max()>0.01
