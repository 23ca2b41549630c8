"""The paper's own problem: ResNet-20 on CIFAR-10 by the paper's recipe, with seven optimizers. Each run resumes where it was stopped.

    python benchmarks/resnet20.py                         # shortened: a third of the pictures, halved to 16 pixels, few epochs; an hour on one core
    python benchmarks/resnet20.py --full --device cuda    # as in the paper: 50,000 pictures, 160 epochs
    python benchmarks/resnet20.py --full --epochs 40 --device cuda    # a shorter schedule, in a file of its own
    python benchmarks/resnet20.py --full --device cuda --minutes 9    # stop in time, go on with the same command
    python benchmarks/resnet20.py --report                # the table of what the file holds
    python benchmarks/resnet20.py --smoke                 # does it run? Seconds, and nothing is kept

The recipe (Yao et al., arXiv 2006.00719, section 4.1, and the authors' code): batches of 256, weight decay 5e-4, pictures shifted by up to an eighth and flipped, the rate divided by ten at half and at three quarters.
Nothing is searched for: SGD, AdamW and `adahessian_paper` have the paper's rates, the others their own, with the recipe's weight decay; Sophia keeps its own, 0.1 times a rate of 1e-3. Loss and accuracy
are those of all 10,000 test pictures. `results/resnet20.csv` (`resnet20_full.csv`) has a row for each epoch; seconds are those of training alone, CPU time of one thread, or of the clock on a GPU.
Two entries differ where their mean accuracies lie further apart than the sum of their standard deviations; otherwise they tie, and so do all of which there is one seed."""
import argparse,time
from dataclasses import dataclass,replace

import pandas as pd,torch.nn.functional as F
from _common import append,machine,results_dir,threads
from fastai.vision.all import *

from adahessian_fastai.adahessian import adahessian,adahessian_paper
from adahessian_fastai.compare import mean_of_all
from adahessian_fastai.sassha import m_sassha,sassha
from adahessian_fastai.sophia import sophia

CACHE = Path(__file__).resolve().parents[1]/'.cache/resnet20'
# The network: He et al., arXiv 1512.03385, section 4.2, with shortcuts that have no parameters

class Block(nn.Module):
    "Two 3×3 convolutions and a shortcut, which skips pixels and fills up with zeros where the block has more channels"
    def __init__(self, n_in, n, stride=1):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(n_in, n, 3, stride, 1, bias=False),nn.BatchNorm2d(n)
        self.conv2,self.bn2 = nn.Conv2d(n, n, 3, 1, 1, bias=False),nn.BatchNorm2d(n)
        self.stride,self.pad = stride,(n-n_in)//2
    def forward(self, x):
        short = F.pad(x[:,:,::self.stride,::self.stride], (0,0,0,0,self.pad,self.pad)) if self.pad else x
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + short)

def resnet20():
    "269,722 parameters"
    widths = [(16,16,1)]*3+[(16,32,2)]+[(32,32,1)]*2+[(32,64,2)]+[(64,64,1)]*2
    m = nn.Sequential(nn.Conv2d(3,16,3,1,1,bias=False), nn.BatchNorm2d(16), nn.ReLU(), *(Block(*o) for o in widths),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64,10))
    for o in m.modules():
        if isinstance(o, (nn.Conv2d,nn.Linear)): nn.init.kaiming_normal_(o.weight)
    return m

# The data: in memory, augmented a batch at a time; order and augmentation depend on seed and epoch alone, so that a run can resume

def pictures(part):
    "Pictures as bytes with their classes, in an order that is always the same; kept beside the checkpoints after they were read once"
    file = CACHE/f'{part}.pt'
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        items = get_image_files(untar_data(URLs.CIFAR)/part).sorted()
        names = sorted({o.parent.name for o in items})
        x = torch.stack([tensor(np.asarray(Image.open(o))).permute(2,0,1) for o in items])
        torch.save((x, tensor([names.index(o.parent.name) for o in items])), file)
    x,y = torch.load(file)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order],y[order]

def made_up(part):
    "Noise in the place of pictures, for a smoke run"
    g = torch.Generator().manual_seed(len(part))
    return torch.randint(256, (8,3,32,32), dtype=torch.uint8, generator=g),torch.randint(10, (8,), generator=g)

def prepared(x, y, device, halved):
    x = x.to(device).float().div(255)
    if halved: x = F.avg_pool2d(x, 2)
    mean,std = (tensor(o, device=device).view(1,3,1,1) for o in ((0.4914,0.4822,0.4465), (0.2023,0.1994,0.2010)))
    return (x-mean)/std,y.to(device)

