"""Every variant of the optimizers in the situations that they meet, as data: an `opt_func` with keywords, a network and a way to train

`python tests/variants.py --against DIR` trains each case with the package on the path and with that of another checkout, and says where
the weights differ. `--record` writes what `test_variants.py` compares with. `-k` picks cases by a part of their names."""
import argparse,contextlib,hashlib,io,itertools,json,os,socket,subprocess,sys,tempfile,time,traceback,warnings
from contextlib import ExitStack,contextmanager
from pathlib import Path
from unittest import mock
import torch,torch.nn.functional as F
import fastai.callback.fp16 as fp16
from fastai.basics import *
from fastai.callback.all import *
from fastai.losses import LabelSmoothingCrossEntropy,LabelSmoothingCrossEntropyFlat
from torch import nn
import adahessian_fastai
from adahessian_fastai.all import *
try: from adahessian_fastai.all import adahessian_paper as adahessian
except ImportError: pass # The name of before
try: from adahessian_fastai.schedule import Budget
except ImportError: from adahessian_fastai.budget import Budget

# What is trained: 90 images in batches of 16, the last one of 10, so two epochs are 12 batches

def data(dtype, n=90, kind='class'):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(n, 1, 6, 6, generator=g, dtype=torch.double).to(dtype)
    y = (x.sum((1,2,3))>0).long()+(x[:,0,0,0]>0.8).long()
    if kind=='class': return x,y
    return (x,F.one_hot(y, 3).to(dtype)) if kind=='hot' else (x,torch.randn(n, 3, generator=g, dtype=torch.double).to(dtype))

def conv(act=nn.Tanh, drop=0.2):
    "No bias before the norm: its gradient is rounding alone, and Sophia takes the sign of that"
    first = [nn.Conv2d(1,4,3,bias=False), nn.BatchNorm2d(4), act(), nn.Flatten()]
    return nn.Sequential(*first, nn.Dropout(drop), nn.Linear(64,8), act(), nn.Linear(8,3))

def kinked():
    first = [nn.Conv2d(1,4,3,padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*first, nn.Linear(36,8), nn.ReLU(), nn.Linear(8,3))

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(36,9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9,3))

class Recurrent(nn.Module):
    "Keeps its hidden state from batch to batch, as fastai's language models do"
    def __init__(self):
        super().__init__()
        self.rnn,self.head,self.h = nn.GRU(6, 5, batch_first=True),nn.Linear(5,3),None
    def forward(self, x):
        h = self.h[:,:len(x)].contiguous() if self.h is not None and self.h.shape[1]>=len(x) else None
        out,h = self.rnn(x[:,0], h)
        self.h = h.detach()
        return self.head(out[:,-1])

class Attentive(nn.Module):
    def __init__(self, drop=0.):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, drop, activation='gelu', batch_first=True)
        self.emb,self.body,self.head = nn.Linear(6,8),nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),nn.Linear(8,3)
    def forward(self, x): return self.head(self.body(self.emb(x[:,0])).mean(1))

class Odd(nn.Module):
    "Tied weights, a parameter without curvature, one that only every other batch uses, from the second on, and one that none does"
    def __init__(self):
        super().__init__()
        self.first,self.second,self.third = nn.Linear(36,6),nn.Linear(6,36),nn.Linear(36,6)
        self.third.weight = self.first.weight
        self.head,self.extra,self.never = nn.Linear(6,3),nn.Linear(6,3),nn.Linear(2,2)
        self.shift,self.n = nn.Parameter(torch.zeros(3)),0
    def forward(self, x):
        out = self.third(self.second(self.first(x.flatten(1)).tanh()).tanh()).tanh()
        if self.training: self.n += 1
        return self.head(out)+self.shift+(0 if self.n%2 else self.extra(out))

nets = dict(  # chkstyle: ignore-node
    conv=conv, relu=partial(conv, nn.ReLU), kinked=kinked, mlp=mlp, recurrent=Recurrent, attentive=Attentive,
    attentive_drop=partial(Attentive, 0.1), odd=Odd, plain=partial(conv, drop=0.))

