"""Hessian-free: cost of products, evaluations, memory, and a deep autoencoder against Adam and L-BFGS

    python benchmarks/hessian_free.py products evaluations memory autoencoder --seconds 10
    python benchmarks/hessian_free.py --smoke    # does it run? Seconds, and nothing is kept

Writes `results/hessian_free_*.csv` and `.png` beside this file. One thread. `backpack-for-pytorch` and `curvlinops-for-pytorch` are compared where they are installed.
The committed results were measured on a shared machine of two cores while other jobs ran (load 5 to 9): so times are processor times of
the one thread, not of the clock, and ratios of interleaved timings mean more than milliseconds. The rows of BackPACK and curvlinops in
the table of products are from an earlier run and relative to the gradient of that run.
"""
import argparse, csv, math, os, subprocess, sys, time, warnings
from functools import partial
from pathlib import Path
from _common import results_dir
import torch, torch.nn.functional as F
from torch import nn

def write(name, rows, args):
    "Write `rows`, dicts with the same keys, as CSV, and show them"
    with open(args.out_dir/f'hessian_free_{name}.csv', 'w', newline='') as f:
        w = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
        w.writeheader()
        w.writerows(rows)
    for r in rows: print(name, r, flush=True)

# --- products

def mlp(*sizes, act=nn.Tanh):
    "Linear layers with `act` between them"
    layers = [o for a,b in zip(sizes, sizes[1:]) for o in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1])

def cnn():
    convs = [o for a,b,s in ((3,32,1),(32,64,2),(64,128,2)) for o in (nn.Conv2d(a, b, 3, stride=s, padding=1), nn.ReLU())]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))

problems = dict(mlp_26k=(lambda: mlp(64, 128, 128, 10), (512,64)), mlp_1_8M=(lambda: mlp(784, 1000, 1000, 10), (512,784)), cnn_95k=(cnn, (64,3,32,32)))

def our_products(model, params, x, y):
    "Products of this package, by name"
    from adahessian_fastai.ggn import dual_jvp, ggn_product, linear_jvp, model_forward
    from adahessian_fastai.hvp import gradient, graph_product
    fwd,z = model_forward(model, params, x),model(x)
    loss = F.cross_entropy(z, y)
    linear = linear_jvp(fwd, params)
    ways = dict(reverse=None, dual=dual_jvp(fwd, params), linearize=linear)
    res = {f'ggn {k}':ggn_product(z, loss, params, jvp=v) for k,v in ways.items()}
    z2 = model(x)
    res['hessian'] = graph_product(gradient(F.cross_entropy(z2, y), params, create_graph=True), params)
    return res