class Batches:
    "Batches of `(x, y)`; shuffled, shifted and flipped where `seed` is given"
    def __init__(self, x, y, bs, seed=None): self.x,self.y,self.bs,self.seed,self.epoch,self.n_inp = x,y,bs,seed,0,1
    def __len__(self): return len(self.x)//self.bs if self.seed is not None else math.ceil(len(self.x)/self.bs)
    def to(self, device): return self
    def __iter__(self):
        if self.seed is None: return zip(self.x.split(self.bs), self.y.split(self.bs))
        return self.augmented(torch.Generator().manual_seed(1000*self.seed+self.epoch))
    def augmented(self, g):
        size,idxs = self.x.shape[-1],torch.randperm(len(self.x), generator=g)[:len(self)*self.bs]
        pad = size//8
        for i in idxs.split(self.bs):
            (dy,dx),flip = torch.randint(2*pad+1, (2,self.bs), generator=g),torch.rand(self.bs, generator=g)<0.5
            cols = torch.where(flip[:,None], torch.arange(size-1, -1, -1), torch.arange(size))+dx[:,None]
            rows,x,j = torch.arange(size)+dy[:,None],F.pad(self.x[i.to(self.x.device)], [pad]*4),torch.arange(self.bs)
            x = x.permute(0,2,3,1)[tuple(o.to(x.device) for o in (j[:,None,None], rows[:,:,None], cols[:,None,:]))]
            yield x.permute(0,3,1,2).contiguous(),self.y[i.to(self.y.device)]

# What is trained, at which rate

def decoupled(opt_func, lr, **kwargs):
    "Weight decay that is multiplied by the rate, so that a step takes 5e-4 off as with SGD: the authors' code divides by it too"
    return partial(opt_func, wd=5e-4/lr, **kwargs),lr

ENTRIES = dict(SGD=(partial(SGD, mom=0.9, decouple_wd=False, wd=5e-4), 0.1), AdamW=decoupled(Adam, 0.01, mom=0.9, sqr_mom=0.999, eps=1e-8),
    adahessian_paper=decoupled(adahessian_paper, 0.15), adahessian=decoupled(adahessian, 0.1), sassha=decoupled(sassha, 0.15, clip=0, cap=0),
    m_sassha=decoupled(m_sassha, 0.15, clip=0, cap=0), sophia=(sophia, 1e-3)) # Both as in their paper

@dataclass
class Form:
    "How much of the problem"
    file: str
    part: float # Of the training pictures
    halved: bool # To 16 pixels?
    epochs: int
    turn: int # Epochs of one optimizer before the next one has its turn, so that all come equally far
    bs: int = 256

FORMS = dict(short=Form('resnet20.csv', 1/3, True, 10, 1), full=Form('resnet20_full.csv', 1., False, 160, 20), smoke=Form('resnet20.csv', 1., True, 1, 1, 4))

# Runs

class Keep(Callback):
    "Writes a row and a checkpoint at the end of each epoch, and stops where the time is over"
    order = 100
    def __init__(self, row, path, saved, deadline, clock, upto):
        store_attr()
        self.secs = 0.
    def before_epoch(self): self.learn.dls.train.epoch = self.epoch
    def before_train(self): self.start = self.clock()
    def after_train(self): self.secs += self.clock()-self.start
    def after_epoch(self):
        if not self.recorder.values or len(self.recorder.values[-1])<3: return
        _,loss,acc = self.recorder.values[-1]
        append(self.path, dict(entry=self.row['entry'], seed=self.row['seed'], epoch=self.epoch+1, **{k: float(f'{v:.5g}') for k,v in
            dict(loss=loss, accuracy=acc, seconds=self.secs).items()}, **{k: v for k,v in self.row.items() if k not in ('entry','seed')}))
        print(self.row['entry'], self.row['seed'], self.epoch+1, f'loss {loss:.4f}, accuracy {acc:.4f}, {self.secs:.0f} s', flush=True)
        if self.saved: save_whole(self.learn, self.saved, self.epoch+1, self.secs)
        if self.epoch+1<self.n_epoch and (self.epoch+1>=self.upto or time.perf_counter()>self.deadline): raise CancelFitException

def save_whole(learn, file, epoch, secs):
    "A checkpoint that is either there as a whole or not at all"
    torch.save(dict(model=learn.model.state_dict(), opt=learn.opt.state_dict(), epoch=epoch, secs=secs), file.with_suffix('.part'))
    file.with_suffix('.part').replace(file)

def drops(lr): return lambda pct: lr*0.1**((pct>=0.5)+(pct>=0.75))

