"The Hessian-free optimizer: in a Learner, in plain PyTorch, and when things go wrong"
import functools, inspect, itertools, math, os, pickle, pytest, socket, time, warnings
import torch, torch.distributed as dist, torch.multiprocessing as mp, torch.nn.functional as F
import numpy as np
from collections import namedtuple
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from unittest import mock
from torch import nn, tensor
from torch.nn.parallel import DistributedDataParallel
from fastai.basics import Adam, CancelFitException, Callback, CrossEntropyLossFlat, DataLoaders, L, Learner, Module, SGD, noop, set_seed
from fastai.callback.all import GradientAccumulation, GradientClip, MixUp
from fastai.callback.rnn import rnn_cbs
from fastai.distributed import rank_distrib
from fastai.losses import MSELossFlat
from fastai.layers import ConvLayer
from fastai.vision.core import TensorImage, TensorMask
from fastai.vision.models.unet import DynamicUnet
from sklearn.datasets import load_digits
from adahessian_fastai.hvp import flat, unflat
from adahessian_fastai.curvature import GaussNewton,Hessian
from adahessian_fastai.ggn import ggn_product
from adahessian_fastai.problem import MeanProblem, Problem
from adahessian_fastai.hessian_free import *
from adahessian_fastai.hessian_free import Batches,CG,Damping,LineSearch,Preconditioner   # their older path
from helpers_learner import Cube,Once

torch.set_num_threads(1)
SOLVED = 1e-3   # one CG run to a relative residual of 1e-5, problems of condition 1e2, float32
SAME = dict(rtol=1e-3, atol=1e-4)  # three steps, float32, sums taken in another order
F64 = torch.float64

def data(n=64, seed=0, n_in=6):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n_in, generator=g)
    return x, (x[:,:3].sum(1)>0).long() + (x[:,3]>.5).long()

def mlp(n_in=6, n_out=3, act=nn.Tanh): return nn.Sequential(nn.Linear(n_in, 8), act(), nn.Linear(8, n_out))

def learner(model=None, bs=64, n=64, loss=None, opt=None, cbs=None, data=data, **kwargs):
    x,y = data(n)
    ds = L(zip(x, y))
    dls = DataLoaders.from_dsets(ds, ds, bs=bs, shuffle=False, drop_last=False, num_workers=0)
    set_seed(3)
    learn = Learner(dls, model() if model else mlp(), loss or CrossEntropyLossFlat(), opt_func=opt or partial(hessian_free, **kwargs), cbs=cbs)
    learn.logger = noop
    return learn

def fit(learn, n=1, **kwargs):
    with learn.no_bar(): learn.fit(n, **kwargs)
    return learn

def weights(learn): return flat(list(learn.model.parameters())).detach().clone()

def steps(opt, closure, n, **kwargs): return [opt.step(closure, **kwargs) for _ in range(n)]

def objective(outputs, loss):
    "Closure `() -> (loss, outputs)`"
    def _f():
        z = outputs()
        return loss(z), z
    return _f

# --- what it reaches

@pytest.fixture(scope='module')
def digits():
    X,y = load_digits(return_X_y=True)
    x,y = tensor(X/16).float(),tensor(y)
    dls = DataLoaders.from_dsets(L(zip(x, y)), L(zip(x, y)), bs=len(x), shuffle=False, drop_last=False, num_workers=0)
    set_seed(0)
    model = nn.Sequential(nn.Linear(64,128), nn.Tanh(), nn.Linear(128,128), nn.Tanh(), nn.Linear(128,10))
    learn = Learner(dls, model, CrossEntropyLossFlat(), opt_func=hessian_free)
    learn.logger = noop
    return fit(learn, 25),x,y

def test_digits_full_batch_below_1e_4_in_25_steps(digits):
    learn,x,y = digits
    assert learn.opt.n_steps == 25 and learn.opt.n_skipped == 0
    assert F.cross_entropy(learn.model(x), y).item() < 1e-4

def test_damping_stays_bounded_and_falls_as_the_model_gets_better(digits):
    lams = [r['damping'] for r in digits[0].opt.record]
    assert max(lams) <= 2. and lams[-1] < 1e-2
    assert all(1/2 < b/a < 2 for a,b in zip(lams, lams[1:]))

def test_digits_run_keeps_to_its_budget_of_evaluations(digits):
    rs = digits[0].opt.record
    assert sum(r['n_evals'] for r in rs)/len(rs) + 1 <= 6   # the forward pass of the gradient is the 1; the reference needs 7 to 17
    assert sum(r['n_iter'] for r in rs) < 600

@pytest.mark.parametrize('n', [3,5,10])
@pytest.mark.parametrize('curvature', ['hessian','ggn'])
def test_one_step_on_a_quadratic_hits_the_minimum(n, curvature):
    g = torch.Generator().manual_seed(n)
    A,b,w = torch.randn(2*n, n, generator=g), torch.randn(2*n, generator=g), torch.zeros(n, requires_grad=True)
    opt = hessian_free([w], curvature=curvature, damping=0., backtracking=False, line_search=False, martens_eps=0, cg_max_iter=5*n)
    f = objective(lambda: A@w, lambda z: F.mse_loss(z, b))
    opt.step(f)
    want = torch.linalg.lstsq(A, b[:,None]).solution[:,0]
    assert (w-want).norm() < SOLVED*want.norm()

def test_weight_decay_is_in_gradient_curvature_and_objective():
    "Ridge regression has a closed form; one undamped step finds it, spares the parameter marked do_wd=False, and reports the decayed loss"
    x,_ = data()
    y,wd = x@torch.arange(6.)+2, .3
    model = nn.Linear(6, 1)
    opt = hessian_free(model.parameters(), wd=wd, damping=0., martens_eps=0, x0_decay=0.)
    opt.state[model.bias]['do_wd'] = False
    f = objective(lambda: model(x)[:,0], lambda z: F.mse_loss(z, y))
    got = opt.step(f)
    X = torch.cat([x, torch.ones(len(x),1)], 1)
    want = torch.linalg.solve(2/len(x)*X.T@X + wd*torch.diag(tensor([1.]*6+[0.])), 2/len(x)*X.T@y)
    assert torch.allclose(torch.cat([model.weight[0], model.bias]), want, rtol=SOLVED, atol=SOLVED)
    assert abs(got - (f()[0] + wd/2*model.weight.pow(2).sum()).item()) < 1e-4

def badly_scaled():
    g = torch.Generator().manual_seed(0)
    A,b = torch.randn(200, 20, generator=g)*torch.logspace(-2, 1, 20), torch.randn(200, generator=g)
    w = torch.zeros(20, requires_grad=True)
    f = objective(lambda: A@w, lambda z: F.mse_loss(z, A@torch.logspace(2, -1, 20)+b))
    return w,f

@pytest.mark.parametrize('probes', [None,32])
def test_preconditioner_lowers_cg_iterations_on_a_badly_scaled_problem(probes):
    its = {}
    for precondition in (False,True):
        w,f = badly_scaled()
        opt = hessian_free([w], precondition=precondition, fisher_probes=probes, fisher_exponent=1., damping=1e-3,
            martens_eps=0, cg_tol=1e-4, cg_max_iter=500, x0_decay=0.)
        steps(opt, f, 3)
        its[precondition] = sum(r['n_iter'] for r in opt.record)
    assert its[True]*2 < its[False]

@pytest.mark.parametrize('curvature,damping,jvp', [('hessian',1.5,'auto'), *(('ggn',.1,o) for o in ('reverse','dual','linearize'))])
@pytest.mark.parametrize('precondition', [False,True])
def test_three_steps_with_a_frozen_first_layer(curvature, damping, jvp, precondition):
    torch.manual_seed(0)
    x,y = torch.randn(16,7),torch.randn(16,3)
    model = nn.Sequential(nn.Linear(7,5), nn.ReLU(), nn.Linear(5,5), nn.ReLU(), nn.Linear(5,3))
    for p in model[0].parameters(): p.requires_grad_(False)
    frozen = model[0].weight.clone()
    opt = hessian_free(model.parameters(), curvature=curvature, damping=damping, precondition=precondition, jvp=jvp)
    f = objective(lambda: model(x), lambda z: F.mse_loss(z, y))
    before,losses = f()[0].item(),steps(opt, f, 3, module=model)
    assert opt.n_skipped == 0 and not opt.curvature.failed and torch.equal(model[0].weight, frozen)
    assert losses[2] < losses[1] < losses[0] < before

# --- the same step in other ways

def closures(n=40, act=nn.Tanh):
    x,y = data(n)
    torch.manual_seed(1)
    model = mlp(act=act)
    f = objective(lambda: model(x), lambda z: F.cross_entropy(z, y))
    return model,f,x,y

@pytest.mark.parametrize('other', [dict(jvp='dual'), dict(jvp='linearize'), dict(keep_graph=False), dict(check_every=1), dict(keep_iterates=None)])
def test_ways_to_compute_do_not_change_the_step(other):
    ws = []
    for kwargs in (dict(keep_iterates=100), other):
        model,f,*_ = closures()
        opt = hessian_free(model.parameters(), **{'keep_iterates':100, **kwargs})
        steps(opt, f, 3, module=model)
        ws.append(flat(list(model.parameters())))
    assert torch.allclose(*ws, **SAME)

@pytest.mark.parametrize('sizes', [[16],[7,8,1]])
@pytest.mark.parametrize('curvature', ['hessian','ggn'])
@pytest.mark.parametrize('reduction', ['mean','sum'])
def test_accumulated_step_is_the_step_on_the_concatenation(sizes, curvature, reduction):
    ws,loss = [],partial(F.cross_entropy, reduction=reduction)
    for acc in (False,True):
        model,_,x,y = closures(16)
        opt = hessian_free(model.parameters(), curvature=curvature, reduction=reduction, cg_max_iter=4)
        for _ in range(3):
            if acc: opt.acc_step(model, loss, list(zip(x.split(sizes), y.split(sizes))))
            else: opt.step(objective(lambda: model(x), lambda z: loss(z, y)))
        ws.append(flat(list(model.parameters())))
    assert torch.allclose(*ws, **SAME)

@pytest.mark.parametrize('kwargs,cbs,bs', [(dict(n_acc=3), None, 24), (dict(n_acc=3, keep_graph=False), None, 24), (dict(), lambda: GradientAccumulation(64), 16),
    (dict(n_acc=2), lambda: GradientAccumulation(32), 16)])
@pytest.mark.parametrize('curvature', ['hessian','ggn'])
def test_accumulating_learner_is_the_full_batch_learner(kwargs, cbs, bs, curvature):
    whole = fit(learner(curvature=curvature), 3)
    acc = fit(learner(bs=bs, cbs=cbs and cbs(), curvature=curvature, **kwargs), 3)
    assert acc.opt.n_steps == whole.opt.n_steps == 3
    assert torch.allclose(weights(whole), weights(acc), **SAME)
    for a,b in zip(whole.opt.record, acc.opt.record): assert a['n_iter'] == b['n_iter'] and abs(a['loss']-b['loss']) < 1e-4

def test_accumulation_weights_batches_by_the_targets_that_count():
    "Ignored targets and class weights: the mean over all data divides by something else in each batch"
    loss = lambda: CrossEntropyLossFlat(ignore_index=2, weight=tensor([1.,3.,1.]))
    whole,acc = fit(learner(loss=loss()), 3),fit(learner(loss=loss(), bs=10, n_acc=7), 3)
    assert acc.opt.n_steps == 3 and torch.allclose(weights(whole), weights(acc), **SAME)

def test_learner_and_closure_make_the_same_steps():
    learn = fit(learner(), 3)
    x,y = data(64)
    set_seed(3)
    model = mlp()
    opt = hessian_free(model.parameters())
    f = objective(lambda: model(x), lambda z: F.cross_entropy(z, y))
    steps(opt, f, 3, module=model)
    assert torch.allclose(weights(learn), flat(list(model.parameters())), **SAME)

@pytest.mark.parametrize('model', [mlp, lambda: Conv()], ids=['mlp','conv'])
@pytest.mark.parametrize('jvp', ['dual','linearize'])
def test_ways_through_a_learner_make_the_same_steps(model, jvp, recwarn):
    ws = [fit(learner(model, jvp=o), 3) for o in ('reverse',jvp)]
    assert not ws[1].opt.curvature.failed and not [w for w in recwarn if 'failed' in str(w.message)]
    assert torch.allclose(*map(weights, ws), **SAME)

def test_convolutions_choose_by_the_cost_of_both_ways():
    learn = fit(learner(Conv), 3)
    opt = learn.opt
    assert set(opt.curvature.costs) == {'dual','linearize'} and all(a>=0 and b>0 for a,b in opt.curvature.costs.values())
    opt.curvature.costs = dict(dual=(0.,1.), linearize=(5.,.5))
    for n,first in ((9,'dual'), (11,'linearize')): assert opt.curvature.by_cost(learn.model, n, opt.curvature.costs)[0] == first
    assert opt.curvature.by_cost(mlp(), 9, opt.curvature.costs) == ['reverse']
    other = learner(Conv)
    other.create_opt()
    other.opt.load_state_dict(opt.state_dict())
    assert other.opt.curvature.costs == opt.curvature.costs

def test_dropout_cannot_be_linearised_and_that_is_silent_unless_asked_for(recwarn):
    class DropConv(Conv):
        def forward(self, x): return super().forward(F.dropout(x, .3, self.training))
    auto,dual = [fit(learner(DropConv, jvp=o, x0_decay=0.), 3) for o in ('auto','dual')]
    assert set(auto.opt.curvature.failed) == {'linearize'} and not [w for w in recwarn if 'failed' in str(w.message)]
    assert torch.allclose(weights(auto), weights(dual), **SAME)
    with pytest.warns(UserWarning, match='random numbers'): fit(learner(DropConv, jvp='linearize'))

