"Two and four gloo processes on one machine: the same weights on every rank, and those of one process on the whole batch"
import contextlib,itertools,os,socket,subprocess,sys
from pathlib import Path
import pytest,torch
import torch.nn.functional as F
from functools import partial
from fastai.callback.training import GradientAccumulation
from torch import nn
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from adahessian_fastai.all import hessian_free,sophia
from adahessian_fastai.batch import n_rows
from adahessian_fastai.estimators import Estimate,Given,made_estimator,seeded
from adahessian_fastai.losses import label_noise
from adahessian_fastai.problem import Problem
from adahessian_fastai.schedule import rows_due
from distributed_worker import APART,BRIEF,FREE,ON_RANKS,SHARDED,SITUATIONS,SYNCED,n_epochs,own_probe
from helpers_learner import HYPERS,InTurn,Noted,ROUNDING,Seeded,adahessian,data,distance,fit,given,learner,mlp,plain,split
from twin import Twin

# A one-sided difference in float64 has half of the digits
DIFFERENCE = 1e-5
# Where a signed average is near zero a step is large, and so is the share of its error
DIFFERENCE_SIGNED = 1e-4
# `MixedPrecision` turns predictions into float32
FLOAT_PRED = 1e-6
# Seconds: a machine that others use too may be slow, and a process that hangs is ended at last
PATIENCE = {2: 600, 4: 3600}
worker = Path(__file__).with_name('distributed_worker.py')


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def launch(n_ranks, folder, timeout, *args):
    "Run all cases on `n_ranks` processes; a process that hangs is ended and named"
    env = {**os.environ, 'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': str(n_ranks), 'OMP_NUM_THREADS': '1'}
    logs = [open(folder/f'{r}.log', 'w+') for r in range(n_ranks)]
    ps = [subprocess.Popen([sys.executable, worker, folder, str(r), str(n_ranks), *args], env={**env, 'RANK': str(r), 'LOCAL_RANK': str(r)},
        stdout=log, stderr=subprocess.STDOUT) for r,log in enumerate(logs)]
    try:
        for p in ps: p.wait(timeout=timeout)
    finally:
        for p in ps: p.kill()
        for log in logs: log.close()
    assert all(p.returncode==0 for p in ps), (folder/'0.log').read_text()[-3000:]+(folder/'1.log').read_text()[-3000:]
    return [torch.load(folder/f'{r}.pt') for r in range(n_ranks)]


@pytest.fixture(scope='module', params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory): return launch(request.param, tmp_path_factory.mktemp('ranks'), PATIENCE[request.param])


@pytest.fixture(scope='module')
def on_gpu(tmp_path_factory):
    "Two processes: a GPU for each with nccl, or one for both with gloo"
    return launch(2, tmp_path_factory.mktemp('gpu'), PATIENCE[2], 'gpu')


CASES = ['fifty','given','plain_ddp','norm','synced_norm','uneven','no_sync','n_acc','amp','overflow','overflow_amp','overflow_no_sync','broken',
    'hessian_bs','ggn','debiased']

@pytest.mark.parametrize('case', CASES)
def test_all_ranks_end_with_the_same_bits(ranks, case):
    "Also the counts, except that after an overflow inside `no_sync` one rank takes no estimate and the others cannot know yet"
    first,*others = [r[case] for r in ranks]
    assert all(p.isfinite().all() for p in first['weights'])
    for o in others:
        for k in first:
            if case=='overflow_no_sync' and k=='n_estimates': continue
            if k in ('weights','averages'): assert all(torch.equal(a,b) for a,b in zip(first[k], o[k]))
            else: assert first[k]==o[k]


def test_fifty_steps_were_taken(ranks):
    found = ranks[0]['fifty']
    assert (found['n_steps'],found['n_estimates'],found['n_skipped'],found['n_dropped'])==(50,50,0,0)
    assert max((p-q).abs().max() for p,q in zip(found['weights'], mlp().parameters()))>0.1


