"""Seconds and memory of a training step: AdaHessian, first-order optimizers and other second-order ones, side by side in one process.

    python benchmarks/speed.py                            # everything, some 15 minutes on two cores
    python benchmarks/speed.py --models mlp --rounds 2    # a first look
    python benchmarks/speed.py --device cuda              # the same on a GPU, timed by CUDA events
    python benchmarks/speed.py --scale depth              # cost against depth, width, batch or tensors

Rounds are interleaved: in each round every contender makes its steps once, in a new order, so that whatever else the machine does hits all of them.
What is reported is the median over rounds, and the median of the ratios to fastai's Adam of the same round.
The rivals (timm, torch_optimizer, pytorch_optimizer, curvlinops-for-pytorch) are left out where they are not installed."""
import argparse,copy,csv,gc,importlib,importlib.metadata,math,os,platform,random,statistics,sys,time,warnings
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

warnings.filterwarnings('ignore')
import torch,torch.nn.functional as F
from fastai.learner import Learner
from fastai.optimizer import Adam,OptimWrapper,ranger
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adahessian_fastai.adahessian import adahessian
from adahessian_fastai.budget import Budget
from adahessian_fastai.closure import replaying
from adahessian_fastai.estimators import Evaluation
from adahessian_fastai.hvp import hessian_product
from adahessian_fastai.learner import twice_differentiable

RESULTS = Path(__file__).parent/'results'
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

def xresnet():
    from fastai.vision.models.xresnet import xresnet18
    return xresnet18(n_out=10)

class Translator(nn.Module):
    "2+2 layers of `nn.Transformer`, d=256"
    def __init__(self, vocab=1000, d=256):
        super().__init__()
        self.embed,self.head = nn.Embedding(vocab, d),nn.Linear(d, vocab)
        self.body = nn.Transformer(d, 8, 2, 2, 4*d, activation='gelu', batch_first=True)
    def forward(self, src, tgt): return self.head(self.body(self.embed(src), self.embed(tgt))).flatten(0,1)

def mlp(depth=3, width=512): return nn.Sequential(*[o for i in range(depth) for o in (nn.Linear(width,width), nn.GELU())], nn.Linear(width,10))

def tokens(n=16, length=32): return torch.randint(1000, (n,length)),torch.randint(1000, (n,length))

MODELS = {'resnet18': (resnet, images, (32,10)), 'resnet18-smooth': (partial(resnet, True), images, (32,10)), 'xresnet18': (xresnet, images, (32,10)),
    'transformer': (Translator, tokens, (512,1000)), 'mlp': (mlp, lambda: (torch.randn(128,512),), (128,10))}

def problem(name, device):
    torch.manual_seed(0)
    make,inputs,(n,classes) = MODELS[name]
    return make().to(device),tuple(o.to(device) for o in inputs()),torch.randint(classes, (n,), device=device)

# Contenders: a step is `kind -> None`, where kind is 'estimate' or 'other'

class Contender:
    "A model of its own with an optimizer"
    kinds = ('other',)
    def __init__(self, model, xb, yb, opt_func):
        self.model,self.xb,self.yb = copy.deepcopy(model),xb,yb
        self.ps = list(self.model.parameters())
        self.opt = opt_func(self.ps)
    def loss(self): return F.cross_entropy(self.model(*self.xb), self.yb)
    def step(self, kind):
        self.opt.zero_grad()
        self.loss().backward()
        self.opt.step()
    def held(self):
        "Bytes of parameters, gradients and state"
        state = getattr(self.opt, 'opt', self.opt).state
        own = (getattr(p, 'hess', None) for p in self.ps) # timm's
        every = [*self.ps, *own, *(p.grad for p in self.ps), *(v for s in state.values() for v in s.values())]
        return sum(o.numel()*o.element_size() for o in {id(t): t for t in every if isinstance(t, torch.Tensor)}.values())

class Rival(Contender):
    "Another AdaHessian, estimating at each step"
    kinds = ('estimate',)
    def step(self, kind):
        self.opt.zero_grad()
        with twice_differentiable(self.model): loss = self.loss()
        loss.backward(create_graph=True)
        self.opt.step()
        self.opt.zero_grad() # breaks the cycles of parameter and gradient