def test_curvature_and_trials_on_other_data():
    x,y = data(40)
    batches = list(zip(x.split(10), y.split(10)))
    seen = mock.Mock() # What a loss keeps in a list or dict of its own is put back after each further evaluation
    def loss(z, t):
        seen(t.tolist())
        return F.cross_entropy(z, t)
    model = mlp()
    opt = hessian_free(model.parameters())
    opt.acc_step(model, loss, batches[2:], grad_data=batches[:2], curv_data=batches[:1])
    counts = [seen.call_args_list.count(mock.call(t.tolist())) for _,t in batches]
    assert counts[0] == 2 and counts[1] == 1                      # evaluated once for each use, never again
    assert counts[2] == counts[3] == opt.record[-1]['n_evals'] + 1

def test_held_out_batch_is_not_in_the_gradient_and_judges_the_step():
    learn = learner(bs=16, n_acc=4, held_out=1, curv_batches=2)
    w0,(x,y) = weights(learn),data(64)
    model = deepcopy(learn.model)
    fit(learn)
    assert learn.opt.record[0]['loss'] == pytest.approx(F.cross_entropy(model(x[48:]), y[48:]).item(), abs=1e-5)
    opt = hessian_free(model.parameters())
    data_ = list(zip(x.split(16), y.split(16)))
    opt.acc_step(model, F.cross_entropy, data_[3:], grad_data=data_[:3], curv_data=data_[:2])
    assert torch.allclose(weights(learn), flat(list(model.parameters())), **SAME) and not torch.equal(weights(learn), w0)

def test_check_reduction_passes_for_the_right_and_raises_for_the_wrong_one():
    x,y = data(40)
    batches = list(zip(x.split([25,15]), y.split([25,15])))
    for curvature in ('ggn','hessian'):
        for reduction in ('mean','sum'):
            model = mlp()
            opt = hessian_free(model.parameters(), curvature=curvature, reduction=reduction)
            opt.check_reduction(model, partial(F.cross_entropy, reduction=reduction), batches)
            with pytest.raises(ValueError, match='reduction'):
                opt.check_reduction(model, partial(F.cross_entropy, reduction=dict(mean='sum', sum='mean')[reduction]), batches)

# --- inside fastai

def test_forward_passes_are_those_of_the_record_and_products_need_none():
    learn,calls = learner(),[]
    forward = learn.model.forward   # a hook is not called where training would not call it
    learn.model.forward = lambda x: calls.append(torch.is_grad_enabled()) or forward(x)
    learn._do_epoch_validate = noop
    fit(learn, 4)
    assert sum(calls) == 4
    assert len(calls) == sum(1+r['n_evals'] for r in learn.opt.record)

def test_least_step_costs_three_forward_passes():
    w,f = badly_scaled()
    opt,calls = hessian_free([w], damping=0., martens_eps=0, cg_max_iter=500),[]
    opt.step(lambda: calls.append(1) or f())
    assert len(calls) == 3 and opt.record[0]['alpha'] == 1.   # gradient, last iterate, one iterate before it

class DropNorm(Module):
    def __init__(self): self.a,self.bn,self.drop,self.b = nn.Linear(6,16),nn.BatchNorm1d(16),nn.Dropout(.4),nn.Linear(16,3)
    def forward(self, x): return self.b(self.drop(self.bn(self.a(x)).relu()))

@pytest.mark.parametrize('kwargs', [dict(), dict(jvp='dual'), dict(keep_graph=False), dict(curvature='hessian')])
def test_all_evaluations_of_a_step_see_one_function(kwargs, recwarn):
    learn = fit(learner(DropNorm, bs=32, check_deterministic=True, **kwargs), 4)
    assert learn.model.bn.num_batches_tracked == 8 == learn.opt.n_steps
    assert not [w for w in recwarn if 'twice' in str(w.message)] and learn.opt.n_skipped == 0 and not learn.opt.curvature.failed
    assert all(r['loss_after'] <= r['loss'] for r in learn.opt.record)

def test_buffers_and_generator_move_as_in_an_ordinary_forward_pass():
    learn = learner(DropNorm)
    model,(x,y) = deepcopy(learn.model),data(64)
    torch.manual_seed(9)
    xs = []
    learn.add_cb(Callback())
    learn.cbs[-1].after_batch = lambda: xs.append(torch.rand(1).item()) if learn.training else None
    learn.cbs[-1].before_batch = lambda: torch.manual_seed(9) if learn.training else None
    fit(learn)
    torch.manual_seed(9)
    model(x)
    assert xs == [torch.rand(1).item()]
    assert torch.equal(model.bn.running_mean, learn.model.bn.running_mean) and torch.equal(model.bn.running_var, learn.model.bn.running_var)

class Remembers(Module):
    "A recurrent model that carries its hidden state from batch to batch, in `kind` of a place"
    def __init__(self, kind):
        self.i,self.r,self.out,self.kind,self.n = nn.Linear(2,6),nn.Linear(6,6),nn.Linear(6,3),kind,0
        if kind=='buffer': self.register_buffer('h', torch.zeros(64, 6))
        elif kind=='in place': self.h = torch.zeros(64, 6)
        else: self.h = None if kind=='attribute' else [(torch.zeros(64, 6),)]
    def forward(self, x):
        h = self.h[0][0] if self.kind=='nested' else torch.zeros(64, 6) if self.h is None else self.h.clone()
        for o in x.split(2, 1): h = (self.i(o)+self.r(h)).tanh()
        self.n += 1
        if self.kind=='nested': self.h[0] = (h.detach(),)
        elif self.kind=='in place': self.h.copy_(h.detach())
        else: self.h = h.detach()
        return self.out(h)
    def state(self): return self.h[0][0] if self.kind=='nested' else self.h

places = ['attribute','in place','nested','buffer']

@pytest.mark.parametrize('kwargs', [dict(), dict(jvp='dual'), dict(jvp='linearize'), dict(keep_graph=False), dict(curvature='hessian')], ids=str)
@pytest.mark.parametrize('kind', places)
def test_hidden_state_moves_as_in_one_forward_pass_and_trials_start_where_the_batch_did(kind, kwargs):
    learn = learner(partial(Remembers, kind), **kwargs)
    learn._do_epoch_validate = noop
    x,y = data(64)
    twin = deepcopy(learn.model)
    class Look(Callback):
        def before_batch(self): twin.load_state_dict(self.model.state_dict() if kind!='buffer' else {**self.model.state_dict(), 'h':twin.h})
        def after_loss(self):
            if torch.is_grad_enabled(): self.first = self.learn.loss.detach()
        def before_step(self):
            batch, = self.opt.batches.pending
            assert batch.again().loss.item() == self.first.item()
        def after_batch(self):
            twin(x)
            assert torch.equal(twin.state(), self.model.state()) and twin.n == self.model.n
    learn.add_cb(Look())
    fit(learn, 4)
    assert learn.opt.n_steps == 4 == learn.model.n and learn.opt.n_skipped == 0 and not learn.opt.curvature.failed
    assert learn.opt.record[-1]['loss_after'] < learn.opt.record[0]['loss']

@pytest.mark.parametrize('kind', places)
def test_hidden_state_of_a_closure_is_protected_too(kind):
    x,y = data(64)
    torch.manual_seed(1)
    model = Remembers(kind)
    twin,opt = deepcopy(model),hessian_free(model.parameters(), check_deterministic=True)
    f = objective(lambda: model(x), lambda z: F.cross_entropy(z, y))
    for i in range(3):
        opt.step(f, module=model)
        twin(x)
        assert torch.equal(twin.state(), model.state()) and model.n == i+1
        twin.load_state_dict({**model.state_dict(), **{k:v for k,v in twin.named_buffers()}})
    assert opt.n_skipped == 0

def test_language_model_of_fastai_with_its_dropouts(recwarn):
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.text.models.core import get_language_model
    drops = dict(output_p=.1, hidden_p=.15, input_p=.25, embed_p=.02, weight_p=.2)
    config = dict(emb_sz=6, n_hid=8, n_layers=2, pad_token=1, bidir=False, tie_weights=True, out_bias=True, **drops)
    g = torch.Generator().manual_seed(0)
    text = torch.randint(0, 12, (16,21), generator=g)
    ds = L(zip(text[:,:-1], text[:,1:]))
    dls = DataLoaders.from_dsets(ds, ds, bs=8, shuffle=False, num_workers=0)
    set_seed(0)
    learn = Learner(dls, get_language_model(AWD_LSTM, 12, config=config), CrossEntropyLossFlat(), cbs=rnn_cbs(alpha=2., beta=1.),
        opt_func=partial(hessian_free, check_deterministic=True))
    learn.logger = noop
    fit(learn, 3)
    assert not [w for w in recwarn if 'twice' in str(w.message)] and learn.opt.n_steps == 6 and learn.opt.n_skipped == 0 and not learn.opt.curvature.failed
    assert all(r['loss_after'] <= r['loss'] for r in learn.opt.record)

def test_an_undeterministic_model_is_reported():
    x,y = data()
    model = mlp()
    opt = hessian_free(model.parameters(), check_deterministic=True)
    noise = iter(range(1000))
    f = objective(lambda: model(x)*(1+next(noise)), lambda z: F.cross_entropy(z, y))
    with pytest.warns(UserWarning, match='twice'): opt.step(f)

@pytest.mark.parametrize('n_acc', [1,2])
def test_mixup_is_replayed(n_acc, recwarn):
    learn = fit(learner(bs=16, cbs=MixUp(.4), n_acc=n_acc, check_deterministic=True), 3)
    assert not [w for w in recwarn if 'twice' in str(w.message)] and learn.opt.n_steps == 12/n_acc and learn.opt.n_skipped == 0

def test_clipped_gradient_is_the_one_that_is_used():
    gs = []
    for c in (None, GradientClip(1e-3)):
        learn = learner(cbs=c)
        learn.add_cb(Callback())
        learn.cbs[-1].after_step = lambda: gs.append(torch.cat([p.grad.flatten() for p in learn.model.parameters()]).norm().item())
        fit(learn)
    assert gs[0] > .1 and gs[1] == pytest.approx(1e-3, rel=1e-2)

class Scale(Callback):
    "What mixed precision does to the loss and the gradient, on the CPU"
    order = 10
    def before_fit(self):
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
        self.learn.scaler.scale(tensor(1.))
    def before_backward(self): self.learn.loss_grad = self.learn.loss_grad*1024.
    def before_step(self):
        for p in self.model.parameters(): p.grad.div_(1024.)
    def after_fit(self): del self.learn.scaler

@pytest.mark.parametrize('curvature', ['ggn','hessian'])
@pytest.mark.parametrize('precondition', [False,True])
def test_scaled_loss_makes_the_same_run(curvature, precondition):
    plain,scaled = [fit(learner(cbs=c, curvature=curvature, precondition=precondition, fisher_probes=None), 3) for c in (None, Scale())]
    assert torch.allclose(weights(plain), weights(scaled), **SAME)
    assert [r['n_iter'] for r in plain.opt.record] == [r['n_iter'] for r in scaled.opt.record]

def two_groups(m): return [list(m[0].parameters()), list(m[2].parameters())]

def test_freeze_unfreeze_and_discriminative_lr():
    x,y = data(64)
    learn = learner()
    learn.splitter = two_groups
    learn.create_opt()
    learn.freeze()
    first = learn.model[0].weight.clone()
    fit(learn, 2)
    assert torch.equal(first, learn.model[0].weight)
    learn.unfreeze()
    fit(learn, 2, lr=slice(.1, 1.))
    assert not torch.equal(first, learn.model[0].weight) and learn.opt.n_skipped == 0
    assert [h['lr'] for h in learn.opt.hypers] == [.1, 1.]

@pytest.mark.parametrize('curvature', ['ggn','hessian'])
@pytest.mark.parametrize('thaw', [False,True], ids=['freeze','thaw'])
@pytest.mark.parametrize('by_hand', [False,True])
def test_other_parameters_within_an_accumulation_begin_it_anew(by_hand, thaw, curvature, recwarn):
    "What was kept of a batch has no curvature for parameters that were frozen since, and no gradient for those that were thawed"
    def trained(forget):
        learn = learner(bs=16, curvature=curvature, n_acc=3)
        learn.splitter = two_groups
        learn.create_opt()
        if thaw: learn.freeze()
        fit(learn)
        assert len(learn.opt.batches)==1
        if forget: learn.opt.forget()
        if by_hand: learn.model[0].requires_grad_(thaw)
        else: learn.freeze_to(0 if thaw else 1)
        return fit(learn)
    learn,ref = trained(False),trained(True)
    assert learn.opt.n_steps==ref.opt.n_steps==2 and not learn.opt.curvature.failed
    assert torch.equal(weights(learn), weights(ref))

def test_lr_scales_the_step_of_its_group():
    x,y = data(64)
    steps_ = []
    for lr in (1., slice(.25, .5)):
        learn = learner(line_search=False, backtracking=False)
        learn.splitter = two_groups
        w0 = weights(learn)
        fit(learn, 1, lr=lr)
        steps_.append(weights(learn)-w0)
    n = 6*8+8
    assert torch.allclose(steps_[1][:n], steps_[0][:n]*.25, **SAME) and torch.allclose(steps_[1][n:], steps_[0][n:]*.5, **SAME)

def test_fit_one_cycle_schedules_the_step_length():
    learn = learner(line_search=False)
    lrs = []
    learn.add_cb(Callback())
    learn.cbs[-1].before_step = lambda: lrs.append(learn.opt.hypers[0]['lr'])
    with learn.no_bar(): learn.fit_one_cycle(8)
    assert max(lrs) == pytest.approx(1., abs=.05) and lrs[0] == pytest.approx(.04) and lrs[-1] < .1
    assert learn.opt.record[-1]['loss'] < learn.opt.record[0]['loss']/2 and learn.lr == 1.

