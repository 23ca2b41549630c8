"""Three fair comparisons of Adam and AdaHessian, and the way there: nobody tuned, both tuned, equal time.

    python benchmarks/equal_time.py                       # digits and a table: minutes on one core
    python benchmarks/equal_time.py captions unet         # an hour; also imagenette_quarter, multi30k_quarter, transfer
    python benchmarks/equal_time.py --report              # the tables and pictures of what the file holds
    python benchmarks/equal_time.py --smoke               # does it run? Seconds, and nothing is kept

*Nobody tuned*: fastai's Adam at fastai's rate of 1e-3, and `adahessian` as it comes, for as many epochs. *Both tuned*: each at the best of four rates that lie half a decade apart, for as many epochs. *Equal time*:
`adahessian` as it comes, and Adam at its best rate for as many epochs as it makes in that time, with a schedule that is as long. A variant of AdaHessian is drawn beside them as it comes: `gnb`, the cheapest, or the one that
was far better in `defaults_….csv`. Rates are chosen at the first seed, on the very data that is reported, for both alike. The names are those of `defaults.py`. `results/equal_time.csv` has a row for each epoch; seconds are CPU time of
one thread in training alone. Two means tie where they lie no further apart than the larger of the two standard deviations."""
import argparse,math

import pandas as pd,torch
from _common import append,machine,results_dir,threads
from defaults import PROBLEMS
from fastai.callback.core import Callback
from fastai.optimizer import Adam
from functools import partial
from training import Clock
from transfer import own_rate

from adahessian_fastai.adahessian import adahessian
from adahessian_fastai.learner import lr_of_run,steps_of_run

ENTRIES = dict(Adam=Adam, adahessian=adahessian, own=adahessian) # `own`: at its own rate
OURS = (0.063,0.2,0.63,2.) # Rates for AdaHessian; those for Adam are the problem's
VARIANTS = {'signed': dict(signed=True), 'signed_blocks': dict(signed_blocks=True), 'debiased, n_samples=2': dict(debiased=True, n_samples=2), 'ggn': dict(curvature='ggn'),
    'gnb': dict(estimator='gnb'), 'n_samples=4': dict(n_samples=4), 'hessian_bs=0.5': dict(hessian_bs=0.5), 'update_each=1': dict(update_each=1)}
BEST = dict(unet='signed', multi30k_quarter='signed_blocks') # `gnb` elsewhere

class Curve(Callback):
    "Held-out loss and metric after each epoch, with the seconds of training until then"
    order = 101
    def __init__(self, clock): self.clock,self.points = clock,[]
    def after_epoch(self):
        values = self.recorder.values
        if values and len(values[-1])>=3: self.points.append((self.clock.secs, *values[-1][1:3]))

def run(path, name, entry, variant, lr, seed, epochs):
    "Train once, a row for each epoch"
    p,clock = PROBLEMS[name],Clock()
    learn,_ = p.make(seed)
    learn.opt_func = partial(adahessian, **VARIANTS[variant]) if entry=='variant' else ENTRIES[entry]
    if lr is None:
        with lr_of_run(learn, epochs): lr = own_rate(learn.opt_func, steps_of_run(learn, epochs+1)) if p.fine_tune else learn.lr
    fit,curve = learn.fine_tune if p.fine_tune else learn.fit_one_cycle,Curve(clock)
    with learn.no_bar(),learn.no_logging(): fit(epochs, lr, cbs=[clock,curve])
    for i,(secs,loss,metric) in enumerate(curve.points):
        found = dict(epoch=i+1, seconds=round(secs, 3), loss=float(f'{loss:.5g}'), metric=float(f'{metric:.5g}'))
        append(path, dict(problem=name, entry=entry, variant=variant, lr=lr, seed=seed, epochs=epochs, **found, machine=machine(),
            command=f'python benchmarks/equal_time.py {name}'))
    print(name, entry, variant, lr, seed, epochs, f'{curve.points[-1][1]:.4f} in {clock.secs:.1f} s', flush=True)

# Plan

def read(path):
    if path.exists(): return pd.read_csv(path, keep_default_na=True).fillna(dict(variant=''))
    return pd.DataFrame(columns=['problem','entry','variant','lr','seed','epochs','epoch','seconds','loss','metric'])

def ends(rows, name, entry, epochs=None, lr=None):
    "The last epochs of the runs"
    on = rows[(rows.problem==name)&(rows.entry==entry)&(rows.epoch==rows.epochs)]
    if epochs is not None: on = on[on.epochs==epochs]
    return on if lr is None else on[on.lr==lr]

def tuned(rows, name, entry, rates, epochs):
    "The rate with the lowest loss at the first seed, `None` while one is missing"
    on = ends(rows, name, entry, epochs)
    on = on[on.seed==0].fillna(dict(loss=math.inf)).groupby('lr').loss.first()
    return None if any(o not in on.index for o in rates) else float(on.reindex(rates).idxmin())

def as_long(rows, name, best, epochs):
    "Epochs that Adam makes at its best rate in the time of `adahessian` as it comes"
    t,t0 = (ends(rows, name, k, epochs, lr).seconds.mean() for k,lr in (('own',None),('Adam',best)))
    return max(epochs, round(epochs*t/t0))

