"One rank of `test_distributed.py`: runs every case and writes down what it ended with. The loaders are plain, because fastai's broadcast CUDA tensors"
import argparse,math,warnings
import torch,torch.distributed as dist,torch.nn.functional as F
import fastai.callback.fp16 as fp16
from accelerate import Accelerator
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.distributed import DistributedTrainer,rank_distrib
from fastai.learner import Learner
from functools import partial
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel,fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel
from adahessian_fastai.all import CurvatureRecorder,adahessian_paper as adahessian,hessian_free,sassha,sophia
from adahessian_fastai.hvp import whole
from adahessian_fastai.learner import is_sharded
from adahessian_fastai.problem import Problem
from helpers_learner import HYPERS,InTurn,Seeded,data,given,mlp
from variants import variants

DistributedTrainer._wrap_dl = lambda self,dl: dl
# It says that synchronised norms need a GPU; their own forward pass says so too, on every step without an estimate
DistributedDataParallel._passing_sync_batchnorm_handle = lambda self,module: None
fp16.autocast = lambda device,**kw: torch.amp.autocast('cpu', **kw)
fp16.GradScaler = lambda device,**kw: torch.amp.GradScaler('cpu', **kw)


def shards(n_ranks, n_batches=4, bs=6):
    "The batches of each rank"
    x,y = data(n_ranks*n_batches*bs)
    return [list(zip(a.split(bs), b.split(bs))) for a,b in zip(x.chunk(n_ranks), y.chunk(n_ranks))]


def uneven(batches, rank, least=0):
    "The last ranks have 2 items in batch 1 and none, or `least`, in batch 2"
    if rank: batches[1],batches[2] = [tuple(o[:n] for o in batches[i]) for i,n in ((1,2),(2,least))]
    return batches


class NoSync(Callback):
    "Local gradients in all but the last of `n` batches"
    run_valid,order = False,30
    def __init__(self, n): self.n = n
    def before_batch(self):
        if self.train_iter%self.n==self.n-1: return
        self.context = self.model.no_sync()
        self.context.__enter__()
    def after_batch(self):
        if hasattr(self, 'context'): self.context.__exit__(None, None, None), delattr(self, 'context')


class Overflow(Callback):
    "On the last rank, batch `at` has an infinite loss or an infinite gradient"
    run_valid,order = False,20
    def __init__(self, what, at=2): self.what,self.at = what,at
    @property
    def on(self): return self.train_iter==self.at and rank_distrib()>0
    def after_loss(self):
        if self.what=='loss' and self.on: self.learn.loss_grad = self.loss_grad*float('inf')
    def before_backward(self):
        if self.what=='scaled' and self.on: self.learn.loss_grad = self.loss_grad*float('inf')


def broken_probe():
    "An infinite probe in the second estimate of the last rank"
    probe,n = given(),[0]
    def draw(p, g):
        n[0] += 1
        z = probe(p, g)
        return z*float('inf') if rank_distrib() and n[0]==8 else z
    return draw


def train(batches, n_epoch=1, model=None, cbs=(), mode='accelerate', sync_bn=False, amp=False, ddp={}, opt_func=None, **kwargs):
    model = model or mlp()
    opt_func = partial(opt_func, **kwargs) if opt_func else partial(adahessian, **{**HYPERS, **kwargs})
    dls = DataLoaders(batches, [])
    torch.manual_seed(5)
    learn = Learner(dls, model, F.cross_entropy, opt_func=opt_func, cbs=[Seeded(),*cbs])
    learn.remove_cb(learn.recorder)
    if amp: learn.to_fp16()
    with learn.no_bar(),learn.no_logging():
        if mode=='accelerate':
            with learn.distrib_ctx(sync_bn=sync_bn, cpu=True): learn.fit(n_epoch)
        else:
            if mode!='none': learn.model = DistributedDataParallel(model, **ddp)
            if mode=='compiled': learn.model = torch.compile(learn.model, backend='aot_eager')
            learn.fit(n_epoch)
    return found_in(learn.opt)


