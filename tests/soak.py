"""Kill, spoil and outlast training runs: `python tests/soak.py` prints a table of what was tried and what was lost

Runs are killed by SIGKILL at random times and go on from their last file until they end; files and states are spoilt; trainings are interrupted at
random lines; memory is watched over many steps; every variant trains on several processes. `--short` does a little of each."""
import argparse,copy,multiprocessing,os,random,resource,signal,sys,tempfile,time,warnings
from pathlib import Path
import torch
from fastai.callback.core import Callback
from torch import nn
from helpers_learner import data,fit,learner,mlp,state_of
from test_resume import SPOILT,SPOILT_PENDING,spoil
from test_threads import OPTS,interrupts
from variants import variants

processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(['helpers_learner','test_resume','test_threads','variants']) # Imported once, so that a run begins at once
KILLED = 'default update_each3 signed debiased control ggn gnb rows n_acc3'.split()
N_EPOCH = 60


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


def killed(folder, names, n_kills, seed=0):
    "Kills, runs that ended, and runs that ended with other weights than the run nobody killed"
    rng,kills,ends,other = random.Random(seed),0,0,[]
    for name in names:
        seconds = start(folder/f'{name}-whole', name)[1]
        want,left,k = torch.load(folder/f'{name}-whole'/'done'),n_kills,0
        while left>0:
            there,k = folder/f'{name}-{k}',k+1
            while not (there/'done').exists():
                was_killed,_ = start(there, name, rng.uniform(0.05, 0.7)*seconds if left>0 else None)
                kills,left = kills+was_killed,left-was_killed
            ends += 1
            got = torch.load(there/'done')
            if not all(torch.equal(got[o], want[o]) for o in want): other.append(there.name)
    return kills,ends,other


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
    return n,bad


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
    return tried,bad


# Memory

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def memory(folder, names, n_steps):
    "Growth of the largest memory, in MB, over the second half of `n_steps`, by variant"
    found = {}
    for name in names:
        learn = learner(mlp(), *data(60), path=folder, **variants[name])
        fit(learn, n_steps//20)
        half = peak()
        fit(learn, n_steps//20)
        found[name] = peak()-half
    return found


# Processes

def on_ranks(folder, n, what):
    "Trainings on `n` processes, and those whose ranks differ"
    from test_distributed import launch
    folder.mkdir()
    a,*others = launch(n, folder, 1800, what)
    names = [k for k,v in a.items() if isinstance(v, dict) and 'weights' in v]
    return len(names),[k for k in names for o in others if not all(torch.equal(p, q) for p,q in zip(a[k]['weights'], o[k]['weights']))]


# Parts of the table: each prints lines by `say(what, tried, lost)`

def say_kills(say, folder, short):
    names = ['n_acc3'] if short else KILLED
    kills,ends,other = killed(folder, names, 2 if short else 12)
    say(f'SIGKILLs in {len(names)} variants; runs that ended', f'{kills}; {ends}', other)

def say_files(say, folder, short): say('files cut off anywhere', *cut_files(folder, 20 if short else 200))

def say_states(say, folder, short): say('states with a spoilt entry', *spoilt_states(folder))

def say_interrupts(say, folder, short):
    n = len(OPTS) if short else 200
    say('interrupts at random lines', n, [f'{k}: {v}' for k,v in interrupts(n, seed=2).items()])

def say_memory(say, folder, short):
    grown = memory(folder, ['default'] if short else KILLED, 400 if short else 2000)
    say(f'steps whose memory was watched, {len(grown)} variants', 200 if short else 1000, [f'{k} {v:.1f} MB' for k,v in grown.items() if v>5])
    print(f'{"":44s} largest growth {max(grown.values()):.1f} MB', flush=True)

def say_ranks(say, folder, short):
    for ranks in () if short else (2,4): say(f'variants on {ranks} processes', *on_ranks(folder/f'{ranks}', ranks, 'variants'))

def say_parts(say, folder, short):
    for ranks in () if short else (2,4): say(f'parameters in parts on {ranks} processes', *on_ranks(folder/f'parts{ranks}', ranks, 'parts'))

PARTS = dict(kills=say_kills, files=say_files, states=say_states, interrupts=say_interrupts, memory=say_memory, ranks=say_ranks, parts=say_parts)


def main(short, only=None):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    tic,lost = time.time(),[]
    def say(what, tried, bad):
        print(f'{what:44s} {tried!s:>12s}   lost: {", ".join(map(str, bad)) or "none"}   ({time.time()-tic:.0f} s)', flush=True)
        lost.extend(bad)
    for name in only or PARTS:
        with tempfile.TemporaryDirectory() as d: PARTS[name](say, Path(d), short)
    print(f'{len(lost)} losses in {time.time()-tic:.0f} s')
    return bool(lost)


if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--short', action='store_true', help='a little of each, two minutes')
    p.add_argument('--only', nargs='+', choices=PARTS, help='these parts alone')
    a = p.parse_args()
    sys.exit(main(a.short, a.only))
