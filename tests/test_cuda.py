"On a GPU everything does what it does on the CPU: the same draws there end in the same weights"
import contextlib,copy,gc,re,warnings
from contextlib import contextmanager
from functools import partial
from unittest import mock
import pytest,torch
import torch.nn.functional as F
from fastai.basics import Adam,Callback,CrossEntropyLossFlat,DataLoader,DataLoaders,Learner,MSELossFlat
from torch import nn
from torch.nn.attention import SDPBackend,sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves,tree_map

import variants
from adahessian_fastai.all import CurvatureRecorder,adahessian,adahessian_paper,hessian_free,m_sassha,rademacher_like,sassha,sophia
from test_host_reads import AtThird,learner as bare_learner,optimizers
from test_variants import tolerance,trained
from variants import cases,train

pytestmark = pytest.mark.cuda
gpu = torch.device('cuda')

# Random numbers: what a GPU would draw the CPU draws

draws = {'bernoulli_','bernoulli','random_','normal_','uniform_','exponential_','multinomial','rand','randn','randint','rand_like','randn_like',
    'randint_like','randperm','normal'}

class SameDraws(TorchDispatchMode):
    "Every random number comes from the CPU's generators, and goes to the device that asked for it"
    def __init__(self, device=gpu):
        super().__init__()
        self.device,self.generators = device,{}
    def generator(self, g):
        "One of the CPU in the place of one of the device"
        if g.device.type!=self.device.type: return g
        if id(g) not in self.generators: self.generators[id(g)] = g,torch.Generator().manual_seed(g.initial_seed()) # `g` is kept, so that its id is
        return self.generators[id(g)][1]
    def is_there(self, o):
        d = o.device if isinstance(o, (torch.Tensor,torch.Generator)) else o
        return isinstance(d, torch.device) and d.type==self.device.type
    def to_cpu(self, o):
        if isinstance(o, torch.Tensor): return o.cpu()
        if isinstance(o, torch.Generator): return self.generator(o)
        return torch.device('cpu') if isinstance(o, torch.device) else o
    def dropout(self, x, p, train):
        "As it is on the CPU, which draws in the order of memory"
        if not train: return x,torch.ones_like(x, dtype=torch.bool)
        noise = torch.empty_like(x, device='cpu').bernoulli_(1-p).to(x.device)
        return x*(noise/(1-p)),noise.bool()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name,kwargs = func._schema.name.partition('::')[2],kwargs or {}
        if name not in (*draws,'native_dropout') or not any(map(self.is_there, tree_leaves((args,kwargs)))): return func(*args, **kwargs)
        if name=='native_dropout': return self.dropout(*args)
        out = func(*tree_map(self.to_cpu, args), **tree_map(self.to_cpu, kwargs))
        return args[0].copy_(out) if name.endswith('_') else tree_map(lambda o: o.to(self.device), out)

def exact(): return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)

@contextmanager
def on_gpu():
    "Learners of `variants` have their batches, loss and network on the GPU, mixed precision is the GPU's, and products of float32 are exact"
    loaders,network = variants.loaders,variants.network
    def moved(case, rank=0):
        dls,loss = loaders(case, rank)
        return dls.to(gpu),(loss.to(gpu) if isinstance(loss, nn.Module) else loss)
    def placed(case, seed=0): return network(case, seed).to(gpu)
    math = sdpa_kernel(SDPBackend.MATH) # The fused kernels draw the masks of dropout inside
    with mock.patch.multiple(variants, loaders=moved, network=placed, on_the_cpu=lambda: []),SameDraws(),exact(),math: yield

own_probes = [n for n in cases if n.startswith(('budget','broken_probe'))] # They draw on the CPU by themselves
ON_ONE = [n for n in cases if cases[n].ranks==1 and n not in own_probes]

# What float16 does in a convolution differs between the two, and with a scale that overflows also which batches are skipped
IN_HALF,OVERFLOWS = 0.1,1.

no_forward = 'forward_recurrent','ride_recurrent' # cuDNN's stand-in for a GRU has no forward derivative

def expect_refusal(got): assert isinstance(got, str) and got.startswith('ValueError') and re.search(r"use (hvp=)?'reverse'", got), got

@pytest.mark.parametrize('name', ON_ONE)
def test_every_variant_ends_with_the_weights_of_the_cpu(name):
    want,case = trained(name),copy.copy(cases[name])
    if case.opt is hessian_free: case.kwargs = {**case.kwargs, 'check_every': 1} # On a GPU conjugate gradients are looked at rarely
    with on_gpu(): got = train(case)
    if name in no_forward: return expect_refusal(got)
    assert isinstance(got, torch.Tensor), got
    half,far = cases[name].half and cases[name].dtype==torch.float,(got.cpu()-want).abs().max().item()
    assert far<(OVERFLOWS if name.endswith('overflow') else IN_HALF if half else tolerance(cases[name]))