# fastai's flattened losses compute in float32 whatever they get
losses = dict(  # chkstyle: ignore-node
    cross_entropy=('class', nn.CrossEntropyLoss), flat=('class', CrossEntropyLossFlat), smoothed=('class', LabelSmoothingCrossEntropy),
    flat_smoothed=('class', LabelSmoothingCrossEntropyFlat), mse=('number', nn.MSELoss),
    mse_sum=('number', lambda: nn.MSELoss(reduction='sum')), bce=('hot', nn.BCEWithLogitsLoss),
    weighted=('class', lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.,2.,0.5]).double())), bare=('class', lambda: F.cross_entropy))

def groups(m): return [params(m[0])+params(m[1]), params(m[5]), params(m[7])]

# Callbacks that a batch may meet

class Penalty(Callback):
    "Adds a smooth function of the weights to the loss"
    run_valid = False
    def after_loss(self):
        more = sum(p.pow(2).sum() for p in self.model.parameters())
        self.learn.loss_grad,self.learn.loss = self.loss_grad+0.05*more,self.loss+0.05*more.detach()

class BadBatch(Callback):
    "The loss of batch `at` is infinite"
    run_valid = False
    def __init__(self, at=4): self.at = at
    def after_loss(self):
        if self.train_iter==self.at: self.learn.loss_grad = self.loss_grad*float('inf')

class Clock:
    "A step costs 1, `a` more with an estimate and `b` more for one on the whole batch: the probes and the loss say which it was"
    def __init__(self, a=2., b=0.): self.now,self.a,self.b,self.drawn,self.rows = 0.,a,b,False,[]
    def __call__(self):
        self.now += 1+(self.a+self.b*min(self.rows, default=1.)/max(self.rows, default=1.))*self.drawn
        self.drawn,self.rows = False,[]
        return self.now
    def probe(self, p, g):
        self.drawn = True
        return torch.randint(2, p.shape, generator=g).mul_(2).sub_(1).to(p)
    def loss(self, pred, y):
        self.rows.append(len(y))
        return F.cross_entropy(pred, y)

def on_a_clock(overhead, n=12, **costs):
    "An `opt_func` with a budget, and the loss function that tells its clock how many rows there were; its memory would be put back"
    def made(**kwargs):
        clock = Clock(**costs)
        opt_func = partial(adahessian, **gentle[adahessian][1], probe=clock.probe, budget=Budget(overhead, n, clock), **kwargs)
        return opt_func,lambda *args: clock.loss(*args)
    return made

def broken_probe(at=9):
    "A Rademacher probe, but infinite at its draw number `at`"
    n = itertools.count()
    return lambda p,g: torch.randint(2, p.shape, generator=g).mul_(2).sub_(1).to(p)*(float('inf') if next(n)==at else 1.)

# Ways to train

def straight(make, lr): return fit(make(), 2, lr)

def long(make, lr): return fit(make(), 4, lr)

def own_lr(make, lr): return fit(make(), 2)

def one_cycle(make, lr):
    learn = make()
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(2, lr)
    return learn

def thawing(make, lr):
    "Two groups frozen, then one, then none"
    learn = make()
    for n in (2,1,0):
        learn.freeze_to(n)
        fit(learn, 1, lr)
    return learn

def discriminative(make, lr): return fit(make(), 2, slice(lr/10, lr))

def scheduled(make, lr):
    "Every hyperparameter moves, and differs between the groups"
    learn = make()
    learn.create_opt()
    learn.opt.set_hyper('wd', [0.1,0.01,0.])
    learn.opt.set_hyper('eps', [1e-2,1e-3,1e-4])
    sched = dict(mom=combined_cos(0.3, 0.95, 0.8, 0.9), sqr_mom=SchedLin(0.9, 0.99), hessian_power=SchedLin(0.5, 1.))
    return fit(learn, 2, slice(lr/10, lr), cbs=ParamScheduler(sched))

def frozen_by_hand(make, lr):
    "`requires_grad_` in the middle, of which nobody tells the optimizer"
    learn = make()
    fit(learn, 1, lr)
    learn.model[0].weight.requires_grad_(False)
    fit(learn, 1, lr)
    learn.model[0].weight.requires_grad_(True)
    return fit(learn, 1, lr)