class Ours(Contender):
    "AdaHessian of this package, as a Learner calls it"
    kinds = ('estimate','other')
    def step(self, kind):
        opt = self.opt
        opt.n_steps,opt.update_each = (0,1) if kind=='estimate' else (1,10**9)
        opt.zero_grad()
        opt.looked_at = True # the look at the first batch is not a part of a step
        with opt.forward_context(SimpleNamespace(model=self.model)):
            out = self.model(*self.xb)
            at = Evaluation(F.cross_entropy(out, self.yb), out, self.yb, F.cross_entropy, model=self.model, inputs=self.xb)
            if opt.ride: at.jvp = opt.ride.read(out)
            def again(twice=False):
                with replaying(opt.before),twice_differentiable(self.model) if twice else nullcontext(): return self.loss()
            at.again = again
            opt.differentiate(at.loss, at=at)
            opt.step()

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
    if name=='resnet18-smooth': only = ['ours','ours finite_difference',*only]
    return {k: v for k,v in every.items() if not only or k in ['Adam',*only]}

def first_order():
    return {'Adam': partial(Contender, opt_func=partial(Adam, lr=LR)), 'ranger': partial(Contender, opt_func=partial(ranger, lr=LR)),
        'torch AdamW': partial(Contender, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, lr=LR))}

def own(name, compiled):
    kinds = {'ours': {}, 'ours forward': dict(hvp='forward'), 'ours ggn': dict(curvature='ggn', hvp='forward'), 'ours ggn, reverse': dict(curvature='ggn'), 'ours gnb': dict(estimator='gnb')}
    if name not in ('resnet18','xresnet18'): kinds['ours finite_difference'] = dict(hvp='finite_difference')
    if compiled and name=='resnet18': kinds['ours compiled'] = dict(hvp='compiled')
    return {k: partial(Ours, opt_func=partial(adahessian, lr=LR, **kw)) for k,kw in kinds.items()}

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
        if 'ours' in cs: r['ours update_each=10','mean'] = (r['ours','estimate']+9*r['ours','other'])/10
    rows = []
    for key in [*keys, *(k for k in rounds[0] if k not in keys)]:
        ratios = [r[key]/r['Adam','other'] for r in rounds]
        peak = peak_bytes(cs[key[0]], key[1], args.device) if key in keys else math.nan
        rows.append(dict(model=name, contender=key[0], kind=key[1], seconds=statistics.median(r[key] for r in rounds), ratio=statistics.median(ratios),
            low=min(ratios), high=max(ratios), peak_mb=peak/1e6, held_mb=cs[key[0]].held()/1e6 if key in keys else math.nan))
        print("{model:16} {contender:24} {kind:9} {seconds:8.4f} s {ratio:6.2f} x Adam ({low:.2f} to {high:.2f}) {peak_mb:8.1f} MB".format(**rows[-1]), flush=True)
    return rows

def trainer(model, opt_func, args, n_inp):
    "A `Learner` in the middle of training, for `one_batch`"
    dls = SimpleNamespace(device=torch.device(args.device), n_inp=n_inp)
    learn = Learner(dls, copy.deepcopy(model), F.cross_entropy, opt_func=opt_func, lr=LR)
    learn.training = True
    learn.remove_cbs(list(learn.cbs))
    learn.create_opt()
    return learn

def measure_budget(name, args, budget=0.25, hessian_bs=None):
    "Row of a run with `budget`, whole periods after the measurement, each step beside one of Adam"
    model,xb,yb = problem(name, args.device)
    clock,timer = time.process_time if args.clock=='cpu' else time.perf_counter,Timer(args)
    b = Budget(budget, 12 if hessian_bs is None else 18, clock)
    ours,adam = (trainer(model, f, args, len(xb)) for f in (partial(adahessian, budget=b, hessian_bs=hessian_bs), Adam))
    pairs = []
    while not b.done or len(pairs) < ours.opt.update_each[0]+2*ours.opt.update_each[1]:
        pairs.append(tuple(timer(o.one_batch, 0, (*xb,yb)) for o in (ours,adam)))
        if not b.done: b.last = clock() # the step of Adam in between is not ours
    n,k = ours.opt.update_each
    t,t0 = (statistics.mean(p[i] for p in pairs[n:n+2*k]) for i in (0,1))
    part = '' if hessian_bs is None else f", {ours.opt.hessian_bs[1]:g} of the batch"
    print(f"{name:16} budget={budget}: period {k}{part}, overhead over Adam {t/t0-1:.3f}", flush=True)
    return dict(model=name, contender=f"ours budget={budget}"+(f", hessian_bs={hessian_bs!r}" if hessian_bs else ''), kind=f"period {k}{part}", seconds=t, ratio=t/t0)