class TwoOut(Module):
    def __init__(self): self.b,self.c = mlp(),nn.Linear(6, 2)
    def forward(self, x): return self.b(x), self.c(x)

class Attend(Module):
    def __init__(self): self.q,self.att,self.out = nn.Linear(1,8),nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True),nn.Linear(8,3)
    def forward(self, x): return self.out(self.att(self.q(x[...,None])).mean(1))

class Recur(Module):
    def __init__(self): self.rnn,self.out = nn.LSTM(1, 6, batch_first=True),nn.Linear(6,3)
    def forward(self, x): return self.out(self.rnn(x[...,None])[0][:,-1])

class Conv(Module):
    def __init__(self): self.c,self.bn,self.o = nn.Conv1d(1,4,3).to(memory_format=torch.contiguous_format),nn.BatchNorm1d(4),nn.Linear(16,3)
    def forward(self, x): return self.o(self.bn(self.c(x[:,None])).relu().flatten(1))

@pytest.mark.parametrize('model,loss', [(TwoOut, lambda z,y: F.cross_entropy(z[0], y)+z[1].pow(2).mean()), (Attend, None), (Recur, None), (Conv, None)])
@pytest.mark.parametrize('curvature', ['ggn','hessian'])
def test_architectures(model, loss, curvature):
    learn = fit(learner(model, loss=loss, curvature=curvature, damping=.01), 8)
    rs = learn.opt.record
    assert (learn.opt.n_skipped == 0 or curvature=='hessian') and not learn.opt.curvature.failed and rs[-1]['loss_after'] < .9*rs[0]['loss']

def test_progress_bar_shows_long_cg_runs():
    class Bar:
        last_v,shown = 0,0
        def update_bar(self, v): self.shown += 1
    opt = hessian_free(mlp().parameters())
    opt.batches.now = SimpleNamespace(learn=SimpleNamespace(progress=SimpleNamespace(pbar=Bar())))
    progress(opt, wait=0.)(7, -.5, 1.)
    assert opt.batches.now.learn.progress.pbar.comment.startswith('CG 7/250') and opt.batches.now.learn.progress.pbar.shown == 1
    progress(opt, wait=100.)(8, -.5, 1.)
    assert opt.batches.now.learn.progress.pbar.comment.startswith('CG 7')

def test_after_a_step_no_graph_is_alive():
    learn = learner()
    seen = []
    learn.add_cb(Callback())
    learn.cbs[-1].after_step = lambda: seen.extend(o.grad_fn for o in (learn.pred, learn.loss, learn.loss_grad))
    fit(learn)
    assert seen == [None]*3 and learn.opt.batches.rounds == learn.opt.batches.pending == [] and learn.opt.batches.now is None

def test_other_optimizers_train_as_before():
    x,y = data(64)
    learn = fit(learner(opt=SGD), 2, lr=.1)
    set_seed(3)
    model = mlp()
    for _ in range(2):
        for p,g in zip(model.parameters(), torch.autograd.grad(F.cross_entropy(model(x), y), model.parameters())): p.data -= .1*g
    assert torch.allclose(weights(learn), flat(list(model.parameters())), rtol=1e-5, atol=1e-6)

# --- state

@pytest.mark.parametrize('kwargs', [dict(), dict(precondition=True)])
def test_save_and_load_continue_bit_for_bit(tmp_path, kwargs):
    whole = fit(fit(learner(bs=32, **kwargs), 2), 2)
    a = fit(learner(bs=32, **kwargs), 2)
    a.path = tmp_path
    a.save('half')
    b = learner(bs=32, **kwargs)
    b.path = tmp_path
    b.create_opt()
    b.load('half')
    assert b.opt.hypers[0]['damping'] == a.opt.hypers[0]['damping'] != 1. and b.opt.n_steps == 4 and len(b.opt.record) == 4
    assert torch.equal(b.opt.state[b.model[0].weight]['x0'], a.opt.state[a.model[0].weight]['x0'])
    fit(b, 2)
    assert torch.equal(weights(b), weights(whole)) and list(b.opt.record) == list(whole.opt.record)

def test_a_state_from_the_middle_of_an_accumulation_says_so_and_starts_the_step_anew():
    "Five of eight batches: one step of three, and two batches that are lost to the continuation"
    a = learner(bs=8, n_acc=3)
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.train_iter==3: self.after = deepcopy((self.model.state_dict(), self.opt.state_dict()))
            if self.training and self.train_iter==5: raise CancelFitException()
    a.add_cb(Stop())
    fit(a)
    with pytest.warns(UserWarning, match='last 2 batches'): middle = deepcopy(a.opt.state_dict())
    ws = []
    for model,state in (a.stop.after, (a.model.state_dict(), middle)):
        b = learner(bs=8, n_acc=3)
        b.create_opt()
        b.model.load_state_dict(model)
        b.opt.load_state_dict(deepcopy(state))
        ws.append(weights(fit(b)))
    assert torch.equal(*ws)
    a.remove_cb(Stop)
    a.opt.load_state_dict(middle)
    assert a.opt.batches.rounds == a.opt.batches.pending == [] and not a.opt.batches.sums
    assert torch.equal(weights(fit(a)), ws[0])

# --- faults

def faulty(kind, at=2):
    "A learner whose batch number `at` is broken, its weights before and after that batch"
    learn = learner(bs=16)
    log,what = {},kind if isinstance(kind, str) else ''
    class Break(Callback):
        def before_batch(self):
            if not self.training: return
            log['n'] = log.get('n', -1)+1
            if log['n']==at:
                log['before'],log['lam'] = weights(learn),learn.opt.hypers[0]['damping']
                log['x0s'] = {p: s['x0'].clone() for p,_,s,_ in learn.opt.all_params()}
                if what=='nan': self.learn.xb = (self.xb[0]*math.nan,)
                if what=='inf': self.learn.xb = (self.xb[0]*1e38*1e38,)
        def after_loss(self):
            if not self.training or log['n']!=at: return
            if what=='zero': self.learn.loss_grad = self.learn.loss_grad*0.
            if torch.is_grad_enabled(): return
            if isinstance(kind, BaseException): raise kind
            if what=='trials': self.learn.loss_grad = self.learn.loss_grad*math.nan
        def after_batch(self):
            if self.training and log['n']==at: log['after'],log['x0'],log['lam1'] = weights(learn),learn.opt.state[learn.model[0].weight].get('x0'),learn.opt.hypers[0]['damping']
    learn.add_cb(Break())
    return learn,log

@pytest.mark.parametrize('kind', ['nan','inf','zero','trials', RuntimeError('no memory for this'), ValueError('odd')], ids=str)
def test_a_broken_batch_is_skipped_and_training_goes_on(kind):
    learn,log = faulty(kind)
    with pytest.warns(UserWarning, match='was skipped') as ws: fit(learn, 3)
    assert len([w for w in ws if 'was skipped' in str(w.message)]) == 1 == learn.opt.n_skipped
    assert torch.equal(log['before'], log['after']) and log['x0'] is None and log['lam1'] == pytest.approx(1.5*log['lam'])
    assert weights(learn).isfinite().all() and learn.opt.n_steps == 12
    assert learn.opt.record[-1]['loss'] < learn.opt.record[0]['loss']

@pytest.mark.parametrize('kind', [KeyboardInterrupt(), TypeError('a bug'), CancelFitException()], ids=repr)
def test_an_interrupt_in_a_trial_restores_the_parameters_and_propagates(kind):
    learn,log = faulty(kind)
    if isinstance(kind, CancelFitException): fit(learn, 3)
    else:
        with pytest.raises(type(kind)): fit(learn, 3)
    opt = learn.opt
    assert torch.equal(log['before'], weights(learn)) and opt.batches.rounds == []
    assert (opt.hypers[0]['damping'], opt.n_steps, opt.n_skipped) == (log['lam'], 2, 0)
    assert all(torch.equal(opt.state[p]['x0'], x0) for p,x0 in log['x0s'].items()) and all(p.grad is None for p in learn.model.parameters())

@pytest.mark.parametrize('curvature', ['ggn','hessian'])
def test_a_network_that_is_not_differentiable_twice_takes_gradient_steps(curvature):
    class Net(Module):
        def __init__(self): self.a,self.b = nn.Linear(6,8),nn.Linear(8,3)
        def forward(self, x): return self.b(Once.apply(self.a(x)))
    learn = learner(Net, curvature=curvature)
    with pytest.warns(UserWarning, match='failed') as ws: fit(learn, 10)
    assert len([w for w in ws if 'failed' in str(w.message)]) <= 2 and learn.opt.n_skipped == 0
    assert learn.opt.record[-1]['loss'] < .9*learn.opt.record[0]['loss']

def test_negative_curvature_is_recorded_and_raises_the_damping():
    w = torch.tensor([.1,.1], requires_grad=True)
    opt = hessian_free([w], curvature='hessian', damping=.01)
    def f(): return (w[0]**2 - w[1]**2 + w[1]**4)
    start = f().item()
    opt.step(f)
    assert opt.record[0]['reason'] == 'negative curvature' and opt.hypers[0]['damping'] == pytest.approx(.015)
    steps(opt, f, 30)
    assert f().item() < start and abs(f().item()+.25) < 1e-3   # the minimum at w[1]² = 1/2

def test_loss_alone_is_enough_for_the_hessian_and_named_for_ggn():
    w = torch.ones(2, requires_grad=True)
    opt = hessian_free([w])
    with pytest.raises(ValueError, match="outputs.*curvature='hessian'"): opt.step(lambda: w.pow(2).sum())
    assert w.tolist()==[1.,1.] and (opt.n_steps, opt.n_skipped, opt.hypers[0]['damping'])==(0,0,1.)
    hessian_free([w], curvature='hessian').step(lambda: w.pow(2).sum())   # the way out
    assert w.abs().max() < 1

# --- every argument

changes = dict(lr=.5, wd=.1, damping=.1, curvature='hessian', adapt_damping=False, lm_bounds=(.01,.02), lm_factors=(3.,.1), damping_bounds=(.8,1.2), cg_max_iter=3,
    cg_tol=.5, martens_eps=.1, x0_decay=0., backtracking=False, grid=4., keep_iterates=1, line_search=False, ls_beta=.3, ls_c=.7, ls_max_iter=1,
    precondition=True, n_acc=2)
same_result = {'jvp','keep_graph','check_every','check_deterministic'}          # tested above: they change how, not what
in_other_tests = {'reduction','neg_curv','curv_batches','held_out','fisher_exponent','fisher_probes','structural','hidden'}   # they need company
objects = {'cg','batches','line_search','precondition'}

def test_every_argument_is_covered():
    for f in (HessianFree, hessian_free): assert set(inspect.signature(f).parameters)-{'params'} == set(changes)|same_result|in_other_tests|objects

class Until(Callback):
    "Ends the training with the first step that is not as in `other`, the record of another one"
    def __init__(self, other): self.other = other
    def after_batch(self):
        record = list(self.opt.record)
        if self.training and record!=self.other[:len(record)]: raise CancelFitException

def run_hard(cbs=None, **kwargs):
    "Steps on a problem where backtracking and line search have work to do"
    kwargs = {'damping':1e-3, 'martens_eps':1e-5, **kwargs}
    return list(fit(learner(partial(mlp, act=nn.ReLU), bs=16, cbs=cbs, **kwargs), 3).opt.record)

@functools.cache
def hard(**kwargs): return run_hard(**kwargs)

def changes_something(company, **kwargs): return run_hard(Until(hard(**company)), **company, **kwargs) != hard(**company)

def test_what_changes_nothing_is_seen(): assert not changes_something({}, keep_graph=True) and len(hard())==12

@pytest.mark.parametrize('name', list(changes))
def test_every_argument_changes_something(name): assert changes_something({}, **{name:changes[name]})

@pytest.mark.parametrize('name,value,company', [('neg_curv','abs',dict(curvature='hessian')), ('curv_batches',1,dict(n_acc=2)), ('reduction','sum',dict(n_acc=2)), ('held_out',1,dict(n_acc=2)),
    ('fisher_exponent',.3,dict(precondition=True)), ('fisher_probes',2,dict(precondition=True))])
def test_arguments_that_need_company_change_something(name, value, company): assert changes_something(company, **{name:value})

@pytest.mark.parametrize('kwargs', [dict(curvature='x'), dict(jvp='x'), dict(reduction='x'), dict(neg_curv='x'), dict(n_acc=0), dict(cg_max_iter=0), dict(ls_max_iter=0),
    dict(curv_batches=0), dict(keep_iterates=0), dict(fisher_probes=0), dict(check_every=0), dict(cg_tol=-1), dict(ls_c=-1),
    dict(held_out=1), dict(x0_decay=2.),
    dict(ls_beta=1.), dict(grid=1.), dict(lr=-1.), dict(damping=-1.), dict(wd=-1.)], ids=str)
def test_wrong_settings_are_named(kwargs):
    with pytest.raises(ValueError, match=list(kwargs)[0]): hessian_free([nn.Parameter(torch.zeros(1))], **kwargs)

# --- plain PyTorch, the examples of the reference's readme in words of this package

def test_minimal_example_two_parameters():
    "f(x) = x₀² + x₁⁴ - x₁ from (2, 1): Hessian curvature, the loss alone"
    w = torch.tensor([2.,1.], requires_grad=True)
    opt = hessian_free([w], curvature='hessian', damping=.1)
    steps(opt, lambda: w[0]**2+w[1]**4-w[1], 10)
    assert torch.allclose(w, torch.tensor([0., .25**(1/3)]), atol=1e-3)

def test_small_network_example_with_preconditioner():
    x,y = data(100)
    torch.manual_seed(0)
    model = mlp()
    opt = hessian_free(model.parameters(), precondition=True)
    f = objective(lambda: model(x), lambda z: F.cross_entropy(z, y))
    losses = steps(opt, f, 15, module=model)
    assert losses[-1] < .1*losses[0]

