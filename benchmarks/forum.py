"""The forum's problem: Imagenette at 128 pixels, xresnet34, five epochs, five runs each, by `fit_flat_cos` with smoothed labels. Wants a GPU.

    python benchmarks/forum.py --device cuda                # each run is a row of `results/forum.csv`; a second run continues there
    python benchmarks/forum.py --device cuda --minutes 9    # begin no run after so long
    python benchmarks/forum.py --report                     # the table of what the file holds
    python benchmarks/forum.py --smoke                      # does it run? A step on made-up pictures; nothing is kept

The forum's own numbers: ranger 80.18 ± .38 % at 10 s an epoch, AdaHessian 80.52 ± .38 % at 52 s. Nothing is searched for: ranger has the rate of fastai's Imagenette examples, the others their defaults.
Loss and accuracy are those of all validation pictures. Seconds are those of training alone by the clock, loading of pictures among them."""
import argparse,time

import pandas as pd
from _common import append,machine,results_dir,threads
from fastai.vision.all import *
from fastai.vision.models.xresnet import xresnet18,xresnet34

from adahessian_fastai.adahessian import adahessian,adahessian_paper
from adahessian_fastai.compare import mean_of_all
from adahessian_fastai.learner import lr_of_run
from adahessian_fastai.sassha import m_sassha

ENTRIES = {'ranger': (partial(ranger, mom=0.95, sqr_mom=0.99, eps=1e-6), 8e-3), 'adahessian': (adahessian, None), 'adahessian_paper': (adahessian_paper, None),
    'adahessian, gnb': (partial(adahessian, estimator='gnb'), None), 'm_sassha': (m_sassha, None)}

def imagenette(device, bs=64, size=128, workers=12):
    path = untar_data(URLs.IMAGENETTE_160)
    block = DataBlock((ImageBlock,CategoryBlock), splitter=GrandparentSplitter(valid_name='val'), get_items=get_image_files, get_y=parent_label,
        item_tfms=RandomResizedCrop(size, min_scale=0.35), batch_tfms=[Flip(), Normalize.from_stats(*imagenet_stats)])
    return block.dataloaders(path, bs=bs, num_workers=workers if device=='cuda' else 0, device=torch.device(device))

def made_up(device):
    "Noise in the place of pictures"
    data = [(torch.randn(3,32,32), torch.tensor(i%10)) for i in range(8)]
    return DataLoaders.from_dsets(data, data, bs=4, num_workers=0, device=torch.device(device))

class Clock(Callback):
    "Seconds of training"
    order,run_valid = 100,False
    def before_fit(self): self.secs = 0.
    def before_train(self): self.start = time.perf_counter()
    def after_train(self):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        self.secs += time.perf_counter()-self.start

def run(entry, seed, dls, arch, epochs, device):
    "Train once; a row of the file"
    set_seed(seed)
    for dl in dls.loaders: dl.rng.seed(seed)
    (opt_func,lr),clock = ENTRIES[entry],Clock()
    learn = Learner(dls, arch(n_out=10), LabelSmoothingCrossEntropyFlat(), opt_func=opt_func, metrics=accuracy)
    with lr_of_run(learn, epochs): lr = ifnone(lr, learn.lr)
    with learn.no_bar(),learn.no_logging(): learn.fit_flat_cos(epochs, lr, cbs=clock)
    train_loss,loss,acc = learn.recorder.values[-1]
    found = {k: float(f'{v:.5g}') for k,v in dict(train_loss=train_loss, loss=loss, accuracy=acc, seconds=clock.secs).items()}
    return dict(entry=entry, seed=seed, lr=lr, epochs=epochs, **found, machine=machine(device), command='python benchmarks/forum.py')

def report(rows):
    groups = rows.groupby('entry', sort=False)
    table = groups.agg(accuracy=('accuracy',mean_of_all), std=('accuracy','std'), seconds=('seconds','mean'), epochs=('epochs','first'), runs=('seed','nunique'))
    table['time'] = table.seconds/table.seconds.get('ranger', math.nan)
    return table.round(4).to_string()

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--entries', nargs='*', default=list(ENTRIES), choices=list(ENTRIES))
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--device', default='cpu', choices=['cpu','cuda'])
    p.add_argument('--minutes', type=float, default=math.inf, help='begin no run after so long')
    p.add_argument('--report', action='store_true', help='only print the table')
    p.add_argument('--smoke', action='store_true', help='an epoch of two steps; nothing is kept')
    args = p.parse_args(args)
    torch.set_num_threads(threads())
    path,deadline = results_dir(args.smoke)/'forum.csv',time.perf_counter()+60*args.minutes
    if not args.report:
        dls,(arch,epochs) = (made_up if args.smoke else imagenette)(args.device),(xresnet18,1) if args.smoke else (xresnet34,5)
        for seed,entry in itertools.product(range(1 if args.smoke else args.seeds), args.entries[:2] if args.smoke else args.entries):
            rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=['entry','seed'])
            if ((rows.entry==entry)&(rows.seed==seed)).any(): continue
            if time.perf_counter()>deadline: return print('to be continued')
            append(path, row := run(entry, seed, dls, arch, epochs, args.device))
            print({k: v for k,v in row.items() if k not in ('machine','command')}, flush=True)
    print(report(pd.read_csv(path)))


if __name__=='__main__': main()