def wanted(rows, name, seeds):
    "Runs as (entry, variant, lr, epochs, seed); more of them once the first are there"
    epochs,adams = PROBLEMS[name].epochs,PROBLEMS[name].adam
    found = [*[('Adam','',lr,epochs,0) for lr in adams], *[('adahessian','',lr,epochs,0) for lr in OURS]]
    found += [('Adam','',1e-3,epochs,s) for s in range(seeds)]+[('own','',None,epochs,s) for s in range(seeds)]
    best = {k: tuned(rows, name, k, r, epochs) for k,r in (('Adam',adams),('adahessian',OURS))}
    found += [(k,'',lr,epochs,s) for s in range(seeds) for k,lr in best.items() if lr is not None]
    found += [('variant',BEST.get(name, 'gnb'),None,epochs,s) for s in range(seeds)]
    if None in best.values() or any(ends(rows, name, k, epochs, lr).seed.nunique()<seeds for k,lr in best.items()): return found
    return found+[('Adam','',best['Adam'],as_long(rows, name, best['Adam'], epochs),s) for s in range(seeds)]

def missing(rows, name, seeds):
    def there(entry, variant, lr, epochs, seed):
        on = ends(rows, name, entry, epochs, lr)
        return ((on.seed==seed)&(on.variant==variant)).any()
    return next((o for o in wanted(rows, name, seeds) if not there(*o)), None)

def fill(path, name, seeds):
    while o := missing(read(path), name, seeds):
        entry,variant,lr,epochs,seed = o
        run(path, name, entry, variant, lr, seed, epochs)

# Report

def verdict(a, b):
    "Does AdaHessian's `a` win, lose or tie against Adam's `b`, both series of losses?"
    if len(a)<2 or len(b)<2: return 'one seed'
    if a.mean()==b.mean() or abs(a.mean()-b.mean())<=max(a.std(), b.std()): return 'tie'
    return 'ahead' if a.mean()<b.mean() else 'behind'

def columns(rows, name, seeds=3):
    "The three comparisons of a problem as (AdaHessian's losses, Adam's losses), `None` where a run is missing"
    epochs,adams = PROBLEMS[name].epochs,PROBLEMS[name].adam
    get = lambda k,lr,n=epochs: ends(rows, name, k, n, lr).loss.fillna(math.inf) # What failed lies behind everything
    best = {k: tuned(rows, name, k, r, epochs) for k,r in (('Adam',adams),('adahessian',OURS))}
    res = {'nobody tuned': (get('own', None), get('Adam', 1e-3))}
    if None in best.values(): return res
    res['both tuned'] = get('adahessian', best['adahessian']),get('Adam', best['Adam'])
    return {**res, 'equal time': (get('own', None), get('Adam', best['Adam'], as_long(rows, name, best['Adam'], epochs)))}

def markdown(rows):
    "The table of three columns: held-out loss of AdaHessian / Adam, means over the seeds"
    def cell(pair):
        if pair is None or not all(map(len, pair)): return '–'
        a,b = pair
        return f"{a.mean():.3g} / {b.mean():.3g}, {verdict(a, b)}"
    kinds = ['nobody tuned','both tuned','equal time']
    body = [[name, *(cell(columns(rows, name).get(k)) for k in kinds)] for name in rows.problem.unique()]
    return '\n'.join(f"| {' | '.join(o)} |" for o in (['held-out loss, `adahessian` / Adam',*kinds], ['---']*4, *body))

def plot(path, rows, name):
    "Held-out loss over processor seconds: means over the seeds, with the range of them"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    epochs = PROBLEMS[name].epochs
    best = {k: tuned(rows, name, k, r, epochs) for k,r in (('Adam',PROBLEMS[name].adam),('adahessian',OURS))}
    n = as_long(rows, name, best['Adam'], epochs) if best['Adam'] else epochs
    lines = [('Adam',1e-3,epochs,'C7','Adam, 1e-3'), ('Adam',best['Adam'],epochs,'C1',f"Adam, {best['Adam']}"), ('Adam',best['Adam'],n,'C3',f"Adam, {best['Adam']}, {n} epochs"),
        ('own',None,epochs,'C0','adahessian'), ('variant',None,epochs,'C2',f"adahessian, {BEST.get(name, 'gnb')}")]
    fig,ax = plt.subplots(figsize=(6,4), layout='constrained')
    for entry,lr,e,color,label in lines:
        on = rows[(rows.problem==name)&(rows.entry==entry)&(rows.epochs==e)]
        o = (on if lr is None else on[on.lr==lr]).groupby('epoch')[['seconds','loss']].agg(['mean','min','max'])
        if not len(o): continue
        ax.plot(o.seconds['mean'], o.loss['mean'], 'o-', color=color, label=label, ms=3)
        ax.fill_between(o.seconds['mean'], o.loss['min'], o.loss['max'], color=color, alpha=0.15)
    ax.set(yscale='log', xlabel='processor seconds of training, one thread', ylabel='held-out loss', title=name)
    ax.legend()
    fig.savefig(path, dpi=80)
    plt.close(fig)

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('problems', nargs='*', default=['digits','table'], help=f'of {list(PROBLEMS)}')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--report', action='store_true', help='only print the table')
    p.add_argument('--smoke', action='store_true', help='an epoch of one seed of the table, at a rate each; nothing is kept')
    args = p.parse_args(args)
    torch.set_num_threads(threads())
    folder = results_dir(args.smoke)
    path = folder/'equal_time.csv'
    if args.smoke:
        for entry,lr in (('Adam',0.01),('adahessian',0.2),('own',None)): run(path, 'table', entry, '', lr, 0, 1)
    elif not args.report:
        for name in args.problems: fill(path, name, args.seeds)
    rows = read(path)
    for name in rows.problem.unique(): plot(folder/f'equal_time_{name}.png', rows, name)
    (folder/'equal_time.md').write_text(markdown(rows)+'\n')
    print(markdown(rows))


if __name__=='__main__': main()
