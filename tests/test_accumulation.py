"Accumulated batches are one big batch: for `n_acc` and for fastai's `GradientAccumulation`, with everything that goes with them"
import copy,gc
import pytest,torch
import torch.nn.functional as F
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from functools import partial
from adahessian_fastai.adahessian import adahessian_paper as adahessian
from adahessian_fastai.all import hessian_free
from adahessian_fastai.estimators import Estimate
from adahessian_fastai.learner import steps_of_run
from adahessian_fastai.problem import Problem
from adahessian_fastai.steppers import Pending
from helpers_learner import HYPERS,ROUNDING,InTurn,Noted,data,distance,fit,given,learner,mlp,plain,split,state_of
from twin import Twin


def grouped(batches, n): return [batches[i:i+n] for i in range(0, len(batches), n)]


def separable():
    "A net whose Hessian is diagonal, so that the estimate does not depend on the probe"
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.linspace(-1, 2, 5).double())
        def forward(self, x): return x*self.weight.square()
    return Net()

def square(pred, y): return (pred-y[:,None]).square().mean()


@pytest.mark.parametrize('how', ['n_acc','callback'])
def test_small_batches_equal_one_big_batch(how):
    "Without any randomness: 4 batches of 6 and 1 of 24, for 2 epochs"
    x,y = data(24)
    kwargs = dict(n_acc=4) if how=='n_acc' else dict(cbs=[GradientAccumulation(24)])
    small,big = learner(separable(), x, y, bs=6, loss_func=square, **kwargs),learner(separable(), x, y, bs=24, loss_func=square)
    assert distance(fit(big, 2).model, separable())>0.05
    assert distance(fit(small, 2).model, big.model)<ROUNDING


@pytest.mark.parametrize('how', ['n_acc','callback'])
@pytest.mark.parametrize('update_each', [1,2])
@pytest.mark.parametrize('n', [36,32])
def test_equals_the_plain_loop(how, update_each, n):
    "With 32 items the last batch has 2; the mean counts items, and fastai's callback divides by the number it was given"
    x,y = data(n)
    steps = grouped(split(x,y,6), 3)
    kwargs = dict(n_acc=3) if how=='n_acc' else dict(cbs=[GradientAccumulation(18 if n==36 else 14)])
    learn = fit(learner(mlp(), x, y, probe=given(), update_each=update_each, **kwargs))
    total = 14 if how=='callback' and n==32 else None
    want = plain(mlp(), steps, total=total, update_each=update_each)
    assert distance(want, mlp())>0.05 and learn.opt.n_steps==2
    assert distance(learn.model, want)<ROUNDING


@pytest.mark.parametrize('how', ['n_acc','callback'])
def test_a_partial_accumulation_survives_the_epoch(how):
    "5 batches in an epoch, 2 in a step: the third step takes the last batch of one epoch and the first of the next"
    x,y = data(30)
    kwargs = dict(n_acc=2) if how=='n_acc' else dict(cbs=[GradientAccumulation(12)])
    learn = fit(learner(mlp(), x, y, probe=given(), **kwargs), 2)
    assert learn.opt.n_steps==5
    want = plain(mlp(), grouped(split(x,y,6)*2, 2))
    assert distance(learn.model, want)<ROUNDING


@pytest.mark.parametrize('how', ['n_acc','callback'])
def test_clipping_sees_the_sum_and_not_its_parts(how):
    x,y = data(24)
    acc = dict(n_acc=2) if how=='n_acc' else {}
    norm = Noted('after_step', lambda l: torch.cat([p.grad.flatten() for p in l.model.parameters()]).norm().item())
    cbs = [GradientClip(0.05), norm] + ([] if how=='n_acc' else [GradientAccumulation(12)])
    fit(learner(mlp(), x, y, probe=given(), cbs=cbs, **acc))
    # `clip_grad_norm_` adds 1e-6 to the norm that it divides by
    assert len(norm.notes)==2 and all(abs(o-0.05)<1e-5 for o in norm.notes)


@pytest.mark.parametrize('how', ['n_acc','callback'])
def test_with_mixed_precision_and_clipping(cpu_amp, how):
    x,y = data(32)
    acc = lambda: (dict(n_acc=3), []) if how=='n_acc' else ({}, [GradientAccumulation(14)])
    def run(fp16):
        kwargs,cbs = acc()
        learn = learner(mlp(), x, y, probe=given(), cbs=[GradientClip(0.3), *cbs], **kwargs)
        return fit(learn.to_fp16() if fp16 else learn, 2)
    half,full = run(True),run(False)
    assert distance(full.model, mlp())>0.05
    # `MixedPrecision` turns predictions into float32
    assert distance(half.model, full.model)<1e-6


