"""Kill, spoil and outlast training runs: `python tests/soak.py` prints a table of what was tried and what was lost

Runs are killed by SIGKILL at random times and go on from their last file until they end; files and states are spoilt, and files hold programs;
trainings are interrupted at random lines; memory is watched over many steps. `--short` does a little of each. Each piece runs in a process of its
own, two at a time. What is done is kept in `.cache/soak.jsonl`: a call that was cut off goes on where it stood, as long as the code is the same.
Several processes: `pytest -m slow tests/test_distributed.py`."""
import argparse,copy,hashlib,json,multiprocessing,os,random,resource,signal,sys,tempfile,threading,time,warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
import torch,adahessian_fastai
from fastai.callback.core import Callback
from torch import nn
from helpers_learner import data,fit,learner,mlp,state_of
from test_resume import SPOILT,SPOILT_PENDING,spoil
from test_threads import OPTS,interrupts
from variants import variants

processes,forked = (multiprocessing.get_context(o) for o in ('forkserver','fork'))
# Imported once, so that a piece begins at once; the server that imports looks for modules as a new Python does
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
    began,begins = forked.Pipe(False)
    p = forked.Process(target=run, args=(folder, name, begins)) # From a process that has differentiated nothing
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

def refusals(folder, files, **kwargs):
    "Of `files`, pairs of a name and the content of one, those that were taken, or that changed something"
    learn = fit(learner(mlp(norm=nn.BatchNorm1d), *data(30), path=folder, n_acc=4))
    before,bad = str(state_of(learn)),[]
    (folder/'models').mkdir(exist_ok=True)
    for name,content in files(learn.save('whole')):
        (folder/'models/part.pth').write_bytes(content)
        try: learn.load('part', **kwargs)
        except Exception: ok = str(state_of(learn))==before
        else: ok = False
        if not ok: bad.append(name)
    return bad


