"""Seconds and memory of a training step: AdaHessian, first-order optimizers and other second-order ones, side by side in one process.

    python benchmarks/speed.py                            # everything, some 15 minutes on two cores
    python benchmarks/speed.py --models mlp --rounds 2    # a first look
    python benchmarks/speed.py --device cuda              # the same on a GPU, timed by CUDA events
    python benchmarks/speed.py --scale depth              # cost against depth, width, batch or tensors
    python benchmarks/speed.py --smoke                    # does it run? Seconds, and nothing is kept

Rounds are interleaved: in each round every contender makes its steps once, in a new order, so that whatever else the machine does hits all of them.
What is reported is the median over rounds, and the median of the ratios to fastai's Adam of the same round.
The rivals (timm, torch_optimizer, pytorch_optimizer, curvlinops-for-pytorch) are left out where they are not installed."""
import argparse,copy,csv,gc,importlib,importlib.metadata,math,os,platform,random,shlex,statistics,sys,time,warnings
from collections import Counter
from functools import partial
from types import SimpleNamespace

warnings.filterwarnings('ignore')
import torch,torch.nn.functional as F
from fastai.learner import Learner
from fastai.optimizer import Adam,OptimWrapper,ranger
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from _common import cpu_name,results_dir,threads

from adahessian_fastai.adahessian import adahessian,adahessian_paper
from adahessian_fastai.estimators import Given
from adahessian_fastai.hvp import hessian_product,twice_differentiable
from adahessian_fastai.schedule import Budget,Every
from adahessian_fastai.sophia import sophia

LR = 1e-6 # Nobody learns anything here: gradients stay ordinary numbers, neither tiny nor infinite

# Models: each a function `device -> (model, inputs, targets)`; the loss is the cross-entropy

def images(n=32, size=64): return (torch.randn(n,3,size,size),)

def resnet(smooth=False):
    from torchvision.models import resnet18
    m = resnet18(num_classes=10)
    return smoothed(m) if smooth else m