def test_accumulated_example():
    x,y = data(100)
    torch.manual_seed(0)
    model = mlp()
    opt = hessian_free(model.parameters())
    batches = list(zip(x.split(30), y.split(30)))
    losses = [opt.acc_step(model, F.cross_entropy, batches, curv_data=batches[:2]) for _ in range(15)]
    assert losses[-1] < .1*losses[0]
    with pytest.raises(ValueError, match='at least one batch'): opt.acc_step(model, F.cross_entropy, [])

# ---- what an accumulation leaves behind -----------------------------------------------------------------------------

def test_loaded_weights_meet_no_old_graph(tmp_path):
    "Rounds of an accumulation are dropped with the weights that they belong to"
    learn = fit(learner(bs=16, n_acc=3))
    learn.path = tmp_path
    learn.save('half', with_opt=False)
    assert len(learn.opt.batches.rounds)==1
    learn.load('half', with_opt=False)
    assert not learn.opt.batches.rounds and not learn.opt.batches.sums
    fit(learn, 3)
    assert not learn.opt.curvature.failed and learn.opt.n_steps==5 and learn.opt.n_skipped==0

def test_weights_may_change_within_an_accumulation():
    "The graph of the old weights is not used; the curvature is that of the new ones"
    class Clamp(Callback):
        def after_batch(self):
            with torch.no_grad():
                for p in self.model.parameters(): p.clamp_(-.4, .4)
    learn = fit(learner(bs=16, n_acc=2, cbs=Clamp()), 2)
    assert not learn.opt.curvature.failed and learn.opt.n_skipped==0 and all(r['n_iter']>2 for r in learn.opt.record)

class Tied(Module):
    def __init__(self):
        self.a,self.b = nn.Linear(6,6,bias=False),nn.Linear(6,6,bias=False)
        self.b.weight = self.a.weight
    def forward(self, x): return self.b(self.a(x).tanh())[:,:3]

def test_a_weight_in_two_groups_counts_once():
    splitter = lambda m: [list(m.a.parameters()), list(m.b.parameters())]
    def run(splitter):
        learn = learner(Tied, damping=.1)
        learn.splitter = splitter
        return fit(learn, 4)
    two,one = run(splitter),run(lambda m: [list(m.a.parameters())])
    assert len(two.opt.hypers)==2 and torch.allclose(weights(two), weights(one), **SAME)
    assert [r['rho'] for r in two.opt.record]==pytest.approx([r['rho'] for r in one.opt.record], rel=1e-3)

def test_the_state_of_another_optimizer_is_refused(tmp_path):
    learn,other = fit(learner()),fit(learner(opt=Adam))
    for o in (learn,other): o.path = tmp_path
    other.save('adam')
    before = deepcopy(learn.opt.hypers)
    with pytest.raises(ValueError, match='not a state of HessianFree'): learn.load('adam')
    assert learn.opt.hypers==before and fit(learn).opt.n_steps==2


# --- models of other kinds

class Half(Module):
    "A part runs under `no_grad`"
    def __init__(self): self.a,self.c,self.b = nn.Linear(6,8),nn.Conv1d(1,1,3,padding=1),nn.Linear(8,3)
    def forward(self, x):
        with torch.no_grad(): h = self.a(x)
        return self.b(self.c((h+self.a(x)).tanh()[:,None])[:,0])

def tiny_unet():
    body = nn.Sequential(ConvLayer(3,4,stride=2), ConvLayer(4,8,stride=2), ConvLayer(8,8,stride=2))
    return DynamicUnet(body, 2, (16,16))

def tiny_mvit():
    from torchvision.models.video.mvit import MSBlockConfig, MViT
    blocks = [MSBlockConfig(1,8,8,[3,3,3],[],[1,1,1],[]), MSBlockConfig(2,8,16,[3,3,3],[3,3,3],[1,2,2],[1,2,2])]
    return MViT((16,16), 4, blocks, residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True, num_classes=3, dropout=0.,
        attention_dropout=0., stochastic_depth_prob=0.)

def pictures(n=8):
    x = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return [TensorImage(o) for o in x],[TensorMask((o[0]>0).long()) for o in x]

def films(n=6): return torch.randn(n, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)),torch.arange(n)%3

@pytest.mark.parametrize('model,data,loss', [(Half, data, None), (tiny_unet, pictures, lambda: CrossEntropyLossFlat(axis=1)), (tiny_mvit, films, None)],
    ids=['half','unet','mvit'])
def test_ways_that_raise_or_are_wrong_give_way_to_the_next(model, data, loss):
    "Whatever is raised (a type that gets lost, an index), and whatever is wrong in silence, the steps are those of the double backward"
    ws,learns = [],[]
    for jvp in ('reverse','auto'):
        learns.append(fit(learner(model, bs=8, n=8, loss=loss and loss(), data=data, jvp=jvp, cg_max_iter=5), 3))
        ws.append(weights(learns[-1]))
    assert all(l.opt.n_skipped==0 and 'reverse' not in l.opt.curvature.failed for l in learns)
    assert torch.allclose(*ws, rtol=1e-2, atol=1e-3)   # three steps in float32 through batch norm

class Residual(Module):
    "A network for u''=-u that differentiates inside, and needs gradients to be enabled for that"
    def __init__(self): self.net = nn.Sequential(nn.Linear(1,8), nn.Tanh(), nn.Linear(8,1))
    def forward(self, t):
        t = t.detach().requires_grad_()
        u = t + t**2*self.net(t)
        du, = torch.autograd.grad(u.sum(), t, create_graph=True)
        return torch.autograd.grad(du.sum(), t, create_graph=True)[0] + u

def times(n=32): return torch.linspace(0, 3, n)[:,None],torch.zeros(n, 1)

@pytest.mark.parametrize('kwargs', [dict(), dict(keep_graph=False), dict(jvp='dual'), dict(curvature='hessian')], ids=str)
def test_a_model_that_differentiates_inside_trains(kwargs):
    learn = learner(Residual, bs=32, n=32, data=times, loss=MSELossFlat(), damping=.01, **kwargs)
    learn._do_epoch_validate = noop
    fit(learn, 15)
    rs = [r['loss_after'] for r in learn.opt.record if 'loss' in r]
    assert len(rs)==15 and rs[-1] < .02*learn.opt.record[0]['loss']

def test_a_closure_may_differentiate_inside():
    torch.manual_seed(0)
    model,(t,_) = Residual(),times()
    opt = hessian_free(model.parameters(), damping=.01)
    losses = steps(opt, objective(lambda: model(t), lambda r: r.pow(2).mean()), 15, module=model)
    assert opt.n_skipped==0 and losses[-1] < .02*losses[0]

class Uncertain(Module):
    "A loss with a parameter of its own: the log of a noise variance"
    def __init__(self): self.s = nn.Parameter(tensor(.3))
    def forward(self, z, y): return F.cross_entropy(z, y)*(-self.s).exp() + self.s/2

@pytest.mark.parametrize('jvp', ['reverse','dual','linearize','auto'])
@pytest.mark.parametrize('model', [mlp, lambda: Conv()], ids=['mlp','conv'])
def test_parameters_of_the_loss_are_trained(model, jvp):
    loss = Uncertain()
    learn = learner(model, loss=loss, jvp=jvp)
    learn.splitter = lambda m: [list(m.parameters()), list(loss.parameters())]
    fit(learn, 4)
    assert learn.opt.n_skipped==0 and loss.s.item()!=pytest.approx(.3, abs=1e-3)
    other,loss2 = learner(model),Uncertain()
    other.loss_func,other.splitter,other.opt_func = loss2,lambda m: [list(m.parameters()), list(loss2.parameters())],partial(hessian_free, jvp='reverse')
    fit(other, 4)
    assert torch.allclose(weights(learn), weights(other), **SAME) and loss.s.item()==pytest.approx(loss2.s.item(), rel=1e-3)

class Sometimes(Module):
    "A layer that only every other training batch uses"
    def __init__(self): self.a,self.b,self.n = nn.Linear(6,3),nn.Linear(6,3),0
    def forward(self, x):
        if self.training: self.n += 1
        return self.a(x) + (self.b(x) if self.n%2 else 0)

@pytest.mark.parametrize('kwargs', [dict(), dict(n_acc=2)], ids=str)
def test_a_layer_that_was_not_used_does_not_move(kwargs):
    learn,moved = learner(Sometimes, bs=16, **kwargs),[]
    class Look(Callback):
        def before_batch(self): self.old = self.model.b.weight.detach().clone()
        def after_batch(self):
            if self.training: moved.append((self.model.n%2==1, not torch.equal(self.old, self.model.b.weight)))
    learn.add_cb(Look())
    fit(learn, 2)
    if kwargs: assert [m for _,m in moved] == [False,True]*4 and learn.opt.n_skipped==0
    else: assert moved == [(True,True),(False,False)]*4

def test_the_closed_form_is_for_the_bare_loss_alone():
    "A callback that multiplies the loss by 5 gives the steps of a loss function that does"
    class Times5(Callback):
        def after_loss(self): self.learn.loss_grad,self.learn.loss = self.learn.loss_grad*5,self.learn.loss*5
    learn,other = learner(cbs=Times5()),learner()
    other.loss_func = lambda z,y: 5*F.cross_entropy(z, y)
    assert torch.allclose(weights(fit(learn, 3)), weights(fit(other, 3)), **SAME)

def test_backward_hooks_do_not_see_products():
    "A hook that halves a gradient is called once in a batch, and the curvature is that of the loss"
    def run(hook):
        learn,calls = learner(),itertools.count()
        if hook: learn.model[2].register_full_backward_hook(lambda m,i,o: None if next(calls) else None)
        fit(learn, 3)
        return learn,next(calls)
    (a,_),(b,n) = run(False),run(True)
    assert n==3 and torch.allclose(weights(a), weights(b), **SAME)

# --- no step where there is none

def test_a_curvature_that_is_not_a_number_is_a_skipped_step():
    "The norm of a difference that is zero has no second derivative"
    w = nn.Parameter(tensor([1.,2.]))
    opt = hessian_free([w], curvature='hessian')
    def f(): return w.square().sum() + (w-w.detach()).norm()
    with pytest.warns(UserWarning, match='skipped: the curvature is not finite'): opt.step(f)
    assert opt.n_skipped==1 and w.tolist()==[1.,2.] and 'skipped' in opt.record[-1]['reason']

def rosenbrock(dtype=torch.float, n=20, **kwargs):
    w = torch.tensor([-1.,3.], dtype=dtype, requires_grad=True)
    def f(): return (1-w[0])**2+100*(w[1]-w[0]**2)**2
    opt = hessian_free([w], curvature='hessian', **kwargs)
    return [f().item(), *(opt.step(f) for _ in range(n))],opt

@pytest.mark.parametrize('dtype', [torch.float, torch.double])
def test_rosenbrock_is_no_worse_than_with_the_package_of_the_example(dtype):
    "PyTorchHessianFree ends its own example at 5e-7"
    losses,opt = rosenbrock(dtype)
    assert losses[-1] < 5e-7 and opt.n_skipped==0

def test_the_start_of_cg_is_no_step():
    "From zero, iterate 0 is no candidate: the first iterate's direction lowers the loss below 120"
    losses,opt = rosenbrock(n=5, damping=.01, x0_decay=0.)
    assert losses[1] < 120 and all(r['best_iter']>0 for r in opt.record)
    assert all(b<a for a,b in zip(losses, losses[1:]))

def test_a_line_search_that_finds_nothing_is_told():
    w = nn.Parameter(tensor([1.]))
    opt = hessian_free([w])
    n = itertools.count()
    def f(): return w.square().sum()*0 + w.sum() + next(n), w   # the loss grows with each evaluation
    with pytest.warns(UserWarning, match='no length of the line search'): opt.step(f)
    assert opt.n_skipped==1 and w.item()==1. and opt.record[-1]['alpha']==0.

# --- batches with nothing in them

@pytest.mark.parametrize('n_acc', [1,2])
def test_a_batch_without_targets_is_left_out(n_acc):
    "All targets ignored: a step of that batch alone is skipped, in an accumulation the other batch makes it"
    learn = learner(loss=CrossEntropyLossFlat(ignore_index=2), bs=16, n_acc=n_acc, curvature='ggn')
    class Ignore(Callback):
        def before_batch(self):
            if self.training and self.train_iter==1: self.learn.yb = (torch.full_like(self.yb[0], 2),)
    learn.add_cb(Ignore())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        fit(learn)
    assert learn.opt.n_skipped==(n_acc==1) and weights(learn).isfinite().all()
    assert len([w for w in seen if 'nothing in the batch that counts' in str(w.message)])==(n_acc==1)
    if n_acc==2: assert learn.opt.n_steps==2 and learn.opt.record[0]['loss_after'] < learn.opt.record[0]['loss']

def test_empty_batches_of_a_plain_loop():
    x,y = data(20)
    model = mlp()
    opt = hessian_free(model.parameters())
    with pytest.warns(UserWarning, match='nothing'): assert opt.acc_step(model, F.cross_entropy, [(x[:0],y[:0])]) is None
    assert opt.n_skipped==1
    loss = opt.acc_step(model, F.cross_entropy, [(x[:0],y[:0]), (x,y)])
    assert loss < opt.record[-1]['loss']

# --- closures

def test_a_closure_that_calls_backward_is_told():
    model,f,*_ = closures()
    opt,old = hessian_free(model.parameters()),flat(list(model.parameters())).clone()
    def closure():
        loss,out = f()
        loss.backward()
        return loss,out
    with pytest.raises(ValueError, match='must not call `backward`'): opt.step(closure)
    assert torch.equal(old, flat(list(model.parameters()))) and opt.n_steps==0 and all(p.grad is None for p in model.parameters())