def found_in(opt):
    "What training ends with, whole tensors; and whether states are parts where parameters are"
    states = [opt.state[p] for p in opt.all_params().itemgot(0)]
    parts = all(isinstance(v, DTensor) for s in states for v in s.values() if isinstance(v, torch.Tensor))
    averages = [whole(s[k]) for s in states for k in ('sqr_avg_diag_hessian','avg_diag_hessian') if k in s]
    counts = {k: getattr(opt, k) for k in ('seed','n_steps','n_estimates','n_skipped','n_dropped') if hasattr(opt, k)}
    return dict(weights=[whole(p.detach()) for p in opt.all_params().itemgot(0)], averages=averages, parts=parts, **counts)


def sharded(batches):
    "What a model of FSDP gets to hear"
    mesh = dist.device_mesh.init_device_mesh('cpu', (dist.get_world_size(),))
    try: train(batches, model=fully_shard(mlp(), mesh=mesh), mode='none')
    except Exception as e: return f'{type(e).__name__}: {e}'


def sharded_blocks(batches):
    "The same of a model whose children alone are sharded"
    mesh,model = dist.device_mesh.init_device_mesh('cpu', (dist.get_world_size(),)),mlp()
    fully_shard(model[0], mesh=mesh)
    try: train(batches, model=model, mode='none')
    except Exception as e: return f'{type(e).__name__}: {e}'


def on_shards():
    "A model of `fully_shard`, one of whose children is a group of its own"
    mesh,model = dist.device_mesh.init_device_mesh('cpu', (dist.get_world_size(),)),mlp()
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def differentiated(opt, model, batches):
    "A plain loop"
    def evaluate(x, y, twice=False):
        out = model(x)
        return F.cross_entropy(out, y),out
    for x,y in batches:
        loss,out = evaluate(x, y)
        opt.differentiate(Problem(list(model.parameters()), loss, out, y, F.cross_entropy, partial(evaluate, x, y)), n_items=len(y))
        if opt.n_batches<opt.n_acc: continue
        opt.step()
        opt.zero_grad()
    return opt


def made_on_shards(model, **kwargs): return adahessian(model.parameters(), **{**HYPERS, **kwargs})

SHARDED = dict(  # chkstyle: ignore-node
    gnb=dict(estimator='gnb'), gnb_samples=dict(estimator='gnb', n_samples=2), gnb_signed=dict(estimator='gnb', signed=True),
    gnb_bounded=dict(estimator='gnb', clip=1., cap=0.1), gnb_each=dict(estimator='gnb', update_each=2),
    gnb_n_acc=dict(estimator='gnb', n_acc=2), difference=dict(hvp='finite_difference'), auto=dict(hvp='auto'),
    difference_samples=dict(hvp='finite_difference', n_samples=2, debiased=True),
    difference_control=dict(hvp='finite_difference', estimator='control_variate', signed=True))

if torch.__version__<'2.9': SHARDED = {k: v for k,v in SHARDED.items() if 'hvp' not in v} # Refused there
BY_LEARNER = [k for k in ('gnb','gnb_bounded','gnb_n_acc','difference') if k in SHARDED]

def plain_loop(batches, **kwargs):
    model = on_shards()
    torch.manual_seed(5)
    return found_in(differentiated(made_on_shards(model, **own_probe(kwargs), **kwargs), model, batches))


def resumed(batches, folder):
    "Two steps, a file, and two more by another optimizer; and by one process' state, whole tensors"
    model,res = on_shards(),[]
    torch.manual_seed(5)
    opt = differentiated(made_on_shards(model, estimator='gnb'), model, batches[:2])
    torch.save((model.state_dict(),opt.state_dict()), f'{folder}/state{dist.get_rank()}')
    for form in (lambda o: o, whole):
        weights,state = torch.load(f'{folder}/state{dist.get_rank()}', weights_only=False)
        state['state'] = [{k: form(v) if isinstance(v, torch.Tensor) else v for k,v in s.items()} for s in state['state']]
        other = on_shards()
        other.load_state_dict(weights)
        new = made_on_shards(other, estimator='gnb')
        new.load_state_dict(state)
        res.append(found_in(differentiated(new, other, batches[2:])))
    return res