def measure_step(args, n=20):
    "Rows of `opt.step()` alone, on ResNet-18's tensors and on as many small ones"
    rows,timer = [],Timer(args)
    for name,shapes in {'step resnet18': [p.shape for p in resnet().parameters()], 'step 64 small tensors': [(64,64)]*64}.items():
        def params(): return [nn.Parameter(torch.randn(s, device=args.device)) for s in shapes]
        made = {'Adam': Adam(params(), lr=LR), 'ours': adahessian(params(), lr=LR, update_each=10**9), 'ours loop': adahessian(params(), lr=LR, update_each=10**9)}
        made['torch AdamW'] = torch.optim.AdamW(params(), lr=LR, foreach=True)
        made['ours loop'].opt.cbs.append(lambda p,**kw: None)
        made |= step_of_rival(params)
        for o in made.values(): ready(o)
        rounds = [{k: timer(made[k].step) for k in shuffled(made)} for _ in range(n)]
        for k in made:
            ratios = [r[k]/r['Adam'] for r in rounds]
            rows.append(dict(model=name, contender=k, kind='step', seconds=statistics.median(r[k] for r in rounds), ratio=statistics.median(ratios),
                low=min(ratios), high=max(ratios), ours=statistics.median(r['ours']/r[k] for r in rounds)))
            print("{model:22} {contender:20} {seconds:8.5f} s {ratio:6.2f} x Adam".format(**rows[-1]), flush=True)
    return rows

def ready(opt):
    "Gradients, and a first estimate where one is needed"
    ps = [p for pl in opt.param_lists for p in pl] if hasattr(opt, 'param_lists') else [p for g in opt.param_groups for p in g['params']]
    for p in ps: p.grad = torch.randn_like(p)
    if hasattr(opt, 'diags'): opt.diags = {p: torch.rand_like(p) for p in ps}
    opt.step(hessian=[torch.rand_like(p) for p in ps]) if type(opt).__module__.startswith('pytorch_optimizer') else opt.step()

def step_of_rival(params):
    try: from pytorch_optimizer import AdaHessian
    except ImportError: return {}
    return {'pytorch_optimizer': AdaHessian(params(), lr=LR, weight_decay=1e-4, update_period=10**9, foreach=True)}

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
    for n in SCALES[what]:
        torch.manual_seed(0)
        depth,width,batch = dict(depth=(n,256,128), width=(4,n,128), batch=(4,256,n), tensors=(n//2-1,32,32))[what]
        model,xb,yb = mlp(depth, width).to(args.device),(torch.randn(batch,width,device=args.device),),torch.randint(10, (batch,),device=args.device)
        cs = {'Adam': Contender(model, xb, yb, partial(Adam, lr=LR)), 'ours': Ours(model, xb, yb, partial(adahessian, lr=LR))}
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
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor()) if os.path.exists('/proc/cpuinfo') else platform.processor()
    device = torch.cuda.get_device_name() if args.device=='cuda' else f"{cpu}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
    return f"{device}; Python {platform.python_version()}, {', '.join(versions)}; {args.rounds} interleaved rounds, {args.clock} clock, load {os.getloadavg()[0]:.1f} at the end"

def write_csv(path, rows):
    keys = list(dict.fromkeys(k for r in rows for k in r))
    with open(path, 'w', newline='') as f:
        w = csv.DictWriter(f, keys, lineterminator='\n')
        w.writeheader()
        for r in rows: w.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k,v in r.items()})