def whole(n_ranks, cut=lambda shards: shards):
    "For each batch, the batches of all ranks"
    x,y = data(n_ranks*24)
    return list(zip(*cut([split(a,b,6) for a,b in zip(x.chunk(n_ranks), y.chunk(n_ranks))])))


def mean_loss(model, batches):
    "The mean of the ranks' means, where an empty batch counts as zero"
    return sum(F.cross_entropy(model(x), y) if len(y) else 0 for x,y in batches)/len(batches)


def together(steps, update_each=1, dropped=None):
    "One process that sees the batches of all ranks: `steps` of lists of what the ranks see at a time; before step `dropped` probes are drawn in vain"
    model,probe = mlp(),given()
    twin = Twin([dict(params=list(model.parameters()), **HYPERS)], probe, update_each=update_each)
    for i,step in enumerate(steps):
        if i==dropped: [probe(p, None) for p in model.parameters()]
        twin.step([partial(mean_loss, model, o) for o in step])
    return list(model.parameters())


def far(a, b): return max((p-q).abs().max().item() for p,q in zip(a,b))


@pytest.mark.parametrize('case,update_each', [('given',1), ('plain_ddp',1), pytest.param('compiled', 2, marks=pytest.mark.slow)])
def test_given_probes_equal_one_process_on_the_whole_batch(ranks, case, update_each):
    if case not in ranks[0]: pytest.skip('compiled on four ranks only')
    steps = [[o] for o in whole(len(ranks))]
    assert far(ranks[0][case]['weights'], together(steps, update_each))<ROUNDING
    if case=='given':
        x,y = data(len(ranks)*24)
        concatenated = [[(torch.cat([x for x,_ in o]),torch.cat([y for _,y in o]))] for o in whole(len(ranks))]
        assert far(ranks[0][case]['weights'], plain(mlp(), concatenated).parameters())<ROUNDING


def test_a_shorter_and_an_empty_batch(ranks):
    def cut(shards):
        for s in shards[1:]: s[1],s[2] = [tuple(o[:n] for o in s[i]) for i,n in ((1,2),(2,0))]
        return shards
    want = together([[o] for o in whole(len(ranks), cut)])
    assert ranks[0]['uneven']['n_skipped']==0 and far(ranks[0]['uneven']['weights'], want)<ROUNDING


@pytest.mark.parametrize('case', ['no_sync','n_acc'])
def test_accumulation(ranks, case):
    batches = whole(len(ranks))
    assert far(ranks[0][case]['weights'], together([batches[:2],batches[2:]]))<ROUNDING


def test_mixed_precision(ranks):
    want = together([[o] for o in whole(len(ranks))])
    assert far(ranks[0]['amp']['weights'], want)<FLOAT_PRED


@pytest.mark.parametrize('case,bound', [('overflow',ROUNDING), ('overflow_amp',FLOAT_PRED)])
def test_an_overflow_on_one_rank_skips_the_step_of_all(ranks, case, bound):
    found,batches = ranks[0][case],whole(len(ranks))
    want = together([[o] for o in batches[:2]+batches[3:]], dropped=2 if case=='overflow' else None)
    assert found['n_steps']==3 and far(found['weights'], want)<bound


def test_uneven_batches_of_an_accumulation(ranks):
    "Each batch weighs as many items as all ranks have in it: 6 and 6 in the first two, 2 and none on the others in the next two"
    same_bits([r['uneven_n_acc'] for r in ranks])
    n,probe,model = len(ranks),given(),mlp()
    shards = [split(a,b,6) for a,b in zip(*(o.chunk(n) for o in data(n*24)))]
    for s in shards[1:]: s[1],s[2] = [tuple(o[:m] for o in s[i]) for i,m in ((1,2),(2,0))]
    twin,batches = Twin([dict(params=list(model.parameters()), **HYPERS)], probe),list(zip(*shards))
    for step in (batches[:2],batches[2:]):
        items = [sum(len(y) for _,y in o) for o in step]
        twin.step([lambda o=o, w=w: mean_loss(model, o)*w*len(step)/sum(items) for o,w in zip(step, items)])
    assert far(ranks[0]['uneven_n_acc']['weights'], model.parameters())<ROUNDING