def test_gradient_product_and_preconditioner_of_ones_own():
    "Those of the loss give the step that the optimizer makes by itself; a flat gradient will do"
    x,y = data(40)
    def make():
        torch.manual_seed(1)
        return mlp().double()
    x = x.double()
    mine,theirs = make(),make()
    a,b = (hessian_free(m.parameters(), x0_decay=0.) for m in (mine, theirs))
    for _ in range(3):
        a.step(objective(lambda: mine(x), lambda z: F.cross_entropy(z, y)), module=mine)
        z = theirs(x)
        ps,loss = list(theirs.parameters()),F.cross_entropy(z, y)
        G = ggn_product(z, loss, ps)
        g = torch.autograd.grad(loss, ps, retain_graph=True)
        b.step(lambda: F.cross_entropy(theirs(x), y), grad=flat(g), product=G, preconditioner=lambda v: v)
    assert torch.allclose(flat(list(mine.parameters())), flat(list(theirs.parameters())), rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match='go with a closure'): a.step(product=G)

def test_no_limit_to_cg():
    w,f = badly_scaled()
    opt = hessian_free([w], damping=1e-4, martens_eps=0, cg_tol=1e-3, cg_max_iter=None, backtracking=False)
    opt.step(f)
    assert opt.record[0]['reason']=='tolerance' and opt.record[0]['n_iter']>20   # more than there are parameters

# --- preconditioners

def test_gnb_preconditioner_lowers_cg_iterations_and_resembles_the_diagonal():
    x,y = data(64)
    torch.manual_seed(0)
    model = mlp()
    with torch.no_grad(): model[0].weight.mul_(torch.logspace(-1, 1, 6))
    x = x*torch.logspace(1.5, -1.5, 6)
    its = {}
    for precondition in (False, 'gnb'):
        m = deepcopy(model)
        opt = hessian_free(m.parameters(), precondition=precondition, damping=1e-3, martens_eps=0, cg_tol=1e-4, cg_max_iter=500,
            x0_decay=0., fisher_exponent=1.)
        for _ in range(3): opt.acc_step(m, F.cross_entropy, [(x,y)])
        its[precondition] = sum(r['n_iter'] for r in opt.record)
    assert its['gnb']*1.2 < its[False]
    z,ps = model(x),list(model.parameters())
    loss = F.cross_entropy(z, y)
    problem = Problem(ps, loss, z, y, F.cross_entropy)
    many = flat(Preconditioner('gnb', n_probes=2000)(MeanProblem([problem]), ps))
    G = ggn_product(z, loss, ps)
    exact = torch.stack([flat(G(unflat(e, ps)))[i] for i,e in enumerate(torch.eye(len(many)))])
    assert ((many-exact).norm()/exact.norm()).item() < .1   # 2000 draws: some 1/sqrt(2000)·2

def test_gnb_preconditioner_is_that_of_the_loss_and_not_of_its_function_alone():
    "Five times the loss, as a callback may make it; the same draws, up to rounding in float32"
    (x,y),model = data(16),mlp()
    ps = list(model.parameters())
    def diag(k):
        torch.manual_seed(0)
        z = model(x)
        return flat(Preconditioner('gnb')(MeanProblem([Problem(ps, k*F.cross_entropy(z, y), z, y, F.cross_entropy)]), ps))
    assert diag(1).norm()>0 and (diag(5)-5*diag(1)).norm()<1e-5*diag(1).norm()

def test_gnb_preconditioner_in_a_learner_and_what_it_cannot_do():
    learn = fit(learner(precondition='gnb', bs=32, n_acc=2), 3)
    assert learn.opt.n_skipped==0 and learn.opt.record[-1]['loss_after'] < learn.opt.record[0]['loss']
    learn = learner(precondition='gnb', loss=lambda z,y: (z.logsumexp(1)-z[range(len(y)),y]).mean())
    w = weights(learn)
    with pytest.raises(ValueError, match="got loss_func=<function .*lambda.*take precondition='fisher'"): fit(learn)
    assert torch.equal(w, weights(learn))
    fit(learner(precondition='fisher', loss=lambda z,y: (z.logsumexp(1)-z[range(len(y)),y]).mean()))   # the way out

# --- half a step

def test_after_an_exception_the_next_gradient_is_that_of_its_batch():
    learn,log = learner(bs=16),{}
    class Stop(Callback):
        order = 100
        def before_step(self):
            log.setdefault('grads', []).append(flat([p.grad for p in self.model.parameters()]).clone())
            if len(log['grads'])==2: raise KeyError('something else')
    learn.add_cb(Stop())
    with pytest.raises(KeyError): fit(learn)
    assert all(p.grad is None for p in learn.model.parameters()) and not learn.opt.batches.pending
    x,y = data(64)
    want = flat(torch.autograd.grad(F.cross_entropy(learn.model(x[:16]), y[:16]), list(learn.model.parameters())))
    learn.dls.train.shuffle = False
    fit(learn)
    assert torch.allclose(log['grads'][2], want, rtol=1e-5, atol=1e-7)

# --- arguments

@pytest.mark.parametrize('name,value', [(n,v) for n in ('lr','wd','damping','cg_tol','martens_eps','x0_decay','grid','ls_beta','ls_c','fisher_exponent','structural')
    for v in (math.nan, math.inf, True, 'one', [], torch.ones(2))] +
    [(n,v) for n in ('n_acc','cg_max_iter','ls_max_iter','curv_batches','keep_iterates','check_every','fisher_probes') for v in (True, 0, 2.5, math.nan, '2')] +
    [(n,v) for n in ('lm_bounds','lm_factors','damping_bounds') for v in (1., (1,2,3), (math.nan,1.), 'ab', (True,2.))] +
    [('lm_bounds',(.9,.1)), ('damping_bounds',(2.,1.)), ('damping_bounds',(-1.,1.)), ('lm_factors',(.5,.5)), ('lm_factors',(2.,0.)), ('adapt_damping','yes')] +
    [('backtracking',None), ('keep_graph',2), ('line_search','no'), ('precondition','jacobi'), ('curvature',3), ('jvp',None), ('reduction',None), ('held_out',-1)])
def test_arguments_that_cannot_work_are_named(name, value):
    state = torch.get_rng_state()
    company = dict(precondition=True) if name.startswith('fisher') else {}
    with pytest.raises(ValueError, match=name): hessian_free([nn.Parameter(torch.zeros(1))], **company, **{name:value})
    if not company: assert torch.equal(state, torch.get_rng_state())

def test_numbers_of_numpy_and_tensors_do():
    x,y = data(20)
    def run(f):
        torch.manual_seed(1)
        model = mlp()
        opt = hessian_free(model.parameters(), lr=f(.5), damping=f(.3), cg_max_iter=f(7) if f is torch.tensor else np.int64(7), ls_beta=f(.7),
            lm_bounds=(f(.2),f(.8)), wd=f(.01))
        steps(opt, objective(lambda: model(x), lambda z: F.cross_entropy(z, y)), 2)
        return flat(list(model.parameters()))
    for f in (np.float64, np.float32, torch.tensor): assert torch.allclose(run(float), run(f), rtol=1e-5, atol=1e-6)

def test_objects_and_flat_keywords_are_the_same_settings():
    flat_ = hessian_free([nn.Parameter(torch.zeros(1))], cg_max_iter=7, damping=.3, ls_c=.1, precondition=True, fisher_probes=3, n_acc=2)
    made = hessian_free([nn.Parameter(torch.zeros(1))], cg=CG(max_iter=7), damping=Damping(.3), line_search=LineSearch(c=.1),
        precondition=Preconditioner(n_probes=3), batches=Batches(n_acc=2))
    for part in ('cg','damping','line_search'): assert vars(getattr(flat_, part))==vars(getattr(made, part))
    assert flat_.preconditioner.n_probes==made.preconditioner.n_probes==3 and flat_.batches.n_acc==made.batches.n_acc==2
    with pytest.raises(ValueError, match='cg must be given without cg_max_iter'): hessian_free([nn.Parameter(torch.zeros(1))], cg=CG(), cg_max_iter=3)
    with pytest.raises(TypeError, match="has no argument 'momentum'"): hessian_free([nn.Parameter(torch.zeros(1))], momentum=.9)

def test_objects_may_serve_several_optimizers():
    "What waits for a step, and what was learned of a network, stays with each"
    made = partial(hessian_free, batches=Batches(n_acc=3), curvature=Hessian('auto'))
    first = fit(learner(bs=16, opt=made))
    other = fit(learner(bs=16, opt=made, model=lambda: mlp(act=nn.ReLU)))
    assert [len(o.opt.batches) for o in (first,other)]==[1,1]
    assert [o.opt.curvature.curvature.used for o in (first,other)]==['finite_difference','reverse']

def test_rates_that_were_set_later_are_looked_at_before_a_step():
    learn = learner()
    w = weights(learn)
    with pytest.raises(ValueError, match='lr'): fit(learn, 1, lr=-1.)
    assert torch.equal(w, weights(learn))
    fit(learn, 1, lr=1.)

def test_the_house_rules():
    own = [n for n,v in vars(HessianFree).items() if inspect.isfunction(v) and not n.startswith('_orig_')]
    assert len(own)<=15 and len(vars(hessian_free([nn.Parameter(torch.zeros(1))])))<=15

# --- states

def test_a_checkpoint_fits_before_and_after_a_schedule_added_a_hyper(tmp_path):
    a = fit(learner())
    a.path = tmp_path
    a.save('before')
    with a.no_bar(): a.fit_one_cycle(2)
    assert 'mom' in a.opt.hypers[0]
    a.save('after')
    a.load('before')
    assert a.opt.n_steps==1
    b = learner()
    b.path = tmp_path
    b.load('after')
    assert b.opt.n_steps==3 and fit(b).opt.n_steps==4

def broken_states():
    def change(f):
        def g(sd):
            f(sd)
            return sd
        return g
    yield 'no dict',lambda sd: None
    yield 'empty',lambda sd: {}
    yield 'shape',change(lambda sd: sd['state'][0].update(x0=torch.zeros(3)))
    yield 'dtype',change(lambda sd: sd['state'][0].update(x0=sd['state'][0]['x0'].double()))
    yield 'nan',change(lambda sd: sd['state'][1].update(x0=sd['state'][1]['x0']*math.nan))
    yield 'number',change(lambda sd: sd['state'][1].update(x0=3.))
    yield 'fewer',change(lambda sd: sd['state'].pop())
    yield 'groups',change(lambda sd: sd['hypers'].append(dict(sd['hypers'][0])))
    yield 'no damping',change(lambda sd: sd['hypers'][0].pop('damping'))
    yield 'nan damping',change(lambda sd: sd['hypers'][0].update(damping=math.nan))
    yield 'negative lr',change(lambda sd: sd['hypers'][0].update(lr=-1.))
    yield 'counts',change(lambda sd: sd['curvature']['counts'].update(n_steps=-1))
    yield 'no counts',change(lambda sd: sd['curvature'].pop('counts'))
    yield 'record',change(lambda sd: sd['curvature'].update(record=[3]))
    yield 'costs',change(lambda sd: sd['curvature']['products'].update(costs=dict(dual=(math.nan,1.))))
    yield 'generator',change(lambda sd: sd['curvature'].update(generator=torch.zeros(3, dtype=torch.uint8)))

@pytest.mark.parametrize('name,change', list(broken_states()), ids=[n for n,_ in broken_states()])
def test_a_state_that_does_not_fit_changes_nothing(name, change):
    a,b = fit(learner(precondition=True), 2),fit(learner(precondition=True), 3)
    before = deepcopy(b.opt.state_dict())
    with pytest.raises((ValueError,TypeError,RuntimeError)): b.opt.load_state_dict(change(deepcopy(a.opt.state_dict())))
    after = b.opt.state_dict()
    assert after['hypers']==before['hypers'] and after['curvature']['counts']==before['curvature']['counts'] and list(after['curvature']['record'])==before['curvature']['record']
    assert all(torch.equal(s['x0'], o['x0']) for s,o in zip(after['state'], before['state']))
    assert torch.equal(after['curvature']['generator'], before['curvature']['generator'])

def test_a_state_of_version_0_0_1_is_read():
    a = fit(learner(precondition=True), 2)
    sd = deepcopy(a.opt.state_dict())
    own = sd.pop('curvature')
    sd['hessian_free'] = dict(own['counts'], record=own['record'], costs={}, generator=own['generator'])
    b = learner(precondition=True)
    b.create_opt()
    b.model.load_state_dict(a.model.state_dict())
    b.opt.load_state_dict(sd)
    assert torch.equal(weights(fit(b, 2)), weights(fit(a, 2))) and b.opt.n_steps==4

def test_an_optimizer_can_be_copied_and_pickled_in_the_middle():
    learn = learner(bs=16, n_acc=3)
    class Stop(Callback):
        def after_batch(self):
            if self.train_iter==2: raise CancelFitException()
    learn.add_cb(Stop())
    fit(learn)
    assert len(learn.opt.batches)==2
    for o in (deepcopy(learn.opt), pickle.loads(pickle.dumps(learn.opt))): assert len(o.batches)==0 and o.n_steps==0


# --- two processes

class Fails(Callback):
    "On the last rank, in batch `at`, `raised` is raised in evaluation number `n` of the batch (0 is the one of the training loop)"
    run_valid = False
    def __init__(self, raised, n=1, at=1): self.raised,self.n,self.at = raised,n,at
    def before_batch(self): self.count = itertools.count()
    def after_pred(self):
        if rank_distrib() and self.train_iter==self.at and next(self.count)>=self.n: raise self.raised

class NoDual(Module):
    "A function without a forward derivative, on the last rank only"
    def __init__(self): self.a,self.c,self.b = nn.Linear(6,8),nn.Conv1d(1,1,3,padding=1),nn.Linear(8,3)
    def forward(self, x):
        h = self.c(self.a(x)[:,None])[:,0]
        return self.b(Cube.apply(h) if rank_distrib() else h**3)