def smoothed(m):
    "GELU and average pooling in place of everything with a kink"
    for name,child in m.named_children():
        if isinstance(child, nn.ReLU): setattr(m, name, nn.GELU())
        elif isinstance(child, nn.MaxPool2d): setattr(m, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        else: smoothed(child)
    return m

def xresnet(name='xresnet18'):
    from fastai.vision.models import xresnet
    return getattr(xresnet, name)(n_out=10)

class Translator(nn.Module):
    "2+2 layers of `nn.Transformer`, d=256"
    def __init__(self, vocab=1000, d=256):
        super().__init__()
        self.embed,self.head = nn.Embedding(vocab, d),nn.Linear(d, vocab)
        self.body = nn.Transformer(d, 8, 2, 2, 4*d, activation='gelu', batch_first=True)
    def forward(self, src, tgt): return self.head(self.body(self.embed(src), self.embed(tgt))).flatten(0,1)

def mlp(depth=3, width=512): return nn.Sequential(*[o for i in range(depth) for o in (nn.Linear(width,width), nn.GELU())], nn.Linear(width,10))

def tokens(n=16, length=32): return torch.randint(1000, (n,length)),torch.randint(1000, (n,length))

TINY = {'tiny': (lambda: mlp(2, 16), lambda: (torch.randn(8,16),), (8,10))} # For a smoke run
MODELS = {'resnet18': (resnet, images, (32,10)), 'resnet18-smooth': (partial(resnet, True), images, (32,10)), 'xresnet18': (xresnet, images, (32,10)),
    'transformer': (Translator, tokens, (512,1000)), 'mlp': (mlp, lambda: (torch.randn(128,512),), (128,10))}
LARGE = {'xresnet34, 128 px': (partial(xresnet, 'xresnet34'), partial(images, 64, 128), (64,10)), # What keeps a GPU busy
    'transformer, d=512': (partial(Translator, 8000, 512), partial(tokens, 64, 64), (64*64,8000))}

def problem(name, device):
    torch.manual_seed(0)
    make,inputs,(n,classes) = {**MODELS, **LARGE, **TINY}[name]
    return make().to(device),tuple(o.to(device) for o in inputs()),torch.randint(classes, (n,), device=device)

# Contenders: a step is `kind -> None`, where kind is 'estimate' or 'other'

def trainer(model, opt_func, device, n_inp):
    "A `Learner` in the middle of training, for `one_batch`"
    dls = SimpleNamespace(device=torch.device(device), n_inp=n_inp)
    learn = Learner(dls, copy.deepcopy(model), F.cross_entropy, opt_func=opt_func, lr=LR)
    learn.training = True
    learn.remove_cbs(list(learn.cbs))
    learn.create_opt()
    return learn

class Contender:
    "A model of its own with an optimizer, trained by a `Learner`"
    kinds = ('other',)
    def __init__(self, model, xb, yb, opt_func):
        self.batch = (*xb,yb)
        self.learn = trainer(model, opt_func, yb.device, len(xb))
        self.ps,self.opt = list(self.learn.model.parameters()),self.learn.opt
    def step(self, kind): self.learn.one_batch(1, self.batch)
    def held(self):
        "Bytes of parameters, gradients and state"
        state = getattr(self.opt, 'opt', self.opt).state
        own = (getattr(p, 'hess', None) for p in self.ps) # timm's
        every = [*self.ps, *own, *(p.grad for p in self.ps), *(v for s in state.values() for v in s.values())]
        return sum(o.numel()*o.element_size() for o in {id(t): t for t in every if isinstance(t, torch.Tensor)}.values())

class Told(Every):
    "A schedule that does as it is told"
    def part(self, age): return None if self.now or age==0 else 0
    def __init__(self):
        super().__init__()
        self.now = True

class Ours(Contender):
    "An optimizer of this package, with and without an estimate"
    kinds = ('estimate','other')
    def __init__(self, model, xb, yb, opt_func):
        self.when = Told()
        super().__init__(model, xb, yb, partial(opt_func, when=self.when))
    def step(self, kind):
        self.when.now = kind=='estimate'
        super().step(kind)

class Rival(Contender):
    "Another AdaHessian in a plain loop, estimating at each step"
    kinds = ('estimate',)
    def __init__(self, model, xb, yb, opt_func):
        self.model,self.xb,self.yb = copy.deepcopy(model),xb,yb
        self.ps = list(self.model.parameters())
        self.opt = opt_func(self.ps)
    def step(self, kind):
        self.opt.zero_grad()
        with twice_differentiable(self.model): loss = F.cross_entropy(self.model(*self.xb), self.yb)
        loss.backward(create_graph=True)
        self.opt.step()
        self.opt.zero_grad() # breaks the cycles of parameter and gradient

def rivals():
    "AdaHessian of other packages, as far as they are installed"
    found = {}
    for name,module,cls in (('timm','timm.optim','Adahessian'),('torch_optimizer','torch_optimizer','Adahessian'),('pytorch_optimizer','pytorch_optimizer','AdaHessian')):
        try: found[name] = partial(Rival, opt_func=partial(getattr(importlib.import_module(module), cls), lr=LR))
        except ImportError: print(f"{name} is not installed and left out")
    return found

def contenders(name, compiled=False, only=()):
    "Contenders by name; Adam is always among them"
    every = first_order()|rivals()|own(name, compiled)
    if name=='resnet18-smooth': only = ['ours paper','ours finite_difference',*only]
    return {k: v for k,v in every.items() if not only or k in ['Adam',*only]}

def first_order():
    return {'Adam': partial(Contender, opt_func=partial(Adam, lr=LR)), 'ranger': partial(Contender, opt_func=partial(ranger, lr=LR)),
        'torch AdamW': partial(Contender, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, lr=LR))}

def own(name, compiled):
    kinds = {'ours paper': {}, 'ours forward': dict(hvp='forward'), 'ours ggn': dict(curvature='ggn', hvp='forward'),
        'ours ggn, reverse': dict(curvature='ggn'), 'ours gnb': dict(estimator='gnb')}
    if 'resnet' not in name or 'smooth' in name: kinds['ours finite_difference'] = dict(hvp='finite_difference')
    if compiled and name=='resnet18': kinds['ours compiled'] = dict(hvp='compiled')
    found = {k: partial(Ours, opt_func=partial(adahessian_paper, lr=LR, **kw)) for k,kw in kinds.items()}
    return {'ours': partial(Ours, opt_func=partial(adahessian, lr=LR)), **found}