class Joined(nn.Module):
    "`mlp` with batch norm on the items of all ranks, 6 of each, and the parameters of each rank as tensors of their own"
    def __init__(self):
        super().__init__()
        self.net,self.own,self.copies = mlp(norm=nn.BatchNorm1d),True,[]
    def forward(self, x):
        xs = x.split(6)
        self.copies = [[p.view_as(p) for p in self.net.parameters()] for _ in xs]
        hs = [F.linear(o, w, b) for o,(w,b,*_) in zip(xs, self.copies)]
        one = torch.cat(hs)
        def normed(h, w, b):
            of = h if self.own else one
            return (h-of.mean(0))/(of.var(0, unbiased=False)+1e-5).sqrt()*w+b
        return torch.cat([F.linear(normed(h, w, b).tanh(), v, c) for h,(_,_,w,b,v,c) in zip(hs, self.copies)])


def labels_of_copies(model, seed):
    "The mean of the squares of what each rank's parameters get from the labels that all ranks draw"
    n = itertools.count()
    def diagonal(problem, params):
        at = seed+7919*next(n)
        pairs = enumerate(zip(problem.outputs.split(6), problem.targets.split(6)))
        us = [label_noise(F.cross_entropy, z, y)(seeded(at+104729*r)(z.device)) for r,(z,y) in pairs]
        each = [torch.autograd.grad(problem.outputs, ps, torch.cat(us), retain_graph=True) for ps in model.copies]
        return [torch.stack(o).square().mean(0) for o in zip(*each)]
    return Given(diagonal)


def joined_training(n_ranks, name, seed, device):
    "One process in which the norm sees the items of all ranks, or of each rank where the estimate differentiates twice"
    model,kwargs = Joined().to(device),dict(SYNCED[name])
    if name=='gnb': kwargs['estimator'] = labels_of_copies(model, seed)
    if kwargs.pop('probe', False): kwargs['probe'] = given()
    if name!='free': kwargs = {**HYPERS, **kwargs}
    def choose(learn): model.own = name=='free' or name!='gnb' and learn.train_iter%2==0
    torch.manual_seed(5)
    opt_func,batches = partial(kwargs.pop('opt_func', adahessian), **kwargs),[(x.to(device),y.to(device)) for x,y in all_batches(n_ranks)]
    learn = Learner(DataLoaders(batches, []), model, F.cross_entropy, opt_func=opt_func, cbs=[Seeded(),Noted('before_batch', choose)])
    learn.remove_cb(learn.recorder)
    return fit(learn)


def as_joined(found, name, device='cpu'):
    same_bits(found)
    learn = joined_training(len(found), name, found[0]['seed'] if name=='gnb' else None, device)
    assert found[0]['n_steps']==learn.opt.n_steps==4
    assert far(found[0]['weights'], [p.cpu() for p in learn.model.parameters()])<(ROUNDING_FREE if name=='free' else ROUNDING)


@pytest.mark.filterwarnings('ignore:hessian_free fits its steps')
@pytest.mark.parametrize('name', SYNCED)
def test_synchronised_norms(ranks, name):
    """Estimates that differentiate twice have the statistics of each rank, at steps 1 and 3, as Hessian-free at each; other steps have those of all.
    GNB, which differentiates once, has them at each step"""
    as_joined([r['synced'][name] for r in ranks], name)


@pytest.mark.cuda
@pytest.mark.filterwarnings('ignore:hessian_free fits its steps')
@pytest.mark.parametrize('name', SYNCED)
def test_synchronised_norms_of_pytorch(on_gpu, name): as_joined([r['synced'][name] for r in on_gpu], name, 'cuda')


def test_a_plain_loop_with_accelerate(ranks):
    same_bits([r['accelerated'] for r in ranks])
    assert far(ranks[0]['accelerated']['weights'], ranks[0]['given']['weights'])<ROUNDING