def test_both_at_once_are_refused():
    x,y = data(12)
    with pytest.raises(ValueError, match='do the same'): fit(learner(mlp(), x, y, n_acc=2, cbs=[GradientAccumulation(12)]))


class Replace(Callback):
    "After batch `at`, in the middle of an accumulation: save, spoil everything, load"
    order,run_valid = 80,False
    def __init__(self, at, how): self.at,self.how = at,how
    def before_batch(self):
        if self.train_iter!=self.at: return
        if self.how=='file':
            self.learn.save('middle')
            with torch.no_grad():
                for p in self.model.parameters(): p.add_(1), p.grad.add_(1)
            for d in self.learn.opt.diags.values(): d.add_(1)
            self.learn.opt.n_items += 5
            self.learn.load('middle')
        else:
            other = copy.deepcopy(self.learn.opt)
            for p,q in zip(self.learn.opt.all_params().itemgot(0), other.all_params().itemgot(0)): q.data = p.data
            for p,q in zip(self.model.parameters(), other.all_params().itemgot(0)): p.requires_grad_(False)
            names = [n for n,_ in self.model.named_parameters()]
            for n,q in zip(names, other.all_params().itemgot(0)):
                mod,_,leaf = n.rpartition('.')
                setattr(self.model.get_submodule(mod), leaf, q)
            self.learn.opt = other


@pytest.mark.parametrize('how', ['n_acc','callback'])
@pytest.mark.parametrize('through', ['file','copy'])
@pytest.mark.parametrize('update_each', [1,5])
def test_save_and_load_in_the_middle_is_exact(how, through, update_each, tmp_path):
    x,y = data(36)
    def run(cbs):
        kwargs,own = (dict(n_acc=3), []) if how=='n_acc' else ({}, [GradientAccumulation(18)])
        return fit(learner(mlp(), x, y, cbs=[*own, *cbs], path=tmp_path, update_each=update_each, **kwargs), 2)
    torch.manual_seed(0)
    straight = run([])
    torch.manual_seed(0)
    replaced = run([Replace(4, through)])
    assert straight.opt.n_estimates==replaced.opt.n_estimates
    assert state_of(straight)==state_of(replaced)


def live_bytes():
    gc.collect()
    return sum(o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) in (torch.Tensor,torch.nn.Parameter))


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_memory_does_not_grow_with_n_acc():
    x,y = data(60)
    def peak(n_acc):
        sizes = Noted('before_batch', lambda l: live_bytes() if l.train_iter in (0,3,9) else 0)
        fit(learner(mlp(), x, y, n_acc=n_acc, cbs=[sizes]))
        return max(sizes.notes)-sizes.notes[0]
    assert peak(10)<=peak(2)


@pytest.mark.parametrize('how', ['load','weights','create_opt'])
def test_half_a_step_is_worth_nothing_to_other_weights(how, tmp_path):
    "A pending gradient neither reaches loaded weights nor a new optimizer on the same model"
    x,y = data(24)
    learn = learner(mlp(), x, y, probe=given(), n_acc=3, path=tmp_path)
    learn.create_opt()
    learn.save('start')
    fit(learn)
    assert learn.opt.n_batches==1
    if how=='create_opt':
        learn.model.load_state_dict(mlp().state_dict())
        learn.create_opt()
    else: learn.load('start', with_opt=how=='load')
    assert learn.opt.n_batches==0 and all(p.grad is None for p in learn.model.parameters())


def test_a_step_past_differentiate_is_refused():
    "Nothing would move, as there is no average yet"
    x,y = data(6)
    net = mlp()
    opt = adahessian(net.parameters())
    F.cross_entropy(net(x), y).backward()
    with pytest.raises(ValueError, match='opt.differentiate'): opt.step()
    opt.zero_grad()
    opt.differentiate(F.cross_entropy(net(x), y))
    opt.step()
    F.cross_entropy(net(x), y).backward()
    opt.step()
    assert opt.n_steps==2

