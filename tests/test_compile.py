"Compiled and checkpointed models: estimates from the module itself, gradients from the fast path"
import gc,weakref
import pytest,torch,torch._dynamo
import torch.nn.functional as F
from fastai.optimizer import Adam
from functools import partial
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint
from adahessian_fastai import curvature as room
from adahessian_fastai.all import adahessian_paper as adahessian,twice_differentiable
from adahessian_fastai.problem import Problem
from contextlib import nullcontext
from helpers_learner import ROUNDING,Noted,Seeded,data,distance,fit,given,learner,mlp,plain,split


@pytest.fixture(autouse=True)
def fresh(): torch._dynamo.reset()


class Counting:
    "A backend that counts the calls of compiled graphs; aot_autograd makes their backward, as inductor's"
    n = 0
    def __call__(self, gm, inputs):
        f = aot_eager(gm, inputs)
        def run(*args):
            self.n += 1
            return f(*args)
        return run


def compiled(model, how, **kwargs):
    if how=='torch.compile': return torch.compile(model, **kwargs)
    model.compile(**kwargs)
    return model


@pytest.mark.parametrize('how', ['torch.compile','model.compile'])
@pytest.mark.parametrize('update_each', [1,2])
def test_compiled_models_equal_the_plain_loop(how, update_each):
    x,y = data(24)
    backend = Counting()
    calls = Noted('after_batch', lambda l: backend.n)
    learn = fit(learner(compiled(mlp(), how, backend=backend), x, y, probe=given(), update_each=update_each, cbs=[calls]))
    may_stay_eager = how=='model.compile' and calls.notes==[0,0,0,0] # Older torch: slower, same results
    assert calls.notes==([0,0,0,0] if update_each==1 or may_stay_eager else [0,1,1,2])
    want = plain(mlp(), [[b] for b in split(x,y,6)], update_each=update_each)
    assert distance(want, mlp())>0.05
    assert distance(learn.model, want)<ROUNDING


def test_without_the_context_it_is_the_error_of_all_others(monkeypatch):
    monkeypatch.setattr(room, 'twice_differentiable', lambda *args, **kwargs: nullcontext())
    x,y = data(12)
    with pytest.raises(RuntimeError, match='double backward|donated'): fit(learner(torch.compile(mlp(), backend='aot_eager'), x, y))


def test_the_compiled_model_is_compiled_again_afterwards():
    "Other optimizers, validation and predictions of the same process use the compiled graph"
    x,y = data(12)
    backend = Counting()
    model = torch.compile(mlp(), backend=backend)
    fit(learner(model, x, y))
    before = backend.n
    fit(learner(model, x, y, opt_func=lambda ps,lr,**kwargs: Adam(ps, lr)))
    assert backend.n>=before+2
    with torch.no_grad(): model(x)
    assert backend.n>before+2


def test_a_compiled_loss_function():
    x,y = data(12)
    loss_func = torch.compile(lambda pred,y: F.cross_entropy(pred.tanh(), y), backend='aot_eager')
    learn = fit(learner(mlp(), x, y, loss_func=loss_func, probe=given()))
    want = plain(mlp(), [[b] for b in split(x,y,6)], loss_func=lambda pred,y: F.cross_entropy(pred.tanh(), y))
    assert distance(learn.model, want)<ROUNDING


@pytest.mark.parametrize('how', ['torch.compile','model.compile'])
def test_with_mixed_precision(cpu_amp, how):
    x,y = data(24, dtype=torch.float)
    run = lambda model: fit(learner(model, x, y, probe=given(), update_each=2).to_fp16()).model
    assert distance(run(compiled(mlp().float(), how, backend='aot_eager')), run(mlp().float()))<1e-3


@pytest.mark.slow
@pytest.mark.parametrize('how', ['torch.compile','model.compile'])
def test_inductor(how):
    x,y = data(24)
    learn = fit(learner(compiled(mlp(), how), x, y, probe=given(), update_each=2))
    assert distance(learn.model, plain(mlp(), [[b] for b in split(x,y,6)], update_each=2))<ROUNDING


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant, whole=False):
        super().__init__()
        self.net,self.use_reentrant,self.whole = mlp(),use_reentrant,whole
    def forward(self, x):
        if self.use_reentrant is None: return self.net(x)
        f = partial(checkpoint, use_reentrant=self.use_reentrant)
        return f(self.net, x) if self.whole else self.net[2:](f(self.net[:2], self.net[0].weight.new_zeros(1)+x))


@pytest.mark.parametrize('whole', [False,True])
def test_checkpoints_equal_the_plain_loop(whole):
    x,y = data(24)
    learn = fit(learner(Checkpointed(False, whole), x, y, probe=given(), update_each=2))
    want = plain(Checkpointed(None), [[b] for b in split(x,y,6)], update_each=2)
    assert distance(learn.model, want)<ROUNDING