def opting_out(make, lr):
    learn = make()
    learn.create_opt()
    learn.opt.opt_out(learn.model[5])
    return fit(learn, 2, lr)

def two_fits(make, lr):
    "What `interrupted` has to end with"
    learn = fit(make(), 1, lr)
    torch.manual_seed(11)
    return fit(learn, 1, lr)

def interrupted(make, lr):
    "A file in the middle, read by a Learner with other weights and another seed"
    with tempfile.TemporaryDirectory() as d:
        fit(make(path=d), 1, lr).save('half')
        learn = make(path=d, seed=9)
        learn.load('half')
    torch.manual_seed(11)
    return fit(learn, 1, lr)

def by_hand(make, lr):
    "A loop of the user's own"
    learn = make()
    learn.create_opt()
    learn.opt.set_hyper('lr', lr)
    learn.model.train()
    for x,y in [*learn.dls.train, *learn.dls.train]:
        learn.opt.differentiate(learn.loss_func(learn.model(x), y))
        learn.opt.step()
        learn.opt.zero_grad()
    return learn

def by_closure(make, lr):
    "A loop of the user's own around an optimizer that evaluates the loss itself"
    learn = make()
    learn.create_opt()
    learn.model.train()
    def closure(x, y):
        out = learn.model(x)
        return learn.loss_func(out, y),out
    for x,y in [*learn.dls.train, *learn.dls.train]: learn.opt.step(partial(closure, x, y), learn.model)
    return learn

def fit(learn, n, lr=None, **kwargs):
    with learn.no_bar(),learn.no_logging(): learn.fit(n, lr, **kwargs)
    return learn

# The table

# Learning rates and keywords under which weights stay small: where they grow without bounds, rounding does so too
gentle = {adahessian: (0.05, dict(eps=1e-2)), sophia: (0.02, dict(update_each=3)), hessian_free: (1., dict(cg_max_iter=12, jvp='reverse'))}

class Case:
    "`opt_func` with `kwargs`, a network and a situation"
    def __init__(self, name, opt=adahessian, kwargs=None, lr=None, net='conv', loss='cross_entropy', way=straight, dtype=torch.double,
        cbs=lambda: [], half=None, n=90, bs=16, splitter=trainable_params, patches=(), made=None, ranks=1):
        store_attr()
        self.kwargs,self.lr = {**gentle[opt][1], **(kwargs or {})},gentle[opt][0] if lr is None else lr

variants = dict(  # chkstyle: ignore-node
    default={}, own_eps=dict(eps=1e-4), update_each3=dict(update_each=3), dense_start=dict(update_each=(3,4)), signed=dict(signed=True),
    samples4=dict(n_samples=4), debiased=dict(debiased=True, n_samples=2), signed_blocks=dict(signed_blocks=True),
    gaussian=dict(probe='gaussian'), control=dict(estimator='control_variate', probe='gaussian', signed=True),
    control2=dict(estimator='control_variate', probe='gaussian', signed=True, n_samples=2), forward=dict(hvp='forward'),
    forward2=dict(hvp='forward', n_samples=2), difference=dict(hvp='finite_difference'), auto=dict(hvp='auto'),
    compiled=dict(hvp='compiled'), ggn=dict(curvature='ggn'), ggn2=dict(curvature='ggn', n_samples=2, debiased=True),
    ride=dict(curvature='ggn', hvp='forward'), ride3=dict(curvature='ggn', hvp='forward', update_each=3),
    ggn_auto=dict(curvature='ggn', hvp='auto'),
    ggn_control=dict(curvature='ggn', estimator='control_variate', probe='gaussian', signed=True), gnb=dict(estimator='gnb'),
    gnb2=dict(estimator='gnb', n_samples=2, debiased=True), gnb_signed=dict(estimator='gnb', signed=True), rows=dict(hessian_bs=0.5),
    rows4=dict(hessian_bs=4), rows_gnb=dict(hessian_bs=0.5, estimator='gnb'), rows_ggn=dict(hessian_bs=0.5, curvature='ggn'),
    rows_changed=dict(hessian_bs=(5,0.25)), rows_all=dict(hessian_bs=1.), n_acc2=dict(n_acc=2),
    n_acc3=dict(n_acc=3, update_each=2, n_samples=2, debiased=True), n_acc2_gnb=dict(n_acc=2, estimator='gnb'),
    n_acc2_rows=dict(n_acc=2, hessian_bs=0.5), n_acc2_forward=dict(n_acc=2, hvp='forward'),
    n_acc2_ride=dict(n_acc=2, curvature='ggn', hvp='forward'), kernels=dict(average_kernels=False), block1=dict(block_length=1),
    block7=dict(block_length=7), l2=dict(decouple_wd=False, wd=0.05), decay=dict(wd=0.05), power=dict(hessian_power=0.5),
    power0=dict(hessian_power=0.), signed_power=dict(hessian_power=0.5, signed=True), no_mom=dict(mom=0., sqr_mom=0.9, eps=1e-2))