def test_a_compiled_product_is_refused_with_a_way_out(ranks):
    assert all(r['compiled_product'][0].startswith('ValueError') and "use hvp='forward'" in r['compiled_product'][0] for r in ranks)


def test_synchronised_norms_use_the_statistics_of_their_rank_on_estimate_steps(ranks):
    "fastai's `distrib_ctx` makes them of every batch norm; with an estimate on each step they equal ordinary ones"
    assert all(torch.equal(a,b) for a,b in zip(ranks[0]['norm']['weights'], ranks[0]['synced_norm']['weights']))


def test_an_overflow_inside_no_sync_skips_the_step_of_all(ranks):
    "In the first half of the second step: no rank waits for an estimate that another does not take"
    found = ranks[0]['overflow_no_sync']
    assert (found['n_steps'],found['n_skipped'])==(1,1)
    assert far(found['weights'], together([whole(len(ranks))[:2]]))<ROUNDING


def test_a_broken_estimate_on_one_rank_is_dropped_by_all(ranks):
    assert (ranks[0]['broken']['n_dropped'],ranks[0]['broken']['n_steps'])==(1,4)


def test_ranks_draw_different_probes(ranks):
    "As many agreements as two coins have: 35 entries, within four standard deviations"
    a,b = (r['first_probe'] for r in ranks[:2])
    assert abs((a==b).double().mean()-0.5)<4*0.5/a.numel()**0.5


def test_more_ranks_leave_less_noise(ranks):
    """60 estimates at one point, the same batch on all ranks: the average of squares lies above the squared diagonal by the variance of an
    estimate, which falls with the number of ranks. A quarter more or less is what 60 estimates of 66 entries leave open"""
    model,((x,y),*_) = mlp(),split(*data(len(ranks)*24), 6)
    ps = list(model.parameters())
    flat = lambda ts: torch.cat([t.flatten() for t in ts])
    gs = flat(torch.autograd.grad(F.cross_entropy(model(x), y), ps, create_graph=True))
    exact = torch.stack([flat(torch.autograd.grad(g, ps, retain_graph=True))[i] for i,g in enumerate(gs)])
    alone = fit(learner(mlp(), x, y, hypers={**HYPERS, 'lr': 0.}, block_length=1), 60)
    one = [s['sqr_avg_diag_hessian'] for s in alone.opt.opt.state.values()]
    above = [(flat(v)/(1-HYPERS['sqr_mom']**60)-exact**2).sum() for v in (one,ranks[0]['noise']['averages'])]
    assert abs(above[0]/above[1]/len(ranks)-1)<0.25


def test_a_static_graph_is_refused_before_the_first_batch(ranks):
    for r in ranks:
        said,n_calls = r['static']
        assert 'static_graph=True' in said and said.startswith('ValueError') and n_calls==0


def test_parameters_that_only_some_batches_use(ranks):
    "`find_unused_parameters`, two heads in turn: as one process"
    a,*others = [r['unused']['weights'] for r in ranks]
    assert all(torch.equal(p, q) for o in others for p,q in zip(a, o))
    alone = fit(learner(InTurn(), *joined(len(ranks)), bs=6*len(ranks), probe=given(), loss_func=F.cross_entropy), 2)
    assert far(a, alone.model.parameters())<ROUNDING


def joined(n_ranks, n_batches=4, bs=6):
    "The items in the order in which all ranks together see them"
    x,y = data(n_ranks*n_batches*bs)
    order = torch.arange(len(x)).view(n_ranks, n_batches, bs).transpose(0, 1).flatten()
    return x[order],y[order]


# Every variant

@pytest.fixture(scope='module', params=[2,4])
def of_variants(request, tmp_path_factory, n_steps):
    return launch(request.param, tmp_path_factory.mktemp('variants'), PATIENCE[4], 'variants', '--n_steps', str(n_steps))

# 50 steps: the sums of different orders have more time to part
ROUNDING_50,DIFFERENCE_50 = 1e-8,1e-4
# 8 steps of Hessian-free: conjugate gradients lengthen what rounding does
ROUNDING_FREE = 1e-7