def looked_at():
    "Whether shards are seen, in models of both kinds of FSDP, before and after a forward pass"
    mesh = dist.device_mesh.init_device_mesh('cpu', (dist.get_world_size(),))
    model = fully_shard(mlp(), mesh=mesh)
    seen = [is_sharded(model)]
    model(data(6)[0])
    seen += [is_sharded(model), any(isinstance(p, DTensor) for p in model.parameters())]
    children = mlp()
    children[0] = FullyShardedDataParallel(children[0], device_id=torch.device('cpu'))
    return [*seen, is_sharded(children), is_sharded(mlp())]


def recorded(batches):
    "What `CurvatureRecorder` says of parameters in parts, and what it keeps"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        res = train(batches, model=on_shards(), mode='none', estimator='gnb', cbs=[recorder := CurvatureRecorder(every=2)])
    return dict(res, said=[str(o.message) for o in said if 'CurvatureRecorder' in str(o.message)], values=list(recorder.records))


def first_probe(batches):
    seen = []
    def draw(p, g):
        seen.append(torch.empty_like(p).bernoulli_(0.5, generator=g))
        return seen[-1]*2-1
    train(batches, probe=draw)
    return seen[0]


class CpuSync(nn.SyncBatchNorm):
    "What `nn.SyncBatchNorm` does on a GPU: the mean and variance are those of all ranks, and are differentiated across them"
    def forward(self, x):
        n,d = dist.get_world_size(),[0,*range(2, x.ndim)]
        mean,sqr = (all_reduce(o.mean(d))/n for o in (x, x.square()))
        return F.linear((x-mean)/(sqr-mean.square()+self.eps).sqrt(), torch.diag(self.weight), self.bias)


def accelerated(batches, **kwargs):
    "A plain loop around a model that `accelerate` has wrapped"
    model = Accelerator(cpu=True).prepare(mlp())
    opt = adahessian(model.parameters(), **{**HYPERS, **kwargs})
    for x,y in batches:
        opt.differentiate(F.cross_entropy(model(x), y), n_items=len(y), group=model.process_group)
        opt.step()
        opt.zero_grad()
    return found_in(opt)


def refused(f):
    "What is said, and whether anything had been computed"
    model,calls = mlp(),[]
    model.register_forward_pre_hook(lambda m,x: calls.append(1))
    try: f(model)
    except Exception as e: return f'{type(e).__name__}: {e}',len(calls)


# Beside AdaHessian's variants: parameters that are moved, steps with bounds, and the other optimizers
ALSO = dict(rho=dict(rho=0.3), rho_each=dict(rho=0.3, update_each=3), rho_gnb=dict(rho=0.3, estimator='gnb'), rho_n_acc=dict(rho=0.3, n_acc=2),
    bounded=dict(clip=1., cap=0.1), rho_bounded=dict(rho=0.3, clip=3., cap=0.1, update_each=10, dense=20))
SOPHIA = dict(opt_func=sophia, lr=0.02, update_each=3)
HF = dict(opt_func=hessian_free, cg_max_iter=12, jvp='reverse')
OTHERS = dict(  # chkstyle: ignore-node
    sophia=SOPHIA, sophia_hutchinson=dict(SOPHIA, estimator='hutchinson'), sophia_n_acc=dict(SOPHIA, n_acc=2), sophia_rows=dict(SOPHIA, hessian_bs=0.5),
    sophia_control=dict(SOPHIA, estimator='control_variate', probe='gaussian'), sassha=dict(opt_func=sassha, lr=0.02, update_each=3))
FREE = dict(  # chkstyle: ignore-node
    free=HF, free_hessian=dict(HF, curvature='hessian'), free_dual=dict(HF, jvp='dual'), free_linearize=dict(HF, jvp='linearize'),
    free_auto=dict(HF, jvp='auto'), free_precondition=dict(HF, precondition=True), free_exact=dict(HF, precondition=True, fisher_probes=None),
    free_no_graph=dict(HF, keep_graph=False), free_decay=dict(HF, wd=0.1), free_fixed=dict(HF, adapt_damping=False, damping=0.3),
    free_no_search=dict(HF, line_search=False, backtracking=False), free_n_acc=dict(HF, n_acc=2), free_held_out=dict(HF, n_acc=3, held_out=1),
    free_curv=dict(HF, n_acc=3, curv_batches=1, curvature='hessian'))