def shard_of(rank, n_ranks, n_batches=3, bs=12):
    x,y = data(n_ranks*n_batches*bs)
    return [(xb[rank::n_ranks].double(),yb[rank::n_ranks]) for xb,yb in zip(x.split(n_ranks*bs), y.split(n_ranks*bs))]

def train_shard(batches, cbs=(), model=None, ddp=None, epochs=2, **kwargs):
    "What one rank ends with; `ddp` are arguments of the wrapper, `None` for a single process"
    set_seed(3)
    model = (model or mlp)().double()
    learn = Learner(DataLoaders(batches, []), model, F.cross_entropy, opt_func=partial(hessian_free, **{'jvp':'reverse', **kwargs}), cbs=list(cbs))
    learn.remove_cb(learn.recorder)
    learn.logger = noop
    if ddp is not None: learn.model = DistributedDataParallel(model, **ddp)
    with warnings.catch_warnings(),learn.no_bar():
        warnings.simplefilter('ignore')
        learn.fit(epochs)
    opt = learn.opt
    return dict(weights=flat(list(model.parameters())).detach(), n_steps=opt.n_steps, n_skipped=opt.n_skipped, failed=sorted(opt.curvature.failed),
        record=[r['reason'] for r in opt.record], damping=opt.hypers[0]['damping'], grad_enabled=torch.is_grad_enabled())

def ignored(batches, rank):
    "All targets of the last rank's batch 1 are ignored"
    if rank: batches[1] = batches[1][0],torch.full_like(batches[1][1], -100)
    return batches

def on_ranks(rank, n_ranks):
    mine = lambda: shard_of(rank, n_ranks)
    return dict(plain=lambda: train_shard(mine(), ddp={}), hessian=lambda: train_shard(mine(), ddp={}, curvature='hessian'),  # chkstyle: ignore-node
        n_acc=lambda: train_shard(mine(), ddp={}, n_acc=3), precondition=lambda: train_shard(mine(), ddp={}, precondition=True, fisher_probes=None),
        auto=lambda: train_shard(mine(), ddp={}, model=Conv, jvp='auto'),
        trial=lambda: train_shard(mine(), [Fails(RuntimeError('in a trial'))], ddp={}),
        bug=lambda: train_shard(mine(), [Fails(ArithmeticError('in the second trial'), 2)], ddp={}),
        product=lambda: train_shard(mine(), [Fails(RuntimeError('in a product'))], ddp={}, jvp='dual'),
        memory=lambda: train_shard(mine(), [Fails(torch.OutOfMemoryError('in a product'))], ddp={}, jvp='dual', damping=.1),
        way=lambda: train_shard(mine(), ddp={}, model=NoDual, jvp='auto'), ignored=lambda: train_shard(ignored(mine(), rank), ddp={}),
        unused=lambda: train_shard(mine(), ddp=dict(find_unused_parameters=True), model=Sometimes))

def on_rank(rank, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    dist.init_process_group('gloo', init_method=f'tcp://localhost:{port}', rank=rank, world_size=2)
    found = {}
    for name,f in on_ranks(rank, 2).items():
        found[name] = f()
        dist.barrier()
    torch.save(found, f'{folder}/{rank}.pt')
    dist.destroy_process_group()

@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "Two processes that have imported everything; one that hangs is ended"
    folder = tmp_path_factory.mktemp('ranks')
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    both,ended = mp.start_processes(on_rank, (folder, port), nprocs=2, join=False, start_method='fork'),False
    until = time.monotonic()+240
    try:
        while not ended and time.monotonic()<until: ended = both.join(timeout=5)
    finally:
        for p in both.processes: p.kill()
    assert ended, 'the processes wait for each other'
    return [torch.load(folder/f'{r}.pt') for r in range(2)]

@pytest.mark.parametrize('case', list(on_ranks(0, 2)))
def test_two_processes_end_alike(ranks, case):
    "Bit for bit, with the same steps, skips, ways and damping, whatever failed on one of them"
    a,b = (r[case] for r in ranks)
    assert torch.equal(a['weights'], b['weights']) and a['weights'].isfinite().all()
    for k in set(a)-{'weights'}:
        if k!='record': assert a[k]==b[k]
    assert [r.startswith('skipped') for r in a['record']]==[r.startswith('skipped') for r in b['record']]

@pytest.mark.parametrize('case,skipped,failed', [('plain',0,[]), ('hessian',None,[]), ('n_acc',0,[]), ('auto',0,[]), ('trial',1,[]), ('bug',1,[]), ('product',1,['dual']), ('memory',1,[]),
    ('way',0,['dual','linearize']), ('ignored',2,[]), ('unused',0,[])])
def test_what_one_process_cannot_do_none_does(ranks, case, skipped, failed):
    found = ranks[0][case]
    assert (skipped is None or found['n_skipped']==skipped) and found['grad_enabled']
    if case!='way': assert found['failed']==failed
    else: assert 'dual' in found['failed'] and 'reverse' not in found['failed']

@pytest.mark.parametrize('case,kwargs', [('plain',{}), ('hessian',dict(curvature='hessian')), ('n_acc',dict(n_acc=3))], ids=str)
def test_two_processes_are_one_on_the_whole_batch(ranks, case, kwargs):
    one = train_shard([tuple(map(torch.cat, zip(*o))) for o in zip(shard_of(0, 2), shard_of(1, 2))], **kwargs)
    assert torch.allclose(one['weights'], ranks[0][case]['weights'], rtol=1e-6, atol=1e-8)   # float64, six steps, other orders of summation

# --- structural damping

class Memory(Module):
    "A recurrent network that is asked at the end for what it saw at the beginning"
    def __init__(self, n_h=10, k=2, radius=1.1):
        self.rnn,self.out = nn.RNN(2, n_h, batch_first=True),nn.Linear(n_h, k)
        with torch.no_grad():
            for p in self.parameters(): nn.init.normal_(p, 0, p.shape[1]**-.5) if p.ndim==2 else p.zero_()
            W = self.rnn.weight_hh_l0
            W.mul_(radius/torch.linalg.eigvals(W).abs().max())
    def forward(self, x): return self.out(self.rnn(x)[0][:,-1])

def bits(k=2, silence=20):
    b = torch.tensor([[(i>>j)&1 for j in range(k)] for i in range(2**k)]).float()
    x = torch.zeros(2**k, silence+k, 2)
    x[:,:k,0],x[:,-1,1] = b*2-1,1
    return x,b

REMEMBERED = 1e-3 # Loss of two bits that are remembered; those that are not stay above 0.1 (30 steps, seeds 0 to 4: 4 solved with the damping, 1 without)

def test_structural_damping_helps_a_long_memory():
    "Two bits over twenty steps of silence, five networks: each ends lower with it, and more of them remember"
    x,b = bits()
    def end(seed, mu):
        torch.manual_seed(seed)
        model = Memory()
        opt = hessian_free(model.parameters(), structural=mu)
        f = objective(lambda: model(x), lambda z: F.binary_cross_entropy_with_logits(z, b))
        return steps(opt, f, 30, module=model)[-1]
    plain,damped = ([end(seed, mu) for seed in range(5)] for mu in (0.,4.))
    assert all(d<p for d,p in zip(damped, plain))
    assert sum(o<REMEMBERED for o in damped)>=3 and sum(o<REMEMBERED for o in plain)<=2

def test_structural_damping_is_as_strong_in_a_loop_as_in_a_learner():
    "It is divided by the samples of a mean there too"
    set_seed(0)
    x,y = torch.randn(8,4,2),torch.arange(8)%2
    models = [Memory() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    loop,data = (HessianFree(m.parameters(), structural=1., x0_decay=0.) for m in models)
    for _ in range(2):
        loop.step(objective(lambda: models[0](x), lambda z: F.cross_entropy(z, y)), models[0])
        data.acc_step(models[1], F.cross_entropy, [(x,y)])
    assert torch.allclose(*(flat(list(m.parameters())) for m in models), **SAME)

def test_structural_damping_in_a_learner_and_where_there_are_no_hidden_states():
    x,b = bits()
    learn = learner(Memory, bs=4, n=4, data=lambda n: (x,b), loss=F.binary_cross_entropy_with_logits, structural=1.)
    learn._do_epoch_validate = noop
    fit(learn, 5)
    assert learn.opt.n_skipped==0 and learn.opt.record[-1]['loss_after'] < learn.opt.record[0]['loss']
    opt = hessian_free((m := mlp()).parameters(), structural=1.)
    with pytest.raises(ValueError, match='hidden='): opt.acc_step(m, F.cross_entropy, [data(10)])
    opt = hessian_free(m.parameters(), structural=1., hidden=lambda m: [m[1]])   # the way out
    assert opt.acc_step(m, F.cross_entropy, [data(10)]) < opt.record[0]['loss']


def test_a_preconditioner_leaves_the_random_state_and_each_optimizer_has_its_own():
    "An object in a `partial` gives a second run the numbers of the first, and those of the flat keyword"
    def run(**kwargs):
        torch.manual_seed(0)
        model,x,y = nn.Sequential(nn.Linear(4,8), nn.Tanh(), nn.Linear(8,3)).double(),torch.randn(32, 4).double(),torch.randint(3, (32,))
        before = torch.get_rng_state()
        opt = hessian_free(model.parameters(), **kwargs)
        assert torch.equal(before, torch.get_rng_state())
        for _ in range(2): opt.acc_step(model, F.cross_entropy, [(x,y)])
        return flat(model.parameters())
    made = Preconditioner(n_probes=2)
    first,second,keyword = run(precondition=made),run(precondition=made),run(precondition=True, fisher_probes=2)
    assert torch.equal(first, second) and torch.equal(first, keyword)

@pytest.mark.parametrize('kwargs', [dict(curvature='hessian', jvp='dual'), dict(curvature=GaussNewton('reverse'), jvp='dual'), dict(fisher_probes=2),
    dict(fisher_exponent=1.)], ids=['a word','an object','probes','exponent'])
def test_a_keyword_that_would_change_nothing_is_refused(kwargs):
    with pytest.raises(ValueError, match=list(kwargs)[-1]): hessian_free([nn.Parameter(torch.zeros(1))], **kwargs)

def test_a_keyword_beside_what_is_switched_off():
    "Told so: a comparison of on and off gives both the same keywords"
    hessian_free([nn.Parameter(torch.zeros(1))], precondition=False, fisher_probes=2, line_search=False, ls_beta=0.5)


def test_a_look_at_the_reduction_changes_nothing():
    "Neither the statistics of a batch norm nor the random state"
    torch.manual_seed(0)
    model,x,y = nn.Sequential(nn.Linear(4,3), nn.BatchNorm1d(3, momentum=0.5)),torch.randn(8, 4),torch.randint(3, (8,))
    opt,before,rng = hessian_free(model.parameters()),{k: v.clone() for k,v in model.state_dict().items()},torch.get_rng_state()
    opt.check_reduction(model, F.cross_entropy, [(x,y),(x,y)])
    assert torch.equal(rng, torch.get_rng_state()) and all(torch.equal(before[k], v) for k,v in model.state_dict().items())

# Settings that have to count, and what is refused

class Cells(nn.Module):
    "A recurrent network of one's own"
    def __init__(self):
        super().__init__()
        self.cell,self.head,self.idle = nn.Linear(5, 3),nn.Linear(3, 2),nn.Linear(2, 2)
    def forward(self, x):
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]): h = self.cell(torch.cat([h,x[:,t]], 1)).tanh()
        return self.head(h)

def cells(**kwargs):
    "Network, closure and optimizer in double precision"
    torch.manual_seed(0)
    m,x = Cells().double(),torch.randn(8, 4, 2).double()
    y = torch.randint(2, (8,))
    return m,objective(lambda: m(x), lambda z: F.cross_entropy(z, y)),hessian_free(m.parameters(), **kwargs)

def stepped(curvature, structural, n=2):
    m,closure,opt = cells(curvature=curvature, structural=structural, damping=0.1, hidden=lambda m: [m.cell])
    for _ in range(n):
        opt.step(closure, m)
        opt.hypers[0]['damping'] = 10.
    return flat(list(m.parameters())).detach()

def test_structural_damping_is_never_left_out():
    "Differences of gradients do not see it: 'auto' takes another way then, and who asks for them is told"
    want = stepped(Hessian('reverse'), .02)
    assert (want-stepped(Hessian('reverse'), 0.)).norm()>1e-4
    torch.testing.assert_close(stepped(Hessian('auto'), .02), want, rtol=1e-8, atol=1e-10)
    for how in ('finite_difference','compiled'):
        with pytest.warns(UserWarning, match='structural damping|no `inputs`'): stepped(Hessian(how), .02)

def test_structural_damping_of_a_closure_needs_its_module():
    "The error says so, and what it says helps; a module in the place of a list is one module"
    m,closure,opt = cells(structural=.1, hidden=lambda m: [m.cell])
    with pytest.raises(ValueError, match=r'step\(closure, model\)'): opt.step(closure)
    assert math.isfinite(opt.step(closure, m))
    losses = [o.step(c, n) for n,c,o in (cells(structural=.1, hidden=h) for h in (lambda m: [m.cell], lambda m: m.cell, lambda m: nn.ModuleList([m.cell])))]
    assert losses[0]==losses[1]==losses[2]

@pytest.mark.parametrize('hidden', [lambda m: m.cell, lambda m: [m.cell], lambda m: (o for o in [m.cell])])
def test_hidden_may_return_modules_of_any_kind(hidden):
    m,closure,opt = cells(structural=.1, hidden=hidden)
    assert math.isfinite(opt.step(closure, m))

@pytest.mark.parametrize('hidden,what', [(nn.Linear(2,2),'hidden must be a function'), ([nn.Linear(2,2)],'hidden must be a function'), ('cell','hidden must be a function')])
def test_hidden_is_a_function(hidden, what):
    with pytest.raises(ValueError, match=what): hessian_free([nn.Parameter(torch.ones(1))], hidden=hidden)