def train(entry, seed, form, data, device, path, saved, deadline, command, upto=math.inf):
    "Train the epochs that are missing of the first `upto`"
    (opt_func,lr),clock = ENTRIES[entry],time.perf_counter if device=='cuda' else time.process_time
    set_seed(seed, reproducible=True)
    dls = DataLoaders(Batches(*data[0], form.bs, seed), Batches(*data[1], 1000))
    dls.device = torch.device(device)
    learn = Learner(dls, resnet20().to(device), CrossEntropyLossFlat(), opt_func=opt_func, lr=lr, metrics=accuracy, wd_bn_bias=True)
    keep = Keep(dict(entry=entry, seed=seed, lr=lr, epochs=form.epochs, machine=machine(device), command=command), path, saved, deadline, clock, upto)
    start = 0
    if saved and saved.exists():
        held = torch.load(saved, map_location=device, weights_only=False)
        learn.create_opt()
        learn.model.load_state_dict(held['model'])
        learn.opt.load_state_dict(held['opt'])
        start,keep.secs = held['epoch'],held['secs']
    with learn.no_bar(),learn.no_logging(): learn.fit(form.epochs, lr, start_epoch=start, cbs=[keep, ParamScheduler({'lr': drops(lr)})])

def done(path, entry, seed):
    "Epochs that the file has"
    if not path.exists(): return 0
    rows = pd.read_csv(path)
    mine = rows[(rows.entry==entry)&(rows.seed==seed)]
    return mine.epoch.max() if len(mine) else 0

# Report

def report(path):
    "The last epoch that all entries have reached: means over the seeds, and who is better than whom"
    rows = pd.read_csv(path).drop_duplicates(['entry','seed','epoch'], keep='last')
    n = rows.groupby(['entry','seed']).epoch.max().groupby('entry').max().min()
    groups = rows[rows.epoch==n].groupby('entry', sort=False)
    table = groups.agg(accuracy=('accuracy',mean_of_all), std=('accuracy','std'), loss=('loss',mean_of_all), seconds=('seconds','mean'), seeds=('seed','nunique'))
    table['time'] = (table.seconds/table.seconds.loc['SGD']).round(2) if 'SGD' in table.index else math.nan
    table['against adahessian'] = [verdict(o, table.loc['adahessian']) if 'adahessian' in table.index else '' for _,o in table.iterrows()]
    return f'After {n} of {rows.epochs.max()} epochs\n\n{table.round(4).to_string()}'

def verdict(a, b):
    "Does `a` win, lose or tie?"
    if a.name==b.name: return ''
    if not (abs(a.accuracy-b.accuracy)>a['std']+b['std']): return 'tie'
    return 'wins' if a.accuracy>b.accuracy else 'loses'

def parse(args):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--full', action='store_true', help='all pictures at 32 pixels, 160 epochs')
    p.add_argument('--epochs', type=int, help='fewer epochs, and a schedule that is as long')
    p.add_argument('--entries', nargs='*', default=list(ENTRIES), choices=list(ENTRIES))
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--device', default='cpu', choices=['cpu','cuda'])
    p.add_argument('--minutes', type=float, default=math.inf, help='begin no epoch after so long')
    p.add_argument('--report', action='store_true', help='only print the table')
    p.add_argument('--smoke', action='store_true', help='an epoch of two batches of noise; nothing is kept')
    return p.parse_args(args)

def main(args=None):
    args = parse(args)
    name = 'smoke' if args.smoke else 'full' if args.full else 'short'
    form,deadline = FORMS[name],time.perf_counter()+60*args.minutes
    if args.epochs: form = replace(form, epochs=args.epochs, turn=min(form.turn, args.epochs), file=form.file.replace('.', f'_{args.epochs}.'))
    path = results_dir(args.smoke)/form.file
    torch.set_num_threads(threads())
    if args.report: return print(report(path))
    read = made_up if args.smoke else pictures
    train_data = [o[:round(form.part*len(o))] for o in read('train')]
    data = prepared(*train_data, args.device, form.halved),prepared(*read('test'), args.device, form.halved)
    command = 'python benchmarks/resnet20.py'+' --full'*args.full+f' --epochs {args.epochs}'*bool(args.epochs)+f' --device {args.device}'*(args.device!='cpu')
    for seed,epochs,entry in itertools.product(range(1 if args.smoke else args.seeds), range(form.turn, form.epochs+form.turn, form.turn), args.entries):
        if time.perf_counter()>deadline: return print('to be continued')
        saved = None if args.smoke else CACHE/f'{name}_{form.epochs}_{entry}_{seed}.pt'
        if done(path, entry, seed)<min(epochs, form.epochs): train(entry, seed, form, data, args.device, path, saved, deadline, command, epochs)
    print(report(path))


if __name__=='__main__': main()