# Measuring

class Timer:
    "Seconds of a call: CUDA events on a GPU, otherwise the wall clock or the CPU time of this process"
    def __init__(self, args): self.cuda,self.clock = args.device=='cuda',time.process_time if args.clock=='cpu' else time.perf_counter
    def __call__(self, f, *args):
        if not self.cuda:
            start = self.clock()
            f(*args)
            return self.clock()-start
        start,end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f(*args)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)/1e3

def shuffled(keys):
    "`keys` in a new order: whoever comes after a contender of its kind finds more of its code in the cache"
    return random.sample(list(keys), len(keys))

def peak_bytes(c, kind, device):
    "Largest number of bytes in tensors during a step: what was held before plus the peak of what the step allocates"
    gc.collect()
    held = c.held()
    if device=='cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        c.step(kind)
        return held+torch.cuda.max_memory_allocated()-before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof: c.step(kind)
    now = peak = 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name()=='[memory]']
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    return held+peak

def measure(name, args):
    "Rows of a model: contender, kind, seconds, ratio to Adam, bytes"
    model,xb,yb = problem(name, args.device)
    cs = {k: make(model, xb, yb) for k,make in contenders(name, args.compile, args.only).items()}
    keys,timer = [(k,kind) for k,c in cs.items() for kind in c.kinds],Timer(args)
    for k,kind in keys*(3 if args.device=='cuda' else 1): cs[k].step(kind)
    rounds = [{key: timer(cs[key[0]].step, key[1]) for key in shuffled(keys)} for _ in range(args.rounds)]
    for r in rounds:
        for k in ('ours','ours paper'):
            if k in cs: r[f'{k} update_each=10','mean'] = (r[k,'estimate']+9*r[k,'other'])/10
    rows = []
    for key in [*keys, *(k for k in rounds[0] if k not in keys)]:
        ratios = [r[key]/r['Adam','other'] for r in rounds]
        peak = peak_bytes(cs[key[0]], key[1], args.device) if key in keys else math.nan
        rows.append(dict(model=name, contender=key[0], kind=key[1], seconds=statistics.median(r[key] for r in rounds), ratio=statistics.median(ratios),
            low=min(ratios), high=max(ratios), peak_mb=peak/1e6, held_mb=cs[key[0]].held()/1e6 if key in keys else math.nan))
        print("{model:16} {contender:24} {kind:9} {seconds:8.4f} s {ratio:6.2f} x Adam ({low:.2f} to {high:.2f}) {peak_mb:8.1f} MB".format(**rows[-1]), flush=True)
    return rows

def measure_budget(name, args, budget=0.25, hessian_bs=None):
    "One row of a run with `budget`, whole periods after the measurement, each step beside one of Adam"
    model,xb,yb = problem(name, args.device)
    clock,timer = time.process_time if args.clock=='cpu' else time.perf_counter,Timer(args)
    wanted = Budget(budget, 12 if hessian_bs is None else 18, clock)
    ours,adam = (trainer(model, f, args.device, len(xb)) for f in (partial(adahessian, budget=wanted, hessian_bs=hessian_bs), Adam))
    b,pairs = ours.opt.when,[] # A copy, which is the optimizer's own
    while not b.done or len(pairs) < ours.opt.update_each[0]+2*ours.opt.update_each[1]:
        pairs.append(tuple(timer(o.one_batch, 1, (*xb,yb)) for o in (ours,adam)))
        b.begin() # the step of Adam in between is not ours
    n,k = ours.opt.update_each
    t,t0 = (statistics.mean(p[i] for p in pairs[n:n+2*k]) for i in (0,1))
    part = '' if hessian_bs is None else f", {ours.opt.hessian_bs[1]:g} of the batch"
    print(f"{name:16} budget={budget}: period {k}{part}, overhead over Adam {t/t0-1:.3f}", flush=True)
    return [dict(model=name, contender=f"ours budget={budget}"+(f", hessian_bs={hessian_bs!r}" if hessian_bs else ''), kind=f"period {k}{part}", seconds=t, ratio=t/t0)]

