"Every way to a product ends with the weights of the double backward, in every setting that it can be combined with"
import pickle,random,warnings
import numpy as np,pytest,torch,torch.nn.functional as F
from collections import deque,namedtuple
from dataclasses import dataclass
from fastai.callback.core import Callback,CancelBackwardException
from fastai.torch_core import TensorImage
from functools import partial
from torch import nn
from types import SimpleNamespace
from adahessian_fastai.all import CurvatureRecorder,adahessian_paper as adahessian,hessian_free,sassha
from helpers_learner import Cube,HYPERS,InTurn,ROUNDING,data,distance,fit,given,learner,mlp,state_of
from adahessian_fastai.curvature import NoProductError,FirstThatWorks,batch_statistics
from adahessian_fastai.replay import backward_hooks,fresh,preserving,restored,snapshot,without_backward_hooks

SETTINGS = dict(  # chkstyle: ignore-node
    whole={}, rows=dict(hessian_bs=0.5), rows4=dict(hessian_bs=4), rows_changed=dict(hessian_bs=(3,0.5)), each=dict(update_each=2), samples=dict(n_samples=2),
    debiased=dict(n_samples=2, debiased=True), n_acc=dict(n_acc=2), n_acc_rows=dict(n_acc=2, hessian_bs=0.5), signed=dict(signed=True), rho=dict(rho=0.3),
    rho_rows=dict(rho=0.3, hessian_bs=0.5), gaussian=dict(probe='gaussian'),
    control=dict(estimator='control_variate', probe='gaussian', signed=True), rows_samples=dict(hessian_bs=0.5, n_samples=2),
    control_rows=dict(estimator='control_variate', probe='gaussian', signed=True, hessian_bs=0.5))


def trained(model=None, n=2, **kwargs):
    learn = learner(model or mlp(), *data(36), hypers={**HYPERS, **kwargs})
    torch.manual_seed(3)
    learn.create_opt()
    return fit(learn, n).model


@pytest.mark.parametrize('curvature', ['hessian','ggn'])
@pytest.mark.parametrize('name', SETTINGS)
def test_the_forward_way_is_the_reverse_way(curvature, name):
    "12 steps with the same random numbers; of the whole batch or of rows, along with the forward pass or after it"
    kwargs = dict(SETTINGS[name], curvature=curvature)
    assert distance(trained(hvp='forward', **kwargs), trained(hvp='reverse', **kwargs))<ROUNDING


