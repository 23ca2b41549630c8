"""How wide is the range of learning rates that work? The share of rates over two decades that come within a tenth of the best.

    python benchmarks/robustness.py                       # digits and a table: minutes on one core
    python benchmarks/robustness.py captions              # an hour; also unet, imagenette_quarter, multi30k_quarter, transfer
    python benchmarks/robustness.py multi30k_quarter --seeds 1 --entries Adam adahessian    # a part of it; --seeds 3 goes on from there
    python benchmarks/robustness.py --report              # the table of what the file holds
    python benchmarks/robustness.py --smoke               # does it run? Seconds, and nothing is kept

Rates are a quarter of a decade apart. Each optimizer begins at a guess and tries rates on both sides until there is a whole decade on each side of its best one, so no guess is an advantage; what counts are the
nine rates within a decade of that best one, by the mean over the seeds. Loss and accuracy are held-out, and the best rate is chosen on the very data that is reported, for all alike. A run that does not end in a
finite loss counts as one that is not near the best. `results/robustness.csv` has a row for each run, and a second run continues there."""
import argparse,math
from functools import partial
from types import SimpleNamespace

import pandas as pd,torch
from _common import append,machine,results_dir,threads
from defaults import PROBLEMS
from fastai.optimizer import Adam
from training import Clock,digits

from adahessian_fastai.adahessian import adahessian
from adahessian_fastai.sassha import sassha
from adahessian_fastai.sophia import sophia

ENTRIES = {'Adam': (Adam, -2), 'adahessian': (adahessian, -0.75), 'adahessian, update_each=1': (partial(adahessian, update_each=1), -0.75),
    'sophia': (sophia, -2.5), 'sassha': (partial(sassha, clip=0, cap=0), -0.75)} # The decimal logarithm of the rate to begin at; sassha as in its paper
REACH,STEP = 4,0.25 # Rates on each side of the best, and their distance in decades

def problem(name):
    "`seed -> (learner, evaluate)` and epochs; digits keep a part for the report, as in `training.py`"
    if name=='digits': return SimpleNamespace(make=digits, epochs=6, fine_tune=False)
    if name=='smoke': return SimpleNamespace(make=partial(digits, n=64), epochs=1, fine_tune=False)
    return PROBLEMS[name]

def rate(exponent): return float(f'{10**exponent:.4g}')

def run(name, entry, exponent, seed):
    "Train once; a row of the file"
    p,clock = problem(name),Clock()
    learn,evaluate = p.make(seed)
    learn.opt_func = ENTRIES[entry][0]
    fit = learn.fine_tune if p.fine_tune else learn.fit_one_cycle
    with learn.no_bar(),learn.no_logging():
        fit(p.epochs, rate(exponent), cbs=clock)
        loss,acc = (evaluate() if evaluate else dict(zip('ab', learn.recorder.values[-1][1:3]))).values()
    return dict(problem=name, entry=entry, exponent=float(exponent), lr=rate(exponent), seed=seed, epochs=p.epochs, loss=float(f'{loss:.5g}'),
        accuracy=float(f'{acc:.5g}'), seconds=round(clock.secs, 2), machine=machine(), command=f'robustness.py {name}')

# Plan

def means(rows, name, entry, seeds):
    "Mean loss and accuracy over the seeds by exponent, of the rates that have all seeds; infinite and 0 where a run has failed"
    mine = rows[(rows.problem==name)&(rows.entry==entry)&(rows.seed<seeds)].fillna(dict(loss=math.inf, accuracy=0.))
    full = mine.groupby('exponent').filter(lambda o: o.seed.nunique()==seeds)
    return full.groupby('exponent')[['loss','accuracy']].mean()

def next_exponent(m, start, reach=REACH):
    "The rate to try next: outwards from the start, then around the best one; `None` when it has `reach` on each side"
    if start not in m.index: return start
    best = m.loss.idxmin()
    return next((o for i in range(1, reach+1) for o in (best+i*STEP, best-i*STEP) if o not in m.index), None)