def measure_step(args, n=40):
    "Rows of `opt.step()` alone, on ResNet-18's tensors and on many small ones: `step` without a new diagonal, `diagonal` with one"
    rows,timer,shapes = [],Timer(args),{'step 64 small tensors': [(64,64)]*64, 'step 256 tiny tensors': [(16,16)]*256}
    if 'resnet18' in args.models: shapes = {'step resnet18': [p.shape for p in resnet().parameters()], **shapes}
    for name,ss in shapes.items():
        def params(): return [nn.Parameter(torch.randn(s, device=args.device)) for s in ss]
        made = {k: stepper(f, params()) for k,f in step_contenders().items()}
        keys = [(k,kind) for k,(_,kinds) in made.items() for kind in kinds]
        for k,kind in keys: made[k][0](kind)()
        rounds = [{(k,kind): timer(made[k][0](kind)) for k,kind in shuffled(keys)} for _ in range(4 if args.smoke else n)]
        for k,kind in keys:
            ratios = [r[k,kind]/r['Adam','step'] for r in rounds]
            rows.append(dict(model=name, contender=k, kind=kind, seconds=statistics.median(r[k,kind] for r in rounds), ratio=statistics.median(ratios),
                low=min(ratios), high=max(ratios), **{f'of_{o}': statistics.median(r[k,kind]/r[o,kind] for r in rounds) for o in rivals_of(k) if (o,kind) in keys}))
            print("{model:22} {contender:28} {kind:8} {seconds:8.5f} s {ratio:6.2f} x Adam".format(**rows[-1]), flush=True)
    return rows

def drawn(problem, ps): return [torch.rand_like(p) for p in ps]

def step_contenders():
    "Optimizers whose step alone is measured"
    def given(f): return lambda ps: f(ps, lr=LR, estimator=Given(drawn), when=Told())
    ours = {'ours': given(adahessian), 'ours paper': given(adahessian_paper), 'ours loop': given(looped), 'ours sophia': given(sophia)}
    found = {'Adam': partial(Adam, lr=LR), 'torch AdamW': partial(torch.optim.AdamW, lr=LR, foreach=True), **ours}
    try: from pytorch_optimizer import AdaHessian,SophiaH
    except ImportError: return found
    rest = dict(lr=LR, update_period=10**9, foreach=True)
    return {**found, 'pytorch_optimizer': partial(AdaHessian, weight_decay=1e-4, **rest), 'pytorch_optimizer sophia': partial(SophiaH, weight_decay=0.1, **rest)}

def rivals_of(k): return {'ours sophia': ['pytorch_optimizer sophia']}.get(k, ['pytorch_optimizer'] if k.startswith('ours') else [])

def looped(ps, **kwargs):
    "AdaHessian with a stepper that has no form for lists, so that all go one by one"
    opt = adahessian(ps, **kwargs)
    opt.cbs.append(lambda p,**kw: None)
    return opt

def stepper(make, ps):
    "`kind -> step`, a step alone that can be timed, and the kinds there are"
    opt = make(ps)
    def gradients():
        for p in ps: p.grad = torch.randn_like(p)
    if hasattr(opt, 'differentiate'): return partial(own_step, opt, ps, gradients),('step','diagonal')
    gradients()
    if not type(opt).__module__.startswith('pytorch_optimizer'): return lambda kind: opt.step,('step',)
    opt.step(hessian=drawn(None, ps))
    return lambda kind: opt.step if kind=='step' else partial(opt.step, hessian=drawn(None, ps)),('step','diagonal')

def own_step(opt, ps, gradients, kind):
    "A step of an optimizer of this package; with a diagonal it needs a loss before, which is not timed"
    opt.when.now = kind=='diagonal'
    opt.differentiate(sum(p.sum() for p in ps))
    gradients()
    return opt.step