class Calls:
    "Probes that no generator determines, another one at each call; of `each` draws the first one counts"
    def __init__(self, each=1): self.each,self.n = each,0
    def __call__(self, p, _):
        turn,i = divmod(self.n, 6) # The network has six parameters
        self.n += 1
        g = torch.Generator().manual_seed(i+6*(1000+turn if turn%self.each else turn//self.each))
        return (torch.randint(2, p.shape, generator=g)*2-1).to(p)


@pytest.mark.parametrize('kwargs', [dict(signed=True),dict(signed=True, hessian_bs=0.5),dict(n_samples=1, signed_blocks=True)], ids=str)
def test_a_probe_that_comes_from_no_generator_is_drawn_once(kwargs):
    "Products that run along ask for it ahead, and the estimate multiplies by the same one"
    probe = Calls(2)
    along = trained(curvature='ggn', hvp='forward', probe=probe, **kwargs)
    assert probe.n%12==0 and distance(along, trained(curvature='ggn', probe=Calls(), **kwargs))<ROUNDING
    assert distance(along, trained(curvature='ggn', probe=lambda p,_: Calls()(p, _), **kwargs))>100*ROUNDING # Probes matter


heads = [] # What was called; the memory of a module is put back

class Noted(InTurn):
    def forward(self, x):
        out = super().forward(x)
        heads.append(self.n%2)
        return out


class Trained(Callback):
    "Validation counts nothing"
    def after_epoch(self): del heads[-1:]


@pytest.mark.parametrize('kwargs', [dict(),dict(curvature='ggn'),dict(estimator='gnb')], ids=str)
def test_rows_are_evaluated_with_the_memory_of_their_batch(kwargs):
    "Here, which head is next; and the count goes on where the batch left it"
    model = Noted()
    heads.clear()
    learn = fit(learner(model, *data(36), hypers={**HYPERS, **kwargs}, hessian_bs=3, cbs=[Trained()]), 2)
    assert heads==[o for i in range(12) for o in [(i+1)%2]*2] and model.n==12 and learn.opt.n_estimates==12


# What a batch's loss may depend on besides weights and data: things that remember. Each is as it was when the batch is evaluated again

class RunningCentre(nn.Module):
    "Subtracts a mean of earlier predictions from these; `move` says how it remembers that"
    def __init__(self, move):
        super().__init__()
        self.register_buffer('centre', torch.zeros(3, dtype=torch.double))
        self.move,self.n = move,0
    def forward(self, pred, y):
        loss,mean = F.cross_entropy(pred-self.centre.clone(), y),pred.detach().mean(0)
        if self.move=='new': self.centre = 0.7*self.centre+0.3*mean
        else: self.centre.mul_(0.7).add_(mean, alpha=0.3)
        self.n += 1
        return loss


class Growing:
    "A loss that is no module, and grows with the batches that it has seen"
    n = 0
    def __call__(self, pred, y):
        self.n += 1
        return F.cross_entropy(pred, y)*self.n/4


def annealed():
    "Closures: a number, a list and a variable of the notebook tell how many batches were seen"
    n,seen = 0,[]
    def loss(pred, y):
        nonlocal n
        n += 1
        seen.append(n)
        heads.append(n)
        return F.cross_entropy(pred, y)*(n+len(seen)+len(heads))/12
    heads.clear()
    return loss


@dataclass
class Last: h:torch.Tensor=None


class Own(nn.Module):
    "Multiplies its hidden units by what `draw` finds in `own`"
    def __init__(self, own, draw):
        super().__init__()
        self.net,self.own,self.draw = mlp(),own,draw
    def forward(self, x): return self.net[3](self.net[:3](x)*self.draw(self.own))


def as_array(own):
    own += 0.25
    return torch.from_numpy(1/own)

def as_set(own):
    own.add(len(own))
    return 1/len(own)

def as_state(own):
    own.h = torch.ones(7).double() if own.h is None else own.h*1.1
    return own.h


class Weighted(Callback):
    "Changes the loss at `when` by what `f` returns, each time more"
    order = -30
    def __init__(self, when, f='count'):
        self.n,self.past,self.g,self.f = 0,torch.ones(1).double(),torch.Generator().manual_seed(0),f
        setattr(self, when, self.change)
    def count(self):
        self.n += 1
        return self.n/4
    def in_place(self): return self.past.mul_(1.1).clone()
    def drawn(self): return 0.5+torch.rand(1, generator=self.g).double()
    def change(self): self.learn.loss_grad = self.loss_grad*getattr(self, self.f)()


class Penalty(Callback):
    "The last word, when the backward pass begins"
    def before_backward(self): self.add(0.05*sum(p.square().sum() for p in self.model.parameters()))
    def add(self, o): self.learn.loss_grad = self.loss_grad+o


def uniform(own): return torch.rand(7, generator=own).double()+0.5

REMEMBER = dict(  # chkstyle: ignore-node
    loss=lambda: dict(loss_func=RunningCentre('new')), loss_in_place=lambda: dict(loss_func=RunningCentre('in_place')),
    loss_object=lambda: dict(loss_func=Growing()), loss_partial=lambda: dict(loss_func=partial(RunningCentre('new'))),
    loss_closure=lambda: dict(loss_func=annealed()), loss_bound=lambda: dict(loss_func=partial(annealed())),
    generator=lambda: dict(model=Own(torch.Generator().manual_seed(0), uniform)),
    numpy=lambda: dict(model=Own(np.random.default_rng(0), lambda g: torch.from_numpy(g.random(7)))),
    numpy_old=lambda: dict(model=Own(np.random.RandomState(0), lambda g: torch.from_numpy(g.rand(7)))),
    python=lambda: dict(model=Own(random.Random(0), lambda g: g.random())), array=lambda: dict(model=Own(np.ones(7), as_array)),
    set=lambda: dict(model=Own(set(), as_set)), dataclass=lambda: dict(model=Own(Last(), as_state)),
    namespace=lambda: dict(model=Own(SimpleNamespace(h=None), as_state)), callback=lambda: dict(cbs=[Weighted('after_loss')]),
    callback_tensor=lambda: dict(cbs=[Weighted('after_loss', 'in_place')]), callback_drawn=lambda: dict(cbs=[Weighted('after_loss', 'drawn')]),
    before_backward=lambda: dict(cbs=[Penalty()]), before_backward_counts=lambda: dict(cbs=[Weighted('before_backward')]))


def remembering(name, cbs=(), opt_func=adahessian, **kwargs):
    what = REMEMBER[name]()
    learn = learner(what.get('model') or mlp(), *data(36), loss_func=what.get('loss_func', F.cross_entropy), cbs=[*what.get('cbs', []), *cbs],
        probe=given() if opt_func is adahessian else None, hypers=HYPERS if opt_func is adahessian else {}, opt_func=opt_func, **kwargs)
    torch.manual_seed(3)
    return fit(learn, 2)


# A one-sided difference in float64 has half of the digits
DIFFERENCE = 1e-6

@pytest.mark.parametrize('name', REMEMBER)
def test_each_evaluation_remembers_what_the_batch_did(name):
    "Every way sees one function and ends with the weights of the double backward, which evaluates nothing again"
    once = remembering(name)
    for hvp,tol in (('forward',ROUNDING), ('finite_difference',DIFFERENCE)):
        again = remembering(name, hvp=hvp)
        assert distance(again.model, once.model)<tol, hvp
        if hasattr(once.loss_func, 'n'): assert again.loss_func.n==once.loss_func.n


class Cancels(Callback):
    "Wants no backward pass"
    def before_backward(self): raise CancelBackwardException

def test_a_cancelled_backward_pass_cancels_no_measurement():
    learn = learner(mlp(), *data(36))
    plain = str(learn.curvature_summary(n_samples=2))
    learn.add_cb(Cancels())
    assert str(learn.curvature_summary(n_samples=2))==plain


class Measures(Callback):
    "Looks at the curvature of the batch under way, at `when`"
    def __init__(self, when):
        self.found = []
        setattr(self, when, self.look)
    def look(self): self.found.append(self.learn.curvature_product(n_batches=1)([torch.ones_like(p) for p in self.model.parameters()])[0])

@pytest.mark.parametrize('when', ['after_pred','after_loss','before_backward'])
def test_a_callback_may_measure_where_it_would_be_asked_itself(when):
    "It is not asked without end; the numbers are those of a measurement before the training"
    cb,model,xy = Measures(when),mlp(),data(36)
    v = [torch.ones_like(p) for p in model.parameters()]
    before = learner(model, *xy).curvature_product(n_batches=1)(v)[0]
    learn = fit(learner(model, *xy, cbs=[cb]), 1)
    assert torch.allclose(cb.found[0], before, atol=ROUNDING) and learn.opt.n_skipped==0


@pytest.mark.parametrize('name', REMEMBER)
def test_a_measurement_is_not_remembered(name):
    plain,measured = remembering(name),remembering(name, cbs=[CurvatureRecorder(every=2, max_iter=3)])
    assert distance(plain.model, measured.model)==0 and len(measured.curvature_recorder.records)==6
    before = pickle.dumps(state_of(measured)), getattr(measured.loss_func, 'n', 0)
    measured.stability(n_batches=1, max_iter=3)
    assert (pickle.dumps(state_of(measured)), getattr(measured.loss_func, 'n', 0))==before


@pytest.mark.parametrize('name', ['loss','loss_in_place','loss_object'])
def test_trials_of_a_step_are_not_remembered(name):
    "Hessian-free evaluates a batch for CG, backtracking and line search; training and validation see it once each"
    learn = remembering(name, opt_func=hessian_free, jvp='dual')
    assert learn.loss_func.n==2*(6+1) and learn.opt.n_skipped==0
    batches = [tuple(o[:18] for o in data(36)),tuple(o[18:] for o in data(36))]
    model,loss_func = mlp(),REMEMBER[name]()['loss_func']
    hessian_free(model.parameters()).acc_step(model, loss_func, batches)
    assert loss_func.n==2


@pytest.mark.filterwarnings('ignore:`torch.jit')
def test_buffers_of_torchscript_move_once():
    "They are no attributes of Python. Statistics of a batch norm show every forward pass in training, and change no step"
    def model():
        net = mlp(norm=nn.BatchNorm1d)
        return torch.jit.trace(net, data(6)[0], check_trace=False)
    def buffers(**kwargs):
        learn = learner(model(), *data(36), cbs=[CurvatureRecorder(every=2, max_iter=3)] if kwargs.pop('record', False) else (), probe=given(), **kwargs)
        return [b.double() for b in fit(learn, 2).model.buffers()]
    once = buffers()
    for again in (buffers(hvp='finite_difference'), buffers(record=True)):
        assert len(again)==3 and all(torch.allclose(a, b, atol=DIFFERENCE) for a,b in zip(once, again))


class Warped(nn.Module):
    "Pixels from where a network says: PyTorch has no forward derivative"
    def forward(self, x):
        image = torch.linspace(0, 1, 16).to(x).view(1,1,4,4).expand(len(x),1,4,4)
        return F.grid_sample(image, torch.stack([x]*2, -1)[:,None].tanh(), align_corners=False).flatten(1)

class Cubed(nn.Module):
    def forward(self, x): return Cube.apply(x)

@pytest.mark.parametrize('last', [Cubed,Warped])
def test_where_there_is_no_forward_derivative_the_way_that_works_is_named(last):
    def model(): return nn.Sequential(mlp(), last())
    try: torch.autograd.functional.hessian(lambda x: last()(x).pow(2).sum(), torch.rand(1,3))
    except RuntimeError: pytest.skip('this version of PyTorch does not differentiate it twice')
    with pytest.raises(ValueError, match="hvp='forward' is not possible here, use 'reverse'"): trained(model(), hvp='forward')
    assert distance(trained(model(), hvp='reverse'), model())>100*ROUNDING


def test_a_way_is_looked_at_though_one_before_it_was_right():
    "The second one starts without the trust in the first"
    used = []
    def build(way):
        def product(v):
            used.append(way)
            if len(used)==2: raise RuntimeError('no more')
            return v
        return product
    product = FirstThatWorks(['a','b'], build, lambda way: 'it is wrong' if way=='b' else '')
    assert product(1)==1
    with pytest.raises(NoProductError, match='it is wrong'): product(1)

def test_a_batch_norm_without_running_statistics_stays_one():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    with batch_statistics(model): assert not any(m.track_running_stats for m in model)
    assert [m.track_running_stats for m in model]==[False,True]

def test_the_first_look_is_the_only_one():
    learn = fit(learner(mlp(), *data(12)))
    assert learn.opt.estimator.curvature.trusted

def test_nothing_of_a_pass_with_dual_numbers_is_kept():
    learn = fit(learner(mlp(), *data(12), curvature='ggn', hvp='forward'))
    assert learn.opt.n_estimates==2 and learn.opt.estimator.curvature.ride is None


class InputPenalty(Callback):
    "A gradient penalty: the square of the derivative for the inputs"
    def after_loss(self):
        if not self.training: return
        x = self.xb[0].detach().requires_grad_()
        g, = torch.autograd.grad(self.model(x).square().sum(), x, create_graph=True)
        self.learn.loss_grad = self.learn.loss_grad+g.square().mean()
        self.learn.loss = self.learn.loss_grad.detach().float()

def penalized(hvp, norm=nn.LayerNorm): return fit(learner(mlp(norm=norm), *data(36), probe=given(), hvp=hvp, cbs=[InputPenalty()])).opt

def test_a_gradient_penalty_through_a_layer_norm_has_no_right_double_backward(capsys):
    "PyTorch's third derivative of it is wrong: differences are believed. With RMSNorm all ways agree, without a warning"
    with pytest.warns(UserWarning, match='wrong, as .* layer norm'): penalized('reverse')
    with pytest.raises(RuntimeError, match="derivative of NativeLayerNorm.* is wrong: use hvp='finite_difference'"): penalized('forward')
    assert penalized('finite_difference').n_estimates==6
    assert penalized('auto').estimator.curvature.used=='finite_difference'
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        a,b = (penalized(o, nn.RMSNorm) for o in ('reverse','forward'))
    assert all(torch.allclose(x, y) for x,y in zip(a.all_params().itemgot(0), b.all_params().itemgot(0)))


# A context that leaves no trace

Pair = namedtuple('Pair', 'a b')
calls = 0

class Everything(nn.Module):
    "Each call adds one to all that it remembers, in place where that is possible, and returns the sum of it with three random numbers"
    def __init__(self):
        super().__init__()
        zero = lambda: torch.zeros(1)
        self.lin,self.rows = nn.Linear(1,1),nn.Embedding(2,1, max_norm=1.)
        self.lin.bias.requires_grad_(False)
        self.register_buffer('n', zero())
        self.one,self.pair,self.several,self.row,self.by_name = zero(),Pair(zero(), 'b'),(zero(),),deque([zero()]),{'k': [zero()]}
        self.alias,self.frozen = [self.one],{'bias': self.lin.bias}
        self.generator = torch.Generator().manual_seed(0)
        with torch.no_grad(): self.rows.weight.fill_(5.)
    def remembered(self):
        assert self.alias[0] is self.one and self.frozen['bias'] is self.lin.bias and isinstance(self.pair, Pair)
        return [self.n, self.one, self.pair.a, *self.several, *self.row, *self.by_name['k'], self.lin.bias]
    def forward(self, x):
        for o in self.remembered(): o.data.add_(1)
        self.row.append(torch.zeros(1))
        self.new = x
        self.training = not self.training
        return sum(self.remembered())+torch.rand(1)+torch.rand(1, generator=self.generator)+random.random()+self.rows(torch.tensor([0]))

def facts(m):
    "All that a call changes, as numbers"
    states = m.generator.get_state().tolist(),torch.get_rng_state().tolist(),random.getstate()
    return [*(o.item() for o in m.remembered()),m.rows.weight.tolist(),m.training,hasattr(m, 'new'),*states]

def test_a_module_starts_again_from_a_snapshot_and_goes_on_where_it_was():
    "Any number of times"
    m = Everything()
    state = snapshot(m)
    want = m(1).item()
    m(1)
    now = facts(m)
    for _ in range(2):
        with restored(state): assert m(1).item()==want
        assert facts(m)==now

def test_a_call_that_fails_leaves_no_trace_either():
    m = Everything()
    before = facts(m)
    with pytest.raises(ZeroDivisionError), preserving(m): m(1), 1/0
    assert facts(m)==before

def counting():
    "A hook that counts in its closure, and what it has counted"
    n = 0
    def hook(*args):
        nonlocal n
        n += 1
    return hook,lambda: n

def counts_in_the_module(*args):
    global calls
    calls += 1

class Counter:
    def __init__(self): self.n = 0
    def hook(self, *args): self.n += 1

@pytest.mark.parametrize('register', ['register_forward_hook','register_forward_pre_hook'])
def test_what_hooks_remember_is_there_again(register):
    "In a closure, in the module, in lists and dicts that they are given, or in the object of a method"
    m,(hook,n),rows,named,counter,seen = nn.Linear(1,1),counting(),[],{},Counter(),[0]
    def into_list(*args): seen[0] += 1
    def noted(rows, *args, to): rows.append(0), to.update({len(rows): 0})
    for f in (hook, counts_in_the_module, partial(noted, rows, to=named), counter.hook, into_list): getattr(m, register)(f)
    def counts(): return [n(),calls,len(rows),len(named),counter.n,seen[0]]
    m(torch.ones(1))
    before = counts()
    with preserving(m): m(torch.ones(1))
    assert counts()==before
    m(torch.ones(1))
    assert counts()==[o+1 for o in before]

def test_hooks_themselves_are_there_again():
    "One that was registered inside is gone, and one that was removed is back"
    m,seen = nn.Linear(1,1),[]
    first = m.register_forward_hook(lambda *args: seen.append('first'))
    with preserving(m):
        first.remove()
        m.register_forward_hook(lambda *args: seen.append('second'))
        m.register_full_backward_hook(lambda *args: None)
    m(torch.ones(1))
    assert seen==['first'] and not backward_hooks(m)

@pytest.mark.parametrize('register', ['register_full_backward_hook','register_full_backward_pre_hook'])
def test_hooks_of_a_backward_pass_rest(register):
    m,seen,x = nn.Sequential(nn.Linear(1,1)),[],torch.ones(1, requires_grad=True)
    getattr(m[0], register)(lambda *args: seen.append(1))
    with pytest.raises(ZeroDivisionError), without_backward_hooks(m):
        assert not backward_hooks(m)
        m(x).sum().backward()
        1/0
    assert backward_hooks(m) and not seen
    m(x).sum().backward()
    assert seen==[1]

@pytest.mark.parametrize('of', [lambda c: c.hook, lambda c: partial(c.hook), lambda c: c], ids=['method','partial','object'])
def test_what_an_object_remembers_is_there_again(of):
    c = Counter()
    with preserving(of(c)): c.hook()
    assert c.n==0
    c.hook()
    assert c.n==1

def test_what_has_no_tensor_in_it_stays_itself():
    m = nn.Linear(1,1)
    m.names = names = ('a',('b',1))
    with preserving(m): assert m.names is names
    assert m.names is names

def test_a_tensor_with_a_graph_is_remembered_without_it():
    "As a hidden state that was not detached; one that is changed in place comes back"
    m = nn.Linear(1,1)
    m.h = h = m.weight*2
    state = snapshot(m)
    with restored(state):
        assert torch.equal(m.h, h) and not m.h.requires_grad
        m.h.add_(1)
    assert m.h is h and torch.equal(h, m.weight*2)
    with restored(state): assert torch.equal(m.h, h)

def test_a_function_may_speak_of_what_is_not_there_yet():
    def hook(*args): return later
    with preserving(hook): pass
    later = 1
    assert hook()==1

def test_a_loss_that_is_a_method_of_the_learner_remembers_nothing_of_it():
    learn = learner(mlp(), *data(12))
    with preserving(learn.validate): learn.note = 1
    assert learn.note==1

def test_what_a_function_counts_is_there_again():
    f,n = counting()
    with preserving(f): f()
    assert n()==0


class InPlace(nn.Module):
    "Writes into its inputs, or into a copy of them"
    def __init__(self, of_its_own):
        super().__init__()
        self.net,self.of_its_own = mlp(),of_its_own
    def forward(self, x):
        if self.of_its_own: x = x.clone()
        return self.net(x.sub_(.5).div_(2.))

def written_loss(pred, y): return (pred-y.mul_(.5)).square().mean()

@pytest.mark.parametrize('opt_func', [adahessian,sassha,partial(adahessian, hessian_bs=.5),partial(adahessian, hvp='forward'),
    partial(adahessian, curvature='ggn', hvp='forward'),hessian_free], ids=['default','sassha','rows','forward','ggn','hessian_free'])
def test_a_model_may_write_into_its_inputs(opt_func):
    "Each evaluation of a batch begins with the batch as it came"
    def run(of_its_own): return fit(learner(InPlace(of_its_own), *data(36), opt_func=opt_func, hypers={}))
    own,shared = run(True),run(False)
    assert distance(own.model, shared.model)==0 and distance(own.model, InPlace(True))>1e-3

def test_a_loss_may_write_into_its_targets():
    y = data(36)[0][:,:3].clone()
    def run(loss): return fit(learner(mlp(), data(36)[0], y.clone(), loss_func=loss, opt_func=sassha, hypers={}))
    assert distance(run(written_loss).model, run(lambda pred,y: written_loss(pred, y.clone())).model)==0

def test_measurements_leave_the_batches_of_the_user_alone():
    x,y = data(12)
    def products(of_its_own, x):
        learn = learner(InPlace(of_its_own), *data(12))
        hv = learn.curvature_product(batches=[(x,y)])
        return [hv([torch.ones_like(p) for p in learn.model.parameters()]) for _ in range(3)]
    mine,want = x.clone(),products(True, x.clone())
    for got in products(False, mine): assert all(torch.equal(a, b) for a,b in zip(got, want[0]))
    assert torch.equal(mine, x)

def test_steps_on_given_batches_leave_these_alone():
    x,y = data(12)
    def run(of_its_own):
        model,mine = InPlace(of_its_own),x.clone()
        opt = hessian_free(model.parameters())
        for _ in range(3): opt.acc_step(model, F.cross_entropy, [(mine,y)])
        return model,mine
    (own,_),(shared,mine) = run(True),run(False)
    assert distance(own, shared)==0 and torch.equal(mine, x)

def test_one_tensor_as_inputs_and_targets_is_one_in_each_evaluation():
    "The second evaluation too compares the prediction with what the model wrote"
    x = torch.randn(6, 5)
    a,(b,c) = fresh((x,(x,x.clone())))
    assert a is b and a is not x and c is not a and torch.equal(a, x)
    x.size_before = 7
    image = TensorImage(torch.rand(3,2,2))
    image.size_before = 8
    assert fresh(x).size_before==7 and fresh((image,))[0].size_before==8 and type(fresh(image)) is TensorImage
    w = nn.Parameter(x)
    assert fresh([w,w*2])[0] is w and fresh({'x': (z := w*2)})['x'] is z
