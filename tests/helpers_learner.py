"Small Learners with given probes, the plain loop that they are compared with"
import torch,torch.nn.functional as F
from fastai.callback.all import *
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from functools import partial
from torch import nn
from adahessian_fastai.all import adahessian_paper as adahessian
from twin import Twin

# A dozen steps in float64: the same sums in another order
ROUNDING = 1e-10
HYPERS = dict(lr=0.05, mom=0.9, sqr_mom=0.99, eps=1e-2, wd=0., hessian_power=1.)


def given(seed=2):
    "Rademacher probes in the order in which they are asked for, whoever asks"
    g = torch.Generator().manual_seed(seed)
    return lambda p,_: (torch.randint(2, p.shape, generator=g)*2-1).to(p)


def data(n=36, shape=(5,), n_out=3, seed=1, dtype=torch.double):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=g).to(dtype),torch.randint(n_out, (n,), generator=g)


class InTurn(nn.Module):
    "One head in even batches, the other in odd ones"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body,self.heads,self.n = nn.Linear(5,7).double(),nn.ModuleList([nn.Linear(7,3).double() for _ in range(2)]),0
    def forward(self, x):
        if self.training: self.n += 1
        return self.heads[self.n%2](self.body(x).tanh())


def mlp(seed=0, n_in=5, n_out=3, norm=nn.LayerNorm):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(n_in,7), norm(7), nn.Tanh(), nn.Linear(7,n_out)).double()


def convnet(seed=0):
    torch.manual_seed(seed)
    block = lambda i,o: [nn.Conv2d(i,o,3,2,1,bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*block(3,8), *block(8,16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,10)).double()


class Cube(torch.autograd.Function):
    "Without a forward derivative"
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3
    @staticmethod
    def backward(ctx, g): return 3*ctx.saved_tensors[0]**2*g

class Once(Cube):
    "A cube with a first derivative and no second"
    backward = staticmethod(torch.autograd.function.once_differentiable(Cube.backward))


class Seeded(Callback):
    "The same dropout masks for a Learner and for a plain loop: training batch `i` runs on seed `i`. The Recorder wants a float32 loss"
    order = -20
    def before_batch(self): torch.manual_seed(self.train_iter)
    def after_loss(self): self.learn.loss = self.loss.float()


class Noted(Callback):
    "Calls `f(learn)` at `when`, in training only, and keeps what it returns"
    run_valid = False
    def __init__(self, when, f):
        self.notes = []
        setattr(self, when, lambda: self.notes.append(f(self.learn)))


def split(x, y, bs): return list(zip(x.split(bs), y.split(bs)))


def learner(model, x, y, bs=6, loss_func=F.cross_entropy, cbs=None, probe=None, opt_func=adahessian, path=None, hypers=HYPERS, **kwargs):
    ds = list(zip(x,y))
    dls = DataLoaders(DataLoader(ds, bs=bs), DataLoader(ds[:bs], bs=bs), device=x.device)
    opt_func = partial(opt_func, **hypers, **kwargs, **({} if probe is None else {'probe': probe}))
    return Learner(dls, model, loss_func, opt_func=opt_func, cbs=[Seeded(), *(cbs or [])], path=path or '.')


def fit(learn, n=1, **kwargs):
    with learn.no_bar(),learn.no_logging(): learn.fit(n, **kwargs)
    return learn


def plain(model, steps, loss_func=F.cross_entropy, probe=None, params=None, total=None, hypers=HYPERS, **kwargs):
    "Train `model` in a plain loop on `steps`, each a list of batches: their items count equally, and `total` of them make a mean"
    twin = Twin([dict(params=list(params or model.parameters()), **hypers)], probe or given(), **kwargs)
    i = 0
    for batches in steps:
        losses,n = [],total or sum(len(y) for _,y in batches)
        for x,y in batches:
            losses.append(partial(one_loss, model, loss_func, x, y, i, len(y)*len(batches)/n))
            i += 1
        twin.step(losses)
    return model


def one_loss(model, loss_func, x, y, seed, weight=1.):
    torch.manual_seed(seed)
    return loss_func(model(x), y)*weight


def distance(a, b):
    "Largest difference of two models' weights"
    return max((p-q).abs().max().item() for p,q in zip(a.parameters(), b.parameters()))


def state_of(learn):
    "Everything that the next step depends on, as comparable pieces"
    def pieces(o):
        if isinstance(o, torch.Tensor): return o.detach().clone().tolist()
        if isinstance(o, dict): return {k: pieces(v) for k,v in o.items()}
        return [pieces(v) for v in o] if isinstance(o, (list,tuple)) or type(o).__name__=='L' else o
    return pieces(learn.model.state_dict()),pieces(learn.opt.state_dict())


def relative(a, b):
    "Norm of the difference of two lists of tensors, relative to the second"
    a,b = (torch.cat([o.detach().flatten().double() for o in l]) for l in (a,b))
    return ((a-b).norm()/b.norm()).item()