def measure_products(name, args):
    "Rows of one Hessian product from scratch, relative to a gradient, in evaluation mode: curvlinops takes no batch norm that trains"
    model,xb,yb = problem(name, args.device)
    model.eval()
    ps,timer = list(model.parameters()),Timer(args)
    def loss():
        with twice_differentiable(model): return F.cross_entropy(model(*xb), yb)
    v = [torch.randn_like(p).sign() for p in ps]
    made = dict(gradient=lambda: torch.autograd.grad(loss(), ps), reverse=partial(hessian_product(loss, ps), v),
        forward=partial(hessian_product(loss, ps, 'forward'), v))
    if len(xb)==1: made |= product_of_curvlinops(model, ps, xb[0], yb, v)
    for f in made.values(): f()
    rounds = [{k: timer(made[k]) for k in shuffled(made)} for _ in range(args.rounds)]
    rows = [dict(model=name, contender=f"product {k}", kind='product', seconds=statistics.median(r[k] for r in rounds),
        ratio=statistics.median(r[k]/r['gradient'] for r in rounds)) for k in made]
    for r in rows: print("{model:16} {contender:24} {seconds:8.4f} s {ratio:6.2f} x gradient".format(**r), flush=True)
    return rows

def product_of_curvlinops(model, ps, x, y, v):
    try: from curvlinops import HessianLinearOperator
    except ImportError: return {}
    named = {n: p for n,p in model.named_parameters()}
    try: H = HessianLinearOperator(model, nn.CrossEntropyLoss(), named, [(x,y)], check_deterministic=False)
    except Exception: H = HessianLinearOperator(model, nn.CrossEntropyLoss(), ps, [(x,y)], check_deterministic=False)
    return {'curvlinops': lambda: H@v}

SCALES = dict(depth=(2,4,8,16,32), width=(128,256,512,1024), batch=(32,64,128,256,512), tensors=(16,64,256,1024))

def measure_scale(what, args):
    "Rows of cost against `what`, for an MLP"
    rows = []
    for n in SCALES[what][:1] if args.smoke else SCALES[what]:
        torch.manual_seed(0)
        depth,width,batch = dict(depth=(n,256,128), width=(4,n,128), batch=(4,256,n), tensors=(n//2-1,32,32))[what]
        model,xb,yb = mlp(depth, width).to(args.device),(torch.randn(batch,width,device=args.device),),torch.randint(10, (batch,),device=args.device)
        cs = {'Adam': Contender(model, xb, yb, partial(Adam, lr=LR)), 'ours': Ours(model, xb, yb, partial(adahessian_paper, lr=LR))}
        keys,timer = [(k,kind) for k,c in cs.items() for kind in c.kinds],Timer(args)
        for k,kind in keys*2: cs[k].step(kind)
        rounds = [{key: timer(cs[key[0]].step, key[1]) for key in shuffled(keys)} for _ in range(4*args.rounds)]
        for key in keys:
            rows.append(dict(scale=what, n=n, contender=key[0], kind=key[1], seconds=statistics.median(r[key] for r in rounds),
                ratio=statistics.median(r[key]/r['Adam','other'] for r in rounds), peak_mb=peak_bytes(cs[key[0]], key[1], args.device)/1e6))
            print("{scale:8} {n:5} {contender:6} {kind:9} {seconds:9.5f} s {ratio:6.2f} x Adam {peak_mb:8.1f} MB".format(**rows[-1]), flush=True)
    return rows

# Results

def where(args):
    "One line on versions and hardware"
    names = ('torch','fastai','timm','torch_optimizer','pytorch_optimizer','curvlinops-for-pytorch')
    versions = []
    for n in names:
        try: versions.append(f"{n} {importlib.metadata.version(n)}")
        except importlib.metadata.PackageNotFoundError: pass
    device = torch.cuda.get_device_name() if args.device=='cuda' else f"{cpu_name()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
    return f"{device}; Python {platform.python_version()}, {', '.join(versions)}; {args.rounds} interleaved rounds, {args.clock} clock, load {os.getloadavg()[0]:.1f} at the end"

def write_csv(path, rows):
    keys = list(dict.fromkeys(k for r in rows for k in r))
    with open(path, 'w', newline='') as f:
        w = csv.DictWriter(f, keys, lineterminator='\n')
        w.writeheader()
        for r in rows: w.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k,v in r.items()})