# Compiling takes minutes and changes rounding alone. A part of the batch has dropout masks of its own
situation = {'compiled': dict(patches=[(torch,'compile',lambda f=None,**kwargs: f)], net='plain'),  # chkstyle: ignore-node
    **{k: dict(net='plain') for k,v in variants.items() if 'hessian_bs' in v}}

def plain_cases(): return [Case(k, kwargs=v, **situation.get(k, {})) for k,v in variants.items()]

def crossed(names, suffix, **where):
    "The variants `names` in the situation `where`"
    return [Case(f'{k}_{suffix}', kwargs=variants[k], **{**situation.get(k, {}), **where}) for k in names.split()]

def in_situations():
    "AdaHessian's variants elsewhere than in a plain fit"
    accumulating,mixing = lambda: [GradientAccumulation(32)],lambda: [MixUp(0.4)]
    return [  # chkstyle: ignore-node
        *crossed('default signed ggn gnb', 'one_cycle', way=one_cycle), *crossed('own_eps ggn', 'own_lr', way=own_lr),
        *crossed('default forward difference ggn ride gnb rows rows_gnb debiased update_each3 control', 'accumulation', cbs=accumulating),
        *crossed('default signed forward ride gnb rows update_each3 dense_start debiased', 'thawing', way=thawing, splitter=groups),
        *crossed('default update_each3 gnb', 'frozen_by_hand', way=frozen_by_hand),
        *crossed('default signed', 'discriminative', way=discriminative, splitter=groups),
        *crossed('default signed', 'scheduled', way=scheduled, splitter=groups),
        *crossed('default gnb rows', 'opting_out', way=opting_out),
        *crossed('n_acc3 n_acc2_gnb n_acc2_rows', 'two_fits', way=two_fits, n=106),
        *crossed('n_acc3 n_acc2_gnb n_acc2_rows', 'interrupted', way=interrupted, n=106),
        *crossed('default update_each3 control auto gaussian', 'two_fits', way=two_fits),
        *crossed('default update_each3 control auto gaussian', 'interrupted', way=interrupted),
        *crossed('default signed debiased', 'by_hand', way=by_hand),
        *crossed('default forward difference auto ggn n_acc2 rows rows_all', 'penalty', cbs=lambda: [Penalty()], net='plain'),
        *crossed('default n_acc2 gnb', 'clipped', cbs=lambda: [GradientClip(0.1)]),
        *crossed('default n_acc2 rows', 'bad_batch', cbs=lambda: [BadBatch()]),
        *crossed('default update_each3 forward ride rows', 'recurrent', net='recurrent'),
        *crossed('default forward difference auto ggn ride gnb rows', 'attentive', net='attentive'),
        *crossed('rows rows_all rows_gnb compiled', 'dropout', net='conv'),
        *crossed('default forward ride', 'attentive_drop', net='attentive_drop'),
        *crossed('default update_each3 forward auto ggn ride gnb', 'odd', net='odd'),
        *crossed('default forward auto ggn ride rows', 'kinked', net='kinked'), *crossed('default auto', 'relu', net='relu'),
        *crossed('ggn ride gnb rows_gnb rows_ggn', 'smoothed', loss='smoothed'),
        *crossed('default forward ggn ride gnb auto', 'mse', loss='mse'), *crossed('default ggn ride gnb', 'bce', loss='bce'),
        *crossed('n_acc2 ggn ride gnb rows_gnb', 'weighted', loss='weighted'),
        *crossed('default ggn gnb compiled rows_gnb', 'bare', loss='bare'),
        *crossed('default forward difference auto ggn ride gnb rows rows_gnb n_acc2', 'flat', loss='flat', dtype=torch.float),
        *crossed('ggn gnb rows_gnb', 'flat_smoothed', loss='flat_smoothed', dtype=torch.float),
        *crossed('default forward ggn', 'mixup', cbs=mixing, loss='flat', dtype=torch.float),
        Case('broken_probe', made=lambda: (partial(adahessian, eps=1e-2, probe=broken_probe()),None)),
        Case('budget', made=on_a_clock(0.5), way=long), Case('budget_n_acc', made=partial(on_a_clock(0.5), n_acc=2), way=long),
        Case('budget_interrupted', made=on_a_clock(0.5), way=interrupted, n=250),
        Case('budget_rows', made=partial(on_a_clock(0.6, 18, a=0.1, b=2.4), hessian_bs='auto'), way=long, net='plain')]