def todo(rows, name, entry, seeds, reach):
    "The run to make next, as exponent and seed"
    e = next_exponent(means(rows, name, entry, seeds), ENTRIES[entry][1], reach)
    if e is None: return None
    done = set(rows.seed[(rows.problem==name)&(rows.entry==entry)&(rows.exponent==e)])
    return e,next(s for s in range(seeds) if s not in done)

def read(path):
    if path.exists(): return pd.read_csv(path)
    return pd.DataFrame(columns=['problem','entry','exponent','seed','loss','accuracy']).astype(dict(exponent=float, seed=int, loss=float, accuracy=float))

def fill(path, name, entries, seeds, reach=REACH):
    for entry in entries:
        while o := todo(read(path), name, entry, seeds, reach):
            append(path, row := run(name, entry, *o))
            print({k: v for k,v in row.items() if k not in ('machine','command')}, flush=True)

# Report

def shares(m, reach=REACH):
    "What the means over seeds say: the best rate, and how much around it is about as good"
    best = m.loss.idxmin()
    near = m[(m.index>=best-reach*STEP)&(m.index<=best+reach*STEP)]
    ten = near[(near.index>=best-2*STEP)&(near.index<=best+2*STEP)]
    return dict(best=rate(best), loss=m.loss.min(), accuracy=m.accuracy[best], loss_within=(near.loss<=1.1*m.loss.min()).mean(),
        accuracy_within=(near.accuracy>=0.9*m.accuracy[best]).mean(), accuracy_lost=1-ten.accuracy.min()/m.accuracy[best], rates=len(near))

def report(rows, seeds=3):
    "A row for each problem and optimizer whose rates are complete, by as many of `seeds` as all of them have"
    found = {}
    for (name,entry),_ in rows.groupby(['problem','entry'], sort=False):
        tried = ((n, means(rows, name, entry, n)) for n in range(seeds, 0, -1))
        best = next((shares(m) | dict(seeds=n) for n,m in tried if len(m) and next_exponent(m, ENTRIES[entry][1]) is None), None)
        if best: found[name,entry] = best
    return pd.DataFrame.from_dict(found, orient='index')

def markdown(rows, seeds=3):
    "The same as Markdown"
    head = ['problem','optimizer','best rate','loss there','accuracy there','rates with a loss within 10 %','rates with an accuracy within 10 %','accuracy lost over a factor of ten','seeds']
    body = [[n, e, f'{o.best:.2g}', f'{o.loss:.3g}', f'{o.accuracy:.1%}', f'{o.loss_within:.0%}', f'{o.accuracy_within:.0%}', f'{o.accuracy_lost:.1%}', f'{o.seeds:.0f}']
        for (n,e),o in report(rows, seeds).iterrows()]
    return '\n'.join(f"| {' | '.join(o)} |" for o in (head, ['---']*len(head), *body))

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('problems', nargs='*', default=['digits','table'], help=f"of {list(PROBLEMS)}")
    p.add_argument('--entries', nargs='*', default=list(ENTRIES), choices=list(ENTRIES))
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--report', action='store_true', help='only print the table')
    p.add_argument('--smoke', action='store_true', help='a step of a few rates; nothing is kept')
    args = p.parse_args(args)
    torch.set_num_threads(threads())
    if args.smoke: args.problems,args.seeds = ['smoke'],1
    path,reach = results_dir(args.smoke)/'robustness.csv',1 if args.smoke else REACH
    for name in args.problems if not args.report else []: fill(path, name, args.entries[:2] if args.smoke else args.entries, args.seeds, reach)
    rows = read(path)
    if args.smoke: return print({k: shares(means(rows, 'smoke', k, 1), reach) for k in args.entries[:2]})
    print(markdown(rows, args.seeds))
    (path.parent/'robustness.md').write_text(markdown(rows, args.seeds)+'\n')


if __name__=='__main__': main()