# With synchronised norms; `given` probes where one process has to draw the same
SYNCED = dict(  # chkstyle: ignore-node
    hutchinson=dict(update_each=2, probe=True), ggn=dict(curvature='ggn', update_each=2, probe=True), forward=dict(hvp='forward', update_each=2, probe=True),
    gnb=dict(estimator='gnb', update_each=2), free=HF)

def synced(batches, probe=False, norm=CpuSync, device='cpu', **kwargs):
    found = train([(x.to(device),y.to(device)) for x,y in batches], model=mlp(norm=norm).to(device), mode='ddp', **kwargs, **(dict(probe=given()) if probe else {}))
    return {**found, 'weights': [o.cpu() for o in found['weights']]}

ON_RANKS = {**{k: v for k,v in variants.items() if k!='compiled'}, **ALSO, **OTHERS, **FREE}
SITUATIONS = 'default forward difference ggn ride gnb rows debiased control rho sophia free'.split()

def own_probe(kwargs):
    "Given probes, where the variant has none of its own; one that runs along with the forward pass draws twice, and keeps to its generator"
    gnb = kwargs.get('estimator', 'gnb' if kwargs.get('opt_func') is sophia else '')=='gnb'
    along = kwargs.get('curvature')=='ggn' and kwargs.get('hvp')=='forward'
    return {} if gnb or along or kwargs.get('probe') or kwargs.get('opt_func') in (hessian_free,sassha) else dict(probe=given())

# Hessian-free's rounding grows with its steps, so that few are compared with one process
BRIEF = 8
# A process draws signs for its own rows, or moves along the gradient of its own batch: one process cannot do the same
APART = 'free_precondition','sassha'

def n_epochs(kwargs, n_steps): return math.ceil(n_steps*kwargs.get('n_acc', 1)/4)

def variant_cases(n_ranks, rank, n_steps):
    "Every variant, with the same probes on every rank where it draws none; some of them in other situations; compiling is a case of its own"
    mine = lambda: shards(n_ranks)[rank]
    def run(kw, *args, batches=mine, mode='ddp', **more): return train(batches(), *args, mode=mode, **{**own_probe(kw), **kw, **more})
    def cbs(): return [GradientAccumulation(12),NoSync(2)]
    def epochs(kw): return n_epochs(kw, BRIEF if kw.get('opt_func') is hessian_free else n_steps)
    def unused(kw): return run(kw, epochs(kw), model=InTurn(), ddp=dict(find_unused_parameters=True))
    def no_sync(kw): return run(kw, 2*epochs(kw), cbs=cbs())
    def uneven_ones(kw): return run(kw, epochs(kw), batches=lambda: uneven(mine(), rank, 1))
    return {**{f'variant {k}': partial(run, v, n_epochs(v, n_steps)) for k,v in ON_RANKS.items()},  # chkstyle: ignore-node
        **{f'brief {k}': partial(run, v, epochs(v)) for k,v in FREE.items()},
        **{f'{n} {k}': partial(f, ON_RANKS[k]) for n,f in (('no_sync',no_sync),('uneven',uneven_ones),('unused',unused)) for k in SITUATIONS}}


def part_cases(n_ranks, rank, folder):
    "Parameters that are held in parts"
    mine = lambda: shards(n_ranks)[rank]
    def by_learner(batches=None, **kwargs): return train(batches or mine(), model=on_shards(), mode='none', **{**own_probe(kwargs), **kwargs})
    cases = dict(sharded=lambda: sharded(mine()),  # chkstyle: ignore-node
        sharded_blocks=lambda: sharded_blocks(mine()),
        looked_at=looked_at,
        resumed=lambda: resumed(mine(), folder),
        by_learner=lambda: {k: by_learner(**SHARDED[k]) for k in BY_LEARNER},
        moved=lambda: by_learner(estimator='gnb', rho=0.3),
        recorded=lambda: recorded(mine()),
        rows=lambda: by_learner(estimator='gnb', hessian_bs=3),
        uneven=lambda: by_learner(uneven(mine(), rank), estimator='gnb'),
        overflow=lambda: by_learner(estimator='gnb', cbs=[Overflow('loss')]))
    return {**cases, **{k: partial(lambda kw: plain_loop(mine(), **kw), kw) for k,kw in SHARDED.items()}}