def test_gradient_diagonal_and_noise_are_means_over_items():
    "One item, then three"
    p,pending = nn.Parameter(torch.ones(2)),Pending()
    for n,v in ((1,1.), (3,0.)):
        problem = Problem([p], (p*v).sum())
        w = pending.weigh(problem, n, 2)
        problem.backward(w)
        pending.add([p], Estimate([torch.full((2,), v)], [torch.full((2,), v)], None), w)
    assert p.grad.tolist()==pending.diags[p].tolist()==pending.noises[p].tolist()==[0.25,0.25]


def test_an_accumulation_of_less_than_a_batch_makes_no_more_steps():
    learn = learner(mlp(), *data(36), cbs=[GradientAccumulation(3)])
    learn.create_opt()
    assert steps_of_run(learn, 2)==12

def test_a_first_batch_of_which_nothing_counts_has_no_part_in_the_gradient():
    "Its loss is not a number"
    x,y = data(12)
    y = torch.cat([torch.full((6,), -100),y[6:]])
    grads = Noted('after_step', lambda l: [p.grad.clone() for p in l.model.parameters()])
    fit(learner(mlp(), x, y, opt_func=hessian_free, hypers={}, n_acc=2, cbs=[grads]))
    model = mlp()
    F.cross_entropy(model(x[6:]), y[6:]).backward()
    assert all(torch.allclose(a, p.grad) for a,p in zip(grads.notes[-1], model.parameters()))

def test_a_parameter_that_later_batches_do_not_use_has_its_share():
    "Half of the first batch's gradient"
    x,y = data(12)
    learn = learner(InTurn(), x, y, opt_func=hessian_free, hypers={}, n_acc=2)
    grads = Noted('after_step', lambda l: l.model.heads[1].bias.grad.clone())
    fit(learn.add_cb(grads))
    model = InTurn()
    F.cross_entropy(model(x[:6]), y[:6]).backward()
    assert torch.allclose(grads.notes[-1], model.heads[1].bias.grad/2)

def test_a_loss_that_reaches_no_parameter_is_named():
    other = nn.Parameter(torch.ones(1).double())
    learn = learner(mlp(), *data(12), loss_func=lambda pred,y: (other**2).sum(), opt_func=hessian_free, hypers={})
    with pytest.raises(ValueError, match='depends on no parameter of the optimizer'): fit(learn)

def detected(y, n_boxes, **kwargs):
    "A step on batches of 6, 6 and 3, whose targets are a list of dicts as detectors have them: boxes, as many as there are, and a label"
    x = data(15)[0]
    ds = list(zip(x, [dict(boxes=torch.zeros(n, 4), label=o) for n,o in zip(n_boxes, y)]))
    dl = DataLoader(ds, bs=6, n_inp=1, create_batch=lambda b: (torch.stack([o[0] for o in b]), [o[1] for o in b]))
    def loss(pred, ys): return F.cross_entropy(pred, torch.stack([o['label'] for o in ys]))
    learn = learner(mlp(), x, y, loss_func=loss, probe=None if 'opt_func' in kwargs else given(), **kwargs)
    learn.dls = DataLoaders(dl, dl)
    return fit(learn).model

def test_pictures_count_equally_however_many_boxes_they_have():
    x,y = data(15)
    want = fit(learner(mlp(), x, y, probe=given(), n_acc=3)).model
    for seed in range(2): assert distance(detected(y, torch.randint(4, (15,), generator=torch.Generator().manual_seed(seed)), n_acc=3), want)==0
    with pytest.raises(ValueError, match='got a list of 6 items in the batch'): detected(y, [1]*15, hessian_bs=3)

def test_pictures_count_equally_for_hessian_free():
    one,other = (detected(data(15)[1], ns, opt_func=hessian_free, hypers={}, n_acc=3) for ns in ([1]*15, [*range(15)]))
    assert distance(one, other)==0


@pytest.mark.parametrize('loss_func', [nn.CrossEntropyLoss(weight=torch.tensor([.1,1.,3.]).double()), nn.CrossEntropyLoss(ignore_index=0)], ids=['weights','ignored'])
def test_batches_count_by_what_their_loss_divides_by(loss_func):
    "Thirds of a batch are one step on the whole, also where rows weigh differently or not at all"
    x,y = data(36)
    def run(bs, n_acc): return fit(learner(mlp(), x, y, bs, loss_func, n_acc=n_acc, probe=lambda p,_: torch.ones_like(p)))
    thirds,whole = run(6, 3),run(18, 1)
    assert distance(thirds.model, whole.model)<ROUNDING and distance(whole.model, mlp())>0.01
    weights = [loss_func.weight[b].sum() if loss_func.weight is not None else (b!=0).sum() for b in y[:18].split(6)]
    assert len({*map(float, weights)})==3 # So that equal weights would give other steps