def in_half():
    "Mixed precision. Autocast leaves a network of float64 alone, so there the scale is alone at work"
    scales = dict(fp16={}, fp16_growing=dict(init_scale=2.**10, growth_interval=3))
    scaled = [c for k,v in scales.items() for c in crossed('default ggn gnb rows n_acc2 n_acc2_rows', k, half=('to_fp16',v))]
    truly = dict(dtype=torch.float)
    return [  # chkstyle: ignore-node
        *scaled, *crossed('debiased update_each3 control ride rows_gnb auto', 'fp16', half=('to_fp16',{})),
        *crossed('default ggn', 'fp16_accumulation', half=('to_fp16',{}), cbs=lambda: [GradientAccumulation(32)]),
        *crossed('default update_each3', 'fp16_interrupted', half=('to_fp16',{}), way=interrupted),
        *crossed('default ggn gnb rows n_acc2', 'float16', half=('to_fp16',{}), **truly),
        *crossed('default ggn gnb rows n_acc2', 'float16_overflow', half=('to_fp16',dict(init_scale=2.**23)), **truly),
        *crossed('default ggn gnb rows forward ride', 'bfloat16', half=('to_bf16',{}), **truly),
        *crossed('default gnb', 'float32', **truly)]

def of_sophia():
    of = lambda name,kwargs=None,**where: Case(f'sophia_{name}', sophia, kwargs, **where)
    hutchinson = dict(estimator='hutchinson')
    return [  # chkstyle: ignore-node
        of('gnb'), of('rare', dict(update_each=10)), of('hutchinson', hutchinson),
        of('ggn', dict(estimator='hutchinson', curvature='ggn')), of('control', dict(estimator='control_variate', probe='gaussian')),
        of('samples', dict(n_samples=2)), of('rows', dict(hessian_bs=0.5), net='plain'), of('n_acc', dict(n_acc=2)),
        of('blocks', dict(block_length=4, average_kernels=True, **hutchinson)), of('rho', dict(rho=1., wd=0.01, eps=1e-3, **hutchinson)),
        of('one_cycle', way=one_cycle), of('own_lr', way=own_lr), of('fp16', half=('to_fp16',{})),
        of('accumulation', cbs=lambda: [GradientAccumulation(32)]), of('thawing', way=thawing, splitter=groups),
        of('discriminative', hutchinson, way=discriminative, splitter=groups), of('interrupted', dict(n_acc=4), way=interrupted),
        of('by_hand', hutchinson, way=by_hand), of('float32', dtype=torch.float)]