def goals(rows, scale, floor):
    "Goal, bound, result: each a ratio of one run; `floor` are operations relative to Adam's"
    ratio = {(r['model'],r['contender'],r['kind']): r['ratio'] for r in rows}
    peak = {(r['model'],r['contender'],r['kind']): r.get('peak_mb', math.nan) for r in rows}
    period = {(r['contender'][5:],r['model']): r['ratio'] for r in rows if 'budget' in r['contender']}
    r18 = lambda c,kind='estimate': ratio.get(('resnet18',c,kind), math.nan)
    over = lambda c,share: round(share*floor.get(c, math.nan), 2)
    others = [v for (m,c,_),v in ratio.items() if m=='resnet18' and c in ('timm','pytorch_optimizer')]
    mem = [v for (m,c,_),v in peak.items() if m=='resnet18' and c in ('timm','pytorch_optimizer')]
    p = lambda c,kind: peak.get(('resnet18',c,kind), math.nan)
    table = [('exact estimate every step (`adahessian_paper`), ResNet-18, × Adam', over('ours paper', 1.05), r18('ours paper')),
        ("the same, × the faster of timm's and pytorch_optimizer's", 1.0, r18('ours paper')/min(others) if others else math.nan),
        ('forward over reverse, compiled, × Adam', over('ours forward', 1.1), r18('ours compiled')),
        ('Gauss-Newton Hutchinson, × Adam', over('ours ggn', 1.05), r18('ours ggn')), ('Gauss-Newton-Bartlett, × Adam', over('ours gnb', 1.05), r18('ours gnb')),
        ('finite differences, smooth ResNet-18, × Adam', over('ours finite_difference', 1.05), ratio.get(('resnet18-smooth','ours finite_difference','estimate'), math.nan)),
        ('`adahessian` as it comes, after its first 20 steps, × Adam', 1.22, r18('ours update_each=10', 'mean')),
        ('`adahessian_paper` with update_each=10, × Adam', 1.22, r18('ours paper update_each=10', 'mean')),
        ('`adahessian_paper`, step without estimate, × Adam', 1.0, r18('ours paper', 'other'))]
    table += step_goals(rows)
    table += [('peak memory of an estimate, ResNet-18, × the smaller of the rivals', 1.0, p('ours paper','estimate')/min(mem) if mem else math.nan),
        ('peak memory of other steps, × Adam', 1.02, p('ours paper','other')/p('Adam','other'))]
    table += [(f"{b}, {m}: overhead", 0.27, v-1) for (b,m),v in period.items()]
    return table+[(f"growth with {w}: largest (cost ratio)/(size ratio)", 1.1, growth(scale, w)) for w in ('batch','depth') if any(r['scale']==w for r in scale)]

def step_goals(rows):
    "`opt.step()` alone against pytorch_optimizer's, which has no bounds on its step and does not look whether it is finite"
    found = {(r['model'],r['contender'],r['kind']): r for r in rows if r['model'].startswith('step ')}
    names = {'ours paper': '`adahessian_paper`', 'ours': '`adahessian`', 'ours sophia': '`sophia`'}
    table = []
    for c,name in names.items():
        for (m,k,kind),r in found.items():
            of = r.get(f'of_{rivals_of(c)[0]}', math.nan)
            if k==c: table.append((f"opt.step() of {name}{' with a new diagonal' if kind=='diagonal' else ''}, {m[5:]}, × pytorch_optimizer's", 1.0, of))
    return table

def growth(scale, what):
    "How much faster than linearly an estimate's cost grows from one size to the next, at worst"
    pts = [(r['n'],r['seconds']) for r in scale if r['scale']==what and r['kind']=='estimate']
    return max([(t2/t1)/(n2/n1) for (n1,t1),(n2,t2) in zip(pts, pts[1:])], default=math.nan)

def counted(args, name, smooth):
    "Contenders on the model `name` with their operations; differences, which need it, on `smooth`"
    model,xb,yb = problem(name, args.device)
    cs = {k: make(model, xb, yb) for k,make in contenders(name, compiled=args.compile).items() if k=='Adam' or k.startswith('ours')}
    model,xb,yb = problem(smooth, args.device)
    cs |= {k: make(model, xb, yb) for k,make in contenders(smooth).items() if 'finite' in k}
    return cs,{k: flops(c) for k,c in cs.items()}