def goals(rows, scale):
    "Goal, bound, result: each a ratio of one run"
    ratio = {(r['model'],r['contender'],r['kind']): r['ratio'] for r in rows}
    peak = {(r['model'],r['contender'],r['kind']): r.get('peak_mb', math.nan) for r in rows}
    period = {(r['contender'][5:],r['model']): r['ratio'] for r in rows if 'budget' in r['contender']}
    r18 = lambda c,kind='estimate': ratio.get(('resnet18',c,kind), math.nan)
    others = [v for (m,c,_),v in ratio.items() if m=='resnet18' and c in ('timm','pytorch_optimizer')]
    mem = [v for (m,c,_),v in peak.items() if m=='resnet18' and c in ('timm','pytorch_optimizer')]
    step = {(r['model'],r['contender']): r['ours'] for r in rows if r['kind']=='step'}
    p = lambda c,kind: peak.get(('resnet18',c,kind), math.nan)
    table = [('exact estimate every step, ResNet-18, × Adam', 3.0, r18('ours')),
        ("the same, × the faster of timm's and pytorch_optimizer's", 0.8, r18('ours')/min(others) if others else math.nan),
        ('forward over reverse, compiled, × Adam', 2.5, r18('ours compiled')),
        ('Gauss-Newton Hutchinson, × Adam', 2.4, r18('ours ggn')), ('Gauss-Newton-Bartlett, × Adam', 1.7, r18('ours gnb')),
        ('finite differences, smooth ResNet-18, × Adam', 2.1, ratio.get(('resnet18-smooth','ours finite_difference','estimate'), math.nan)),
        ('update_each=10, × Adam', 1.25, r18('ours update_each=10', 'mean')), ('step without estimate, × Adam', 1.0, r18('ours', 'other'))]
    table += [(f"opt.step() alone, {m[5:]}, × {c}", 1.0, step.get((m,c), math.nan)) for m in ('step resnet18','step 64 small tensors') for c in ('Adam','pytorch_optimizer')]
    table += [('peak memory of an estimate, ResNet-18, × the smaller of the rivals', 1.0, p('ours','estimate')/min(mem) if mem else math.nan),
        ('peak memory of other steps, × Adam', 1.02, p('ours','other')/p('Adam','other'))]
    table += [(f"{b}, {m}: overhead", 0.27 if 'auto' in b else (0.20,0.27), v-1) for (b,m),v in period.items()]
    return table+[(f"growth with {w}: largest (cost ratio)/(size ratio)", 1.1, growth(scale, w)) for w in ('batch','depth') if any(r['scale']==w for r in scale)]

def growth(scale, what):
    "How much faster than linearly an estimate's cost grows from one size to the next, at worst"
    pts = [(r['n'],r['seconds']) for r in scale if r['scale']==what and r['kind']=='estimate']
    return max((t2/t1)/(n2/n1) for (n1,t1),(n2,t2) in zip(pts, pts[1:]))

def floors(args):
    "Markdown: multiplications of each kind of step relative to a step of Adam, and where an exact estimate spends its time"
    model,xb,yb = problem('resnet18', args.device)
    cs = {k: make(model, xb, yb) for k,make in contenders('resnet18', compiled=True).items() if k=='Adam' or k.startswith('ours')}
    model,xb,yb = problem('resnet18-smooth', args.device)
    cs |= {k: make(model, xb, yb) for k,make in contenders('resnet18-smooth').items() if 'finite' in k}
    n = {k: flops(c) for k,c in cs.items()}
    rows = [f"| {k} | {v/1e9:.1f} | {v/n['Adam']:.2f} |" for k,v in n.items()]
    return ['', '## The floor', '', 'Floating-point operations in matrix products and convolutions (ResNet-18, 64 px, batch 32), counted by `FlopCounterMode`. Where',
        'the ratio is near a goal, no implementation can be far below it. An exact product takes three times the operations of a gradient, and',
        'forward over reverse, compiled or not, takes them beside the forward pass that the training loop has made already.', '',
        '| step | 10⁹ operations | × Adam |', '|---|---|---|', *rows, *profile(cs, ['Adam','ours']+['ours compiled']*args.compile)]

def flops(c):
    "Operations of an estimate; what is compiled is counted as it is written"
    with torch.compiler.set_stance('force_eager'):
        c.step(c.kinds[0])
        with FlopCounterMode(display=False) as counter: c.step(c.kinds[0])
    return counter.get_total_flops()