def test_checkpoints_with_dropout_and_attention():
    "The recomputed forward pass has the same masks and the same differentiable kernel"
    class Net(nn.Module):
        def __init__(self, use):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, batch_first=True, activation='gelu')
            self.head,self.use = nn.Linear(8,3),use
        def forward(self, x):
            f = partial(checkpoint, self.layer, use_reentrant=False) if self.use else self.layer
            return self.head(f(x).mean(1))
    x,y = data(24, (5,8))
    run = lambda use: fit(learner(Net(use).double(), x, y, probe=given())).model
    assert distance(run(True), run(False))<ROUNDING


@pytest.mark.parametrize('grad_input', [False,True])
def test_reentrant_checkpoints_get_a_clear_error(grad_input):
    "Without a gradient of its input the checkpoint hides its parameters; with one PyTorch itself objects. Both name the remedy"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first,self.net = nn.Linear(5,5).double(),mlp()
        def forward(self, x):
            if grad_input: return checkpoint(self.net, self.first(x), use_reentrant=True)
            return checkpoint(self.net, x, use_reentrant=True) + self.first(x)[:,:3]
    x,y = data(12)
    if not grad_input: x.requires_grad_(True)
    with pytest.raises((ValueError,RuntimeError), match='use_reentrant=False'): fit(learner(Net(), x, y))


def test_two_losses_of_one_model(monkeypatch):
    "Each has the product of its own, though the model is one"
    monkeypatch.setattr(torch, 'compile', lambda f, **kwargs: f)
    model = nn.Linear(2, 1, bias=False).double()
    x,y = torch.randn(8,2).double(),torch.randn(8,1).double()
    def product(loss_func):
        p = Problem([model.weight], loss_func(model(x), y), loss_func=loss_func, targets=y, model=model)
        p.obstacle,p.inputs = '',(x,)
        return room.compiled(p, p.params).product
    mean,total = product(lambda z,y: (z-y).square().mean()),product(lambda z,y: (z-y).square().sum())
    v = [torch.ones_like(model.weight)]
    assert torch.allclose(mean(v)[0]*8, total(v)[0]) and torch.allclose(mean(v)[0], 2*x.T@x.sum(1)/8)


def test_a_compiled_model_in_a_plain_loop_is_told_what_to_do():
    "PyTorch differentiates a compiled model once; the advice leads to the result of the plain model"
    def train(compiled, around):
        model,(x,y) = mlp(),data(36)
        opt,net = adahessian(model.parameters(), lr=0.05, probe=given()),torch.compile(model, backend='aot_eager') if compiled else model
        for _ in range(2):
            with around(net): loss = F.cross_entropy(net(x), y)
            opt.differentiate(loss)
            opt.step()
            opt.zero_grad()
        return model
    with pytest.raises(RuntimeError, match=r"compiled models inside `with twice_differentiable\(model\):`"): train(True, lambda _: nullcontext())
    assert distance(train(True, twice_differentiable), train(False, lambda _: nullcontext()))<1e-10

@pytest.mark.parametrize('loss_func', [F.cross_entropy,nn.CrossEntropyLoss()], ids=['function','module'])
def test_a_compiled_product_keeps_no_model_in_memory(monkeypatch, loss_func):
    "Nothing is compiled here"
    monkeypatch.setattr(torch, 'compile', lambda f, **kwargs: f)
    model = mlp().float()
    learn = learner(model, *data(12, dtype=torch.float), loss_func=loss_func, hvp='compiled')
    learn.remove_cb(Seeded)
    fit(learn)
    seen = weakref.ref(model)
    del model,learn
    gc.collect()
    assert seen() is None

def test_a_compiled_product_sees_the_present_mode_of_the_model(monkeypatch):
    "The module that is compiled shares the state of the model, its own flag for training too"
    monkeypatch.setattr(torch, 'compile', lambda f, **kwargs: f)
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([2.]))
        def forward(self, x): return self.w**2*x*(2 if self.training else 1)
    def square(z, y): return (z-y).square().mean()
    model = Doubled()
    def product():
        def evaluate(twice=False):
            z = model(torch.ones(1))
            return square(z, torch.zeros(1)),z
        loss,z = evaluate()
        p = Problem([model.w], loss, z, torch.zeros(1), square, evaluate=evaluate, model=model)
        p.obstacle,p.inputs = '',(torch.ones(1),)
        return room.compiled(p, [model.w]).product([torch.ones(1)])[0].item()
    assert product()==pytest.approx(4*12*4)
    model.eval()
    assert product()==pytest.approx(12*4)