def test_the_draws_are_the_cpus():
    "Of global and own generators, in place or not, dropout among them"
    def drawn(device, mode):
        torch.manual_seed(3)
        g = torch.Generator(device).manual_seed(5)
        with mode: return [o.cpu() for o in (torch.empty(40, device=device).bernoulli_(0.5), torch.randn(9, device=device, generator=g),
            torch.randint(9, (9,), device=device, generator=g), rademacher_like(torch.empty(70, device=device), g),
            F.dropout(torch.ones(50, device=device), 0.3), F.dropout(torch.ones(3,4,5, device=device).mT, 0.3),
            torch.multinomial(torch.ones(4,3, device=device), 1, generator=g))]
    for a,b in zip(drawn('cpu', contextlib.nullcontext()), drawn('cuda', SameDraws()), strict=True): assert torch.equal(a, b)

# Waiting for the GPU

def waits(step):
    "How often `step` waits for the device"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            step()
    finally: torch.cuda.set_sync_debug_mode('default')
    return [str(o.message)[:80] for o in seen if 'synchroniz' in str(o.message)]

@pytest.mark.parametrize('name', [o for o in optimizers if o!='opted_out'])
def test_a_step_waits_once(name):
    "Once without an estimate, twice at most with one, after the first step"
    learn,batch = bare_learner(optimizers[name] if 'sassha' in name else partial(optimizers[name], when=AtThird()), 1)
    learn.model.cuda()
    learn.dls.device = gpu
    learn.create_opt()
    batch,found = [o.cuda() for o in batch],[]
    for _ in range(4):
        before = learn.opt.n_estimates
        seen = waits(lambda: [learn.one_batch(0, batch) for _ in range(learn.opt.n_acc)])
        found.append((learn.opt.n_estimates>before, seen))
    assert [o for o,_ in found]==[True,False,True,False]
    for asked,seen in found[1:]: assert len(seen)<=1+asked, seen

# The compiler, other layouts, memory

def images(n=64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n,3,16,16, generator=g)
    return x,(x.mean((1,2,3))*30).round().long().clamp(0,4)

def net():
    torch.manual_seed(0)
    body = [nn.Conv2d(3,8,3,padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8,8,3,padding=1), nn.GELU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32,5))

def learner(opt_func, model=None, cbs=(), n=64):
    ds = list(zip(*images(n)))
    dls = DataLoaders(DataLoader(ds, bs=16), DataLoader(ds[:16], bs=16), device=gpu)
    return Learner(dls, (model or net()).cuda(), CrossEntropyLossFlat(), opt_func=opt_func, cbs=cbs)

def weights(learn): return torch.cat([p.detach().float().flatten() for p in learn.model.parameters()]).cpu()

def run(learn, n=3, fit='fit_one_cycle', around=exact):
    torch.manual_seed(1)
    with learn.no_bar(),learn.no_logging(),around(): getattr(learn, fit)(n)
    return weights(learn)

moved = partial(adahessian, eps=1e-2)
FLOAT = 5e-3 # Twelve steps in float32, with sums in another order

@pytest.mark.parametrize('kwargs', [dict(hvp='compiled'), dict(hvp='forward'), dict(hvp='auto'), dict(hvp='finite_difference')], ids=str)
def test_each_product_trains_alike(kwargs):
    want,got = run(learner(partial(moved, update_each=1))),run(learner(partial(moved, update_each=1, **kwargs)))
    assert (want-run(learner(Adam))).abs().max()>0.01 and (want-got).abs().max()<(FLOAT if kwargs['hvp'] in ('compiled','forward') else 5*FLOAT)

def test_differences_have_all_bits():
    "cuDNN's convolutions leave out 13 bits of 23 unless they are told, of which differences would be made"
    assert torch.backends.cudnn.allow_tf32
    want,got = run(learner(partial(moved, update_each=1))),run(learner(partial(moved, update_each=1, hvp='finite_difference')), around=contextlib.nullcontext)
    assert (want-got).abs().max()<5*FLOAT and torch.backends.cudnn.allow_tf32

def test_dropout_of_fused_attention_is_the_same_again():
    "Finite differences see the masks of the step; those of the graph that can be differentiated twice are others, and no objection"
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.TransformerEncoderLayer(16, 2, 32, 0.2, activation='gelu', batch_first=True)
            self.head = nn.Linear(16,5)
        def forward(self, x): return self.head(self.body(x.mean(1)).mean(1))
    torch.manual_seed(0)
    learn = learner(partial(moved, hvp='finite_difference', update_each=1), Attends())
    run(learn)
    assert learn.opt.n_estimates==12 and learn.opt.n_skipped==0

def test_a_compiled_model_trains_alike():
    model = net()
    want,got = run(learner(moved)),run(learner(moved, torch.compile(model.cuda())))
    assert (want-got).abs().max()<FLOAT