def cut_files(folder, n):
    "Files tried, and those that were taken or changed something: cut off at `n` places"
    def files(file): return [(i, file.read_bytes()[:file.stat().st_size*i//n]) for i in range(n)]
    return n,refusals(folder, files),''


class Program:
    "Is unpickled by a call"
    def __init__(self, f, *args): self.call = f,args
    def __reduce__(self): return self.call


# Where a program hides in a checkpoint
HIDES = dict(whole=(), model=('model',), weight=('model','0.weight'), opt=('opt',), state=('opt','state'), average=('opt','state',0,'grad_avg'),
    hypers=('opt','hypers'), rate=('opt','hypers',0,'lr'), parts=('opt','curvature'), counts=('opt','curvature','counts'),
    pending=('opt','curvature','pending','grads'))

def programs(folder, file):
    "A checkpoint for each place and each kind of call"
    mark = folder/'it ran'
    calls = [(open,str(mark),'w'), (os.mkdir,str(mark)), (os.system,f'touch "{mark}"'), (eval,f'open({str(mark)!r}, "w")'), (exec,f'open({str(mark)!r}, "w")')]
    for name,path in HIDES.items():
        for call in calls:
            inside = held = dict(whole=torch.load(file, weights_only=False))
            *way,last = ('whole',*path)
            for k in way: inside = inside[k]
            inside[last] = Program(*call)
            torch.save(held['whole'], folder/'held')
            yield f'{name} {call[0].__name__}',(folder/'held').read_bytes()


def pickles(folder):
    "Files tried, and those whose program ran, or that were taken, or that changed something"
    mark,tried,bad = folder/'it ran',[],[]
    def files(file):
        for name,content in programs(folder, file):
            torch.load(folder/'held', weights_only=False)
            if not mark.exists(): raise RuntimeError(f'the program {name} does nothing')
            mark.rmdir() if mark.is_dir() else mark.unlink()
            yield name,content
            tried.append(name)
            if mark.exists(): bad.append(f'{name} ran')
    bad = refusals(folder, files)+bad
    return len(tried),bad,''


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

def memory(folder, name, n_steps):
    "Steps that were watched, and whether the largest memory of this process grew over the second half of `n_steps`"
    learn = learner(mlp(), *data(60), path=folder, **variants[name])
    n_epoch = n_steps*variants[name].get('n_acc', 1)//20
    fit(learn, n_epoch)
    half = peak()
    fit(learn, n_epoch)
    mb = peak()-half
    return n_steps//2,[f'{name} {mb:.1f} MB'] if mb>FLAT else [],f'{mb:.1f} MB more'


# The table: what is done at a time, each a function of a folder that returns attempts, losses and what else there is to say

def interrupted(folder, name, n): return n,[f'{k}: {v}' for k,v in interrupts(n, 2, [name]).items()],''

def pieces(short):
    "By part and name; the long ones first"
    kills,some = (['n_acc3'],1) if short else (KILLED,None)
    return dict(  # chkstyle: ignore-node
        memory={k: partial(memory, name=k, n_steps=400 if short else 2000) for k in KILLED[:some]},
        kills={k: partial(killed, name=k, n_kills=2 if short else 12) for k in kills},
        interrupts={k: partial(interrupted, name=k, n=1 if short else 20) for k in OPTS},
        states=dict(spoilt=spoilt_states), files=dict(cut=partial(cut_files, n=20 if short else 200)), pickles=dict(program=pickles))

PARTS = dict(kills='SIGKILLs', files='files cut off anywhere', pickles='files that hold a program', states='states with a spoilt entry',
    interrupts='interrupts at random lines', memory='steps whose memory was watched')


def cpu(): return sum(o.ru_utime+o.ru_stime for o in map(resource.getrusage, (resource.RUSAGE_SELF,resource.RUSAGE_CHILDREN)))

def work(part, name, short, told):
    "Do a piece in this process, and tell what was found and how long it took"
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    tic,begun = time.time(),cpu()
    with tempfile.TemporaryDirectory() as d: tried,lost,said = pieces(short)[part][name](Path(d))
    told.send(dict(tried=tried, lost=[str(o) for o in lost], said=said, seconds=round(time.time()-tic), cpu=round(cpu()-begun)))


def done(part, name, short):
    "What a piece found; a process that does not come to its end is a loss"
    told,tells = processes.Pipe(False)
    p = processes.Process(target=work, args=(part, name, short, tells))
    p.start()
    tells.close()
    try: found = told.recv()
    except EOFError: found = None
    p.join()
    return found or dict(tried=0, lost=[f'{part} {name} ended with {p.exitcode}'], said='', seconds=0, cpu=0)


class Kept:
    "What is done, in a file; nothing of it counts when the code has changed"
    def __init__(self, file, short):
        folders = [Path(__file__).parent, Path(adahessian_fastai.__file__).parent]
        content = b''.join(f.read_bytes() for d in folders for f in sorted(d.glob('*.py')))
        self.file,self.code = file,hashlib.sha256(content).hexdigest()[:12]+('-short' if short else '')
        lines = file.read_text().splitlines() if file.exists() else []
        self.done = {o['piece']: o for o in map(json.loads, lines) if o['code']==self.code}
        self.lock,self.short = threading.Lock(),short

    def __call__(self, part, name):
        "What a piece found, now or before"
        piece = f'{part} {name}'
        if piece in self.done: return self.done[piece]
        found = dict(piece=piece, code=self.code, **done(part, name, self.short))
        with self.lock:
            self.file.parent.mkdir(exist_ok=True)
            if found['tried']:
                with open(self.file, 'a') as o: o.write(json.dumps(found)+'\n')
            line(f'  {piece}', [found], found['said'])
        return found


def line(name, found, said=''):
    n,seconds,cpu = (sum(o[k] for o in found) for k in ('tried','seconds','cpu'))
    lost = sum((o['lost'] for o in found), [])
    print(f'{name:50s} {n:6d}   lost: {", ".join(lost) or "none"}   {said} ({seconds} s, processor {cpu} s)', flush=True)
    return lost


def main(short, only=None, file=None, jobs=2):
    tic,kept = time.time(),Kept(Path(file or Path(__file__).parents[1]/'.cache/soak.jsonl'), short)
    table = {part: pieces(short)[part] for part in pieces(short) if part in (only or PARTS)}
    with ThreadPoolExecutor(jobs) as pool:
        table = {part: [pool.submit(kept, part, name) for name in names] for part,names in table.items()}
        table = {part: [o.result() for o in found] for part,found in table.items()}
    print()
    lost = [o for part in PARTS if table.get(part) for o in line(f'{PARTS[part]}, {len(table[part])} pieces', table[part])]
    print(f'{len(lost)} losses, {(time.time()-tic)/60:.0f} minutes, of one processor {sum(o["cpu"] for found in table.values() for o in found)/60:.0f}')
    return bool(lost)


if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--short', action='store_true', help='a little of each')
    p.add_argument('--only', nargs='+', choices=PARTS, help='these parts alone')
    p.add_argument('--file', help='where to keep what is done')
    p.add_argument('--jobs', type=int, default=2, help='pieces at a time')
    a = p.parse_args()
    sys.exit(main(**vars(a)))