def of_hessian_free():
    def of(name, kwargs=None, **where):
        return Case(f'hessian_free_{name}', hessian_free, kwargs, **{'net': 'plain', 'bs': 45, 'way': long, **where})
    accumulated,brief = dict(bs=16, way=straight),dict(way=straight)
    return [  # chkstyle: ignore-node
        of('ggn'), of('hessian', dict(curvature='hessian'), **brief),
        of('abs', dict(curvature='hessian', neg_curv='abs', cg_max_iter=5), **brief), of('dual', dict(jvp='dual')),
        of('linearize', dict(jvp='linearize')), of('auto', dict(jvp='auto'), net='mlp', **brief),
        of('precondition', dict(precondition=True)), of('precondition_exact', dict(precondition=True, fisher_probes=None)),
        of('no_graph', dict(keep_graph=False)), of('decay', dict(wd=0.1)), of('short', lr=0.5), of('cold', dict(x0_decay=0.)),
        of('no_search', dict(line_search=False, backtracking=False), **brief),
        of('fixed_damping', dict(adapt_damping=False, damping=0.3)), of('whole_grid', dict(keep_iterates=None, grid=1.1)),
        of('n_acc2', dict(n_acc=2), **accumulated), of('held_out', dict(n_acc=3, held_out=1), **accumulated),
        of('curv_batches', dict(n_acc=3, curv_batches=1, curvature='hessian'), **accumulated),
        of('sum', dict(reduction='sum', n_acc=2), loss='mse_sum', **accumulated),
        of('weighted', dict(n_acc=2), loss='weighted', **accumulated), of('mse', loss='mse'), of('bce', loss='bce'),
        of('smoothed', loss='smoothed'), of('dropout', net='conv'),
        of('dropout_no_graph', dict(keep_graph=False, curvature='hessian'), net='conv', **brief), of('kinked', net='kinked', **brief),
        of('recurrent', net='recurrent', **brief), of('attentive', net='attentive', **brief),
        of('odd', dict(curvature='hessian'), net='odd', **brief),
        of('penalty', dict(curvature='hessian'), **brief, cbs=lambda: [Penalty()]), of('own_lr', way=own_lr),
        of('one_cycle', way=one_cycle), of('thawing', way=thawing, splitter=groups),
        of('interrupted', dict(precondition=True), way=interrupted), of('by_closure', way=by_closure),
        of('discriminative', way=discriminative, splitter=groups), of('bad_batch', cbs=lambda: [BadBatch(2)]),
        of('fp16', half=('to_fp16',{}), **brief), of('float32', dtype=torch.float, **brief)]

def on_ranks():
    "Two processes, each with its own batches"
    return [  # chkstyle: ignore-node
        *crossed('default debiased ggn ride gnb rows n_acc2 forward auto', 'ranks', ranks=2),
        *crossed('default', 'fp16_ranks', ranks=2, half=('to_fp16',{})), Case('sophia_ranks', sophia, ranks=2),
        Case('hessian_free_ranks', hessian_free, net='plain', ranks=2)]

cases = {c.name: c for c in [*plain_cases(), *in_situations(), *in_half(), *of_sophia(), *of_hessian_free(), *on_ranks()]}

# The engine

def on_the_cpu():
    "Mixed precision as it is, with autocast and `GradScaler` of the CPU"
    def of(cls): return lambda device,**kwargs: cls('cpu', **kwargs)
    return [(fp16,'autocast',of(torch.amp.autocast)), (fp16,'GradScaler',of(torch.amp.GradScaler))]

@contextmanager
def patched(patches):
    with ExitStack() as stack:
        for o,name,new in patches: stack.enter_context(mock.patch.object(o, name, new))
        yield

def loaders(case, rank=0):
    kind,loss = losses[case.loss]
    x,y = data(case.dtype, case.n*case.ranks, kind)
    ds = list(zip(*[o[rank*case.n:(rank+1)*case.n] for o in (x,y)]))
    return DataLoaders(DataLoader(ds, bs=case.bs), DataLoader(ds[:case.bs], bs=case.bs), device=torch.device('cpu')),loss()

def network(case, seed=0):
    "The weights are drawn in float64, because vectorised generators of float32 round differently"
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.double)
    try: return nets[case.net]().to(case.dtype)
    finally: torch.set_default_dtype(torch.float)