def test_channels_last_trains_alike():
    want,got = run(learner(moved)),run(learner(moved, net().to(memory_format=torch.channels_last)))
    assert (want-got).abs().max()<FLOAT

opt_funcs = dict(adahessian=adahessian, paper=adahessian_paper, gnb=partial(adahessian, estimator='gnb'), sassha=sassha, m_sassha=m_sassha, sophia=sophia,
    budget=partial(adahessian, budget=0.25))

@pytest.mark.parametrize('name', opt_funcs)
@pytest.mark.parametrize('half', ['to_fp16','to_bf16'])
def test_trains_in_half_precision(name, half):
    "With the GPU's loss scale: as low a loss as in single precision, and every weight has moved"
    def go(learn):
        run(learn, 8)
        return learn.recorder.values[-1][0],weights(learn)
    opt_func = opt_funcs[name]
    (loss,w),(loss16,w16) = go(learner(opt_func)),go(getattr(learner(opt_func), half)())
    assert w16.isfinite().all() and loss16<max(1.3*loss, loss+0.15) and (w16!=weights(learner(Adam))).all()

def test_out_of_memory_in_an_estimate():
    "It raises; parameters and state stay, and training goes on"
    class Huge(Callback):
        "A loss whose second derivative does not fit"
        on = False
        def after_loss(self):
            if not self.on or not self.training: return
            w = next(self.model.parameters())
            self.learn.loss_grad = self.loss_grad+Hungry.apply(w.sum())
    class Hungry(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x*0
        @staticmethod
        def backward(ctx, g): return More.apply(g, *ctx.saved_tensors)
    class More(torch.autograd.Function):
        @staticmethod
        def forward(ctx, g, x): return g*x*0
        @staticmethod
        def backward(ctx, g): return g,torch.empty(2**44, device=gpu)[:1].sum()*g
    learn = learner(partial(adahessian, update_each=1), cbs=(huge := Huge()))
    run(learn, 1, 'fit')
    before,state = weights(learn),copy.deepcopy(learn.opt.state_dict())
    huge.on = True
    with pytest.raises(torch.OutOfMemoryError): run(learn, 1, 'fit')
    assert torch.equal(before, weights(learn))
    after = learn.opt.state_dict()
    for a,b in zip(state['state'], after['state'], strict=True):
        for k in a: assert torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])), k
    huge.on = False
    assert not torch.equal(before, run(learn, 1, 'fit'))

# Everything else that a user calls

def test_diagnostics_are_those_of_the_cpu():
    def found(device):
        torch.manual_seed(2)
        learn = learner(adahessian)
        learn.dls.to(torch.device(device))
        learn.model.to(device).eval()
        return [o.cpu() for o in learn.curvature_product()([torch.ones_like(p) for p in learn.model.parameters()])]
    with exact():
        for a,b in zip(found('cpu'), found('cuda'), strict=True): assert (a-b).norm()<1e-3*max(a.norm(), 1e-2)

def test_what_a_user_calls(tmp_path):
    "Rates, summaries, records, files: on the GPU, and a file goes on on the CPU"
    learn = learner(adahessian, cbs=[CurvatureRecorder(every=4)])
    learn.path = tmp_path
    with learn.no_bar(),learn.no_logging():
        assert learn.lr_find(show_plot=False)[0]>0
        learn.fine_tune(1)
        learn.fit_one_cycle(2)
        assert 'λ' in learn.curvature_summary() and learn.stability()
    assert len(learn.curvature_recorder.records)>1 and all(r['lambda_max']>0 for r in learn.curvature_recorder.records)
    learn.save('here')
    learn.load('here', device='cpu')
    there = learner(adahessian)
    there.path = tmp_path
    there.dls.to(torch.device('cpu'))
    there.model.cpu()
    there.load('here')
    run(there, 1, 'fit')
    assert next(there.model.parameters()).device.type=='cpu' and not torch.equal(weights(there), weights(learn))

def test_hessian_free_on_a_gpu():
    "A least-squares problem, which is solved at once"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64,5, generator=g)
    y = x@torch.tensor([1.,-2.,3.,0.,0.5])[:,None]
    ds = list(zip(x, y))
    dls = DataLoaders(DataLoader(ds, bs=64), DataLoader(ds, bs=64), device=gpu)
    learn = Learner(dls, nn.Linear(5,1).cuda(), MSELossFlat(), opt_func=hessian_free)
    with learn.no_bar(),learn.no_logging(): learn.fit(6)
    assert learn.recorder.values[-1][1]<1e-5

def test_no_memory_stays():
    "Nothing more is held after two hundred steps than after a hundred"
    learn,held = learner(partial(adahessian, update_each=2), n=800),[]
    for _ in range(3):
        run(learn, 2, 'fit')
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[2]<=held[1]