def test_hidden_returns_modules_that_run():
    m,closure,opt = cells(structural=.1, hidden=lambda m: ['cell'])
    with pytest.raises(ValueError, match='hidden must return modules'): opt.step(closure, m)
    m,closure,opt = cells(structural=.1, hidden=lambda m: [m.idle])
    with pytest.raises(ValueError, match='calls none of the modules'): opt.step(closure, m)

@pytest.mark.parametrize('kwargs', [dict(n_acc=2), dict(n_acc=2, held_out=1), dict(n_acc=2, curv_batches=1)])
def test_counts_of_batches_are_for_a_learner(kwargs):
    "A closure and `acc_step` are steps of their own, and say so; nothing has moved then"
    x,y = data()
    m = mlp()
    opt,before = hessian_free(m.parameters(), **kwargs),flat(list(m.parameters())).detach().clone()
    with pytest.raises(ValueError, match='n_acc=2'): opt.step(objective(lambda: m(x), lambda z: F.cross_entropy(z, y)), m)
    with pytest.raises(ValueError, match='grad_data and curv_data'): opt.acc_step(m, F.cross_entropy, [(x,y)])
    assert torch.equal(flat(list(m.parameters())), before)
    fit(learner(bs=16, **kwargs))

def test_all_frozen_is_said():
    x,y = data()
    m = mlp()
    opt = hessian_free(m.parameters())
    for p in m.parameters(): p.requires_grad_(False)
    closure = objective(lambda: m(x), lambda z: F.cross_entropy(z, y))
    ways = [lambda: opt.step(closure, m), lambda: opt.acc_step(m, F.cross_entropy, [(x,y)]), lambda: opt.check_reduction(m, F.cross_entropy, [(x,y)]*2)]
    for f in ways:
        with pytest.raises(ValueError, match='frozen'): f()

def test_data_may_be_a_generator_of_pairs():
    x,y = data()
    m = mlp()
    opt,halves = hessian_free(m.parameters()),[(x[:32],y[:32]), (x[32:],y[32:])]
    opt.check_reduction(m, F.cross_entropy, iter(halves))
    with pytest.raises(ValueError, match="'sum'"): hessian_free(m.parameters(), reduction='sum').check_reduction(m, F.cross_entropy, iter(halves))
    for few in ([], halves[:1]):
        with pytest.raises(ValueError, match='two batches'): opt.check_reduction(m, F.cross_entropy, few)
    for odd in ((x,y), [dict(x=x, y=y)]):
        with pytest.raises(ValueError, match='inputs, targets'): opt.acc_step(m, F.cross_entropy, odd)

def test_the_text_says_what_is_not_as_it_comes():
    ps = [nn.Parameter(torch.ones(1))]
    plain,pre,no_search = (repr(hessian_free(ps, **o)) for o in (dict(), dict(precondition=True), dict(line_search=False)))
    assert 'preconditioner: Preconditioner()' in pre and 'line_search: None' in no_search
    assert not any(o in plain for o in ('preconditioner','line_search'))

# --- settings that can never work are no skipped steps

class GivesLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()
    def forward(self, x): return self.net(x).square().mean()

def test_a_preconditioner_without_outputs_is_refused():
    "Not skipped step after step; the advice trains"
    own = dict(model=GivesLoss, loss=lambda out,y: out, curvature='hessian')
    learn = learner(**own, precondition=True)
    before = weights(learn)
    with pytest.raises(ValueError, match='precondition=True needs outputs with samples along dimension 0, got a number: take False'): fit(learn)
    assert torch.equal(weights(learn), before)
    assert not torch.equal(weights(fit(learner(**own, precondition=False))), before)

def test_a_closure_does_not_tell_the_loss_function_to_gnb():
    (x,y),m = data(),mlp()
    def closure():
        out = m(x)
        return F.cross_entropy(out, y),out
    with pytest.raises(ValueError, match="`acc_step` know and a closure does not: take precondition='fisher'"):
        hessian_free(m.parameters(), precondition='gnb').step(closure, m)
    hessian_free(m.parameters(), precondition='fisher').step(closure, m)
    assert hessian_free(m.parameters(), precondition='gnb').acc_step(m, nn.CrossEntropyLoss(), [(x,y)])<F.log_softmax(torch.zeros(3), 0).neg()[0]*2

def test_a_gradient_of_ones_own_has_to_fit():
    "Refused before anything has changed; as a list, a generator and a vector it makes the same step"
    (x,y),made = data(),[mlp() for _ in range(3)]
    for m in made[1:]: m.load_state_dict(made[0].state_dict())
    def closure(m): return lambda: F.cross_entropy(m(x), y)
    gs = torch.autograd.grad(closure(made[0])(), list(made[0].parameters()))
    opts = [hessian_free(m.parameters(), curvature='hessian') for m in made]
    for wrong in (gs[:-1], [g[:1] for g in gs], flat(gs)[1:], [flat(gs)], gs[0], []):
        with pytest.raises(ValueError, match='grad, if it is not one vector for all trained parameters, must be tensors of the shapes .*, got'):
            opts[0].step(closure(made[0]), made[0], grad=wrong)
    assert opts[0].n_steps==0 and all(p.grad is None for p in made[0].parameters())
    for o,m,g in zip(opts, made, (list(gs), (g for g in gs), flat(gs))): o.step(closure(m), m, grad=g)
    assert all(torch.equal(p, q) for m in made[1:] for p,q in zip(made[0].parameters(), m.parameters()))

class Bends(nn.Module):
    "A kink in the body alone, in a function"
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Linear(6,8),nn.Linear(8,3)
    def forward(self, x): return self.head(self.body(x).relu().tanh())

def test_auto_looks_again_at_what_is_thawed():
    learn = learner(model=Bends, curvature=Hessian('auto'))
    learn.splitter = lambda m: [list(m.body.parameters()),list(m.head.parameters())]
    for f,want in ((learn.freeze,'finite_difference'), (learn.unfreeze,'reverse')):
        f()
        assert fit(learn).opt.curvature.curvature.used==want

def test_a_picture_without_damping_shows_its_zeros():
    opt,p = hessian_free([w := nn.Parameter(torch.ones(2))], damping=0., curvature='hessian'),torch.tensor([1.,3.])
    for _ in range(2): opt.step(lambda: (p*w**2).sum())
    damping = next(ax for ax in opt.plot_record().axes if 'damping' in ax.get_title())
    assert damping.get_yscale()=='linear' and set(damping.lines[0].get_ydata())=={0.}

# --- one step by hand

def weight(*values): return nn.Parameter(torch.tensor(values, dtype=F64))

def test_where_cg_starts_is_a_step_too_unless_it_starts_at_zero():
    "w⁴ at 1: Newton's step is -1/3, the remembered one -1 ends at the minimum; where the next CG starts is not the step but CG's solution"
    def stepped(start):
        w,v = weight(1.),weight(0.)
        opt = hessian_free([w,v], curvature='hessian', damping=0., line_search=False)
        if start: opt.state[w]['x0'] = torch.full_like(w, -1.)
        loss = opt.step(lambda: (w**4+v**2/2).sum())
        return w.item(),v.item(),loss,opt
    *found,opt = stepped(True)
    assert found==pytest.approx([0.,0.,0.], abs=1e-12) and (opt.record[0]['best_iter'],opt.record[0]['n_iter'])==(0,1)
    assert [opt.state[p]['x0'].item() for p in opt.param_lists[0]]==pytest.approx([-.95/3,0.])
    *found,opt = stepped(False)
    assert found==pytest.approx([2/3,0.,(2/3)**4], abs=1e-12) and opt.record[0]['best_iter']==1

def two_weights(**kwargs):
    "½(3a²+5b²) at (1,1), a group each, with the closure"
    a,b = weight(1.),weight(1.)
    return a,b,hessian_free([[a],[b]], curvature='hessian', **kwargs),lambda: (3*a**2+5*b**2).sum()/2

def test_each_group_has_a_damping_and_the_record_has_the_last_ones():
    "As it was in the step; the model promised more than the loss gives up, so both fall, and both grow with a step that is skipped"
    a,b,opt,f = two_weights(damping=[1.,4.])
    opt.step(f)
    assert (a.item(),b.item())==pytest.approx((1-3/4,1-5/9)) and opt.record[0]['damping']==4.
    assert [h['damping'] for h in opt.hypers]==pytest.approx([2/3,8/3])
    with pytest.warns(UserWarning, match=r'step 2 was skipped.*damping is 4 now'): opt.step(lambda: f()*math.nan)
    assert [h['damping'] for h in opt.hypers]==pytest.approx([1.,4.]) and opt.record[1]['damping']==pytest.approx(4.)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        opt.step(lambda: f()*math.nan)
    assert opt.n_skipped==2

@pytest.mark.parametrize('lrs', [[.5,1.],[1.,.5]], ids=str)
@pytest.mark.parametrize('kwargs', [dict(), dict(ls_c=.5), dict(line_search=False), dict(line_search=False, backtracking=False)], ids=str)
def test_the_loss_after_a_scaled_step_is_that_of_where_it_ends(lrs, kwargs):
    "Newton's step times the rate of each group, which gives more than half of what its slope promises; without a search nobody evaluates there"
    a,b,opt,f = two_weights(damping=0., **kwargs)
    opt.set_hyper('lr', lrs)
    loss = opt.step(f)
    assert [a.item(),b.item()]==pytest.approx([1-o for o in lrs])
    assert loss==opt.record[0]['loss_after']==(None if 'line_search' in kwargs else pytest.approx(f().item()))
    assert opt.state[a]['x0'].item()==pytest.approx(-.95)   # CG's solution, whatever the rates make of it

def test_the_loss_before_a_step_has_the_weight_decay_too():
    "½w² at 2 with a decay of 1: from 4 to 0, as the model promised"
    w = weight(2.)
    opt = hessian_free([w], curvature='hessian', damping=0., wd=1.)
    opt.step(lambda: w.square().sum()/2)
    r = opt.record[0]
    assert (r['loss'],r['loss_after'],r['rho'])==pytest.approx((4.,0.,1.))

def test_weight_decay_is_summed_in_double_precision():
    w = nn.Parameter(torch.full((1000,), .1))
    opt = hessian_free([w], wd=1.)
    assert decay(opt, [w])==pytest.approx(w.double().square().sum().item()/2, rel=1e-12)

def test_the_first_group_of_a_weight_counts():
    a,b = weight(1.),weight(1.)
    opt = hessian_free([[a],[a,b]])
    for k in ('lr','wd','damping'): opt.set_hyper(k, [.1,.2])
    opt.state[a]['do_wd'] = False
    assert [hyper_of(opt, [a,b], k) for k in ('lr','wd','damping')]==[[.1,.2],[0.,.2],[.1,.2]]

@pytest.mark.parametrize('name', ['adapt_damping','backtracking','line_search'])
def test_what_judges_a_step_suffices_alone(name):
    "Each of the three evaluates the loss; with none of them a step has neither a ratio nor a loss"
    off = dict(adapt_damping=False, backtracking=False, line_search=False)
    a,b,opt,f = two_weights(damping=0., **{**off, name: True})
    assert opt.step(f)==pytest.approx(0., abs=1e-12) and opt.record[0]['rho']==pytest.approx(1.)
    a,b,opt,f = two_weights(damping=0., **off)
    assert opt.step(f) is None and math.isnan(opt.record[0]['rho']) and (a.item(),b.item())==pytest.approx((0.,0.), abs=1e-12)

def test_the_way_through_a_saddle_where_the_gradient_leads_uphill():
    "Curvatures 1 and -99.9 with forces of 10 each: along the gradient the fourth power wins, Newton's step ends near the saddle"
    a,b = weight(10.),weight(.1)
    opt = hessian_free([a,b], curvature='hessian', damping=0.)
    def f(): return (a**2/2-50*b**2+b**4).sum()
    loss = opt.step(f)
    assert a.item()==pytest.approx(0., abs=1e-6) and abs(b.item())<1e-3 and loss==opt.record[0]['loss_after']==pytest.approx(f().item())
    assert opt.record[0]['reason']=='negative curvature' and opt.record[0]['alpha']==1. and opt.n_skipped==0

# --- what a difference of reductions shows in

@pytest.mark.parametrize('what,loss', [('loss',lambda z,y: z.square().sum()), ('gradient',lambda z,y: (z-z.detach()).sum()),
    ('curvature',lambda z,y: (z-z.detach()).square().sum())], ids=['loss','gradient','curvature'])
def test_a_wrong_reduction_is_named_by_what_it_shows_in(what, loss):
    "Sums under reduction='mean': of squares, of a loss that is zero with a gradient, of one that has a curvature alone"
    x,y = data(40)
    m = mlp()
    with pytest.raises(ValueError, match=f"the {what} of the batches is not that of their concatenation under reduction='mean'"):
        hessian_free(m.parameters(), curvature='hessian').check_reduction(m, loss, list(zip(x.split([25,15]), y.split([25,15]))))

@pytest.mark.parametrize('tol,told', [(dict(),True), (dict(rtol=.5),False), (dict(atol=1.),False)], ids=str)
def test_the_tolerance_of_a_look_at_the_reduction(tol, told):
    "A loss of 1.05 in halves and 1 in whole"
    m = nn.Linear(2, 1)
    for p in m.parameters(): nn.init.zeros_(p)
    x,y = torch.ones(10, 2),torch.ones(10, 1)
    loss = lambda z,y: (z-y).square().mean()*(1.05 if len(z)<10 else 1.)
    look = partial(hessian_free(m.parameters()).check_reduction, m, loss, [(x[:5],y[:5]),(x[5:],y[5:])], **tol)
    if not told: return look()
    with pytest.raises(ValueError, match='the loss of the batches'): look()