def by_difference(kwargs): return kwargs.get('hvp') in ('finite_difference','auto')

def same_bits(found):
    first,*others = found
    assert all(p.isfinite().all() for p in first['weights'])
    for o in others: assert far(first['weights'], o['weights'])==0 and all(first[k]==o[k] for k in first if k.startswith('n_'))


OF_ESTIMATOR = 'estimator','curvature','probe','n_samples'

class OfRanks:
    "The mean of what `n` processes estimate, each on its batch and with its own random numbers, found by one that sees all batches"
    again,second_order = False,True
    def __init__(self, n, own, hessian_bs=None, hvp=None, **kwargs):
        self.each = [made_estimator(**{**own(), **kwargs}) for _ in range(n)]
        self.opt,self.hessian_bs,self.n_samples = None,hessian_bs,self.each[0].n_samples

    def surround(self, *args): return contextlib.nullcontext()

    def on_rank(self, r, problem, x, y):
        at = self.opt.counts.seed+7919*self.opt.n_estimates+104729*r
        if self.hessian_bs is not None and (n := n_rows(rows_due(self.opt.n_steps, self.hessian_bs), len(x)))<len(x):
            rows = torch.randperm(len(x), generator=seeded(at+1)(torch.device('cpu')))[:n].sort().values
            x,y = x[rows],y[rows]
        problem.model.eval() # It neither counts nor drops
        z = problem.model(x)
        problem.model.train()
        return Problem(problem.params, F.cross_entropy(z, y)*problem.weight, z, y, F.cross_entropy, weight=problem.weight),seeded(at)

    def __call__(self, problem, params, rng, center=None):
        ests = []
        for r,(est,x,y) in enumerate(zip(self.each, *(problem.loss_func.cut(o) for o in (problem.inputs[0],problem.targets)))):
            of,mine = self.on_rank(r, problem, x, y)
            ests.append(est(of, params, mine, center))
        mean = [[torch.stack(o).mean(0) for o in zip(*(e[i] for e in ests))] for i in (0,1)]
        return Estimate(*mean, None)

    def state_dict(self): return {}
    def load_state_dict(self, sd): pass


class MeanOfRanks:
    "The mean of the losses of all processes, whose items come one after the other; where they are `uneven` all but the first have fewer"
    def __init__(self, n, uneven=False): self.n,self.uneven,self.fewer = n,uneven,{6+2*(n-1): 2, 6+(n-1): 1}
    def cut(self, o): return o.split([6]+[self.fewer.get(len(o), 6) if self.uneven else 6]*(self.n-1))
    def __call__(self, pred, y): return sum(F.cross_entropy(z, t) for z,t in zip(self.cut(pred), self.cut(y)))/self.n


def all_batches(n_ranks, uneven=False):
    "The batches of all ranks, joined"
    def cut(shards):
        for s in shards[1:]: s[1],s[2] = [tuple(o[:m] for o in s[i]) for i,m in ((1,2),(2,1))]
        return shards
    return [tuple(map(torch.cat, zip(*o))) for o in whole(n_ranks, cut if uneven else lambda s: s)]


def alone(n_ranks, n_epoch, seed, model=None, cbs=(), uneven=False, opt_func=adahessian, **kwargs):
    "One process that sees the batches of all, with the random numbers of each"
    own = {k: kwargs.pop(k) for k in (*OF_ESTIMATOR,'hvp','hessian_bs') if k in kwargs and opt_func is not hessian_free}
    if opt_func is sophia: own.setdefault('estimator', 'gnb')
    if opt_func is adahessian: kwargs = {**HYPERS, **kwargs}
    est = None if opt_func is hessian_free else OfRanks(n_ranks, lambda: own_probe({**own, 'opt_func': opt_func}), **own)
    loss_func = MeanOfRanks(n_ranks, uneven) if est or uneven else F.cross_entropy
    torch.manual_seed(5)
    learn = Learner(DataLoaders(all_batches(n_ranks, uneven), []), model or mlp(), loss_func, opt_func=partial(opt_func, **kwargs,
        **(dict(estimator=est) if est else {})), cbs=[Seeded(),*cbs])
    learn.remove_cb(learn.recorder)
    learn.create_opt()
    if est: est.opt,learn.opt.counts.seed = learn.opt,seed
    return fit(learn, n_epoch)