def make(case, path='.', seed=0, rank=0):
    "A new Learner for `case`. The Recorder wants a loss of float32"
    model,(dls,loss_func) = network(case, seed),loaders(case, rank)
    opt_func,own_loss = case.made() if case.made else (partial(case.opt, **case.kwargs),None)
    learn = Learner(dls, model, own_loss or loss_func, opt_func=opt_func, splitter=case.splitter, cbs=case.cbs(), path=path)
    if case.dtype==torch.double: learn.remove_cb(learn.recorder)
    if case.half: getattr(learn, case.half[0])(**case.half[1])
    torch.manual_seed(seed+5)
    return learn

def weights(learn):
    "Parameters and buffers, flat"
    return torch.cat([o.detach().flatten().double() for o in learn.model.state_dict().values() if o.is_floating_point()])

def train(case, rank=0):
    "The weights that `case` ends with, or what stands against it"
    quiet = contextlib.redirect_stdout(io.StringIO())
    with warnings.catch_warnings(),patched([*case.patches, *on_the_cpu()]),quiet:
        warnings.simplefilter('ignore')
        try: return weights(case.way(partial(make, case, rank=rank), case.lr))
        except Exception as e: return f'{type(e).__name__}: {e}\n{traceback.format_exc()}'

def chosen(k=None, ranks=1): return {n: c for n,c in cases.items() if c.ranks==ranks and any(o in n for o in (k or '').split(','))}

def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]

python = [sys.executable, '-W', 'ignore']

def train_on_ranks(k=None, env=os.environ, timeout=300):
    "What every rank ends with, by case: the weights of all ranks, one after the other"
    env = {**env, 'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': '2', 'OMP_NUM_THREADS': '1'}
    worker = Path(__file__).with_name('variants_worker.py')
    with tempfile.TemporaryDirectory() as d:
        run = lambda r: subprocess.Popen([*python, worker, d, r, k or ''], env={**env, 'RANK': r, 'LOCAL_RANK': r})
        ps = [run(r) for r in '01']
        try: codes = [p.wait(timeout=timeout) for p in ps]
        finally: [p.kill() for p in ps]
        if any(codes): raise RuntimeError(f'a rank ended with {codes=}')
        each = [torch.load(f'{d}/{r}.pt') for r in range(2)]
    return {n: next((e[n] for e in each if isinstance(e[n], str)), None) or torch.cat([e[n] for e in each]) for n in each[0]}

def train_all(k=None, ranks=False, env=os.environ):
    found = {n: train(c) for n,c in chosen(k).items()}
    return {**found, **train_on_ranks(k, env)} if ranks and chosen(k, 2) else found

def dump(file, k=None, ranks=False):
    torch.save(train_all(k, ranks), f'{file}.{os.getpid()}')
    os.replace(f'{file}.{os.getpid()}', file)

# Two packages

def fingerprint(folder):
    "Of this file and of the package in `folder`"
    h = hashlib.sha256()
    files = [*Path(__file__).parent.glob('variants*.py'), *Path(folder, 'adahessian_fastai').glob('*.py')]
    for f in sorted(files): h.update(f.read_bytes())
    return h.hexdigest()[:16]

def start(folder, k, ranks):
    "A process that trains the cases with the package of `folder`, and the file that it writes; what it wrote before is kept"
    name = hashlib.sha256(f'{fingerprint(folder)} {k} {ranks} {torch.__version__}'.encode()).hexdigest()[:16]
    out = Path(tempfile.gettempdir())/f'variants-{name}.pt'
    if out.exists(): return None,out
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')]), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([*python, __file__, '--dump', out, '-k', k or '', *(['--ranks'] if ranks else [])], env=env),out

def same(a, b):
    "The same bits, or the same error"
    if isinstance(a, str) or isinstance(b, str): return str(a).splitlines()[0]==str(b).splitlines()[0]
    return a.shape==b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())

def row(name, here, there):
    "One line of the table"
    said = [o.splitlines()[0][:90] if isinstance(o, str) else 'trains' if o.isfinite().all() else 'is not finite' for o in (here,there)]
    distance = f'{(here-there).abs().max().item():.2e}' if said==['trains']*2 and here.shape==there.shape else ''
    note = '' if said==['trains']*2 else f'here: {said[0]}, there: {said[1]}'
    return f'{name:32s} {distance:9s} {"yes" if same(here, there) else "NO":4s} {"wrong before " if name in wrong_before else ""}{note}'