def test_the_picture_of_a_record():
    "Skipped steps are not in it; two lines for CG with their names; lengths above 1 are seen, and losses below zero"
    opt = hessian_free([weight(1.)])
    row = dict(loss=2., damping=.5, n_iter=7, best_iter=4, alpha=1.)
    opt.record.extend([dict(row, step=1), dict(step=2, reason='skipped', damping=.7), dict(row, step=3, loss=1., alpha=2.)])
    axs = {ax.get_title(): ax for ax in opt.plot_record().axes}
    lines = {t: [l.get_xydata().tolist() for l in ax.lines] for t,ax in axs.items()}
    assert lines=={'loss': [[[1,2.],[3,1.]]], 'damping λ': [[[1,.5],[3,.5]]], 'iterations of CG': [[[1,7],[3,7]],[[1,4],[3,4]]],
        'step length': [[[1,1.],[3,2.]]]}
    assert [l.get_label() for l in axs['iterations of CG'].lines]==['run','used']
    assert [ax.get_yscale() for ax in axs.values()]==['log','log','linear','linear'] and axs['step length'].get_ylim()==(0,pytest.approx(2.1))
    opt.record.append(dict(row, step=4, loss=-1.))
    assert opt.plot_record().axes[0].get_yscale()=='linear'

@pytest.mark.parametrize('name,value', [('grad',[torch.ones(1)]), ('product',lambda v: v), ('preconditioner',lambda v: v)])
def test_what_is_ones_own_goes_with_a_closure(name, value):
    with pytest.raises(ValueError, match='go with a closure'): hessian_free([weight(1.)]).step(**{name: value})

@pytest.mark.parametrize('way', ['step','acc_step'])
def test_rates_of_every_group_are_looked_at_before_every_kind_of_step(way):
    m,(x,y) = mlp(),data(8)
    opt = hessian_free(two_groups(m))
    opt.hypers[1]['lr'] = -1.
    step = dict(step=lambda: opt.step(lambda: F.cross_entropy(m(x), y), m), acc_step=lambda: opt.acc_step(m, F.cross_entropy, [(x,y)]))[way]
    with pytest.raises(ValueError, match='lr'): step()
    assert opt.n_steps==opt.n_skipped==0

def test_a_skipped_step_without_words_has_the_name_of_the_exception():
    w,n = weight(1.),itertools.count()
    def f():
        if next(n): raise RuntimeError
        return w.square().sum()
    opt = hessian_free([w], curvature='hessian')
    with pytest.warns(UserWarning, match='was skipped: RuntimeError'): opt.step(f)
    assert opt.record[0]['reason']=='skipped: RuntimeError'

@pytest.mark.parametrize('curved,match', [(1.,'no length of the line search'), (0.,'along the gradient is zero')])
def test_a_warning_that_is_an_error_leaves_nothing_of_the_step(curved, match):
    "Neither where CG would start nor the damping, with the parameters"
    w,n = weight(1.),itertools.count()
    opt = hessian_free([w])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(UserWarning, match=match): opt.step(lambda: (w.square().sum()*curved + w.sum() + 10*next(n), w))
    assert w.item()==1. and 'x0' not in opt.state[w] and (opt.n_steps,opt.hypers[0]['damping'],len(opt.record))==(0,1.,0)

def test_no_start_is_kept_where_none_is_wanted():
    w = weight(1.)
    opt = hessian_free([w], curvature='hessian', x0_decay=0.)
    opt.step(lambda: w.square().sum())
    assert 'x0' not in opt.state[w]

@pytest.mark.parametrize('n,training,told', [(511,True,True), (512,True,False), (511,False,False)])
def test_batch_norm_is_told_of_where_it_takes_statistics(n, training, told):
    m,x = nn.BatchNorm1d(1).train(training),torch.zeros(n, 1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        warn_of_batch_norm(SimpleNamespace(model=m, xb=(x,), yb=(x,)))
    assert [f'a batch of {n} ' in str(o.message) for o in said]==[True]*told

def test_progress_is_shown_every_so_many_seconds(monkeypatch):
    now,shown = [0.],[]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    bar = SimpleNamespace(last_v=3, update_bar=lambda v: shown.append((now[0],v,bar.comment)))
    opt = hessian_free([weight(1.)], cg_max_iter=None)
    progress(opt)(1, -.5, 1.)   # no bar, nothing happens
    opt.batches.now = SimpleNamespace(learn=SimpleNamespace(progress=SimpleNamespace(pbar=bar)))
    show = progress(opt, wait=2.)
    for now[0] in (1.,2.5,4.,5.): show(int(2*now[0]), -.25*now[0], 1.)
    bar.last_v,now[0] = None,9.
    show(9, -1., 1.)
    assert shown==[(2.5,3,'CG 5/∞, model -0.625'),(5.,3,'CG 10/∞, model -1.25')]

# --- states by hand

def stepped_twice(**kwargs):
    "One step and one that was skipped"
    w = weight(1.)
    opt = hessian_free([w], curvature='hessian', **kwargs)
    opt.step(lambda: (w**2).sum())
    with pytest.warns(UserWarning, match='skipped'): opt.step(lambda: (w*math.nan).sum())
    return opt

def test_what_a_state_holds():
    "It does not change with the optimizer that it is of; the record that is loaded is bounded as the old one"
    opt = stepped_twice()
    sd = opt.state_dict()
    opt.record.append(dict(step=3))
    assert sd['curvature']['counts']==dict(n_steps=2, n_skipped=1) and isinstance(sd['curvature']['record'], list) and len(sd['curvature']['record'])==2
    other = hessian_free([weight(1.)], curvature='hessian')
    other.load_state_dict(sd)
    assert (other.n_steps,other.n_skipped,len(other.record),other.record.maxlen)==(2,1,2,10_000)

@pytest.mark.parametrize('one,other', [(False,True),(True,False)])
def test_a_state_fits_with_a_preconditioner_and_without(one, other):
    x,y = data(8)
    def made(precondition):
        m = mlp()
        return m,hessian_free(m.parameters(), precondition=precondition)
    (m,a),(_,b) = made(one),made(other)
    a.acc_step(m, F.cross_entropy, [(x,y)])
    b.load_state_dict(a.state_dict())
    assert b.n_steps==1

@pytest.mark.parametrize('costs,fits', [(dict(dual=(0.,1.)),True), (dict(dual=[0,0]),True), (dict(dual=(1.,)),False), (dict(dual=(1.,2.,3.)),False),
    (dict(dual=(-1.,1.)),False), (dict(dual=(1.,math.inf)),False), (dict(dual=1.),False)], ids=str)
@pytest.mark.parametrize('old', [False,True])
def test_costs_of_a_state(costs, fits, old):
    "Two numbers from 0 on for a way, in a file of version 0.0.1 too"
    m = mlp()
    opt = hessian_free(m.parameters())
    sd = opt.state_dict()
    own = sd.pop('curvature') if old else sd['curvature']
    if old: sd['hessian_free'] = dict(n_steps=3, n_skipped=2, record=[], costs=costs, generator=None)
    else: own['products'] = dict(own['products'], costs=costs)
    if fits:
        opt.load_state_dict(sd)
        assert opt.curvature.costs==costs and (opt.n_steps,opt.n_skipped)==((3,2) if old else (0,0))
    else:
        with pytest.raises(ValueError, match='costs of dual'): opt.load_state_dict(sd)

@pytest.mark.parametrize('key,odd', [('costs',None), ('costs',[1.]), ('n_products','a'), ('n_products',-1), ('n_products',None)], ids=str)
def test_a_state_with_impossible_products_changes_nothing(key, odd):
    (m,a),(_,b) = ((m, hessian_free(m.parameters(), lr=lr)) for m,lr in ((mlp(), 0.5), (mlp(), 1.)))
    sd,before = a.state_dict(),deepcopy(b.state_dict())
    sd['curvature'] = dict(sd['curvature'], products={'costs': {}, 'n_products': 0, key: odd})
    with pytest.raises(ValueError, match=key): b.load_state_dict(sd)
    assert b.state_dict()==before and b.hypers[0]['lr']==1.

@pytest.mark.parametrize('row', [3,dict(loss=1.)], ids=str)
def test_a_record_is_of_steps(row):
    opt = stepped_twice()
    sd = opt.state_dict()
    sd['curvature']['record'] = [row]
    with pytest.raises(ValueError, match='record.*a list of steps'): opt.load_state_dict(sd)

# --- settings by hand

@pytest.mark.parametrize('name,wrong', [('cg',False), ('cg',3), ('batches',False), ('line_search',3), ('precondition',0.)])
def test_a_settings_object_is_one_or_a_switch_where_there_is_one(name, wrong):
    with pytest.raises(ValueError, match=f'{name} must be'): hessian_free([weight(1.)], **{name: wrong})

@pytest.mark.parametrize('kwargs', [dict(), dict(cg=None), dict(batches=None), dict(cg=None, cg_max_iter=7)], ids=str)
def test_none_is_the_default_settings(kwargs):
    opt = hessian_free([weight(1.)], **kwargs)
    assert opt.cg.max_iter==kwargs.get('cg_max_iter', 250) and opt.batches.n_acc==1

@pytest.mark.parametrize('switch', [True,np.True_])
def test_switches_of_settings_may_be_numpys(switch):
    opt = hessian_free([weight(1.)], line_search=switch, precondition=switch)
    assert opt.line_search and opt.preconditioner
    opt = hessian_free([weight(1.)], line_search=not switch, precondition=np.bool_(False))
    assert opt.line_search is None and opt.preconditioner is None

@pytest.mark.parametrize('name,want', [('cg',None),('batches',None),('line_search',True),('precondition',False),('lr',1.),('damping',1.),('cg_max_iter',250)])
def test_defaults_that_the_signature_shows(name, want):
    "And those of an optimizer that is made with nothing"
    assert inspect.signature(hessian_free).parameters[name].default==want
    opt = hessian_free([weight(1.)])
    assert (opt.cg.max_iter,opt.hypers[0]['lr'],opt.hypers[0]['damping'],opt.preconditioner,opt.default_lr)==(250,1.,1.,None,1.) and opt.line_search

def test_an_object_is_copied():
    cg = CG(max_iter=7)
    assert (own := hessian_free([weight(1.)], cg=cg).cg) is not cg and vars(own)==vars(cg)


@pytest.mark.parametrize('curvature', ['ggn','hessian'])
def test_autocast_around_a_step_sees_the_trial_points(curvature):
    "It keeps copies of the weights in half precision; with old ones no trial was better, and each step was skipped"
    def run(outside):
        torch.manual_seed(0)
        (x,y),model,casts,losses = data(),mlp().float(),partial(torch.autocast, 'cpu', torch.bfloat16),[]
        x = x.float()
        opt = hessian_free(model.parameters(), curvature=curvature)
        def closure():
            with nullcontext() if outside else casts(): return F.cross_entropy(o := model(x), y), o
        for _ in range(3):
            with casts() if outside else nullcontext(): losses.append(opt.step(closure, model))
        return losses
    assert run(True)==pytest.approx(run(False), rel=0.02) and run(True)[-1]<0.9*run(True)[0]


def test_a_gradient_of_ones_own_may_be_of_another_precision():
    (x,y),made = data(),[mlp() for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    gs = torch.autograd.grad(F.cross_entropy(made[0](x), y), list(made[0].parameters()))
    for m,g in zip(made, (gs, [o.to(torch.float) for o in gs])):
        hessian_free(m.parameters()).step(lambda: (F.cross_entropy(o := m(x), y), o), m, grad=g)
        assert all(p.grad.dtype==p.dtype for p in m.parameters())
    assert max((p-q).abs().max() for p,q in zip(*(m.parameters() for m in made)))<1e-4


class LogProbs(nn.Module):
    "A network that ends in log-probabilities, for F.nll_loss"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5,7), nn.Tanh(), nn.Linear(7,3))
    def forward(self, x): return F.log_softmax(self.net(x), 1)

@pytest.mark.parametrize('logits', [False,True])
def test_a_curvature_of_zero_is_warned_of_with_what_helps(logits, recwarn):
    "The loss is linear in log-probabilities, so all curvature is in the model; the two ways out that are named have none of it"
    x,y = torch.randn(12,5),torch.randint(3, (12,))
    m = LogProbs()
    f = (lambda: (F.cross_entropy(z := m.net(x), y),z)) if logits else (lambda: (F.nll_loss(z := m(x), y),z))
    hessian_free(m.parameters()).step(f)
    assert [('F.cross_entropy' in str(w.message)) for w in recwarn if 'along the gradient is zero' in str(w.message)]==[True]*(not logits)
    if not logits:
        recwarn.clear()
        hessian_free(m.parameters(), curvature='hessian').step(f)
        assert not [w for w in recwarn if 'is zero' in str(w.message)]


Answer = namedtuple('Answer', 'logits hidden')

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body,self.head = nn.Linear(5,7),nn.Linear(7,3)
    def forward(self, x):
        h = self.body(x).tanh()
        return Answer(self.head(h), h)

class Alone(Named):
    def forward(self, x): return super().forward(x).logits

def test_a_model_may_return_a_named_tuple():
    "It trains as one that returns the tensor of the loss"
    x,y = torch.randn(24,5),torch.randint(3, (24,))
    def run(m, loss_func):
        dls = DataLoaders(*[[(x[i:i+8], y[i:i+8]) for i in (0,8,16)]]*2)
        learn = Learner(dls, m, loss_func, opt_func=hessian_free)
        with learn.no_bar(),learn.no_logging(): learn.fit(1)
        return learn.model
    a,b = run(Named(), lambda z,y: F.cross_entropy(z.logits, y)),run(Alone(), F.cross_entropy)
    for p,q in zip(a.parameters(), b.parameters()): assert torch.allclose(p, q, atol=1e-5)
    assert (a.head.weight-Named().head.weight).abs().max()>0.01
