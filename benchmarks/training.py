"""Train one problem with many optimizers: equal learning-rate search, several seeds, the same batches. Results go to a CSV file, which a second run continues.

    python benchmarks/training.py digits                  # handwritten digits, minutes on one core
    python benchmarks/training.py imagenette              # all of Imagenette at 64 pixels, one epoch, xresnet18: two hours on one core
    python benchmarks/training.py imagenette_quarter      # a quarter of its images, two epochs: the variants of AdaHessian
    python benchmarks/training.py multi30k                # translation with a small Transformer, an hour on one core
    python benchmarks/training.py multi30k_quarter        # the variants on a quarter of that
    python benchmarks/training.py imagenette --report     # the table of what the CSV file holds
    python benchmarks/training.py --smoke                 # does it run? Seconds, and nothing is kept

Each entry of a task trains with the same number of learning rates at seed 0: three, and in the studies of variants a fourth beyond the better end. The rate with the lowest loss on a *choosing* part of the held-out data
trains from the other seeds, and what is reported is measured on the *rest* of the held-out data. `--sweep N` looks at robustness: two decades of
rates from N seeds, in a file `robustness_….csv`; they choose nothing. *AdaHessian* is the published algorithm, `adahessian_paper`; `defaults.py`, `equal_time.py` and `robustness.py` are about `adahessian` as it comes. Seconds are CPU time of one thread in training alone, so a machine that does other work changes them little.
"""
import argparse,time
from dataclasses import dataclass,field

import pandas as pd,torch
from _common import RESULTS,append as append_row,machine,threads
from fastai.vision.all import *

from adahessian_fastai.adahessian import adahessian_paper
from adahessian_fastai.compare import digits_cnn
from adahessian_fastai.sophia import sophia
from adahessian_fastai.translation import bleu_chrf,numericalize_pair,sentence_pairs,translate,translation_dls,translation_learner
from studies import best_runs,study_table

# Optimizers: `opt_func` and the rates to try first, best guess in the middle; `sweep` are the ends of two decades