def compared(n_ranks, name, n_steps, found, situation='variant'):
    "Largest difference from one process that sees the batches of all, and how large it may be"
    kwargs,n_steps = ON_RANKS[name],BRIEF if name in FREE else n_steps
    n_epoch,model,cbs = n_epochs(kwargs, n_steps)*(2 if situation=='no_sync' else 1),InTurn() if situation=='unused' else mlp(),[]
    if situation=='no_sync': cbs = [GradientAccumulation(12*n_ranks)]
    learn = alone(n_ranks, n_epoch, found.get('seed'), model, cbs, situation=='uneven', **kwargs)
    bound = ROUNDING_FREE if name in FREE else DIFFERENCE_50 if by_difference(kwargs) else ROUNDING_50
    return far(found['weights'], learn.model.parameters()),bound


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ON_RANKS)
def test_every_variant_on_all_ranks(of_variants, n_steps, name):
    "The same bits, and the weights of one process that sees the batches of all"
    same_bits(found := [r[f'variant {name}'] for r in of_variants])
    assert found[0]['n_steps']>=n_steps
    if name in APART: return
    if name in FREE: same_bits(found := [r[f'brief {name}'] for r in of_variants])
    distance,bound = compared(len(of_variants), name, n_steps, found[0])
    assert distance<bound


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', SITUATIONS)
@pytest.mark.parametrize('situation', ['no_sync','uneven','unused'])
def test_variants_in_situations_on_all_ranks(of_variants, n_steps, situation, name):
    "Local gradients in every other batch as one process that accumulates; unused parameters, and uneven batches, as one process"
    same_bits(found := [r[f'{situation} {name}'] for r in of_variants])
    distance,bound = compared(len(of_variants), name, n_steps, found[0], situation)
    assert distance<bound


def test_data_parallel_on_one_device_works():
    x,y = data(24)
    learn = fit(learner(nn.DataParallel(mlp()), x, y, probe=given()))
    assert distance(learn.model.module, plain(mlp(), [[b] for b in split(x,y,6)]))<ROUNDING


def test_data_parallel_on_several_devices_is_refused():
    "Before the first batch is computed"
    x,y = data(12)
    model = nn.DataParallel(mlp())
    model.device_ids = [0,1]
    with pytest.raises(ValueError, match='use `learn.distrib_ctx'): fit(learner(model, x, y))


# Parts of the parameters in each process

@pytest.fixture(scope='module', params=[2, pytest.param(4, marks=pytest.mark.slow)])
def shared_out(request, tmp_path_factory): return launch(request.param, tmp_path_factory.mktemp('parts'), PATIENCE[request.param], 'parts')

@pytest.mark.parametrize('case', ['sharded','sharded_blocks'])
def test_a_sharded_model_is_refused(shared_out, case):
    assert all('ValueError: curvature is not available for parameters sharded as in this' in r[case] for r in shared_out)


PARTS = list(SHARDED)
BY_DIFFERENCE = [k for k in PARTS if not k.startswith('gnb')]

def labels_of_ranks(n_ranks, seed, n_samples=1):
    "What one process finds that draws the labels of all ranks as they do: the square of the mean gradient, as often as there are ranks"
    n = itertools.count()
    def diagonal(problem, params):
        at = seed+7919*next(n)
        rngs = [seeded(at+104729*r)(torch.device('cpu')) for r in range(n_ranks)]
        def sample():
            zs,ys = problem.outputs.chunk(n_ranks),problem.targets.chunk(n_ranks)
            us = [label_noise(F.cross_entropy, z, y)(g)/n_ranks for z,y,g in zip(zs, ys, rngs)]
            return [n_ranks*problem.weight*g.square() for g in torch.autograd.grad(problem.outputs, params, torch.cat(us), retain_graph=True)]
        return [torch.stack(o).mean(0) for o in zip(*(sample() for _ in range(n_samples)))]
    return Given(diagonal)