@pytest.mark.parametrize('loss_func', [nn.CrossEntropyLoss(weight=torch.tensor([.1,1.,3.]).double()), nn.CrossEntropyLoss(ignore_index=0)], ids=['weights','ignored'])
def test_the_curvature_over_batches_is_that_of_the_loss_of_all_their_rows(loss_func):
    x,y = data(18)
    learn = learner(mlp(), x, y, loss_func=loss_func)
    v = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p) for p in learn.model.parameters()]
    many,one = (learn.curvature_product(batches=bs)(v) for bs in (list(zip(x.split(6), y.split(6))), [(x,y)]))
    for a,b in zip(many, one): assert torch.allclose(a, b, rtol=ROUNDING)


class Words(nn.Module):
    "A class for each word of a sentence"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb,self.out = nn.Embedding(10, 5).double(),nn.Linear(5, 4).double()
    def forward(self, x): return self.out(self.emb(x).tanh()).transpose(1, 2)

def sentences(padded=False): # Of different lengths, maybe with classes -100 behind their ends
    g = torch.Generator().manual_seed(0)
    found = [tuple(torch.randint(k, (4,n), generator=g) for k in (10,4)) for n in (3,9,5,2,7,7,1,10)]
    return [(x,y.masked_fill(torch.arange(y.shape[1])>torch.arange(4)[:,None]+1, -100)) for x,y in found] if padded else found

def ones(p, generator=None): return torch.ones_like(p)

class InFloat(Callback):
    "The Recorder wants a float32 loss"
    def after_loss(self): self.learn.loss = self.loss.float()

def on_sentences(loss_func, func, padded=False, **kwargs):
    dl = torch.utils.data.DataLoader(sentences(padded), batch_size=None)
    return fit(Learner(DataLoaders(dl, dl), Words(), loss_func, opt_func=partial(func, n_acc=2, **kwargs), cbs=InFloat())).model

@pytest.mark.parametrize('padded', [False,True])
def test_sentences_count_by_their_words(padded):
    "Two batches are a step on all of their words, as in a plain loop, and as with an ignored class that there is none of"
    got = on_sentences(nn.CrossEntropyLoss(), adahessian, padded, probe=ones, **HYPERS)
    want = Words()
    twin = Twin([dict(params=list(want.parameters()), **HYPERS)], ones)
    def loss(batches): return sum(F.cross_entropy(want(x), y, reduction='sum') for x,y in batches)/sum((y>=0).sum() for _,y in batches)
    for batches in grouped(sentences(padded), 2): twin.step([partial(loss, batches)])
    assert distance(got, want)<ROUNDING and distance(want, Words())>1e-3
    if padded: return
    assert distance(got, on_sentences(nn.CrossEntropyLoss(ignore_index=9), adahessian, probe=ones, **HYPERS))<ROUNDING

def test_sentences_count_by_their_words_for_hessian_free():
    loose,told = (on_sentences(f, hessian_free) for f in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=9)))
    assert distance(loose, told)<ROUNDING and distance(told, Words())>1e-3


@pytest.mark.parametrize('targets,opt_func,kwargs', [('dict',adahessian,dict(n_acc=2)), ('dict',adahessian,dict(hessian_bs=.5)),
    ('dict',hessian_free,dict(n_acc=2)), ('list',adahessian,dict(n_acc=2)), ('list',hessian_free,dict(n_acc=2))])
def test_targets_of_a_loader_of_pytorch_count_as_those_of_fastai(targets, opt_func, kwargs):
    "It makes a list of inputs and targets, which is no list of targets"
    def run(kind):
        batches = [kind((x, dict(y=y) if targets=='dict' else [dict(y=o.expand(i+2)) for i,o in enumerate(y)])) for x,y in split(*data(20), 6)]
        loss = lambda out,y: F.cross_entropy(out, y['y'] if targets=='dict' else torch.stack([o['y'][0] for o in y]))
        dls = DataLoaders(*(torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=lambda b: b) for _ in range(2)))
        return fit(Learner(dls, mlp().double(), lambda *o: loss(*o).float(), opt_func=partial(opt_func, **kwargs)), 2, lr=.1).model
    assert distance(run(list), run(tuple))==0<distance(run(list), mlp())