def floors(cs, n, steps):
    "Markdown: multiplications of each kind of step relative to a step of Adam, and where the time goes"
    rows = [f"| {k} | {v/1e9:.1f} | {v/n['Adam']:.2f} |" for k,v in n.items()]
    return ['', '## The floor', '', 'Floating-point operations in matrix products and convolutions (ResNet-18, 64 px, batch 32), counted by `FlopCounterMode`. Where',
        'the ratio is near a goal, no implementation can be far below it. An exact product takes three times the operations of a gradient, and',
        'forward over reverse, compiled or not, takes them beside the forward pass that the training loop has made already.', '',
        '| step | 10⁹ operations | × Adam |', '|---|---|---|', *rows, *profile(cs, [k for k in ('Adam','ours paper','ours','ours ggn','ours gnb','ours compiled') if k in cs]), *profile_steps(steps)]

def flops(c):
    "Operations of an estimate; what is compiled is counted as it is written"
    with torch.compiler.set_stance('force_eager'):
        c.step(c.kinds[0])
        with FlopCounterMode(display=False) as counter: c.step(c.kinds[0])
    return counter.get_total_flops()

def profile(cs, names):
    "Markdown: CPU time by operation in a step of each of `names`, the first of which takes 1 in all"
    lines = ['', '## Where the time goes', '', 'CPU time by operation, a step of Adam in all = 1.', '']
    times = {k: spent(partial(cs[k].step, cs[k].kinds[0])) for k in names}
    return [*lines, *by_operation(times)]

def profile_steps(shapes):
    "Markdown: CPU time by operation of `opt.step()` alone"
    lines = ['', '## Where the time of a step alone goes', '', "64 tensors of 64×64, a step of pytorch_optimizer in all = 1; time outside of PyTorch's operations is not in it.", '']
    made = {k: stepper(f, [nn.Parameter(torch.randn(s)) for s in shapes])[0] for k,f in step_contenders().items()}
    names = [k for k in ('pytorch_optimizer','ours paper','ours','pytorch_optimizer sophia','ours sophia') if k in made]
    return [*lines, *by_operation({k: spent(made[k]('step')) for k in names})]

def by_operation(times):
    "Markdown: a row for each of the dozen operations that take longest, a column for each of `times`, whose first one takes 1 in all"
    names,lines = list(times),[]
    total = sum(times[names[0]].values())
    top = sorted({o for k in names for o in times[k]}, key=lambda o: max(times[k].get(o, 0) for k in names))[:-13:-1]
    def row(o, of): return f"| {o} | "+' | '.join(f"{of(times[k])/total:.2f}" for k in names)+' |'
    rows = [row(f"`{o}`", lambda t: t.get(o, 0)) for o in top]
    return [*lines, f"| operation | {' | '.join(names)} |", '|---'*(len(names)+1)+'|', *rows, row('all', lambda t: sum(t.values()))]

def spent(step):
    "Microseconds in a step by operation; fused loops of the compiler are one"
    for _ in range(2): step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof: step()
    found = Counter()
    for e in prof.key_averages(): found['compiled loops' if is_fused(e.key) else e.key] += e.self_cpu_time_total
    return found

def is_fused(name): return name.startswith(('graph_','cpp_fused','Torch-Compiled Region','## Call CompiledFxGraph','TorchDynamo'))

def write_goals(path, table, line, extra):
    "The table of goals against results"
    def verdict(bound, v):
        if math.isnan(v): return 'not measured'
        return 'met' if round(v, 2)<=bound else '**missed**'
    head = ['# Goals and results', '', f"Written by `python benchmarks/speed.py {shlex.join(sys.argv[1:])}`. {line}.", '', '| goal | bound | result | |', '|---|---|---|---|']
    body = [f"| {g} | ≤ {b} | {v:.2f} | {verdict(b, v)} |" for g,b,v in table]
    path.write_text('\n'.join(head+body+extra)+'\n')

