"How often a step waits for a number from the device: each such read stalls a GPU, whose work is otherwise only queued"
from functools import partial
from types import SimpleNamespace
import pytest,torch
from fastai.layers import ConvLayer
from fastai.learner import Learner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adahessian_fastai.batch
from adahessian_fastai.all import adahessian,adahessian_paper,sassha,sophia
from adahessian_fastai.schedule import Every

reading = {'_local_scalar_dense','item','is_nonzero','equal','nonzero','nonzero_static','masked_select','unique_dim',
    '_unique2','repeat_interleave'}

class HostReads(TorchDispatchMode):
    "Counts operations whose result, or the size of whose result, the host has to know"
    def __init__(self):
        super().__init__()
        self.found = []
    def __enter__(self): # `tolist` passes no dispatcher
        torch.Tensor.tolist = lambda t: self.found.append('tolist') or torch._C.TensorBase.tolist(t)
        return super().__enter__()
    def __exit__(self, *args):
        del torch.Tensor.tolist
        return super().__exit__(*args)
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition('::')[2]
        indices = [o for a in args if isinstance(a, (list,tuple)) for o in a if isinstance(o, torch.Tensor)]
        masks = name.startswith('index') and any(o.dtype==torch.bool for o in indices)
        if name in reading or masks: self.found.append(name)
        return func(*args, **(kwargs or {}))

class AtThird(Every):
    "Estimates at steps 1 and 3"
    def part(self, age): return None if age in (0,2) else 0

optimizers = dict(adahessian=adahessian, signed=partial(adahessian, signed=True), gnb=partial(adahessian, estimator='gnb'),
    ggn=partial(adahessian, curvature='ggn'), samples=partial(adahessian, n_samples=2, debiased=True), paper=adahessian_paper,
    sophia=sophia, no_bounds=partial(adahessian, clip=0, cap=0, rho=0), loop=partial(adahessian, decouple_wd=False, hessian_power=0.7),
    sassha=partial(sassha, update_each=2), m_sassha=partial(sassha, along='momentum', update_each=2),
    sophia_hutchinson=partial(sophia, estimator='hutchinson'), n_acc=partial(adahessian, n_acc=2), opted_out=adahessian)

def learner(opt_func, depth):
    "A Learner in the middle of training, with no callback that reads anything, and its batch"
    torch.manual_seed(0)
    layers = [ConvLayer(3,8), *(ConvLayer(8,8) for _ in range(depth))]
    dls,model = SimpleNamespace(device=torch.device('cpu'), n_inp=1),nn.Sequential(*layers, nn.Flatten(), nn.Linear(8*64,10))
    learn = Learner(dls, model, nn.CrossEntropyLoss(), opt_func=opt_func)
    learn.remove_cbs(list(learn.cbs))
    learn.training = True
    learn.create_opt()
    return learn,(torch.randn(4,3,8,8), torch.randint(10, (4,)))

def reads(opt_func, depth=1, n=4, opted_out=False):
    "The reads of each of `n` steps, and whether there was an estimate"
    learn,batch = learner(opt_func, depth)
    if opted_out: learn.opt.opt_out(learn.model[0])
    res = []
    for _ in range(n):
        before = learn.opt.n_estimates
        with HostReads() as mode:
            for _ in range(learn.opt.n_acc): learn.one_batch(0, batch)
        res.append((learn.opt.n_estimates>before, mode.found))
    return res

def test_the_counter_sees_reads():
    "What stalls a GPU is found, in a backward pass too; what does not is not"
    x = torch.arange(4.).requires_grad_()
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): return g*g.sum().item()
    once = [lambda: x.sum().item(), lambda: bool(x[0]>1), lambda: x[x>1], lambda: torch.equal(x, x), lambda: x.nonzero(), lambda: x.tolist(),
        lambda: x.detach().add(x, alpha=x.detach()[1]), lambda: Reads.apply(x).sum().backward()]
    for f,n in [(lambda: torch.where(x>1, x, 0.).clamp(max=x.max()), 0), *((f,1) for f in once)]:
        with HostReads() as mode: f()
        assert len(mode.found)==n, mode.found

trial = 2 # More in the first step of a run, which looks once whether products are symmetric

@pytest.mark.parametrize('name', optimizers)
def test_reads_of_a_step(name):
    "One read in a step without an estimate, two at most in one with"
    scheduled = optimizers[name] if 'sassha' in name else partial(optimizers[name], when=AtThird())
    found = reads(scheduled, opted_out=name=='opted_out')
    assert [asked for asked,_ in found] == [True,False,True,False]
    for i,(asked,names) in enumerate(found): assert len(names)<=1+asked+trial*(i==0), (i,names)

def test_reads_do_not_grow():
    "A larger network is not read more often"
    few,many = (learner(adahessian, depth)[0] for depth in (0,4))
    assert len(list(many.model.parameters()))>2*len(list(few.model.parameters()))
    assert [[len(o) for _,o in reads(partial(adahessian, when=AtThird()), depth)] for depth in (0,4)] == [[1+trial,1,1,1]]*2

class Launches(TorchDispatchMode):
    "Counts operations that a GPU would be asked for: all but views"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += not (func.is_view or 'detach' in func._schema.name)
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('opt_func', [adahessian,adahessian_paper,sophia,partial(adahessian, signed=True)])
def test_launches_do_not_grow(opt_func):
    "The parameters of a larger network are moved for the forward pass, put back and stepped by as many operations"
    def launches(depth):
        learn,batch = learner(partial(opt_func, when=AtThird()), depth)
        for i in range(2): learn.one_batch(i, batch)
        opt = learn.opt
        with Launches() as moved:
            opt.perturb.ahead(opt)
            opt.perturb.back()
        for p in learn.model.parameters(): p.grad = torch.ones_like(p)
        with Launches() as stepped: opt.step()
        return moved.n,stepped.n
    assert launches(0)==launches(4)

@pytest.mark.parametrize('opt_func', [adahessian,sophia])
def test_models_are_looked_through_for_estimates_alone(opt_func, monkeypatch):
    "A walk through all modules takes the host a millisecond: a batch without an estimate goes without"
    (learn,batch),walks = learner(partial(opt_func, when=AtThird()), 1),[]
    for name in ('check_model','in_half'):
        orig = getattr(adahessian_fastai.batch, name)
        monkeypatch.setattr(adahessian_fastai.batch, name, lambda *args,name=name,orig=orig: walks.append(name) or orig(*args))
    found = []
    for i in range(4):
        learn.one_batch(i, batch)
        found.append(set(walks))
        walks.clear()
    assert all('check_model' in found[i] for i in (0,2)) and found[1]==found[3]==set()