def against(folder, k=None, ranks=False):
    "Print a table, and return the names that differ"
    tic,here = time.time(),Path(adahessian_fastai.__file__).parents[1]
    if not Path(folder, 'adahessian_fastai').is_dir(): sys.exit(f'there is no package in {folder}')
    runs = [start(o, k, ranks) for o in (here,Path(folder).resolve())]
    codes = [p.wait() for p,_ in runs if p]
    if any(codes): sys.exit(f'a process ended with {codes=}')
    a,b = [torch.load(o) for _,o in runs]
    print(f'here {here}, there {folder}\n{"case":32s} {"max|diff|":9s} identical')
    for n in a: print(row(n, a[n], b[n]))
    differ = [n for n in a if not same(a[n], b[n])]
    print(f'{len(a)-len(differ)} of {len(a)} alike in {time.time()-tic:.0f} s; different: {" ".join(differ) or "none"}')
    return differ

# What is recorded

# Where the code before the rebuild is wrong, and the case whose weights are right, where there is one
wrong_before = dict(  # chkstyle: ignore-node
    rows_all_dropout='default', rows_all_penalty='default_penalty', compiled_dropout='default', forward_mse='default_mse',
    forward_ranks='default_ranks', rows_penalty=None, rows_dropout=None, rows_gnb_dropout=None, rows_recurrent=None, auto_ranks=None,
    hessian_free_ranks=None)

recorded = Path(__file__).with_name('recorded_variants.json')

def signs(n, i):
    "`n` signs, others for each `i`, that no generator has to draw"
    j = torch.arange(1, n+1, dtype=torch.long)
    return ((j*2654435761*(2*i+1)+j*j*40503*(i+3)).bitwise_and(0xffffffff)>=0x80000000).double()*2-1

def summary(w): return [w.norm().item(), *((w*signs(len(w), i)).sum().item() for i in range(7))]

def stream():
    "What the generators of this build of PyTorch draw"
    g = torch.Generator().manual_seed(1)
    drawn = [  # chkstyle: ignore-node
        torch.empty(40).bernoulli_(0.5, generator=g), torch.rand(20, generator=g), torch.randn(40, generator=g),
        torch.randn(40, generator=g).double(), torch.randn(40, generator=g, dtype=torch.double), torch.randint(2, (40,), generator=g),
        torch.randperm(16, generator=g), torch.multinomial(torch.ones(9,3), 2, True, generator=g),
        torch.empty(9).exponential_(generator=g)]
    return [(o.double().flatten()*torch.arange(1, o.numel()+1)).sum().item() for o in drawn]

def record():
    found = train_all(ranks=True)
    known = [n for n in found if n not in wrong_before]
    bad = {n: str(found[n]).splitlines()[0] for n in known if isinstance(found[n], str) or not found[n].isfinite().all()}
    if bad: sys.exit(f'these do not train: {bad}')
    kept = {n: summary(found[wrong_before.get(n, n)]) for n in found if wrong_before.get(n, n)}
    lines = ',\n'.join(f'{json.dumps(n)}: {json.dumps(v)}' for n,v in kept.items())
    recorded.write_text(f'{{"random": {json.dumps(stream())},\n"cases": {{\n{lines}}}}}\n')
    print(f'{len(kept)} of {len(found)} cases in {recorded}, {recorded.stat().st_size/1024:.0f} KB')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--against', metavar='DIR', help='a checkout with another package')
    p.add_argument('--record', action='store_true', help=f'write {recorded.name}')
    p.add_argument('--dump', metavar='FILE', help='write the weights of all cases')
    p.add_argument('--ranks', action='store_true', help='also on two processes')
    p.add_argument('-k', help='only cases with this in their name; several with commas')
    a = p.parse_args()
    torch.set_num_threads(1)
    if a.record: record()
    elif a.dump: dump(a.dump, a.k, a.ranks)
    elif a.against: sys.exit(1 if against(a.against, a.k, a.ranks) else 0)
    else: p.print_help()

if __name__=='__main__': main()