def plot(path, rows, line):
    "Ratios to Adam as bars, a panel for each model"
    import matplotlib.pyplot as plt
    models = [m for m in {**MODELS, **LARGE, **TINY} if any(r['model']==m and r['kind']!='product' for r in rows)]
    fig,axs = plt.subplots(1, len(models), figsize=(4.2*len(models),4.5), squeeze=False)
    for ax,m in zip(axs[0], models):
        rs = [r for r in rows if r['model']==m and r['kind']!='product'][::-1]
        colors = ['tab:blue' if r['contender'].startswith('ours') else 'tab:gray' for r in rs]
        ax.barh([f"{r['contender']}, {r['kind']}" for r in rs], [r['ratio'] for r in rs], color=colors)
        ax.axvline(1, color='k', lw=0.8)
        ax.set(title=m, xlabel="time of a step, Adam = 1")
    fig.text(0.01, 0.01, line, fontsize=6)
    fig.tight_layout(rect=(0,0.03,1,1))
    fig.savefig(path, dpi=80)

def parse(args):
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--models', nargs='*', choices=[*MODELS,*LARGE,*TINY], help='models to measure; on a GPU large ones too')
    ap.add_argument('--only', nargs='*', default=[], help='contenders to measure, beside Adam')
    ap.add_argument('--compile', action='store_true', help="hvp='compiled' too, on ResNet-18: compiling takes minutes")
    ap.add_argument('--rounds', type=int, default=5, help='interleaved rounds')
    ap.add_argument('--device', default='cpu', choices=['cpu','cuda'])
    ap.add_argument('--clock', default='wall', choices=['wall','cpu'], help='cpu: CPU time of the process, for a machine with other work')
    ap.add_argument('--threads', type=int, default=threads(), help='CPU threads')
    ap.add_argument('--scale', nargs='*', default=list(SCALES), choices=list(SCALES), help='what to scale an MLP by')
    ap.add_argument('--name', default='', help='a word for the names of the result files')
    ap.add_argument('--skip', nargs='*', default=[], choices=['products','scale','budget'], help='what not to measure')
    ap.add_argument('--smoke', action='store_true', help='a tiny network, one round; nothing is kept')
    args = ap.parse_args(args)
    args.models = args.models or [*MODELS, *(LARGE if args.device=='cuda' else [])]
    if args.smoke: args.models,args.rounds,args.scale = ['tiny'],1,args.scale[:1]
    if args.device=='cuda' and not torch.cuda.is_available(): ap.error('there is no CUDA device here')
    return args

def main(args=None):
    args = parse(args)
    torch.set_num_threads(args.threads)
    folder,end = results_dir(args.smoke),'_cuda'*(args.device=='cuda')+f'_{args.name}'*bool(args.name)
    cs,n = counted(args, *(['tiny']*2 if args.smoke else ['resnet18','resnet18-smooth']))
    floor,extra,rows,scale = {k: v/n['Adam'] for k,v in n.items()},floors(cs, n, [(64,64)]*64),[],[]
    del cs
    for part in parts(args): # Files are written anew after each part, so that a run that is stopped leaves what it has
        (scale if part.func is measure_scale else rows).extend(part())
        line = where(args)
        write_csv(folder/f"speed{end}.csv", [{**r, 'where': line} for r in rows])
        if scale: write_csv(folder/f"scaling{end}.csv", [{**r, 'where': line} for r in scale])
        write_goals(folder/f"goals{end}.md", goals(rows, scale, floor), line, extra)
    plot(folder/f"speed{end}.png", rows, line)
    return folder

def parts(args):
    "What is measured, the dearest last"
    yield partial(measure_step, args)
    for m in args.models: yield partial(measure, m, args)
    if 'products' not in args.skip: yield from (partial(measure_products, m, args) for m in args.models if m!='resnet18-smooth')
    if 'scale' not in args.skip: yield from (partial(measure_scale, w, args) for w in args.scale)
    for m,part in (('resnet18',None), ('transformer',None), ('resnet18','auto'), ('tiny',None)):
        if m in args.models and 'budget' not in args.skip: yield partial(measure_budget, m, args, hessian_bs=part)

if __name__=='__main__': main()
