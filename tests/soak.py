"""Kill, spoil and outlast training runs: `python tests/soak.py` prints a table of what was tried and what was lost

Runs are killed by SIGKILL at random times and go on from their last file until they end; files and states are spoilt; trainings are interrupted at
random lines; memory is watched over many steps; every variant trains on several processes. `--short` does a little of each.
What is done is kept in `.cache/soak.jsonl`: a call that was cut off goes on where it stood, as long as the code is the same."""
import argparse,copy,hashlib,json,multiprocessing,os,random,resource,signal,sys,tempfile,time,warnings
from functools import partial
from pathlib import Path
import torch,adahessian_fastai
from fastai.callback.core import Callback
from torch import nn
from helpers_learner import data,fit,learner,mlp,state_of
from test_resume import SPOILT,SPOILT_PENDING,spoil
from test_threads import OPTS,interrupts
from variants import variants

processes = multiprocessing.get_context('forkserver')
# Imported once, so that a run begins at once; the server that imports looks for modules as a new Python does
os.environ['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get('PYTHONPATH')])])
processes.set_forkserver_preload(['helpers_learner','test_resume','test_threads','variants'])
KILLED = 'default update_each3 signed debiased control ggn gnb rows n_acc3'.split()
N_EPOCH = 30
FLAT = 5 # MB that the allocator may add


# Runs that are killed

class Files(Callback):
    "A file after each epoch that was trained (fastai counts skipped ones too), which is whole or not there"
    order,trained = 90,False
    def before_train(self): self.trained = True
    def after_epoch(self):
        if not self.trained: return
        self.learn.save('new')
        held = torch.load(self.path/'models/new.pth', weights_only=False)
        torch.save(dict(held=held, epoch=self.epoch+1), self.path/'both')
        os.replace(self.path/'both', self.path/'last')


def run(folder, name, begins):
    "One process of a run: it goes on from the last file, and writes down what it ends with"
    there = torch.load(folder/'last', weights_only=False) if (folder/'last').exists() else None
    torch.manual_seed(int.from_bytes(os.urandom(4), 'little') if there else 0)
    torch.set_num_threads(1)
    learn = learner(mlp(norm=nn.BatchNorm1d), *data(30), path=folder, cbs=[Files()], **variants[name])
    learn.create_opt()
    if there:
        learn.model.load_state_dict(there['held']['model'])
        learn.opt.load_state_dict(there['held']['opt'])
    begins.send(True)
    fit(learn, N_EPOCH, start_epoch=there['epoch'] if there else 0)
    torch.save(learn.model.state_dict(), folder/'done')


def start(folder, name, seconds=None):
    "Run a process, and kill it so many seconds after it began to train: was it killed, and seconds of training"
    folder.mkdir(parents=True, exist_ok=True)
    began,begins = processes.Pipe(False)
    p = processes.Process(target=run, args=(folder, name, begins))
    p.start()
    begins.close()
    began.recv()
    tic = time.time()
    p.join(seconds or 600)
    if p.is_alive(): os.kill(p.pid, signal.SIGKILL)
    p.join()
    if p.exitcode not in (0,-signal.SIGKILL): raise RuntimeError(f'{name} ended with {p.exitcode}')
    return p.exitcode!=0,time.time()-tic


def killed(folder, name, n_kills, seed=0):
    "Kills, and runs that ended with other weights than the run nobody killed"
    rng,other = random.Random(f'{name} {seed}'),[]
    seconds = start(folder/'whole', name)[1]
    want,left,k = torch.load(folder/'whole'/'done'),n_kills,0
    while left>0:
        there,k = folder/f'{k}',k+1
        while not (there/'done').exists():
            was_killed,_ = start(there, name, rng.uniform(0.05, 0.7)*seconds if left>0 else None)
            left -= was_killed
        got = torch.load(there/'done')
        if not all(torch.equal(got[o], want[o]) for o in want): other.append(f'{name} {k}')
    return n_kills-left,other,f'{k} runs that ended'


# Files that are spoilt

def cut_files(folder, n):
    "Files tried, and those that were taken or changed something: cut off at `n` places, or with some bytes turned"
    learn = fit(learner(mlp(norm=nn.BatchNorm1d), *data(30), path=folder, n_acc=4))
    content,bad = learn.save('whole').read_bytes(),[]
    (folder/'models').mkdir(exist_ok=True)
    for i in range(n):
        (folder/'models/part.pth').write_bytes(content[:len(content)*i//n])
        before = str(state_of(learn))
        try: learn.load('part')
        except Exception: ok = str(state_of(learn))==before
        else: ok = False
        if not ok: bad.append(i)
    return n,bad,''


def spoilt_states(folder):
    "States tried, and those that were taken or changed something"
    kwargs,bad,tried = dict(n_acc=4, n_samples=2, debiased=True),[],0
    source,learn = (fit(learner(mlp(norm=nn.BatchNorm1d), *data(30), path=folder, **kwargs), n) for n in (1,2))
    for path,(name,v) in [*SPOILT,*SPOILT_PENDING]:
        sd,before = copy.deepcopy(source.opt.state_dict()),str(state_of(learn))
        spoil(sd, path, v)
        tried += 1
        try: learn.opt.load_state_dict(sd)
        except ValueError: ok = str(state_of(learn))==before
        except Exception: ok = False
        else: ok = False
        if not ok: bad.append(f'{path} {name}')
    return tried,bad,''


# Memory

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def grown(folder, name, n_steps, told):
    "Growth of the largest memory of this process, in MB, over the second half of `n_steps`"
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    learn = learner(mlp(), *data(60), path=folder, **variants[name])
    n_epoch = n_steps*variants[name].get('n_acc', 1)//20
    fit(learn, n_epoch)
    half = peak()
    fit(learn, n_epoch)
    told.send(peak()-half)


def memory(folder, name, n_steps):
    "Steps that were watched, in a process of their own, and whether they took more memory"
    told,tells = processes.Pipe(False)
    p = processes.Process(target=grown, args=(folder, name, n_steps, tells))
    p.start()
    tells.close()
    mb = told.recv()
    p.join()
    return n_steps//2,[f'{name} {mb:.1f} MB'] if mb>FLAT else [],f'{mb:.1f} MB more'


# Processes

def on_ranks(folder, n, what):
    "Trainings on `n` processes, and those whose ranks differ"
    from test_distributed import launch
    a,*others = launch(n, folder, 1800, what)
    names = [k for k,v in a.items() if isinstance(v, dict) and 'weights' in v]
    return len(names),[k for k in names for o in others if not all(torch.equal(p, q) for p,q in zip(a[k]['weights'], o[k]['weights']))],''


# The table: what is done at a time, each a function of a folder that returns attempts, losses and what else there is to say

def interrupted(folder, name, n): return n,[f'{k}: {v}' for k,v in interrupts(n, 2, [name]).items()],''

def pieces(short):
    "By part and name"
    kills,some = (['n_acc3'],1) if short else (KILLED,None)
    return dict(  # chkstyle: ignore-node
        kills={k: partial(killed, name=k, n_kills=2 if short else 12) for k in kills},
        files=dict(cut=partial(cut_files, n=20 if short else 200)), states=dict(spoilt=spoilt_states),
        interrupts={k: partial(interrupted, name=k, n=1 if short else 20) for k in OPTS},
        memory={k: partial(memory, name=k, n_steps=400 if short else 2000) for k in KILLED[:some]},
        ranks={f'{r}': partial(on_ranks, n=r, what='variants') for r in (() if short else (2,4))},
        parts={f'{r}': partial(on_ranks, n=r, what='parts') for r in (() if short else (2,4))})

PARTS = dict(kills='SIGKILLs', files='files cut off anywhere', states='states with a spoilt entry', interrupts='interrupts at random lines',
    memory='steps whose memory was watched', ranks='variants on several processes', parts='parameters in parts on several processes')


class Kept:
    "What is done, in a file; nothing of it counts when the code has changed"
    def __init__(self, file, short):
        folders = [Path(__file__).parent, Path(adahessian_fastai.__file__).parent]
        content = b''.join(f.read_bytes() for d in folders for f in sorted(d.glob('*.py')))
        self.file,self.code = file,hashlib.sha256(content).hexdigest()[:12]+('-short' if short else '')
        lines = file.read_text().splitlines() if file.exists() else []
        self.done = {o['piece']: o for o in map(json.loads, lines) if o['code']==self.code}

    def __call__(self, piece, f):
        "What `f` found, now or before"
        if piece in self.done: return self.done[piece]
        tic = time.time()
        with tempfile.TemporaryDirectory() as d: tried,lost,said = f(Path(d))
        found = dict(piece=piece, code=self.code, tried=tried, lost=[str(o) for o in lost], said=said, seconds=round(time.time()-tic))
        self.file.parent.mkdir(exist_ok=True)
        with open(self.file, 'a') as o: o.write(json.dumps(found)+'\n')
        return found


def line(name, found, said=''):
    n,lost,seconds = sum(o['tried'] for o in found),sum((o['lost'] for o in found), []),sum(o['seconds'] for o in found)
    print(f'{name:40s} {n:6d}   lost: {", ".join(lost) or "none"}   {said} ({seconds} s)', flush=True)
    return lost


def main(short, only=None, file=None):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    kept,table = Kept(Path(file or Path(__file__).parents[1]/'.cache/soak.jsonl'), short),[]
    for part in only or PARTS:
        found = {}
        for name,f in pieces(short)[part].items():
            found[name] = kept(f'{part} {name}', f)
            line(f'  {part} {name}', [found[name]], found[name]['said'])
        if found: table.append((f'{PARTS[part]}, {len(found)} pieces', list(found.values())))
    print()
    lost = [o for row in table for o in line(*row)]
    print(f'{len(lost)} losses')
    return bool(lost)


if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--short', action='store_true', help='a little of each, two minutes')
    p.add_argument('--only', nargs='+', choices=PARTS, help='these parts alone')
    p.add_argument('--file', help='where to keep what is done')
    a = p.parse_args()
    sys.exit(main(a.short, a.only, a.file))