def profile(cs, names):
    "Markdown: CPU time by operation in a step of each of `names`, the first of which takes 1 in all"
    lines = ['', '## Where the time goes', '', 'CPU time by operation, a step of Adam in all = 1.', '']
    times = {k: spent(cs[k]) for k in names}
    total = sum(times[names[0]].values())
    top = sorted({o for k in names for o in times[k]}, key=lambda o: max(times[k].get(o, 0) for k in names))[:-13:-1]
    def row(o, of): return f"| {o} | "+' | '.join(f"{of(times[k])/total:.2f}" for k in names)+' |'
    rows = [row(f"`{o}`", lambda t: t.get(o, 0)) for o in top]
    return [*lines, f"| operation | {' | '.join(names)} |", '|---'*(len(names)+1)+'|', *rows, row('all', lambda t: sum(t.values()))]

def spent(c):
    "Microseconds in a step by operation; fused loops of the compiler are one"
    for _ in range(2): c.step(c.kinds[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof: c.step(c.kinds[0])
    found = Counter()
    for e in prof.key_averages(): found['compiled loops' if is_fused(e.key) else e.key] += e.self_cpu_time_total
    return found

def is_fused(name): return name.startswith(('graph_','cpp_fused','Torch-Compiled Region','## Call CompiledFxGraph','TorchDynamo'))

def write_goals(path, rows, scale, line, extra):
    "The table of goals against results"
    def verdict(bound, v):
        if math.isnan(v): return 'not measured'
        return 'met' if (bound[0]<=round(v, 2)<=bound[1] if isinstance(bound, tuple) else round(v, 2)<=bound) else '**missed**'
    head = ['# Goals and results', '', f"Written by `python benchmarks/speed.py {' '.join(sys.argv[1:])}`. {line}.", '', '| goal | bound | result | |', '|---|---|---|---|']
    body = [f"| {g} | {'{} to {}'.format(*b) if isinstance(b, tuple) else f'≤ {b}'} | {v:.2f} | {verdict(b, v)} |" for g,b,v in goals(rows, scale)]
    path.write_text('\n'.join(head+body+extra)+'\n')

def plot(path, rows, line):
    "Ratios to Adam as bars, a panel for each model"
    import matplotlib.pyplot as plt
    models = [m for m in MODELS if any(r['model']==m and r['kind']!='product' for r in rows)]
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

def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--models', nargs='*', default=list(MODELS), choices=list(MODELS), help='models to measure')
    ap.add_argument('--only', nargs='*', default=[], help='contenders to measure, beside Adam')
    ap.add_argument('--compile', action='store_true', help="hvp='compiled' too, on ResNet-18: compiling takes minutes")
    ap.add_argument('--rounds', type=int, default=5, help='interleaved rounds')
    ap.add_argument('--device', default='cpu', choices=['cpu','cuda'])
    ap.add_argument('--clock', default='wall', choices=['wall','cpu'], help='cpu: CPU time of the process, for a machine with other work')
    ap.add_argument('--threads', type=int, default=int(os.environ.get('OMP_NUM_THREADS', 1)), help='CPU threads')
    ap.add_argument('--scale', nargs='*', default=list(SCALES), choices=list(SCALES), help='what to scale an MLP by')
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    if args.device=='cuda' and not torch.cuda.is_available(): ap.error('there is no CUDA device here')
    rows = measure_step(args)
    for m in args.models: rows += measure(m, args)+(measure_products(m, args) if m!='resnet18-smooth' else [])
    rows += [measure_budget(m, args, hessian_bs=part) for m,part in (('resnet18',None), ('transformer',None), ('resnet18','auto')) if m in args.models]
    scale = [r for w in args.scale for r in measure_scale(w, args)]
    RESULTS.mkdir(exist_ok=True)
    end,line = '' if args.device=='cpu' else '_cuda',where(args)
    write_csv(RESULTS/f"speed{end}.csv", [{**r, 'where': line} for r in rows])
    if scale: write_csv(RESULTS/f"scaling{end}.csv", [{**r, 'where': line} for r in scale])
    write_goals(RESULTS/f"goals{end}.md", rows, scale, line, floors(args))
    plot(RESULTS/f"speed{end}.png", rows, line)

if __name__=='__main__': main()