def by_the_model(model, x, y, n=30, steps=3):
    "Processor time of a product in steps of the optimizer, `n` in each, starts of the way and vector operations included; and the way it chose"
    from adahessian_fastai.hessian_free import hessian_free
    opt,spent = hessian_free(model.parameters(), cg_max_iter=n, martens_eps=0, cg_tol=0., x0_decay=0., backtracking=False),[]
    solve = opt.solve
    def timed(*args):
        tic = time.process_time()
        try: return solve(*args)
        finally: spent.append((time.process_time()-tic)/n)
    opt.solve = timed
    def closure():
        z = model(x)
        return F.cross_entropy(z, y), z
    for _ in range(2+steps): opt.step(closure, module=model)
    return sorted(spent[2:])[steps//2],opt.curvature.by_cost(model, n, opt.curvature.costs)[0]

def other_products(model, params, x, y):
    "Products of other packages, where they are installed"
    res,loss_func = {},nn.CrossEntropyLoss()
    try:
        from backpack.hessianfree.ggnvp import ggn_vector_product
        z = model(x)
        loss = loss_func(z, y)
        res['backpack ggn'] = lambda v: ggn_vector_product(loss, z, model, v)
    except ImportError: pass
    try:
        from curvlinops import GGNLinearOperator
        G = GGNLinearOperator(model, loss_func, params, [(x,y)], check_deterministic=False)
        res['curvlinops ggn'] = lambda v: G@v
    except ImportError: pass
    return res

def products(args):
    "Median cost of a product in gradients, timings interleaved"
    rows = []
    for name,(make,shape) in dict(list(problems.items())[:args.n_problems]).items():
        torch.manual_seed(0)
        model,x = make(),torch.randn(*shape)
        params,y = list(model.parameters()),torch.randint(0, 10, shape[:1])
        runs = {**our_products(model, params, x, y), **other_products(model, params, x, y)}
        v,times = [torch.randn_like(p) for p in params],{k:[] for k in ['gradient',*runs]}
        want = torch.cat([o.flatten() for o in runs['ggn reverse'](v)])
        for k,run in runs.items():
            got = torch.cat([o.flatten() for o in run(v)])
            if k!='hessian': assert torch.allclose(got, want, rtol=1e-3, atol=1e-5), k
        for _ in range(args.repeats):
            for k in times:
                tic = time.process_time()
                torch.autograd.grad(F.cross_entropy(model(x), y), params) if k=='gradient' else runs[k](v)
                times[k].append(time.process_time()-tic)
        mid = lambda k: sorted(times[k])[args.repeats//2]
        n = sum(p.numel() for p in params)
        cost,way = by_the_model(model, x, y)
        times[f'ggn in 30 iterations of a step, by {way}'] = [cost]*args.repeats
        rows += [dict(problem=name, parameters=n, product=k, gradients=round(mid(k)/mid('gradient'), 2), ms=round(1e3*mid(k), 2)) for k in times]
    write('products', rows, args)

# --- evaluations of the loss

def digits():
    from sklearn.datasets import load_digits
    X,y = load_digits(return_X_y=True)
    return torch.tensor(X/16).float(),torch.tensor(y)

def evaluations(args):
    "Evaluations and CG iterations of full-batch steps on digits"
    from adahessian_fastai.hessian_free import hessian_free
    x,y = digits()
    rows = []
    for kwargs in (dict(), dict(x0_decay=0.), dict(precondition=True), dict(curvature='hessian'), dict(keep_iterates=None)):
        torch.manual_seed(0)
        model = mlp(64, 128, 128, 10)
        opt,calls = hessian_free(model.parameters(), **kwargs),[]
        def closure():
            calls.append(1)
            z = model(x)
            return F.cross_entropy(z, y), z
        for _ in range(args.steps): loss = opt.step(closure, module=model)
        rs = opt.record
        rows.append(dict(settings=str(kwargs), loss=f'{loss:.1e}', forwards_per_step=len(calls)/args.steps,
            cg_iterations=sum(r['n_iter'] for r in rs), max_damping=max(r['damping'] for r in rs)))
    write('evaluations', rows, args)

# --- memory

def resident(): return int(Path('/proc/self/statm').read_text().split()[1])*4096

def memory_of(kind, kwargs):
    "Peak of resident memory over that after a warm-up at a hundredth of the size, in sizes of the parameters; runs in a process of its own"
    import threading
    from adahessian_fastai.hessian_free import hessian_free
    def hf(params, lr): return hessian_free(params, lr=lr, cg_max_iter=28, martens_eps=0, cg_tol=0., **kwargs)
    make = dict(hf=hf, sgd=torch.optim.SGD, adam=torch.optim.Adam)[kind]
    def train(width, steps):
        model,x,y = mlp(784, width, width, 10),torch.randn(512, 784),torch.randint(0, 10, (512,))
        opt = make(model.parameters(), lr=1. if kind=='hf' else 1e-3)
        def closure():
            z = model(x)
            return F.cross_entropy(z, y), z
        for _ in range(steps):
            if kind=='hf': opt.step(closure, module=model)
            else:
                opt.zero_grad()
                closure()[0].backward()
                opt.step()
        return sum(p.numel() for p in model.parameters())
    train(20, 2)
    base,peak,stop = resident(),[0],threading.Event()
    def watch():
        while not stop.wait(.001): peak[0] = max(peak[0], resident())
    t = threading.Thread(target=watch)
    t.start()
    n = train(2000, 3)
    stop.set()
    t.join()
    return (peak[0]-base)/4/n

def memory(args):
    "Peak memory of training steps on 5.6M parameters, 28 CG iterations"
    rows = []
    settings = {}, dict(keep_graph=False), dict(keep_iterates=8), dict(keep_iterates=None), dict(precondition=True), dict(x0_decay=0., keep_iterates=3)
    for kind,kwargs in (('sgd',{}), ('adam',{}), *(('hf',o) for o in settings)):
        cmd = [sys.executable, '-W', 'ignore', __file__, 'memory_of', '--kind', kind, '--kwargs', repr(kwargs)]
        out = subprocess.run(cmd, capture_output=True, text=True, env={**os.environ, 'MALLOC_MMAP_THRESHOLD_':'1000000'})
        rows.append(dict(optimizer=kind, settings=str(kwargs), parameter_sizes=round(float(out.stdout.split()[-1]), 1)))
    write('memory', rows, args)

# --- autoencoder

def autoencoder(act=nn.Tanh):
    "Layers with Xavier's initial weights"
    model = mlp(64, 200, 100, 50, 30, 50, 100, 200, 64, act=act)
    for l in model:
        if not isinstance(l, nn.Linear): continue
        nn.init.xavier_normal_(l.weight)
        nn.init.zeros_(l.bias)
    return model

@torch.no_grad()
def sparse_init(model):
    "Martens 2010, section 5: 15 weights into each unit from a unit normal, the rest and the biases zero"
    for l in model:
        if not isinstance(l, nn.Linear): continue
        l.weight.zero_()
        l.bias.zero_()
        for r in l.weight: r[torch.randperm(len(r))[:15]] = torch.randn(min(15, len(r)))

def one_cycle(share):
    "Factor on the learning rate after a share of the time: up for a quarter of it, then down along a cosine"
    return share*4+1e-3 if share<.25 else .5+.5*math.cos(math.pi*(min(share, 1.)-.25)/.75)

def bce(o, t): return F.binary_cross_entropy_with_logits(o, t, reduction='sum')/len(t)

def hf_trainer(model, x, share=.25, **kwargs):
    "`epoch(time)` of Hessian-free: gradient and trials on all images, curvature on a share of them, drawn for each step"
    from adahessian_fastai.hessian_free import hessian_free
    opt = hessian_free(model.parameters(), **kwargs)
    def epoch(time):
        i = torch.randperm(len(x))[:round(share*len(x))]
        opt.acc_step(model, bce, [(x,x)], curv_data=[(x[i],x[i])])
    return epoch

def torch_trainer(model, x, opt, bs, lr=None):
    "`epoch(time)` of an optimizer of PyTorch; `lr` is the top of one cycle"
    def epoch(time):
        for g in opt.param_groups: g['lr'] = lr*one_cycle(time) if lr else g['lr']
        for i in torch.randperm(len(x)).split(bs):
            def closure():
                opt.zero_grad()
                l = bce(model(x[i]), x[i])
                l.backward()
                return l
            opt.step(closure)
    return epoch

def adam(model, x, lr=3e-3): return torch_trainer(model, x, torch.optim.Adam(model.parameters(), lr=lr), 128)
def adam_one_cycle(model, x, lr=1e-2): return torch_trainer(model, x, torch.optim.Adam(model.parameters()), 64, lr=lr)
def lbfgs(model, x):
    opt = torch.optim.LBFGS(model.parameters(), max_iter=20, history_size=20, line_search_fn='strong_wolfe', tolerance_change=0.)
    return torch_trainer(model, x, opt, len(x))

trainers = dict(hf=partial(hf_trainer, martens_eps=2e-3), adam=adam, adam_one_cycle=adam_one_cycle, lbfgs=lbfgs)

def train_autoencoder(name, seed, x, seconds, act=nn.Tanh, init=None):
    "Reconstruction error over time: `[(seconds, error)]`"
    torch.manual_seed(seed)
    model = autoencoder(act)
    if init: init(model)
    epoch,curve,spent = trainers[name](model, x),[],0.
    while spent<seconds:
        tic = time.process_time()
        epoch(spent/seconds)
        spent += time.process_time()-tic
        with torch.no_grad(): curve.append((spent, ((model(x).sigmoid()-x)**2).sum(1).mean().item()))
    return curve

def autoencoder_runs(args):
    "Reconstruction error of a deep autoencoder on digits for the same processor time, and its plot"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    x,_ = digits()
    curves = {}
    for s in range(args.seeds):
        for n in trainers:
            curves[n,s] = train_autoencoder(n, s, x, args.seconds)
            print(n, s, curves[n,s][-1], flush=True)
    half = {k: next(e for t,e in c if t>=args.seconds/2) for k,c in curves.items()}
    write('autoencoder', [dict(optimizer=n, seed=s, cpu_seconds=args.seconds, epochs=len(c), error=round(c[-1][1], 4), half_time_error=round(half[n,s], 4))
        for (n,s),c in sorted(curves.items())], args)
    fig,ax = plt.subplots(figsize=(7,4))
    for (n,s),c in curves.items(): ax.plot(*zip(*c), color=f'C{list(trainers).index(n)}', label=n if s==0 else None, lw=1)
    ax.set(yscale='log', xlabel='processor seconds, one thread', ylabel='squared error per image', title='Autoencoder 64-200-100-50-30-…-64 on digits')
    ax.legend()
    fig.savefig(args.out_dir/'hessian_free_autoencoder.png', dpi=80, bbox_inches='tight')

def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='*', help='of products, evaluations, memory, autoencoder; all by default')
    parser.add_argument('--seconds', type=float, default=10, help='processor time of each autoencoder run')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--repeats', type=int, default=15, help='timings of each product')
    parser.add_argument('--kind', default='hf')
    parser.add_argument('--kwargs', default='{}')
    parser.add_argument('--steps', type=int, default=25, help='of which evaluations are counted')
    parser.add_argument('--smoke', action='store_true', help='the smallest problem, a step or an epoch of each')
    args = parser.parse_args(args)
    every = ['products','evaluations','memory','autoencoder']
    if odd := set(args.parts)-{*every,'memory_of'}: parser.error(f'there is no {sorted(odd)[0]}, only {every}')
    args.parts = args.parts or every
    args.n_problems,args.out_dir = 1 if args.smoke else len(problems),results_dir(args.smoke)
    if args.smoke: args.parts,args.seconds,args.seeds,args.repeats,args.steps = ['products','evaluations','autoencoder'],1e-3,1,1,1
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    for part in args.parts:
        if part=='memory_of': print(memory_of(args.kind, eval(args.kwargs)))
        else: dict(products=products, evaluations=evaluations, memory=memory, autoencoder=autoencoder_runs)[part](args)

if __name__=='__main__': main()
