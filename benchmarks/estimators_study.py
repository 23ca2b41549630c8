"""Which estimate of the diagonal trains best? Equal learning-rate search for each, several seeds, results as a CSV file that a second run continues.

    python benchmarks/estimators_study.py                              # handwritten digits, a minute or ten on one core
    python benchmarks/estimators_study.py --data imagenette            # Imagenette at 64 pixels, wants a GPU
    python benchmarks/estimators_study.py --report                     # the table of what the CSV file holds

Each variant trains with each learning rate of its grid and each seed. The learning rate is chosen on the validation set (mean accuracy over the
seeds) and the accuracy on the test set is reported for that one. All grids have the same number of values, a factor of about 3 apart; a best value
at an end of its grid is marked in the report. Imagenette has no third part, so a third of its validation set chooses and the rest reports.
"""
import argparse,csv,time
from pathlib import Path

import torch
from fastai.vision.all import *

from adahessian_fastai.adahessian import adahessian
from adahessian_fastai.sophia import sophia

FIELDS = ['data', 'variant', 'lr', 'seed', 'valid', 'test', 'loss', 'seconds']
NEWTON = [0.003, 0.01, 0.03, 0.1, 0.3, 1., 3.]
ADAM = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1]
VARIANTS = {  # chkstyle: ignore-node
    'Adam': (Adam, ADAM),
    'default': (adahessian, NEWTON),
    'n_samples=4': (partial(adahessian, n_samples=4), NEWTON),
    'signed_blocks': (partial(adahessian, signed_blocks=True), NEWTON),
    'signed': (partial(adahessian, signed=True), NEWTON),
    'control variate': (partial(adahessian, signed=True, estimator='control_variate', probe='gaussian'), NEWTON),
    'debiased, n_samples=2': (partial(adahessian, debiased=True, n_samples=2), NEWTON),
    'ggn': (partial(adahessian, curvature='ggn'), NEWTON),
    'gnb': (partial(adahessian, estimator='gnb'), NEWTON),
    'hessian_bs=0.25': (partial(adahessian, hessian_bs=0.25), NEWTON),
    'sophia, gnb': (partial(sophia, update_each=10), ADAM),
    'sophia, hutchinson': (partial(sophia, update_each=10, estimator='hutchinson'), ADAM)}


def digits(seed, bs=64):
    "1000 digits to train on, 397 to choose by, 400 to report; the split is always the same"
    from sklearn.datasets import load_digits
    x,y = load_digits(return_X_y=True)
    x,y = torch.tensor(x, dtype=torch.float).view(-1,1,8,8)/8-1,torch.tensor(y)
    idxs = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = [list(zip(x[o],y[o])) for o in idxs.split([1000,397,400])]
    net = nn.Sequential(ConvLayer(1,16), ConvLayer(16,32,stride=2), ConvLayer(32,32,stride=2), nn.Flatten(), nn.Linear(128,10))
    set_seed(seed, reproducible=True)
    net.apply(lambda m: m.reset_parameters() if hasattr(m, 'reset_parameters') else None)
    dls = DataLoaders(DataLoader(parts[0], bs=bs, shuffle=True, drop_last=True, num_workers=0), DataLoader(parts[1], bs=200, num_workers=0))
    return Learner(dls, net, CrossEntropyLossFlat(), metrics=accuracy),DataLoader(parts[2], bs=200, num_workers=0)


def imagenette(seed, bs=64):
    "Imagenette at 64 pixels and a small residual network from scratch"
    path = untar_data(URLs.IMAGENETTE_160)
    set_seed(seed, reproducible=True)
    dls = ImageDataLoaders.from_folder(path, valid='val', item_tfms=RandomResizedCrop(64, min_scale=0.35), bs=bs,
        batch_tfms=[FlipItem(), Normalize.from_stats(*imagenet_stats)], seed=0)
    items = dls.valid_ds.items
    idxs = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    third = len(items)//3
    chosen,test = (dls.test_dl([items[i] for i in o], with_labels=True) for o in (idxs[:third],idxs[third:]))
    dls.loaders[1] = chosen
    return vision_learner(dls, resnet18, pretrained=False, metrics=accuracy),test


def run(data, variant, lr, seed, epochs):
    "Train once; a row of the CSV file"
    opt_func,_ = VARIANTS[variant]
    learn,test = dict(digits=digits, imagenette=imagenette)[data](seed)
    learn.opt_func,start = opt_func,time.perf_counter()
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    seconds = time.perf_counter()-start
    with learn.no_bar(),learn.no_logging():
        valid = learn.validate()[1]
        test.to(learn.dls.device)
        loss,acc = learn.validate(dl=test)
    return dict(data=data, variant=variant, lr=lr, seed=seed, valid=valid, test=acc, loss=loss, seconds=round(seconds,2))


def read(path):
    if not path.exists(): return []
    num = dict(lr=float, seed=int, valid=float, test=float, loss=float, seconds=float)  # chkstyle: ignore-node
    return [{k: num.get(k, str)(v) for k,v in o.items()} for o in csv.DictReader(path.open())]


def report(rows, data):
    "Markdown table: accuracy on the test set at the learning rate that is best on the validation set"
    print("| variant | lr | test accuracy | test loss | seconds | seeds |\n|---|---|---|---|---|---|")
    for variant,(_,grid) in VARIANTS.items():
        mine = [r for r in rows if r['data']==data and r['variant']==variant]
        if not mine: continue
        mean = lambda lr,k: sum(vals)/len(vals) if (vals := [r[k] for r in mine if r['lr']==lr and not math.isnan(r[k])]) else -math.inf
        best = max({r['lr'] for r in mine}, key=lambda lr: mean(lr, 'valid'))
        at = [r for r in mine if r['lr']==best]
        accs = torch.tensor([r['test'] for r in at])
        spread = accs.std().item() if len(accs)>1 else math.nan
        end = ' (end of grid)' if best in (grid[0],grid[-1]) else ''
        print(f"| {variant} | {best:g}{end} | {accs.mean():.4f} ± {spread:.4f} | {mean(best,'loss'):.4f} | {mean(best,'seconds'):.1f} | {len(at)} |")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', choices=['digits','imagenette'], default='digits')
    p.add_argument('--out', type=Path, default=Path('estimators_study.csv'))
    p.add_argument('--epochs', type=int)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--variants', nargs='*', choices=list(VARIANTS), default=list(VARIANTS))
    p.add_argument('--report', action='store_true', help='only print the table')
    args = p.parse_args()
    epochs = args.epochs or dict(digits=6, imagenette=5)[args.data]
    done = {(r['data'],r['variant'],r['lr'],r['seed']) for r in read(args.out)}
    if not args.report:
        for seed in range(args.seeds):
            for variant in args.variants:
                for lr in VARIANTS[variant][1]:
                    if (args.data,variant,lr,seed) in done: continue
                    row,new = run(args.data, variant, lr, seed, epochs),not args.out.exists()
                    with args.out.open('a', newline='') as f:
                        out = csv.DictWriter(f, FIELDS)
                        if new: out.writeheader()
                        out.writerow(row)
                    print(row, flush=True)
    report(read(args.out), args.data)


if __name__=='__main__': main()