def main(folder, rank, n_ranks, what='usual', n_steps=50, wanted=()):
    mine = lambda: shards(n_ranks)[rank]
    cases = dict(fifty=lambda: train(shards(n_ranks, 10)[rank], 5),  # chkstyle: ignore-node
        given=lambda: train(mine(), probe=given()),
        plain_ddp=lambda: train(mine(), probe=given(), mode='ddp'),
        norm=lambda: train(mine(), 2, model=mlp(norm=nn.BatchNorm1d)),
        synced_norm=lambda: train(mine(), 2, model=mlp(norm=nn.BatchNorm1d), sync_bn=True),
        uneven=lambda: train(uneven(mine(), rank), probe=given()),
        no_sync=lambda: train(mine(), probe=given(), cbs=[GradientAccumulation(12),NoSync(2)]),
        n_acc=lambda: train(mine(), probe=given(), n_acc=2),
        amp=lambda: train(mine(), probe=given(), amp=True),
        overflow=lambda: train(mine(), probe=given(), cbs=[Overflow('loss')]),
        overflow_amp=lambda: train(mine(), probe=given(), cbs=[Overflow('scaled')], amp=True),
        overflow_no_sync=lambda: train(mine(), probe=given(), cbs=[GradientAccumulation(12),NoSync(2),Overflow('loss')]),
        broken=lambda: train(mine(), probe=broken_probe()),
        hessian_bs=lambda: train(mine(), hessian_bs=3),
        ggn=lambda: train(mine(), curvature='ggn'),
        debiased=lambda: train(mine(), n_samples=2, debiased=True),
        noise=lambda: train(shards(n_ranks)[0][:1], 60, lr=0., block_length=1),
        first_probe=lambda: first_probe(mine()),
        uneven_n_acc=lambda: train(uneven(mine(), rank), probe=given(), n_acc=2),
        synced=lambda: {k: synced(mine(), **kw) for k,kw in SYNCED.items()},
        accelerated=lambda: accelerated(mine(), probe=given()),
        compiled_product=lambda: refused(lambda m: train(mine(), model=m, mode='ddp', hvp='compiled')),
        unused=lambda: train(mine(), 2, model=InTurn(), mode='ddp', ddp=dict(find_unused_parameters=True), probe=given()),
        static=lambda: refused(lambda m: train(mine(), model=m, mode='ddp', ddp=dict(static_graph=True))))
    if n_ranks>2: cases['compiled'] = lambda: train(mine(), probe=given(), update_each=2, mode='compiled')
    if what=='variants': cases = variant_cases(n_ranks, rank, n_steps)
    if what=='gpu': cases = dict(synced=lambda: {k: synced(mine(), norm=nn.SyncBatchNorm, device='cuda', **kw) for k,kw in SYNCED.items()})
    if what=='parts': cases = part_cases(n_ranks, rank, folder)
    found = {}
    for name,case in cases.items():
        if wanted and name not in wanted: continue
        found[name] = case()
        torch.save(found, f'{folder}/{rank}.pt')


if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('folder', help='where to write what is found')
    for o in ('rank','n_ranks'): p.add_argument(o, type=int)
    p.add_argument('what', nargs='?', default='usual', choices=['usual','variants','parts','gpu'])
    p.add_argument('--n_steps', type=int, default=50, help='of each variant')
    p.add_argument('--wanted', nargs='*', default=(), help='names of cases; all by default')
    a = p.parse_args()
    torch.set_num_threads(1)
    on_gpu = a.what=='gpu'
    if on_gpu: torch.cuda.set_device(a.rank%torch.cuda.device_count())
    dist.init_process_group('nccl' if on_gpu and torch.cuda.device_count()>=a.n_ranks else 'gloo', rank=a.rank, world_size=a.n_ranks)
    main(**vars(a))
    dist.destroy_process_group()