def round_rate(lr): return float(f'{lr:.2g}')
def rates(centre, n=3): return [round_rate(centre*10**(i/2)) for i in range(-(n//2), n//2+1)]

@dataclass
class Entry:
    "An optimizer in a task"
    opt_func: object # For the Learner
    centre: float # Middle of the rates that are tried
    epochs: int = None # If not those of the task
    like: str = None # Take the rate that was found for this entry, and try none
    swept: bool = False # Part of the look at robustness?
    fit: dict = field(default_factory=dict) # Arguments of `fit_one_cycle`

@dataclass
class Task:
    "A problem and what is trained on it"
    make: object # `seed -> (learner, evaluate)`, where `evaluate()` gives a dict of numbers on the rest of the held-out data
    epochs: int
    entries: dict
    n_rates: int = 3 # Tried for each entry; a fourth lies beyond the better end of the three

# Problems

def fitted(dls, model, loss_func, seed):
    "A Learner whose batches come in an order that `seed` decides"
    for dl in dls.loaders: dl.rng.seed(seed)
    return Learner(dls, model, loss_func, metrics=accuracy)

def on_rest(learn, dl):
    def evaluate(): return dict(zip(('loss','accuracy'), learn.validate(dl=dl)))
    return evaluate

def digits(seed, n=1000):
    "1000 digits to train on, 397 to choose by, 400 to report; the split is always the same"
    from sklearn.datasets import load_digits
    x,y = load_digits(return_X_y=True)
    x,y = tensor(x).float().view(-1,1,8,8)/16,tensor(y)
    idxs = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = [list(zip(x[o],y[o])) for o in idxs.split([1000,397,400])]
    set_seed(seed, reproducible=True)
    dls = DataLoaders.from_dsets(parts[0][:n], parts[1], bs=64, num_workers=0)
    learn = fitted(dls, digits_cnn(), CrossEntropyLossFlat(), seed)
    return learn,on_rest(learn, DataLoader(parts[2], bs=200, num_workers=0))

def imagenette(seed, part=1., bs=64, size=64):
    "Imagenette from scratch; a third of its validation set chooses, two thirds report"
    from fastai.vision.models.xresnet import xresnet18
    path,rng = untar_data(URLs.IMAGENETTE_160),torch.Generator().manual_seed(0)
    items = get_image_files(path/'train').sorted()
    kept = [items[i] for i in torch.randperm(len(items), generator=rng)[:int(part*len(items))]]
    held = get_image_files(path/'val').sorted()
    held = [held[i] for i in torch.randperm(len(held), generator=rng)]
    third = len(held)//3
    set_seed(seed, reproducible=True)
    block = DataBlock((ImageBlock,CategoryBlock), splitter=FuncSplitter(lambda o: o.parent.parent.name=='val'), get_y=parent_label,
        item_tfms=RandomResizedCrop(size, min_scale=0.35), batch_tfms=[Flip(), Normalize.from_stats(*imagenet_stats)])
    dls = block.dataloaders(kept+held[:third], bs=bs, num_workers=0)
    learn = fitted(dls, xresnet18(n_out=10), CrossEntropyLossFlat(), seed)
    return learn,on_rest(learn, dls.test_dl(held[third:], with_labels=True))

def multi30k(seed, n_train=10_000, decode=True):
    "English to German on a part of Multi30k; its validation set chooses, its test set of 2016 reports, decoded greedily or by its loss"
    set_seed(seed, reproducible=True)
    train,valid,test = (sentence_pairs('multi30k', o) for o in ('train','valid','test'))
    dls = translation_dls(train, valid, n_train=n_train, max_len=24)
    learn,(en,de) = translation_learner(dls),zip(*test)
    if decode: return learn,lambda: bleu_chrf(translate(learn, en), de)
    return learn,on_rest(learn, dls.valid.new([numericalize_pair(o, dls.src_vocab, dls.tgt_vocab) for o in test]))

# What is trained on what

delayed = partial(adahessian_paper, update_each=10)
first_order = {'Adam': Entry(Adam, 3e-3, swept=True), 'ranger': Entry(ranger, 1e-2)}
newton = {'AdaHessian': Entry(adahessian_paper, 0.15), 'AdaHessian, update_each=10': Entry(delayed, 0.15, swept=True)}
variants = {'Adam': Adam, 'default': delayed,  # chkstyle: ignore-node
    'signed_blocks': partial(delayed, signed_blocks=True),
    'signed': partial(delayed, signed=True),
    'n_samples=4': partial(delayed, n_samples=4),
    'debiased, n_samples=2': partial(delayed, debiased=True, n_samples=2),
    'ggn': partial(delayed, curvature='ggn'),
    'gnb': partial(delayed, estimator='gnb'),
    'hessian_bs=0.25': partial(delayed, hessian_bs=0.25),
    'control variate': partial(delayed, signed=True, estimator='control_variate', probe='gaussian'),
    'sophia, gnb': partial(sophia, update_each=10),
    'sophia, hutchinson': partial(sophia, update_each=10, estimator='hutchinson')}
def study(*centres, **opt_funcs): return {k: Entry(f, c) for (k,f),c in zip({**variants, **opt_funcs}.items(), centres, strict=True)}
guessed = study(3e-3, 0.15, 0.15, 0.03, 0.15, 0.05, 0.1, 0.05, 0.15, 0.03, 1e-3, 1e-3)
on_images = study(3e-3, 0.15, 0.05, 0.01, 0.15, 0.05, 0.3, 0.015, 0.15, 0.01, 3e-3, 3e-3) # What was best on the digits
on_text = study(3e-3, 0.05, 0.015, 3e-3, 0.05, 0.015, 0.1, 0.05, 0.05, 3e-3, 1e-3, 1e-3, gnb=partial(delayed, estimator='gnb', eps=0.01)) # Half a decade lower
steadier = {'ggn, n_samples=4': Entry(partial(delayed, curvature='ggn', n_samples=4), 0.03)} # After ggn had failed for one seed of three
damped = {'ggn, eps=0.01': Entry(partial(delayed, curvature='ggn', eps=0.01), 0.1)} # And after that had for two
images_as_long = {'Adam, in the time of ggn, n_samples=4': Entry(Adam, 3e-3, epochs=4, like='Adam')}
text_as_long = {'Adam, in the time of n_samples=4': Entry(Adam, 3e-3, epochs=7, like='Adam')}
longer = {'Adam, in the time of AdaHessian': Entry(Adam, 3e-3, epochs=3, like='Adam')}
translators = {'AdamW': Entry(Adam, 3e-3), **newton,  # chkstyle: ignore-node
    'update_each=10, block_length=1': Entry(partial(delayed, block_length=1), 0.15, like='AdaHessian, update_each=10'),
    'update_each=10, mom=0.9 throughout': Entry(delayed, 0.15, like='AdaHessian, update_each=10', fit=dict(moms=(0.9,0.9,0.9))),
    'budget=0.25': Entry(partial(adahessian_paper, budget=0.25), 0.15, like='AdaHessian, update_each=10'),
    'AdamW, in the time of AdaHessian': Entry(Adam, 3e-3, epochs=8, like='AdamW')}
both = dict(Adam=Entry(Adam, 3e-3, swept=True), AdaHessian=Entry(adahessian_paper, 0.15, swept=True))
TASKS = dict(  # chkstyle: ignore-node
    digits=Task(digits, 6, {**guessed, **both}, n_rates=4),
    imagenette=Task(imagenette, 1, {**first_order, **newton, **longer}),
    imagenette_quarter=Task(partial(imagenette, part=0.25, bs=32), 2, {**on_images, **steadier, **images_as_long}, n_rates=4),
    multi30k=Task(multi30k, 3, translators),
    multi30k_quarter=Task(partial(multi30k, n_train=2500, decode=False), 4, {**on_text, **text_as_long, **steadier, **damped}, n_rates=4))

# Runs

class Clock(Callback):
    "CPU seconds of training"
    order,run_valid = 100,False
    def before_fit(self): self.secs = 0.
    def before_train(self): self.start = time.process_time()
    def after_train(self): self.secs += time.process_time()-self.start

def run(name, entry, lr, seed):
    "Train once; a row of the CSV file"
    task,e = TASKS[name],TASKS[name].entries[entry]
    learn,evaluate = task.make(seed)
    learn.opt_func,epochs,clock = e.opt_func,e.epochs or task.epochs,Clock()
    with learn.no_bar(),learn.no_logging():
        learn.fit_one_cycle(epochs, lr, cbs=clock, **e.fit)
        valid_loss = learn.recorder.values[-1][1]
        found = evaluate()
    found = {k: round(v,5) for k,v in dict(valid_loss=valid_loss, **found).items()}
    return dict(task=name, entry=entry, lr=lr, seed=seed, epochs=epochs, **found, seconds=round(clock.secs,1), machine=machine())

# Plan and report

def read(name, kind='training'):
    path = RESULTS/f'{kind}_{name}.csv'
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=['entry','lr','seed','valid_loss'])

def next_rate(rows, name, entry):
    "The rate to try at seed 0: the middle, half a decade lower and higher, then beyond the better end; `None` after the last"
    low,middle,high = rates(TASKS[name].entries[entry].centre)
    tried = rows[(rows.entry==entry) & (rows.seed==0)].set_index('lr').valid_loss.fillna(math.inf).to_dict()
    for lr in (middle,low,high):
        if lr not in tried: return lr
    return round_rate(low**2/middle if tried[low]<tried[high] else high**2/middle) if len(tried)<TASKS[name].n_rates else None

def best_lr(rows, name, entry):
    "The tried rate with the lowest loss on the choosing part, `None` while one is missing"
    if like := TASKS[name].entries[entry].like: return best_lr(rows, name, like)
    return float(best_runs(rows[rows.entry==entry]).lr.iloc[0]) if next_rate(rows, name, entry) is None else None

def plan(rows, name, entries, seeds):
    "The runs to make next as (entry, lr, seed): rates at seed 0, for all in turn, and when an entry has its rates the other seeds"
    mine = [o for o in entries if not TASKS[name].entries[o].like]
    trials = [(k, lr, 0) for k in mine if (lr := next_rate(rows, name, k)) is not None]
    trials.sort(key=lambda o: len(rows[(rows.entry==o[0]) & (rows.seed==0)]))
    return trials+[(k, lr, s) for s in range(seeds) for k in entries if (lr := best_lr(rows, name, k)) is not None]

def sweep_plan(name, entries, seeds):
    "Five rates over two decades for each entry in the look at robustness"
    return [(k, lr, s) for s in range(seeds) for k in entries if (e := TASKS[name].entries[k]).swept for lr in rates(e.centre, 5)]

def missing(wanted, *tables):
    done = {o for t in tables for o in zip(t.entry, t.lr, t.seed)}
    return first(o for o in wanted if o not in done)

def append(row, kind):
    append_row(RESULTS/f"{kind}_{row['task']}.csv", row)
    print({k: v for k,v in row.items() if k!='machine'}, flush=True)

def smoke():
    "An epoch of two batches with some entries, and the table"
    TASKS['smoke'] = Task(partial(digits, n=128), 1, {k: guessed[k] for k in ('Adam','default','gnb','sophia, gnb')})
    rows = pd.DataFrame([run('smoke', k, e.centre, 0) for k,e in TASKS['smoke'].entries.items()])
    del TASKS['smoke']
    return print(study_table(rows).to_string())

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('task', nargs='?', choices=list(TASKS), default='digits')
    p.add_argument('--entries', nargs='*')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--sweep', type=int, default=0, help='seeds to run at five rates over two decades')
    p.add_argument('--report', action='store_true', help='only print the table')
    p.add_argument('--smoke', action='store_true', help='an epoch of two batches; nothing is kept')
    args = p.parse_args(args)
    torch.set_num_threads(threads())
    if args.smoke: return smoke()
    name,entries = args.task,args.entries or list(TASKS[args.task].entries)
    while not args.report and (todo := missing(plan(read(name), name, entries, args.seeds), read(name))): append(run(name, *todo), 'training')
    while not args.report and (todo := missing(sweep_plan(name, entries, args.sweep), read(name), read(name, 'robustness'))):
        append(run(name, *todo), 'robustness')
    print(study_table(read(name)).to_string())


if __name__=='__main__': main()