def of_parts(n_ranks):
    "Probes whose parts each rank draws by itself; rows are dealt out as `chunk` does"
    draws = [given() for _ in range(n_ranks)]
    def draw(p, _):
        parts = p.detach().chunk(n_ranks)
        return torch.cat([f(o, None) for f,o in zip(draws, [*parts, *[p.detach()[:0]]*(n_ranks-len(parts))])])
    return draw


def on_one(n_ranks, found, **kwargs):
    "The same training in one process, on whole parameters"
    gnb = kwargs.get('estimator')=='gnb'
    ours = {k: v for k,v in kwargs.items() if not (gnb and k=='n_samples')}
    if gnb: ours['estimator'] = labels_of_ranks(n_ranks, found['seed'], kwargs.get('n_samples', 1))
    else: ours.update(hvp='reverse')
    if not gnb: ours['probe'] = of_parts(n_ranks)
    return fit(learner(mlp(), *joined(n_ranks), bs=6*n_ranks, hypers={**HYPERS, **ours})).opt


@pytest.mark.parametrize('name', PARTS)
def test_parts_in_each_process_equal_one_process(shared_out, name):
    "Weights and averages, in float64; the states are parts as the parameters are"
    found,*others = [r[name] for r in shared_out]
    opt = on_one(len(shared_out), found, **SHARDED[name])
    averages = [v for p in opt.all_params().itemgot(0) for k,v in opt.state[p].items() if 'diag_hessian' in k]
    bound = ROUNDING if name not in BY_DIFFERENCE else DIFFERENCE_SIGNED if SHARDED[name].get('signed') else DIFFERENCE
    assert found['parts'] and found['n_estimates']==opt.n_estimates and found['n_steps']==opt.n_steps>1
    assert far(found['weights'], opt.all_params().itemgot(0))<bound and far(found['averages'], averages)<bound
    for o in others: assert far(found['weights'], o['weights'])==0 and found['n_estimates']==o['n_estimates']


def test_a_learner_with_parts_trains_as_a_plain_loop(shared_out):
    for r in shared_out:
        for name,found in r['by_learner'].items(): assert found['parts'] and far(found['weights'], r[name]['weights'])<ROUNDING, name


def test_a_state_of_parts_goes_on_where_it_stood(shared_out):
    "From parts and from whole tensors"
    for r in shared_out:
        for found in r['resumed']: assert found['parts'] and far(found['weights'], r['gnb']['weights'])==0


def test_with_parts_an_overflow_on_one_rank_skips_the_step_of_all(shared_out):
    for r in shared_out: assert (r['overflow']['n_steps'],r['overflow']['n_skipped'])==(3,1)


@pytest.mark.parametrize('case', ['moved','rows','uneven'])
def test_parts_in_other_situations_are_the_same_on_all_ranks(shared_out, case):
    first,*others = [r[case] for r in shared_out]
    assert first['n_steps']==first['n_estimates']==4 and all(p.isfinite().all() for p in first['weights'])
    for o in others: assert far(first['weights'], o['weights'])==0


def test_a_recorder_says_that_it_measures_nothing_of_parts(shared_out):
    "On one process, and the training is the one without it"
    for r in shared_out: assert r['recorded']['values']==[] and far(r['recorded']['weights'], r['by_learner']['gnb']['weights'])==0
    assert [len(r['recorded']['said']) for r in shared_out]==[1]+[0]*(len(shared_out)-1)
    assert shared_out[0]['recorded']['said'][0].startswith('CurvatureRecorder measures nothing here: the parameters are sharded')


def test_parts_are_seen_before_and_after_a_forward_pass(shared_out):
    "After it the root holds whole parameters for a while: the third entry says that this was the case"
    for r in shared_out: assert r['looked_at']==[True,True,False,True,False]
