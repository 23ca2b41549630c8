"Diagnostics: nothing is disturbed, the numbers are those of the dense Hessian, every optimizer and callback goes along"
import math,os,pickle,socket,sys,time,types,warnings
from functools import partial
from unittest import mock

import matplotlib,numpy as np,pytest,torch,torch.distributed as dist,torch.multiprocessing as mp,torch.nn.functional as F
matplotlib.use('Agg')
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.rnn import rnn_cbs
from fastai.callback.schedule import Learner
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.data.core import DataLoaders,TfmdDL
from fastai.learner import Callback
from fastai.losses import CrossEntropyLossFlat,MSELossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam,Lookahead,OptimWrapper,Optimizer,SGD,average_grad,momentum_step,ranger
from fastai.text.data import LMDataLoader
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import get_language_model
from fastai.torch_core import get_random_states,set_seed
from fastcore.foundation import L
from scipy.linalg import eigvalsh
from torch import Tensor,nn
from torch.nn.attention import SDPBackend,sdpa_kernel
from torch.utils.data import TensorDataset

from adahessian_fastai.curvature import Hessian
from adahessian_fastai.estimators import Given
from adahessian_fastai.adahessian import adahessian as adahessian_default,adahessian_paper as adahessian
from adahessian_fastai.batch import batch_of,problem_of
from adahessian_fastai.compare import compare_optimizers
from adahessian_fastai.diagnostics import *
from adahessian_fastai.hessian_free import hessian_free
from adahessian_fastai.hutchinson import hutchinson_diag,hutchinson_samples
from adahessian_fastai.hvp import flat
from adahessian_fastai.replay import preserving
from adahessian_fastai.sassha import m_sassha,sassha
from adahessian_fastai.sophia import sophia
from adahessian_fastai.spectrum import confidence_interval,dense_hessian,dense_matrix,extreme_eigenvalues,spectral_density
from adahessian_fastai.stability import Stability,fresh_states,trained_lr

# float32 curvature of small networks, relative to its largest entry
SAME = 1e-5
# An eigenvalue by Lanczos in float32 against the dense one in float64
EIGEN = 1e-3

def gen(seed=0): return torch.Generator().manual_seed(seed)

def dls(n=64, bs=16, seq=False):
    g = gen(3)
    x = torch.randint(0, 7, (n+16,6), generator=g) if seq else torch.randn(n+16, 1, 6, 6, generator=g)
    y = torch.randint(0, 3, (n+16,), generator=g)
    d = TensorDataset(x[:n], y[:n]),TensorDataset(x[n:], y[n:])
    return DataLoaders(*(TfmdDL(o, bs=bs, shuffle=i==0, num_workers=0) for i,o in enumerate(d)))

class Transformer(nn.Module):
    def __init__(self, dropout=.1):
        super().__init__()
        self.emb,self.enc,self.out = nn.Embedding(7,8),nn.TransformerEncoderLayer(8, 2, 8, dropout=dropout, batch_first=True),nn.Linear(8,3)
    def forward(self, x): return self.out(self.enc(self.emb(x)).mean(1))

class Remembers(nn.Module):
    "A recurrent model with a hidden state in an attribute"
    def __init__(self):
        super().__init__()
        self.emb,self.rnn,self.out,self.h = nn.Embedding(7,4),nn.GRU(4, 5, batch_first=True),nn.Linear(5,3),None
    def forward(self, x):
        o,h = self.rnn(self.emb(x), self.h)
        self.h = h.detach()
        return self.out(o[:,-1])

def conv(): return nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.3), nn.Flatten(), nn.Linear(64,3))

models = dict(conv=conv, transformer=Transformer, no_dropout=partial(Transformer, 0.), remembers=Remembers)

def learner(name='conv', opt_func=Adam, cbs=None, **kwargs):
    set_seed(5)
    return Learner(dls(seq=name in ('transformer','no_dropout','remembers')), models[name](), loss_func=CrossEntropyLossFlat(), opt_func=opt_func, cbs=cbs, **kwargs)

def run(learn, epochs=2, lr=1e-2):
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    return learn

def everything(learn):
    "Weights, buffers, optimizer state and random numbers after training, as a flat list"
    def leaves(o):
        if isinstance(o, dict): return [x for k in sorted(o, key=str) for x in leaves(o[k])]
        return [x for e in o for x in leaves(e)] if isinstance(o, (list,tuple,L)) else [o]
    rng = get_random_states()
    return leaves([learn.model.state_dict(), learn.opt.state_dict(), rng['torch_state'], rng['numpy_state'][1].tolist(),
        list(rng['random_state'][1]),
        [p.grad for p in learn.model.parameters()], torch.rand(3), learn.recorder.losses, getattr(learn.model, 'h', 0)])

def identical(a, b): return len(a)==len(b) and all(torch.equal(x, y) if isinstance(x, Tensor) else x==y for x,y in zip(a, b))

class Writes(nn.Module):
    "Writes into its weights: by new data, or in the data that is there"
    def __init__(self, how):
        super().__init__()
        self.net,self.how = conv(),how
    def forward(self, x):
        w = self.net[0].weight
        if self.training and self.how=='new data': w.data = F.normalize(w.data, dim=1)
        elif self.training: w.data.mul_(.97)
        return self.net(x)

models |= dict(normalizes=partial(Writes, 'new data'), decays=partial(Writes, 'in the data'))

# ---- nothing is disturbed -------------------------------------------------------------------------------------------

opts = dict(adam=Adam, sgd=partial(SGD, mom=.9), adahessian=partial(adahessian, update_each=2), defaults=adahessian_default, sassha=sassha,
    ranger=ranger,    hessian_free=partial(hessian_free, cg_max_iter=4, jvp='reverse')) # 'auto' chooses by a clock

slowly = lambda name,opt: [pytest.mark.slow] if opt=='hessian_free' and name!='conv' else []

@pytest.mark.parametrize('name,opt', [pytest.param(m, o, marks=slowly(m, o)) for m in models for o in opts])
def test_training_is_bit_identical(name, opt):
    plain = everything(run(learner(name, opts[opt])))
    seen = learner(name, opts[opt], cbs=CurvatureRecorder(every=3, per_layer=True))
    assert identical(plain, everything(run(seen)))
    assert len(seen.curvature_recorder.records)==3

@pytest.mark.parametrize('name', ['normalizes','decays'])
def test_what_a_forward_pass_writes_into_weights_is_no_trace_of_a_measurement(name):
    "Of one by hand, after training"
    learn = run(learner(name))
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.stability()
    learn.curvature_summary()
    assert all(torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))

def texts(): # Of a language model, whose loader shuffles them in place
    g = torch.Generator().manual_seed(0)
    return [LMDataLoader([torch.randint(7, (n,), generator=g) for n in range(5,25)], bs=4, seq_len=6, shuffle=k) for k in (True,False)]

def reader(dls, opt_func=Adam):
    set_seed(5)
    return Learner(dls, nn.Sequential(nn.Embedding(7,8), nn.Linear(8,7)), loss_func=CrossEntropyLossFlat(), opt_func=opt_func)

def test_a_look_at_the_batches_of_a_language_model_leaves_their_order():
    learn = reader(DataLoaders(*texts()))
    run(learn, 1)
    order = [*learn.dls.train.items.idxs]
    first = [first_batches(learn.dls.train)[0][0].tolist() for _ in range(3)]
    assert first[0]==first[1]==first[2] and learn.dls.train.items.idxs==order!=sorted(order)

def test_a_table_with_a_column_of_that_name_is_left_alone():
    "The items of a table's loader are the table"
    dl = DataLoaders(*texts()).train
    table = TfmdDL(list(range(8)), bs=4)
    table.items = types.SimpleNamespace(idxs=(3,1,2))
    assert first_batches(table)[0].tolist()==[0,1,2,3] and table.items.idxs==(3,1,2) and hasattr(dl, 'make_chunks')

def test_each_optimizer_reads_the_texts_in_one_order():
    dls = DataLoaders(*texts())
    runs = compare_optimizers(partial(reader, dls), dict(a=Adam, b=Adam), 2, lr=1e-2)
    a,b = runs.losses
    assert len(a)>8 and a==b

def test_the_comparison_can_fail():
    "Another seed of the dropout masks is seen by `identical`"
    def shifted():
        learn = learner()
        torch.rand(1)
        return everything(run(learn))
    assert not identical(everything(run(learner())), shifted())

others = dict(nothing=lambda: [], accumulation=lambda: [GradientAccumulation(32)], mixup=lambda: [MixUp(), GradientClip(1.)],
    both=lambda: [GradientClip(.1), GradientAccumulation(24)])

@pytest.mark.parametrize('opt', ['adam','defaults'])
@pytest.mark.parametrize('cbs', others)
def test_beside_other_callbacks(cbs, opt):
    "The defaults move the parameters for a pass; an accumulation keeps them where a step began"
    plain = everything(run(learner(opt_func=opts[opt], cbs=others[cbs]())))
    seen = learner(opt_func=opts[opt], cbs=[*others[cbs](), CurvatureRecorder(every=2)])
    assert identical(plain, everything(run(seen)))
    assert all(math.isfinite(r['lambda_max']) for r in seen.curvature_recorder.records)

def test_functions_of_the_learner_do_not_disturb():
    def go(look):
        learn = learner(opt_func=adahessian)
        if look:
            learn.curvature_summary(n_samples=2, max_iter=4)
            learn.stability(2, max_iter=4)
            learn.curvature_product()
            assert learn.opt is None and trained_lr(learn)==.15 and learn.opt is None
        return everything(run(learn))
    assert identical(go(False), go(True))

def test_gradient_hooks_are_not_called():
    def go(cbs):
        learn,calls = learner(cbs=cbs),[]
        def hook(g):
            calls.append(1)
            return g/2
        learn.model[0].weight.register_hook(hook)
        return everything(run(learn)),len(calls)
    plain,seen = go([]),go([CurvatureRecorder(every=1)])
    assert identical(plain[0], seen[0]) and plain[1]==seen[1]==8

def test_frozen_layers_and_modes():
    learn = learner(cbs=CurvatureRecorder(every=1))
    learn.model[0].requires_grad_(False)
    learn.model[1].eval()
    run(learn, 1)
    modes = [m.training for m in learn.model.modules()]
    learn.curvature_summary(n_samples=2, max_iter=4)
    assert [m.training for m in learn.model.modules()]==modes
    assert '0 Conv2d' not in layer_params(learn.model) and len(learn.curvature_recorder.records)==4

def test_lr_find_and_predictions_are_left_alone(tmp_path):
    learn = learner(cbs=CurvatureRecorder(every=1), path=tmp_path)
    with learn.no_bar(): learn.lr_find(num_it=8, show_plot=False)
    assert learn.curvature_recorder.records==[]
    run(learn, 1)
    n = len(learn.curvature_recorder.records)
    assert n==4 and len(learn.recorder.metric_names)==3+5+1
    with learn.no_bar():
        learn.get_preds()
        assert len(learn.validate())==1
    assert len(learn.curvature_recorder.records)==n

def test_interrupted_training_can_go_on():
    class Stop(Callback):
        def after_backward(self):
            if self.n: self.n -= 1
            else: raise KeyboardInterrupt
    stop = Stop()
    stop.n = 2
    learn = learner(cbs=[CurvatureRecorder(every=1), stop])
    with pytest.raises(KeyboardInterrupt): run(learn)
    learn.remove_cb(stop)
    run(learn, 1)
    assert len(learn.curvature_recorder.records)==4 and len(learn.recorder.metric_names)==9

def test_recorder_can_be_pickled():
    learn = run(learner(cbs=CurvatureRecorder(every=2)), 1)
    rec = learn.curvature_recorder
    learn.remove_cb(rec)
    assert pickle.loads(pickle.dumps(rec)).frame.equals(rec.frame)

def on_rank(rank, port, path, with_recorder):
    "One of two processes: its own half of the data, the model wrapped as fastai wraps it"
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    class Wrap(Callback):
        order = -20
        def before_fit(self): self.learn.model = nn.parallel.DistributedDataParallel(self.model)
        def after_fit(self): self.learn.model = self.model.module
    learn = learner(cbs=[Wrap(), *([CurvatureRecorder(every=1)] if with_recorder else [])])
    learn.dls.train.rng.seed(rank)
    run(learn, 1)
    n = len(learn.curvature_recorder.records) if with_recorder else 0
    torch.save((n, [p.detach() for p in learn.model.parameters()], list(learn.model.buffers())), path/f'{with_recorder}_{rank}.pt')
    dist.destroy_process_group()

def test_two_processes(tmp_path):
    "The first process measures, the second does not wait for anything, and both train as without a recorder"
    for with_recorder in (True, False):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        mp.start_processes(on_rank, (port, tmp_path, with_recorder), nprocs=2, start_method='fork')
    res = {(w,r): torch.load(tmp_path/f'{w}_{r}.pt') for w in (True,False) for r in (0,1)}
    assert res[True,0][0]==4 and res[True,1][0]==0
    for r in (0,1):
        for a,b in zip(res[True,r][1]+res[True,r][2], res[False,r][1]+res[False,r][2]): assert torch.equal(a, b)
    for a,b in zip(res[True,0][1], res[True,1][1]): assert torch.equal(a, b)

@pytest.mark.cuda
def test_mixed_precision_on_a_gpu():
    "float16 training with a loss scale: bit-identical, and curvature in single precision without the scale"
    def go(cbs):
        set_seed(5)
        learn = Learner(dls().cuda(), conv().cuda(), loss_func=CrossEntropyLossFlat(), cbs=[MixedPrecision(), *cbs])
        return everything(run(learn)),learn
    (plain,_),(seen,learn) = go([]),go([CurvatureRecorder(every=2)])
    assert identical(plain, seen)
    for r in learn.curvature_recorder.records: assert 0 < r['lambda_max'] < 1e3

def test_hooks_and_lists_of_callbacks():
    "Hooks of modules, of their backward passes, and what a callback of the loss collects"
    class Collects(Callback):
        def before_fit(self): self.seen = []
        def after_loss(self): self.seen.append(self.loss.item())
    def go(cbs):
        learn,backs = learner(cbs=[ActivationStats(modules=None), Collects(), *cbs]),[]
        learn.model[0].register_full_backward_hook(lambda m,gi,go: backs.append(go[0].norm().item()))
        run(learn)
        return everything(learn),learn.activation_stats.stats,learn.collects.seen,backs
    plain,seen = go([]),go([CurvatureRecorder(every=1, per_layer=True)])
    assert identical(plain[0], seen[0]) and len(plain[3])==8
    assert str(plain[1:])==str(seen[1:])

def test_embeddings_that_are_shortened():
    "An embedding with `max_norm` changes its weights in the forward pass"
    class Short(Transformer):
        def __init__(self):
            super().__init__(0.)
            self.emb = nn.Embedding(7, 8, max_norm=1.)
    def go(look):
        set_seed(5)
        learn = Learner(dls(seq=True), Short(), loss_func=CrossEntropyLossFlat(), cbs=CurvatureRecorder(every=1) if look else None)
        weights = learn.model.emb.weight.clone()
        if look: learn.curvature_summary(n_samples=2, max_iter=3)
        assert torch.equal(weights, learn.model.emb.weight)
        return everything(run(learn, 1))
    assert identical(go(False), go(True))

def test_transformers_install_hooks_in_their_first_forward_pass():
    transformers = pytest.importorskip('transformers')
    class Bert(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = dict(vocab_size=7, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, num_labels=3)
            config = transformers.BertConfig(**sizes, output_hidden_states=True)
            self.net,self.n_states = transformers.BertForSequenceClassification(config),[]
        def forward(self, x):
            out = self.net(x)
            self.n_states = [*self.n_states, len(out.hidden_states)]
            return out.logits + sum(h.mean() for h in out.hidden_states)
    def go(cbs):
        set_seed(5)
        learn = Learner(dls(seq=True), Bert(), loss_func=CrossEntropyLossFlat(), cbs=cbs)
        return everything(run(learn, 1)),learn
    (plain,a),(seen,b) = go([]),go([CurvatureRecorder(every=1)])
    assert identical(plain, seen) and set(a.model.n_states)==set(b.model.n_states)=={3}
    assert all(math.isfinite(r['lambda_max']) for r in b.curvature_recorder.records)

# ---- a diagnostic never ends a run ----------------------------------------------------------------------------------

class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return g

def ctc(pred, y):
    "PyTorch's CTC has no double backward"
    n,logs = len(pred),pred.view(-1, 1, 3).log_softmax(-1).repeat(1, 2, 1).transpose(0, 1)
    return F.ctc_loss(logs, y[:,None]%2+1, torch.full((n,), 2), torch.full((n,), 1))

once = types.SimpleNamespace(last=torch.tensor([]))

def raises(pred, y):
    "A loss that can be evaluated once a batch"
    if torch.equal(y, once.last): raise RuntimeError("once only")
    once.last = y
    return F.cross_entropy(pred, y)

broken = dict(once=lambda pred,y: F.cross_entropy(Once.apply(pred), y), ctc=ctc, raises=raises)

@pytest.mark.parametrize('loss', broken)
def test_what_cannot_be_measured_is_nan_with_one_warning(loss):
    def go(cbs):
        set_seed(5)
        learn = Learner(dls(), conv(), loss_func=broken[loss], cbs=cbs)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            return everything(run(learn)),learn,[o for o in said if 'cannot measure' in str(o.message)]
    (plain,*_),(seen,learn,said) = go([]),go([CurvatureRecorder(every=2)])
    assert identical(plain, seen) and len(said)==1
    recs = learn.curvature_recorder.records
    assert len(recs)==4 and all(math.isnan(r[k]) for r in recs for k in CurvatureRecorder.columns)
    assert all(r['seconds']>0 and r['lr']>0 for r in recs)
    learn.curvature_recorder.plot_timeline()

def test_an_interrupt_in_a_measurement_is_one():
    class Stops(Hessian):
        def __call__(self, *args): raise KeyboardInterrupt
    learn = learner(cbs=CurvatureRecorder(every=1, curvature=Stops()))
    with pytest.raises(KeyboardInterrupt): run(learn)
    assert learn.curvature_recorder.records==[]

def test_an_unknown_curvature_is_refused_before_the_training():
    with pytest.raises(ValueError, match="curvature='fisher'"): CurvatureRecorder(curvature='fisher')

def on_shard(rank, port, path):
    "One of two processes that share a model's parameters, in its children alone"
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    set_seed(5)
    model = nn.Sequential(nn.Linear(36,4), nn.Tanh(), nn.Linear(4,3))
    flat_dls = DataLoaders(*(TfmdDL(TensorDataset(torch.randn(8,36), torch.randint(0, 3, (8,))), bs=4, num_workers=0) for _ in range(2)))
    fully_shard(model[0], mesh=init_device_mesh('cpu', (2,)))
    learn = Learner(flat_dls, model, loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, wd=0.), cbs=CurvatureRecorder(every=1))
    with warnings.catch_warnings(record=True) as said, learn.no_bar(), learn.no_logging():
        warnings.simplefilter('always')
        learn.fit(1, .01)
    try: error = learn.curvature_summary()
    except ValueError as e: error = str(e)
    torch.save((learn.curvature_recorder.records, sum('sharded' in str(o.message) for o in said), error), path/f'{rank}.pt')
    dist.destroy_process_group()

def test_sharded_parameters_are_said_to_be_sharded(tmp_path):
    "The first process alone would wait for ever"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.start_processes(on_shard, (port, tmp_path), nprocs=2, start_method='fork')
    for rank in (0,1):
        records,n,error = torch.load(tmp_path/f'{rank}.pt')
        assert records==[] and n==(rank==0) and 'sharded' in error

# ---- the numbers ----------------------------------------------------------------------------------------------------

def literal(learn, params):
    "Dense Hessian of the batch in the Learner, by the room below"
    model = learn.model
    def loss():
        with sdpa_kernel(SDPBackend.MATH): return learn.loss_func(model(*learn.xb), *learn.yb).as_subclass(Tensor)
    return dense_hessian(loss, params, chunk_size=256)

def literal_at(learn, b, params):
    "The same for the batch `b`"
    with preserving(learn.model),batch_of(learn):
        learn._split(b)
        return literal(learn, params)

@pytest.mark.parametrize('name', ['conv', 'no_dropout'])
def test_product_of_a_batch(name):
    learn = learner(name)
    for m in learn.model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    b = first_batches(learn.dls.train)[0]
    learn.model.double()
    b = tuple(o.double() if o.is_floating_point() else o for o in b)
    params = list(learn.model.parameters())
    H = literal_at(learn, b, params)
    v = [torch.randn(p.shape, generator=gen(), dtype=p.dtype) for p in params]
    assert torch.allclose(flat(learn.curvature_product(params, [b])(v)), H@flat(v), atol=1e-9)
    group = params[-2:]
    n = sum(p.numel() for p in group)
    assert torch.allclose(dense_matrix(learn.curvature_product(group, [b]), group), H[-n:,-n:], atol=1e-9)
    with products_of(learn, [b], params) as of:
        assert torch.allclose(flat(of()(v)), H@flat(v), atol=1e-9)
        assert torch.allclose(dense_matrix(of(group), group), H[-n:,-n:], atol=1e-9)

def test_one_graph_serves_many_products():
    learn = learner()
    b,params = first_batches(learn.dls.train),learner_params(learn)
    forward,count = type(learn.model).forward,[]
    def counted(self, x):
        count.append(1)
        return forward(self, x)
    v = [torch.ones_like(p) for p in params]
    type(learn.model).forward = counted
    try:
        with products_of(learn, b, params) as of:
            for _ in range(3): of()(v), of(params[:1])(v[:1])
        assert len(count)==1
        for _ in range(3): learn.curvature_product(params, b)(v)
        assert len(count)==4
    finally: type(learn.model).forward = forward

def test_recorded_numbers_are_those_of_the_dense_hessian():
    "Each record against the dense Hessian at the weights after that step, taken by another callback"
    class Dense(Callback):
        order = CurvatureRecorder.order+1
        def before_fit(self): self.H = []
        def after_batch(self):
            if not self.training: return
            with preserving(self.model),torch.enable_grad(): self.H.append(literal(self.learn, list(self.model.parameters())))
    learn = learner(opt_func=SGD, cbs=[CurvatureRecorder(every=1, tol=1e-4, max_iter=200, n_samples=6), Dense()])
    learn.model[3].p = 0.
    run(learn, 1, .1)
    covered = 0
    for r,H in zip(learn.curvature_recorder.records, learn.dense.H):
        lam = eigvalsh(H.double())
        assert abs(r['lambda_max']-lam[-1]) <= r['lambda_max_bound']+SAME*lam[-1]
        assert abs(r['lambda_min']-lam[0]) <= r['lambda_min_bound']+SAME*lam[-1]
        assert r['edge']==pytest.approx(lam[-1]*r['lr']/2, rel=EIGEN)
        covered += r['trace_lo'] <= H.trace() <= r['trace_hi']
    assert len(learn.dense.H)==4 and covered>=3

@pytest.mark.parametrize('name', ['conv','remembers'])
def test_masks_and_hidden_states_are_those_of_the_batch(name):
    "With a learning rate of zero the recorded loss surface is the one of the training step, dropout mask, hidden state and all"
    class Grab(Callback):
        def after_pred(self): self.seen = self.pred.detach().clone()
    grab = Grab()
    learn = learner(name, SGD, cbs=[grab, CurvatureRecorder(every=1)])
    rec,preds = learn.curvature_recorder,[]
    original = rec.record
    def record():
        with problem_of(learn, None, learner_params(learn), start=rec.before): preds.append((learn.pred.detach().clone(), grab.seen))
        return original()
    rec.record = record
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.)
    assert len(preds)==4 and all(torch.equal(a, b) for a,b in preds)

def test_gauss_newton_is_positive_and_follows_the_loss():
    learn = run(learner(cbs=CurvatureRecorder(every=2, curvature='ggn')), 1)
    for r in learn.curvature_recorder.records: assert r['lambda_min'] > -1e-4*r['lambda_max'] and r['lambda_max']>0

class Halves(Callback):
    "Hands half of the input to the loss, as a callback does that reconstructs or forces a teacher"
    order = 1
    def before_batch(self): self.learn.xb,self.learn.yb = (self.x,),(self.y,self.x[:,0,0,:3])
    def after_pred(self): self.learn.pred = self.pred*2

def test_the_batch_is_the_one_that_callbacks_prepared():
    def loss(pred, y, more): return F.cross_entropy(pred, y) + (pred-more).square().mean()
    learn = Learner(dls(), conv(), loss_func=loss, opt_func=SGD, cbs=[Halves(), CurvatureRecorder(every=1, max_iter=100, tol=1e-4)])
    learn.model[3].p = 0.
    learn.model[1].eval()
    class Dense(Callback):
        order = CurvatureRecorder.order+1
        def before_fit(self): self.top = []
        def before_train(self): self.model[1].eval()
        def after_batch(self):
            if not self.training: return
            def f(): return loss(self.model(self.x)*2, *self.yb)
            with preserving(self.model),torch.enable_grad(): H = dense_hessian(f, list(self.model.parameters()), chunk_size=256)
            self.top.append(eigvalsh(H.double())[-1])
    learn.add_cb(Dense())
    run(learn, 1, .1)
    assert [r['lambda_max'] for r in learn.curvature_recorder.records]==pytest.approx(learn.dense.top, rel=EIGEN)

class Adds(Callback):
    "Adds 5‖w‖² to the loss, so 10 to each eigenvalue"
    def after_loss(self): self.learn.loss_grad = self.loss_grad + 5*sum(p.square().sum() for p in self.model.parameters())

def test_what_a_callback_adds_is_seen_everywhere():
    def tops(cbs):
        learn = learner('no_dropout', SGD, cbs=[*cbs, CurvatureRecorder(every=1, max_iter=200, tol=1e-5)])
        with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.)
        b = first_batches(learn.dls.train)
        text = learn.curvature_summary(n_samples=2, max_iter=200)
        in_table = float(text.splitlines()[-4].split()[-3])
        return learn.curvature_recorder.records[0]['lambda_max'],learn.stability(batches=b, tol=1e-5).lambda_max,in_table
    for plain,more in zip(tops([]), tops([Adds()])): assert more-plain==pytest.approx(10, rel=.02)

def test_mean_over_batches_is_the_whole():
    learn = learner('no_dropout')
    params = list(learn.model.parameters())
    v = [torch.randn(p.shape, generator=gen()) for p in params]
    xb = tuple(torch.cat(o) for o in zip(*[b for b in learn.dls.train.new(shuffle=False)]))
    whole,mean = learn.curvature_product(params, [xb]),learn.curvature_product(params, learn.dls.train)
    assert torch.allclose(flat(whole(v)), flat(mean(v)), atol=SAME)

class TimeFirst(nn.Module):
    "As PyTorch's recurrent layers have it by default: time × rows × features"
    def __init__(self):
        super().__init__()
        self.rnn,self.out = nn.GRU(3,4),nn.Linear(4,3)
    def forward(self, x): return self.out(self.rnn(x)[0][-1])

def test_batches_count_by_their_targets():
    "As in a step: the first dimension of these inputs is time"
    batches = [(torch.randn(7,n,3, generator=gen(n)),torch.randint(3, (n,), generator=gen(n))) for n in (16,16,6)]
    learn = Learner(DataLoaders(batches, batches), TimeFirst(), CrossEntropyLossFlat(), opt_func=adahessian)
    whole = tuple(torch.cat(o, dim) for o,dim in zip(zip(*batches), (1,0)))
    v = [torch.ones_like(p) for p in learn.model.parameters()]
    want,got = (flat(learn.curvature_product(batches=o)(v)) for o in ([whole],batches))
    assert torch.allclose(want, got, atol=SAME)

def test_batches_of_detectors_count_by_their_pictures():
    "Whatever the boxes of the first one"
    x,y = torch.randn(9, 4, generator=gen()),torch.arange(9)%3
    def loss(pred, ys): return F.cross_entropy(pred, torch.stack([o['label'] for o in ys]))
    rows = [dict(boxes=torch.zeros(n, 4), label=o) for n,o in zip((1,2,3,4,5,6,9,1,1), y)]
    batches = [(x[:6],rows[:6]), (x[6:],rows[6:])]
    learn = Learner(DataLoaders(batches, batches), nn.Linear(4,3), loss, opt_func=adahessian)
    v = [torch.randn(p.shape, generator=gen(1)) for p in learn.model.parameters()]
    both,a,b = (learn.curvature_product(batches=o)(v) for o in (batches, batches[:1], batches[1:]))
    for m,p,q in zip(both, a, b): torch.testing.assert_close(m, (6*p+3*q)/9)

def test_first_batches_leave_the_shuffling():
    learn = learner()
    set_seed(9)
    first = first_batches(learn.dls.train, 2)
    again = first_batches(learn.dls.train, 2)
    assert all(torch.equal(a[0], b[0]) for a,b in zip(first, again)) and len(first_batches(learn.dls.train, 99))==4
    with pytest.raises(ValueError, match='n_batches'): first_batches(learn.dls.train, 0)

@pytest.mark.parametrize('own', [False,True], ids=['global','own'])
def test_loaders_of_pytorch(own):
    "They have no `rng`, `bs` or `device` of fastai's; the numbers are those of fastai's loaders, and the shuffling stays"
    ours = learner()
    x,y = (torch.cat(o) for o in zip(*ours.dls.valid))
    ds,g = TensorDataset(torch.as_tensor(x), torch.as_tensor(y)),torch.Generator().manual_seed(1) if own else None
    plain = torch.utils.data.DataLoader(ds, 16)
    ours.dls = DataLoaders(TfmdDL(list(ds), bs=16), ours.dls.valid, device='cpu')
    theirs = Learner(DataLoaders(plain, plain), ours.model, ours.loss_func, opt_func=Adam)
    v = [torch.ones_like(p) for p in ours.model.parameters()]
    assert torch.allclose(flat(ours.curvature_product(n_batches=2)(v)), flat(theirs.curvature_product(n_batches=2)(v)), atol=SAME)
    assert str(ours.curvature_summary(n_samples=2))==str(theirs.curvature_summary(n_samples=2))
    shuffled = torch.utils.data.DataLoader(ds, 16, shuffle=True, generator=g)
    state = torch.get_rng_state(),g.get_state() if own else torch.zeros(1)
    first,again = first_batches(shuffled, 1),first_batches(shuffled, 1)
    assert torch.equal(first[0][0], again[0][0]) and not torch.equal(first[0][0], x[:16])
    assert torch.equal(torch.get_rng_state(), state[0]) and (not own or torch.equal(g.get_state(), state[1]))

def test_rnn_callbacks_take_part():
    "A language model returns three things; its callbacks pick the prediction and regularise the loss"
    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            drops = {f'{o}_p': .1 for o in ('output','hidden','input','embed','weight')}
            self.lm = get_language_model(AWD_LSTM, 7, config=dict(emb_sz=6, n_hid=5, n_layers=1, pad_token=0,
                tie_weights=True, out_bias=True, **drops))
        def forward(self, x): return self.lm(x)
        def reset(self): self.lm.reset()
    def go(rec):
        set_seed(1)
        x = torch.randint(0, 7, (32,5), generator=gen())
        d = DataLoaders(*(TfmdDL(TensorDataset(x, x), bs=8, shuffle=s, num_workers=0) for s in (True,False)))
        learn = Learner(d, LM(), loss_func=CrossEntropyLossFlat(), cbs=[*rnn_cbs(alpha=2., beta=1.), *rec])
        return everything(run(learn, 1)),learn
    (plain,_),(seen,learn) = go([]),go([CurvatureRecorder(every=1)])
    assert identical(plain, seen)
    recs = learn.curvature_recorder.records
    assert len(recs)==4 and all(math.isfinite(r['trace']) and r['lambda_max']>0 for r in recs)

def test_autocast_does_not_reach_the_curvature(cpu_amp):
    "Training in bfloat16, measured in single precision: the numbers are those of a run without autocast at the same weights"
    def lam(half):
        learn = learner(opt_func=SGD, cbs=CurvatureRecorder(every=1))
        if half: learn.to_bf16()
        with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.)
        return [r['lambda_max'] for r in learn.curvature_recorder.records]
    assert lam(True)==lam(False)

def test_loss_that_is_not_finite_is_recorded_and_survived():
    learn = learner(opt_func=SGD, cbs=CurvatureRecorder(every=1))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*cannot measure')
        run(learn, 1, 1e20)
    recs = learn.curvature_recorder.records
    assert len(recs)==4 and math.isnan(recs[-1]['lambda_max'])
    learn.curvature_recorder.plot_timeline()

# ---- what the optimizer believes ------------------------------------------------------------------------------------

def test_overestimate_on_a_known_diagonal():
    "An optimizer whose average is three times the diagonal is said to overestimate by three"
    p = nn.Parameter(torch.zeros(4))
    d = torch.tensor([1.,2.,-3.,4.])
    st = ProbeStats(lambda v: [d*v[0]], [p], 2)
    opt = adahessian([p], lr=.1)
    assert math.isnan(overestimate(opt, [p], st))
    opt.opt.state[p].update(sqr_avg_diag_hessian=(3*d)**2*(1-.999**5), hess_step=5)
    assert overestimate(opt, [p], st)==pytest.approx(3., rel=1e-4)
    assert math.isnan(overestimate(Adam([p], lr=.1), [p], st))

def test_probe_stats_against_their_definition():
    A = torch.randn(6, 6, generator=gen())
    A,ps = A+A.T,[torch.zeros(2,2), torch.zeros(2)]
    product = lambda v: [o.view_as(p) for o,p in zip((A@flat(v)).split([4,2]), ps)]
    st = ProbeStats(product, ps, 4000, gen())
    var = (A**2).sum(1)-A.diag()**2
    signal,noise = st.power()
    assert signal==pytest.approx((A.diag()**2).mean().item(), rel=.1) and noise==pytest.approx(var.mean().item(), rel=.1)
    tr,err = st.trace([1])
    assert abs(tr-A.diag()[4:].sum()) < 4*err
    with pytest.raises(ValueError, match='n_samples'): ProbeStats(product, ps, 1)

def test_more_probes_of_the_optimizer_mean_less_noise():
    def snr(n):
        learn = run(learner(opt_func=partial(adahessian, n_samples=n), cbs=CurvatureRecorder(every=4)), 1)
        return learn.curvature_recorder.records[0]['snr']
    one,four = snr(1),snr(4)
    assert one>0 and four>one

# ---- schedule, table, logs ------------------------------------------------------------------------------------------

def test_budget_is_kept():
    "The share of time stays below the budget, apart from the last measurement"
    class Slow(Callback):
        def before_batch(self): time.sleep(.02)
    learn = learner(cbs=[CurvatureRecorder(budget=.2, max_iter=3, n_samples=2), Slow()])
    began = time.perf_counter()
    run(learn, 12)
    rec,total = learn.curvature_recorder,time.perf_counter()-began
    cost = [r['seconds'] for r in rec.records]
    assert 2 <= len(rec.records) < 48
    assert sum(cost)-max(cost) <= .2*total

def test_every_argument_changes_something():
    base = dict(every=2)
    def rec(**kw): return run(learner(cbs=CurvatureRecorder(**{**base, **kw})), 1).curvature_recorder.records
    numbers = lambda rs: [(r['lambda_max'], r['lambda_max_bound'], r['trace']) for r in rs]
    one = rec()
    assert numbers(one)==numbers(rec())
    others = dict(n_samples=8), dict(max_iter=3), dict(tol=1e-6), dict(curvature='ggn'), dict(seed=1)
    for kw in others: assert numbers(rec(**kw))!=numbers(one), kw
    assert len(rec(every=1))==4 and 'layers' in rec(per_layer=True)[0]

def test_table_and_trackers(tmp_path):
    stops = EarlyStoppingCallback(monitor='lambda_max', comp=np.less, patience=5)
    learn = learner(cbs=[CurvatureRecorder(every=2), CSVLogger(), stops], metrics=accuracy, path=tmp_path)
    with learn.no_bar(): learn.fit(2, 1e-2)
    names = list(learn.recorder.metric_names)
    assert names==['epoch','train_loss','valid_loss','accuracy',*CurvatureRecorder.columns,'time']
    assert all(len(v)==len(names)-2 for v in learn.recorder.values)
    assert learn.recorder.values[-1][3]==learn.curvature_recorder.records[-1]['lambda_max']
    assert 'lambda_max' in (tmp_path/'history.csv').read_text().splitlines()[0]

def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = learner(cbs=[TensorBoardCallback(tmp_path, trace_model=False, log_preds=False), CurvatureRecorder(every=2)])
    run(learn, 1)
    acc = EventAccumulator(str(tmp_path)).Reload()
    got = [e.value for e in acc.Scalars('curvature/lambda_max')]
    assert got==pytest.approx([r['lambda_max'] for r in learn.curvature_recorder.records]) and 'trace' in acc.Tags()['scalars']

def test_writers_of_other_callbacks(monkeypatch):
    "The two ways out, with stand-ins for the packages"
    scalars,logged = [],[]
    class Board(Callback):
        def before_fit(self): self.writer = types.SimpleNamespace(add_scalar=lambda k,v,i: scalars.append((k,v,i)))
    class Wandb(Callback):
        def before_fit(self): self._wandb_step = 7
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(log=lambda d,step: logged.append((d,step))))
    learn = run(learner(cbs=[Board(), Wandb(), CurvatureRecorder(every=4)]), 1)
    lam = learn.curvature_recorder.records[0]['lambda_max']
    assert ('curvature/lambda_max', lam, 1) in scalars
    assert logged[0][1]==7 and logged[0][0]['curvature/lambda_max']==lam

def test_plots_draw_what_was_recorded():
    learn = run(learner(opt_func=adahessian, cbs=CurvatureRecorder(every=2, per_layer=True)), 1)
    rec = learn.curvature_recorder
    axs = rec.plot_timeline()
    assert list(axs[1,0].lines[0].get_ydata())==[r['edge'] for r in rec.records] and math.isfinite(rec.records[-1]['edge'])
    bars = rec.plot_layers()[0].patches
    assert sorted(b.get_width() for b in bars)==pytest.approx(sorted(o['lambda_max'] for o in rec.records[-1]['layers'].values()))
    assert len(rec.plot_density(n_steps=5, n_samples=1).lines)==1
    scatter = rec.plot_diagonal(n_entries=20)
    x,y = scatter.lines[0].get_data()
    assert len(x)==20 and (x>=0).all() and (y>=0).all() and 'optimizer' in scatter.get_ylabel()
    plain = run(learner(opt_func=ranger, cbs=CurvatureRecorder(every=2)), 1).curvature_recorder
    assert 'probe' in plain.plot_diagonal(n_entries=5).get_ylabel()
    scales = [(scatter,'log'), (rec.plot_diagonal(5, log=False),'linear')]
    scales += [(plain.plot_diagonal(5),'linear'), (plain.plot_diagonal(5, log=True),'log')]
    assert rec.plot_diagonal(5, log=False).get_xlabel()==scatter.get_xlabel()=='exact |diagonal|'
    for ax,scale in scales: assert (ax.get_xscale(),ax.get_yscale(),ax.get_xlim(),ax.get_aspect())==(scale,scale,ax.get_ylim(),1)
    assert all(math.isnan(r['edge']) for r in plain.records) and 'none is known' in plain.plot_timeline()[1,0].texts[0].get_text()
    with pytest.raises(ValueError, match='per_layer=True'): plain.plot_layers()
    with pytest.raises(ValueError, match='train first'): CurvatureRecorder().plot_timeline()

def test_a_recorder_of_one_training_says_how_it_can_draw_afterwards():
    learn,rec = learner(),CurvatureRecorder(every=2)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, cbs=rec)
    for draw in (rec.plot_density,rec.plot_diagonal):
        with pytest.raises(ValueError, match='add_cb'): draw()
    learn.add_cb(rec)
    assert len(rec.plot_density(n_steps=5, n_samples=1).lines)==1 and rec.plot_diagonal(n_entries=5).lines and len(rec.records)>0

def test_scatter_is_the_dense_diagonal():
    learn = learner('no_dropout', cbs=CurvatureRecorder(every=2))
    run(learn, 1)
    params,n = learner_params(learn),30
    idxs = torch.randperm(sum(p.numel() for p in params), generator=gen(42))[:n]
    H = literal_at(learn, first_batches(learn.dls.train)[0], params)
    x = learn.curvature_recorder.plot_diagonal(n_entries=n).lines[0].get_xdata()
    assert torch.allclose(torch.as_tensor(x), H.diag()[idxs], atol=SAME)

def test_noise_plot_draws_the_record():
    learn = learner(opt_func=partial(adahessian, n_samples=2), splitter=lambda m: [list(o.parameters()) for o in (m[:2], m[2:])])
    run(learn, 1)
    drawn,record = plot_noise(learn).lines[:4:2],learn.opt.noise_record
    assert len(record)==len(learn.dls.train)>1
    for i,l in enumerate(drawn):
        want = np.array([r[i].item() for _,r in record])
        assert l.get_xdata().tolist()==[s for s,_ in record]
        np.testing.assert_array_equal(np.nan_to_num(np.asarray(l.get_ydata(), dtype=want.dtype)), want)
    assert [l.get_label() for l in drawn]==['0 Conv2d … 1 BatchNorm2d', '5 Linear']
    assert [l.get_label() for l in plot_noise(learn.opt).lines[:4:2]]==['group 0', 'group 1']
    assert plot_noise(learn).get_yscale()=='log'

def test_gaps_of_the_noise_plot_are_explained():
    opt = types.SimpleNamespace(noise_record=[(i, torch.tensor([r,1.])) for i,r in enumerate((2.,0.,3.,0.))])
    ax = plot_noise(opt)
    assert ax.lines[1].get_xdata().tolist()==[1,3] and ax.lines[3].get_xdata().tolist()==[]
    assert 'not told from noise' in [o.get_text() for o in ax.get_legend().get_texts()]
    del opt.noise_record[1], opt.noise_record[2]
    assert 'not told from noise' not in [o.get_text() for o in plot_noise(opt).get_legend().get_texts()]

@pytest.mark.parametrize('opt', [Adam, adahessian])
def test_noise_plot_without_a_record_says_what_to_do(opt):
    learn = learner(opt_func=opt)
    for o in (learn, run(learn, 1), learn.opt):
        with pytest.raises(ValueError, match='n_samples >= 2'): plot_noise(o)

# ---- the optimizer at hand, summary and learning rate ----------------------------------------------------------------

def dense_scaling(opt, params):
    "What `opt` divides by, from its state"
    def one(p, s, h):
        if 'sqr_avg' in s: return (s['sqr_avg']/(1-h['sqr_mom']**s['step'])).sqrt()+h['eps']
        if 'hessian_power' in h:
            d = (s['sqr_avg_diag_hessian'].sqrt()/(1-h['sqr_mom']**s['hess_step'])**.5 if 'sqr_avg_diag_hessian' in s
                else s['avg_diag_hessian'].abs()/(1-h['sqr_mom']**s['hess_step']))
            d = d**h['hessian_power']+h['eps']
            m = s['grad_avg']/(1-h['mom']**s['step'])
            u = (m/d).abs()
            rms = u.square().mean().sqrt()
            if h['clip']: d = d*(u/(h['clip']*rms)).clamp_min(1)
            return d*(rms/h['cap']).clamp_min(1) if h['cap'] else d
        d = (h['rho']*s['avg_diag_hessian']).clamp_min(h['eps'])
        return torch.where(s['grad_avg'].abs()<d, d, math.inf)
    of = {p: one(p, s, h) for p,_,s,h in opt.all_params()}
    return flat([of[p] for p in params]).double()

def dense_top(H, rates):
    half = rates.sqrt()
    return eigvalsh((half[:,None]*H.double()*half).numpy())[-1]

plain_steps = dict(mom=.9, wd=0.)
scaled_opts = dict(adam=Adam, adahessian=adahessian, half=partial(adahessian, hessian_power=.5), bounded=partial(adahessian, clip=1.5, cap=.1),
    m_sassha=m_sassha, sophia=partial(sophia, estimator='hutchinson', rho=5., update_each=1))
scaled_opts = {k: partial(f, **plain_steps) for k,f in scaled_opts.items()}

def two_groups(m): return [list(m.emb.parameters())+list(m.enc.parameters()), list(m.out.parameters())]

@pytest.mark.parametrize('opt', scaled_opts)
def test_recorded_edge_is_that_of_the_optimizers_own_step(opt):
    "With a learning rate for each group, against the dense matrix scaled by the optimizer's own state"
    class Dense(Callback):
        order = CurvatureRecorder.order+1
        def before_fit(self): self.edges = []
        def after_batch(self):
            if not self.training: return
            params = learner_params(self.learn)
            with preserving(self.model),torch.enable_grad(): H = literal(self.learn, params)
            lr = flat([torch.full_like(p, h['lr']) for p,_,_,h in self.opt.all_params()])
            self.edges.append(dense_top(H, lr/dense_scaling(self.opt, params))/(2*1.9/.1))
    learn = learner('no_dropout', scaled_opts[opt], cbs=[CurvatureRecorder(every=1, tol=1e-5, max_iter=300), Dense()], splitter=two_groups)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, slice(1e-3,1e-2))
    assert learn.dense.edges[-1]>0
    assert [r['edge'] for r in learn.curvature_recorder.records]==pytest.approx(learn.dense.edges, rel=EIGEN)

@pytest.mark.parametrize('opt', ['adam','adahessian','bounded','sophia'])
def test_a_parameter_that_no_step_moves_has_no_part_in_the_edge(opt):
    "The same training, and the same limit after it, with a parameter that the loss does not know"
    def trained(spare):
        learn = learner('no_dropout', scaled_opts[opt], cbs=CurvatureRecorder(every=1, tol=1e-5, max_iter=300))
        if spare: learn.model.out.spare = nn.Parameter(torch.ones(3)) # The last one, so that the others have the same probes
        run(learn, 1)
        return [r['edge'] for r in learn.curvature_recorder.records],learn.stability(n_batches=1, tol=1e-5, max_iter=300)
    (edges,limit),(same,also) = map(trained, (False,True))
    assert all(map(math.isfinite, edges)) and edges==pytest.approx(same, rel=EIGEN)
    assert also.limit==pytest.approx(limit.limit, rel=EIGEN)

def test_sophia_takes_part_with_what_it_does_not_clip():
    learn = run(learner('no_dropout', scaled_opts['sophia']), 1)
    P = flat(step_scaling(learn.opt, learner_params(learn)))
    assert 0 < P.isinf().float().mean() < 1

@pytest.mark.parametrize('name', ['no_dropout','conv'])
def test_summary_has_the_layers_numbers(name):
    learn = learner(name, opt_func=SGD, lr=.25)
    if name=='conv': learn.model[3].p = 0.
    text = learn.curvature_summary(n_samples=60, max_iter=60)
    params = learner_params(learn)
    H = literal_at(learn, first_batches(learn.dls.train)[0], params).double()
    rows = {l.split()[0]:l for l in text.splitlines() if '±' in l}
    at = 0
    for name,ps in layer_params(learn.model).items():
        n = sum(p.numel() for p in ps)
        block,off = H[at:at+n,at:at+n],(H[at:at+n]**2).sum()-(H.diag()[at:at+n]**2).sum()
        snr = (block.diag().square().sum()/off).sqrt().item()
        at += n
        row = rows[name.split()[0]].split()
        if row[3]=='±': row.insert(1, '')
        tr,err,lam = float(row[3]),float(row[5]),float(row[6])
        assert int(row[2].replace(',',''))==n
        assert abs(tr-block.trace()) < 4*err+1e-2*abs(tr)
        assert lam==pytest.approx(eigvalsh(block)[-1], rel=.02, abs=1e-3)
        assert float(row[8])==pytest.approx(snr, rel=.4, abs=.15)
    lam = eigvalsh(H)[-1]
    assert all(len(l)<=80 for l in text.splitlines()[:-2])
    assert f'lr=0.25 is {.25/(2/lam):.2g} times that limit' in text

def test_summary_judges_the_rate_of_the_training(tmp_path):
    "Not what the schedule left of it, and not what `lr_find` tried"
    learn = learner('no_dropout', lr=.02, path=tmp_path)
    assert trained_lr(learn)==.02
    run(learn, 2, .01)
    assert learn.opt.hypers[-1]['lr']<1e-3 and trained_lr(learn)==pytest.approx(.01, rel=.05)
    assert f'lr={trained_lr(learn):.3g} is' in learn.curvature_summary(n_samples=2, max_iter=4)
    with learn.no_bar(): learn.lr_find(num_it=8, show_plot=False)
    assert trained_lr(learn)==.02
    with learn.no_bar(),learn.no_logging(): learn.fit(1, .003)
    assert trained_lr(learn)==.003
    assert 'lr=0.5 ' in learn.curvature_summary(n_samples=2, max_iter=4, lr=.5)

def test_parameters_of_the_loss_are_listed():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))
        def forward(self, pred, y): return F.cross_entropy(pred, y)*torch.exp(-self.scale)+self.scale
    loss = Loss()
    learn = Learner(dls(), conv(), loss_func=loss, splitter=lambda m: [list(m.parameters()), list(loss.parameters())])
    text = learn.curvature_summary(n_samples=2, max_iter=4)
    assert 'outside the model' in text and any(p is loss.scale for p in learner_params(learn))

@pytest.mark.parametrize('mom', [0., .9])
def test_stability_limit_of_sgd(mom):
    "Below the limit a quadratic is minimised, above it diverges"
    def final(factor):
        set_seed(2)
        x = torch.randn(32, 3, generator=gen())
        y = x@torch.tensor([[1.],[2.],[3.]])
        d = DataLoaders(*(TfmdDL(TensorDataset(x, y), bs=32, num_workers=0) for _ in range(2)))
        learn = Learner(d, nn.Linear(3,1), loss_func=MSELossFlat(), opt_func=partial(SGD, mom=mom, wd=0.))
        limit = learn.stability(1, tol=1e-5).limit
        with learn.no_bar(),learn.no_logging(): learn.fit(150, factor*limit)
        with torch.no_grad(): return F.mse_loss(learn.model(x), y).item()
    assert final(.9) < 1e-3 and not final(1.1) < 1e3

@pytest.mark.parametrize('opt', scaled_opts)
def test_scaled_stability_is_the_dense_one(opt):
    "After training, the limit is that of the dense matrix scaled by the optimizer's own state"
    learn = run(learner('no_dropout', scaled_opts[opt]))
    s,params = learn.stability(1, tol=1e-6, max_iter=300),learner_params(learn)
    H = literal_at(learn, first_batches(learn.dls.train)[0], params)
    lam,h = dense_top(H, 1/dense_scaling(learn.opt, params)),learn.opt.hypers[-1]
    assert s.lambda_max==pytest.approx(lam, rel=EIGEN)
    assert s.limit==pytest.approx(2*(1+h['mom'])/(1-h['mom'])/lam, rel=EIGEN)

@pytest.mark.parametrize('mom', [0., .9])
def test_preconditioned_limit_on_a_quadratic(mom):
    "AdaHessian with a diagonal that cannot see the ravine: below its limit it converges, above it diverges"
    A = torch.tensor([[1.,.9],[.9,1.]])
    def final(factor):
        w = nn.Parameter(torch.tensor([1.,.5]))
        opt = adahessian([w], lr=1., mom=mom, wd=0., eps=1e-8, probe=lambda p,g: torch.ones_like(p))
        opt.differentiate(w@A@w/2)
        opt.step()
        limit = 1/edge_of_stability(opt, lambda v: [A@v[0]], [w])
        opt.set_hyper('lr', factor*limit)
        for _ in range(1000):
            opt.zero_grad()
            opt.differentiate(w@A@w/2)
            opt.step()
        return w.norm().item()
    assert final(.95) < 1e-3 and not final(1.1) < 1e3

def test_fresh_states_are_what_the_first_step_divides_by():
    learn = learner('no_dropout', partial(Adam, wd=0.))
    b,params = first_batches(learn.dls.train),learner_params(learn)
    learn.create_opt()
    assert step_scaling(learn.opt, params) is None
    fresh = step_scaling(learn.opt, params, fresh_states(learn, learn.opt, params, b))
    with preserving(learn.model),batch_of(learn):
        learn._split(b[0])
        gs = torch.autograd.grad(learn.loss_func(learn.model(*learn.xb), *learn.yb), params)
    assert all(torch.allclose(a, g.abs()+1e-5, atol=1e-6) for a,g in zip(fresh, gs))
    assert not any(learn.opt.state[p].get('sqr_avg') is not None for p in params)

new_opts = dict(gnb=partial(adahessian, estimator='gnb'), ggn=partial(adahessian, curvature='ggn'), auto=partial(adahessian, hvp='auto'),
    control=partial(adahessian, signed=True, estimator='control_variate', probe='gaussian'), sophia=sophia, defaults=adahessian_default)

@pytest.mark.parametrize('opt', new_opts)
def test_a_new_optimizer_of_any_kind_has_a_limit_and_is_left_alone(opt, capsys):
    def go(look):
        learn = learner('no_dropout', new_opts[opt])
        learn.create_opt()
        if look:
            capsys.readouterr()
            s = learn.stability(2, max_iter=6)
            assert s.limit>0 and 'auto' not in capsys.readouterr().out
        return everything(run(learn, 1))
    assert identical(go(False), go(True))

@pytest.mark.parametrize('opt', [lambda ps, lr: Lookahead(SGD(ps, lr, mom=0.9)), partial(SGD, mom=[0.,0.9])])
def test_no_limit_is_known_of_steps_that_are_mixed(opt):
    "Of each step by itself there is one"
    ps = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    rule,limit = step_rule(opt([[p] for p in ps], lr=0.1))
    assert rule=='unknown' and math.isnan(limit)

def test_stability_speaks_in_one_sentence():
    for opt in (SGD, Adam, adahessian, ranger):
        text = repr(learner('no_dropout', opt).stability(1, max_iter=4))
        assert len(text)<160 and '\n' not in text and ('stable up to lr=' in text)==(opt is not ranger)

def test_an_optimizer_of_torch():
    "Nothing is known of its steps, and the curvature is the same"
    other = run(learner(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)))
    s = other.stability(1)
    assert s.rule=='unknown' and math.isnan(s.limit) and s.lambda_max>0
    assert 'No stability limit is known' in other.curvature_summary()


@pytest.mark.parametrize('call', [lambda l,how: l.stability(2, curvature=how), lambda l,how: l.curvature_summary(curvature=how, n_samples=2),
    lambda l,how: l.curvature_product(curvature=how)([torch.ones_like(p) for p in l.model.parameters()])], ids=['stability','summary','product'])
def test_what_a_curvature_learns_of_one_network_is_no_other_ones(call):
    "Finite differences that suit a smooth network are looked at anew in one with kinks"
    models = [nn.Sequential(nn.Flatten(), nn.Linear(36,8), act(), nn.Linear(8,3)) for act in (nn.Tanh,nn.ReLU)]
    smooth,kinked = [Learner(dls(), m, CrossEntropyLossFlat(), opt_func=Adam) for m in models]
    how = Hessian('finite_difference')
    call(smooth, how)
    with pytest.raises(ValueError, match='has a kink'): call(kinked, how)

def test_a_recorder_looks_anew_in_each_training(capsys):
    "'auto' chooses a way for each network, once within a training, and may be pickled"
    rec,used = CurvatureRecorder(every=2, curvature=Hessian('auto'), per_layer=True),[]
    for act in (nn.GELU,nn.ReLU):
        learn = Learner(dls(), nn.Sequential(nn.Flatten(), nn.Linear(36,8), act(), nn.Linear(8,3)), CrossEntropyLossFlat(), opt_func=Adam, cbs=rec)
        with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-2)
        used.append(capsys.readouterr().out.count("hvp='auto' is"))
        assert len(rec.records)==2 and not rec.frame.lambda_max.isna().any() and rec.curvature.used is None
        pickle.loads(pickle.dumps(learn))
    assert used==[1,1]

def test_the_limit_of_debiased_steps_is_that_of_their_state():
    "Before training as after many steps at a rate of zero: the noise is taken out, and the probe is the optimizer's"
    def limits(**kwargs):
        torch.manual_seed(0)
        net,x,y = nn.Sequential(nn.Linear(4,6), nn.Tanh(), nn.Linear(6,3)),torch.randn(16,4),torch.randint(3, (16,))
        rows = list(zip(x, y))
        opt_func = partial(adahessian, block_length=1, average_kernels=False, sqr_mom=0.99, **kwargs)
        learn = Learner(DataLoaders.from_dsets(rows, rows, bs=16, shuffle=False, num_workers=0), net, nn.CrossEntropyLoss(), opt_func=opt_func)
        batch = [learn.dls.one_batch()]
        before = learn.stability(batches=batch*300).limit
        with learn.no_bar(),learn.no_logging(): learn.fit(600, 0.)
        return before,learn.stability(batches=batch).limit
    for kwargs in (dict(debiased=True, n_samples=2), dict(probe='gaussian')):
        before,after = limits(**kwargs)
        assert before==pytest.approx(after, rel=0.3), kwargs

def test_clipped_steps_of_sophia_are_not_called_flat():
    "Where each entry moves by the learning rate, curvature says nothing of the limit"
    torch.manual_seed(0)
    rows = list(zip(torch.randn(16,4), torch.randint(3, (16,))))
    learn = Learner(DataLoaders.from_dsets(rows, rows, bs=16, num_workers=0), nn.Linear(4,3), nn.CrossEntropyLoss(), opt_func=partial(sophia, rho=1e-12))
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    said = repr(learn.stability(n_batches=1))
    assert 'clipped' in said and 'No positive curvature' not in said

def test_batches_in_any_form():
    "A generator is a list; none, one alone, and parameters of another model are refused"
    learn = learner()
    batches = first_batches(learn.dls.train, 2)
    assert learn.stability(batches=iter(batches))==learn.stability(batches=batches)
    ps = [p for p in learn.model.parameters() if p.requires_grad]
    v = [torch.ones_like(p) for p in ps]
    same = [learn.curvature_product(batches=o)(v) for o in (batches, iter(batches))]
    assert all(torch.equal(a, b) for a,b in zip(*same))
    for f in (learn.stability,learn.curvature_product):
        for odd,got in (([],r'\[\]'), (batches[0],'Tensor'), (2,'int'), (learn.dls,'DataLoaders')):
            with pytest.raises(ValueError, match=f'batches must be a list of batches.*got .*{got}'): f(batches=odd)
    for odd in ([], [nn.Parameter(torch.ones(2))]):
        with pytest.raises(ValueError, match='params must be parameters of the model'): learn.curvature_product(params=odd)
    for odd in ([], v[:1], v[::-1], [o[:1] for o in v]):
        with pytest.raises(ValueError, match='v must be tensors of the shapes'): learn.curvature_product()(odd)

@pytest.mark.parametrize('name,v', [('every',0), ('budget','x'), ('budget',True), ('budget',0), ('budget',0.), ('budget',1.5), ('seed','a'), ('n_samples',1)])
def test_settings_of_the_recorder_are_looked_at(name, v):
    with pytest.raises(ValueError, match=f'^{name} must be '): CurvatureRecorder(**{name: v})

# Layers that take no part in the estimate

def exact(problem, params): return [torch.full_like(p, 2.) for p in params]

def opted_out(opt_func, whole=False):
    "Two layers whose loss has the diagonal 2; the second, or both, train as with Adam"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3,4), nn.Linear(4,2)).double()
    x = torch.randn(16, 3, dtype=torch.double)
    ds = [(o,o[:2]) for o in x]
    learn = Learner(DataLoaders.from_dsets(ds, ds, bs=16, shuffle=False, device='cpu'), model, MSELossFlat(), opt_func=opt_func)
    learn.create_opt()
    if hasattr(learn.opt, 'opt_out'): learn.opt.opt_out(model if whole else model[1])
    return learn

def test_stability_before_training_knows_who_is_opted_out():
    "With nothing left to estimate the steps are Adam's"
    plain = partial(adahessian_default, clip=0, cap=0, rho=0, spike=0, eps=1e-5)
    ours,adam = opted_out(plain, whole=True).stability(1),opted_out(Adam).stability(1)
    assert ours.limit==pytest.approx(adam.limit, rel=1e-3)

def test_squared_gradients_are_no_diagonal():
    learn = opted_out(partial(adahessian_default, estimator=Given(exact), rho=0, dense=0, update_each=1))
    rec = CurvatureRecorder(every=1, n_samples=50)
    learn.add_cb(rec)
    with learn.no_bar(),learn.no_logging(): learn.fit(3, 1e-6)
    own = own_diagonal(learn.opt)
    assert set(own)=={*learn.model[0].parameters()} and all(torch.allclose(d, torch.full_like(d, 2.)) for d in own.values())
    ax = rec.plot_diagonal(1000)
    assert len(ax.lines[0].get_xdata())==sum(p.numel() for p in learn.model[0].parameters()) and (ax.lines[0].get_ydata()==pytest.approx(2))

def test_layers_and_the_whole_have_the_noise_of_one_kind_of_estimate():
    learn = opted_out(partial(adahessian_default, n_samples=16))
    layer = nn.Sequential(nn.Linear(3,2).double())
    learn = Learner(learn.dls, layer, MSELossFlat(), opt_func=partial(adahessian_default, n_samples=16))
    rec = CurvatureRecorder(every=1, n_samples=20, per_layer=True)
    learn.add_cb(rec)
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    r = rec.records[-1]
    assert r['layers']['0 Linear']['snr']==pytest.approx(r['snr'])

@pytest.mark.parametrize('call', [lambda l,r: l.stability(seed=0.5), lambda l,r: l.curvature_summary(seed=-1), lambda l,r: l.curvature_summary(lr=slice(0.1,0.2)),
    lambda l,r: r.plot_diagonal(n_entries=0), lambda l,r: r.plot_diagonal(n_entries=-1)])
def test_odd_numbers_of_diagnostics_are_named(call):
    learn = opted_out(adahessian_default)
    learn.add_cb(rec := CurvatureRecorder(every=1))
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    with pytest.raises(ValueError, match='seed|lr|n_entries'): call(learn, rec)

# The numbers by hand

F64 = torch.double

def small_matrix(n=6):
    "A symmetric matrix, two parameters that it acts on and the product"
    A = torch.randn(n, n, generator=gen(1), dtype=F64)
    A,ps = A+A.T+4*torch.eye(n),[torch.zeros(2, 2, dtype=F64),torch.zeros(n-4, dtype=F64)]
    return A,ps,lambda v: [o.view_as(p) for o,p in zip((A@flat(v)).split([4,n-4]), ps)]

@pytest.mark.parametrize('idxs,cols', [(slice(None),slice(None)), ([1],slice(4,6))], ids=['all','one'])
def test_statistics_of_three_probes(idxs, cols):
    "Mean, unbiased variance, the trace with its standard error, and the diagonal's mean square without the noise of the mean"
    A,ps,product = small_matrix()
    st = ProbeStats(product, ps, 3, gen())
    d = torch.stack([flat(o) for o in hutchinson_samples(product, ps, 3, generator=gen())])[:,cols]
    mean,var = st.pick(idxs)
    torch.testing.assert_close(mean, d.mean(0))
    torch.testing.assert_close(var, d.var(0))
    sums = d.sum(1)
    assert st.trace(idxs)==pytest.approx((sums.mean().item(), sums.std().item()/3**.5))
    noise = d.var(0).mean().item()
    signal = max(d.mean(0).square().mean().item()-noise/3, 0.)
    assert st.power(idxs)==pytest.approx((signal,noise)) and st.snr(idxs)==pytest.approx((signal/noise)**.5)

def test_where_noise_is_all_there_is_nothing_is_left_and_without_noise_all():
    "The diagonal is zero, as the estimates' mean is not; a diagonal matrix is estimated without an error"
    none = ProbeStats(lambda v: [v[0].flip(0)], [torch.zeros(2, dtype=F64)], 3, gen(1))
    assert none.mean[0].norm()>0 and none.power()[0]==none.snr()==0.
    exact = ProbeStats(lambda v: [3*v[0]], [torch.zeros(2, dtype=F64)], 3)
    assert exact.power()==(9.,0.) and exact.snr()==math.inf and exact.trace()==(6.,0.)

def test_the_numbers_of_a_measurement_are_those_of_its_parts():
    "Both ends with the bounds of their own, the interval of the trace, and the root of the mean square"
    A,ps,product = small_matrix(12)
    g = gen(3)
    eig = extreme_eigenvalues(product, ps, which='both', tol=.01, max_iter=4, check=False, generator=g)
    st = ProbeStats(product, ps, 5, g)
    low,high = confidence_interval(*st.trace(), 5)
    found,_ = curvature_stats(product, ps, 5, max_iter=4, generator=gen(3))
    hi,lo,hi_bound,lo_bound = eig.values[0].item(),eig.values[-1].item(),eig.bounds[0].item(),eig.bounds[-1].item()
    assert hi_bound!=pytest.approx(lo_bound) and found==pytest.approx(dict(lambda_max=hi, lambda_max_bound=hi_bound, lambda_min=lo,
        lambda_min_bound=lo_bound, trace=st.trace()[0], trace_lo=low, trace_hi=high, snr=st.snr(), rms_diag=st.power()[0]**.5))

@pytest.mark.parametrize('k', [.5,1.])
def test_what_an_optimizer_believes_of_the_diagonal_is_no_power_of_it(k):
    "Nor has it the addition to the denominator; what has no estimate, or takes no part, has no diagonal"
    ps = [nn.Parameter(torch.zeros(2, dtype=F64)) for _ in range(3)]
    opt = adahessian(ps, hessian_power=k, eps=.3)
    for p in ps[:2]: opt.state[p].update(sqr_avg_diag_hessian=torch.tensor([4.,9.], dtype=F64)*(1-.999**5), hess_step=5)
    opt.state[ps[1]]['do_hessian'] = False
    own = own_diagonal(opt)
    assert set(own)=={ps[0]} and own[ps[0]].tolist()==pytest.approx([2.,3.])

def test_an_overestimate_is_one_of_the_parameters_that_have_an_estimate():
    "The others' diagonal is ten times larger; where all there is is noise, any average is infinitely too large"
    a,b = (nn.Parameter(torch.zeros(2, dtype=F64)) for _ in range(2))
    opt = adahessian([a,b])
    opt.state[b].update(sqr_avg_diag_hessian=torch.full((2,), 36., dtype=F64)*(1-.999), hess_step=1)
    assert overestimate(opt, [a,b], ProbeStats(lambda v: [20*v[0],2*v[1]], [a,b], 2))==pytest.approx(3.)
    assert overestimate(opt, [a,b], ProbeStats(lambda v: [v[0],0*v[1]], [a,b], 2))==math.inf

dampened = partial(partial, Optimizer, cbs=[partial(average_grad, dampening=True),momentum_step])

@pytest.mark.parametrize('opt_func,want', [(partial(SGD, mom=0.), ('gradient',2.)), (partial(SGD, mom=.5), ('momentum',3.)),
    (partial(Adam, mom=.5), ('adam',6.)), (dampened(mom=.5, lr=.1), ('unknown',math.nan)), (ranger, ('unknown',math.nan))],
    ids=['sgd','momentum','adam','dampened','ranger'])
def test_limits_of_the_rules(opt_func, want):
    "lr·λ up to 2, 2(1+β) and 2(1+β)/(1-β)"
    assert step_rule(opt_func([nn.Parameter(torch.zeros(1))], lr=.1))==pytest.approx(want, nan_ok=True)

state_of_three = dict(grad_avg=torch.tensor([.8,.2,0.], dtype=F64), sqr_avg_diag_hessian=torch.tensor([1.,4.,1.], dtype=F64), step=1, hess_step=math.inf)
rms_of_three = (65/3)**.5 # Of the quotients 8, 1, 0: the first average is a tenth of the gradient

@pytest.mark.parametrize('bounds,want', [(dict(), [1.,2.,1.]), (dict(clip=1.), [8/rms_of_three,2.,1.]),
    (dict(cap=.5), [2*rms_of_three,4*rms_of_three,2*rms_of_three]), (dict(clip=1., cap=.5), [16.,4*rms_of_three,2*rms_of_three]),
    (dict(cap=100.), [1.,2.,1.])], ids=str)
@pytest.mark.parametrize('still', [False,True], ids=['moves','still'])
def test_bounds_on_a_step_are_part_of_its_scaling(bounds, want, still):
    "An entry without a gradient is scaled as its tensor is, and a tensor without one by its curvature alone"
    p = nn.Parameter(torch.zeros(3, dtype=F64))
    opt = adahessian([p], eps=1e-12, **bounds)
    state = {**state_of_three, **({'grad_avg': torch.zeros(3, dtype=F64)} if still else {})}
    assert step_scaling(opt, [p], {p: state})[0].tolist()==pytest.approx([1.,2.,1.] if still else want)

def test_sophia_clips_from_the_bound_on_and_on_both_sides():
    p = nn.Parameter(torch.zeros(4, dtype=F64))
    opt = sophia([p], rho=2., estimator='hutchinson')
    state = dict(grad_avg=torch.tensor([1.,2.,-3.,-1.], dtype=F64), avg_diag_hessian=torch.ones(4, dtype=F64), hess_step=1)
    assert step_scaling(opt, [p], {p: state})[0].tolist()==[2.,math.inf,math.inf,2.]

@pytest.mark.parametrize('lrs,relative,want', [([.1,.2],False,[.025,.1]), ([.1,.2],True,[.125,.5]), ([.1,0.],True,[.25,.5]), ([.1,0.],False,[.025,0.])])
def test_rates_of_groups(lrs, relative, want):
    "Divided by the scaling, and relative to the last group's, where that moves at all"
    ps = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    opt = SGD([[p] for p in ps], lr=.1)
    opt.set_hyper('lr', lrs)
    assert step_rates(opt, ps, [4.,2.], relative)==pytest.approx(want)

def narrow():
    "A network of 123 weights"
    set_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36,3), nn.Tanh(), nn.Linear(3,3))
    return Learner(dls(), model, loss_func=CrossEntropyLossFlat(), opt_func=SGD)

@pytest.mark.parametrize('kind', ['hessian','ggn'])
def test_blocks_of_the_mean_over_batches(kind):
    "The product of a layer is that of the layer alone, over one batch as over those that it is made of"
    learn = narrow()
    params,batches = learner_params(learn),[tuple(t[i:j] for t in learn.dls.valid.one_batch()) for i,j in ((0,4),(4,6),(6,16))]
    def products(batches):
        with products_of(learn, batches, params, kind) as of: return [flat(of(g)([torch.randn(p.shape, generator=gen()) for p in g])) for g in groups]
    groups = params[-2:],params[:1],params
    for n in (2,3):
        for a,b in zip(products(batches[:n]), products([tuple(map(torch.cat, zip(*batches[:n])))])): assert a.shape==b.shape and (a-b).abs().max()<SAME

def test_a_layer_is_listed_by_what_it_trains():
    "Frozen parameters are in no row, named ones or not; a wrapped model has the names of the one inside"
    m = nn.Sequential(nn.Linear(2,2), nn.Sequential(nn.Linear(2,2)))
    m[0].bias.requires_grad_(False)
    rows = {'0 Linear': [m[0].weight], '1.0 Linear': list(m[1][0].parameters())}
    for found in (layer_params(m), layer_params(m, list(m.parameters())), layer_params(nn.DataParallel(m))):
        assert list(found)==list(rows) and all(a is b for k in rows for a,b in zip(found[k], rows[k], strict=True))

def test_rows_of_the_record():
    "Every third of eight batches: its number, the epochs before it, and the last group's rate in the step"
    rates = []
    class Notes(Callback):
        def after_step(self): rates.append(self.opt.hypers[-1]['lr'])
    learn = learner('no_dropout', cbs=[CurvatureRecorder(every=3, per_layer=True), Notes()], splitter=two_groups)
    run(learn, lr=slice(1e-3,1e-2))
    f = learn.curvature_recorder.frame
    assert f.batch.tolist()==[1,4,7] and f.epoch.tolist()==[0.,.75,1.5] and f.lr.tolist()==rates[::3] and 'layers' not in f

@pytest.mark.parametrize('every,budget,n_seen,spent,want', [(None,.5,1,.9,True), (None,.5,1,1.1,False), (2,.5,2,.9,True), (2,.5,1,0.,False),
    (2,.5,2,1.1,False), (2,None,2,9.,True)])
def test_when_a_measurement_is_due(every, budget, n_seen, spent, want, monkeypatch):
    "Half of the time that was trained, three seconds less those that were spent: 0.9 of 1.05, 1.1 of 0.95"
    rec = CurvatureRecorder(every, budget)
    vars(rec).update(n_seen=n_seen, spent=spent, began=7.)
    monkeypatch.setattr(time, 'perf_counter', lambda: 10.)
    assert rec.due()==want

@pytest.mark.parametrize('kwargs', [dict(), dict(every=2), dict(budget=.3), dict(every=2, budget=.3)], ids=str)
def test_a_budget_is_set_where_no_schedule_is(kwargs): assert CurvatureRecorder(**kwargs).budget==(kwargs.get('budget') if kwargs else .05)

@pytest.mark.parametrize('kwargs', [dict(every=0), dict(n_samples=1), dict(max_iter=0), dict(tol=0.), dict(seed=-1), dict(per_layer='x')], ids=str)
def test_each_setting_of_the_recorder_is_checked(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))): CurvatureRecorder(**kwargs)

# The pictures by their data

def recorded(*edges):
    "A recorder with one made-up record for each of `edges`"
    rec = CurvatureRecorder(every=1)
    layers = dict(first=dict(lambda_max=1., rms_diag=2., snr=math.inf), last=dict(lambda_max=3., rms_diag=4., snr=5.))
    rec.records = [dict(batch=i+1, lambda_max=10.+i, lambda_max_bound=.5, lambda_min=-1.-i, lambda_min_bound=.25, trace=20.+i, trace_lo=15., trace_hi=30.,
        edge=e, snr=2.+i, layers=layers if i==0 else {k: {n: x+10*i for n,x in o.items()} for k,o in layers.items()}) for i,e in enumerate(edges)]
    return rec

@pytest.mark.parametrize('edges,scale', [((.5,2.),'log'), ((.5,-1.),'linear')])
def test_lines_of_the_timeline(edges, scale):
    ax,tr,edge,snr = recorded(*edges).plot_timeline().flat
    bars = [[o[1].tolist() for o in c.lines[2][0].get_segments()] for c in ax.containers]
    assert [c.get_label() for c in ax.containers]==['largest','smallest'] and bars==[[[1.,10.5],[2.,11.5]],[[1.,-.75],[2.,-1.75]]]
    assert tr.lines[0].get_xydata().tolist()==[[1.,20.],[2.,21.]] and tr.dataLim.intervaly.tolist()==[15.,30.]
    assert edge.lines[0].get_ydata().tolist()==list(edges) and edge.get_yscale()==scale
    assert snr.lines[0].get_ydata().tolist()==[2.,3.]

@pytest.mark.parametrize('record,add', [(-1,10.),(0,0.)])
def test_bars_of_the_layers(record, add):
    "The first layer is on top; a ratio without noise is no bar"
    axs = recorded(.5,.5).plot_layers(record)
    assert [o.get_text() for o in axs[0].get_yticklabels()]==['last','first']
    assert [[b.get_width() for b in ax.patches] for ax in axs[:2]]==[[3+add,1+add],[4+add,2+add]]
    width = [b.get_width() for b in axs[2].patches]
    assert width[0]==5+add and math.isnan(width[1])

# Stability and summary by hand

def in_turn(*ds):
    "An estimator that gives these numbers in turn, alternating in sign within a tensor"
    def signs(p): return 1-2*(torch.arange(p.numel(), dtype=p.dtype).view_as(p)%2)
    ds = iter(ds)
    def diagonal(problem, params):
        d = next(ds)
        return [d*signs(p)+1 for p in params]
    return Given(diagonal),lambda p,d: d*signs(p)+1

@pytest.mark.parametrize('signed', [False,True])
def test_fresh_states_are_means_over_batches(signed):
    "Of gradients, and of squared or signed diagonals as the optimizer averages them over blocks; a layer that takes no part has its gradients"
    est,want = in_turn(3.,-5.)
    learn = opted_out(partial(adahessian_default, estimator=est, signed=signed))
    opt,ps,(x,y) = learn.opt,list(learn.model.parameters()),learn.dls.one_batch()
    batches = [(x[:8],y[:8]),(x[8:],y[8:])]
    gs = [torch.autograd.grad(learn.loss_func(learn.model(a), b), ps) for a,b in batches]
    fresh = fresh_states(learn, opt, ps, batches)
    for i,p in enumerate(ps):
        s,d = dict(fresh[p]),[opt.smooth(want(p.detach(), o)) for o in (3.,-5.)] if i<2 else [g[i].abs() for g in gs]
        mean = s.pop('avg_diag_hessian') if signed else s.pop('sqr_avg_diag_hessian')
        torch.testing.assert_close(mean, (d[0]+d[1])/2 if signed else (d[0]**2+d[1]**2)/2)
        torch.testing.assert_close(s.pop('grad_avg'), (gs[0][i]+gs[1][i])/2)
        assert s==dict(step=math.inf, hess_step=math.inf)

@pytest.mark.parametrize('seed', [42,3])
@pytest.mark.parametrize('probe', ['rademacher','gaussian'])
def test_fresh_states_without_the_noise_of_squares(probe, seed):
    "Of two samples, averaged over blocks, the square of their mean less that of half their difference is their product"
    learn = narrow()
    learn.opt_func = partial(adahessian, debiased=True, n_samples=2, probe=probe)
    learn.create_opt()
    ps,batches = learner_params(learn),first_batches(learn.dls.train, 2)
    fresh,g,want = fresh_states(learn, learn.opt, ps, batches, seed),gen(seed),0.
    for b in batches:
        with products_of(learn, [b], ps) as of: one,two = (flat(map(learn.opt.smooth, d)) for d in hutchinson_samples(of(), ps, 2, probe, g))
        want = want + one*two/2
    got = flat([fresh[p]['sqr_avg_diag_hessian'] for p in ps])
    assert (got-want).norm()<SAME*want.norm()

@pytest.mark.parametrize('kind', ['hessian','ggn'])
def test_rows_of_the_summary_are_those_of_its_probes(kind):
    "And their eigenvalues and the limit those of the dense matrix"
    learn = narrow()
    params,batches = learner_params(learn),first_batches(learn.dls.train)
    text = learn.curvature_summary(n_samples=5, curvature=kind, max_iter=200, seed=3).splitlines()
    with products_of(learn, batches, params, kind) as of: st,H = ProbeStats(of(), params, 5, gen(3)),dense_matrix(of(), params)
    ends,places = torch.tensor([0,*(p.numel() for p in params)]).cumsum(0),{id(p): i for i,p in enumerate(params)}
    blocks = [[places[id(p)] for p in ps] for ps in layer_params(learn.model, params).values()]
    for line,idxs in zip([o for o in text[1:-2] if '±' in o], [*blocks,list(range(len(params)))], strict=True):
        trace,_,err,lam,mean,snr = line.split()[-6:]
        tr,e = st.trace(idxs)
        assert [trace,err,mean,snr]==[f'{tr:.4g}',f'{e:.2g}',f'{st.pick(idxs)[0].abs().mean():.2g}',f'{st.snr(idxs):.2g}']
        at = torch.cat([torch.arange(ends[i], ends[i+1]) for i in idxs])
        top = eigvalsh(H[at][:,at].double().numpy())[-1]
        assert float(lam)==pytest.approx(top, rel=.02, abs=1e-4)
    assert float(text[-2].split('lr=')[1].split()[0])==pytest.approx(2/top, rel=.02)
    few = next(o for o in learn.curvature_summary(n_samples=2, curvature=kind, max_iter=2, seed=3).splitlines() if o.startswith('whole network'))
    assert float(few.split()[-3])<.98*top

def test_a_summary_over_batches_is_that_of_them_together():
    def text(n, bs):
        torch.manual_seed(0)
        model,g = nn.Sequential(nn.Linear(3,4), nn.Tanh(), nn.Linear(4,2)).double(),gen(7)
        rows = list(zip(torch.randn(16, 3, dtype=F64, generator=g), torch.randint(2, (16,), generator=g)))
        learn = Learner(DataLoaders.from_dsets(rows, rows, bs=bs, shuffle=False, num_workers=0), model, nn.CrossEntropyLoss(), opt_func=SGD)
        return learn.curvature_summary(n_batches=n, n_samples=4)
    assert text(2, 8).replace('2 batches', '1 batch')==text(1, 16)

@pytest.mark.parametrize('stability,said', [
    (Stability(math.nan, 2., .1, 'unknown', 1), 'No stability limit is known for this optimizer (largest eigenvalue 2 ± 0.1 on 1 batch)'),
    (Stability(math.inf, 0., 0., 'sophia', 2),
        "All entries of Sophia's step are clipped on 2 batches, or none has positive curvature: its size is the learning rate"),
    (Stability(math.inf, -1., 0., 'adam', 2), 'No positive curvature on 2 batches: no learning rate is too large for the quadratic model'),
    (Stability(.5, 4., .02, 'sophia', 1), "Sophia's step is stable up to lr=0.5 on 1 batch (largest eigenvalue 4 ± 0.02 in the scale of its steps)"),
    (Stability(.5, 4., .02, 'momentum', 3), 'SGD with momentum is stable up to lr=0.5 on 3 batches (largest eigenvalue 4 ± 0.02)')])
def test_sentences_of_stability(stability, said): assert repr(stability)==said

def concave(opt_func=SGD):
    "A loss of -w² on a few rows, with a Learner"
    rows = [(torch.ones(1),torch.zeros(1))]*8
    return Learner(DataLoaders.from_dsets(rows, rows, bs=2, num_workers=0), nn.Linear(1,1,bias=False), lambda z,y: -z.square().mean(), opt_func=opt_func)

def test_without_positive_curvature_there_is_no_limit():
    "Four batches by default; where no rule is known the limit is no number all the same"
    found = concave().stability()
    assert (found.limit,found.rule,found.n_batches)==(math.inf,'gradient',4) and found.lambda_max==pytest.approx(-2)
    assert math.isnan(concave(ranger).stability().limit)
    text = str(concave().curvature_summary())
    assert 'No positive curvature on 1 batch' in text and 'times that limit' not in text

@pytest.mark.parametrize('lrs', [[.1,.2],[.2,.1]], ids=str)
def test_the_limit_is_that_of_the_last_groups_rate(lrs):
    "The other group's rate in the same proportion, against the dense matrix"
    learn = learner('no_dropout', SGD, splitter=two_groups)
    learn.create_opt()
    learn.opt.set_hyper('lr', lrs)
    params = learner_params(learn)
    rates = flat([torch.full_like(p, h['lr']/lrs[-1]) for p,_,_,h in learn.opt.all_params()]).double()
    lam = dense_top(literal_at(learn, first_batches(learn.dls.train)[0], params), rates)
    assert learn.stability(1, tol=1e-6, max_iter=300).limit==pytest.approx(2/lam, rel=EIGEN)

@pytest.mark.parametrize('n,want', [(16,'b'+'a'*15+' Linear'), (17,'b'+'a'*16+' Line…'), (20,'b'+'a'*19+' L…'), (21,'b'+'a'*20), (23,'b'+'a'*22),
    (24,'…'+'a'*22)])
def test_names_of_layers_leave_room_for_a_space(n, want):
    "A class is cut at its end or left out, a path at its beginning"
    model = nn.Sequential()
    model.add_module('b'+'a'*(n-1), nn.Linear(1, 1))
    rows = [(torch.ones(1),torch.zeros(1))]*2
    learn = Learner(DataLoaders.from_dsets(rows, rows, bs=2, num_workers=0), model, MSELossFlat(), opt_func=SGD)
    assert learn.curvature_summary(n_samples=2).splitlines()[2][:25]==f'{want:<24} '

def pictured(**kwargs):
    learn = narrow()
    learn.add_cb(rec := CurvatureRecorder(every=2, seed=3, **kwargs))
    return run(learn, 1),rec

@pytest.mark.parametrize('kind', ['hessian','ggn'])
def test_points_and_curves_of_the_pictures_are_of_the_recorders_curvature_and_seed(kind):
    "The diagonal with signs, or absolute on logarithmic axes; and the density, drawn as asked"
    learn,rec = pictured(curvature=kind)
    params = learner_params(learn)
    with products_of(learn, first_batches(learn.dls.train), params, kind) as of:
        exact,est = dense_matrix(of(), params).diag(),flat(hutchinson_diag(of(), params, 3, generator=gen(3)))
        want = spectral_density(of(), params, 7, 2, generator=gen(3)).plot().lines[0].get_ydata()
    idxs = torch.randperm(len(exact), generator=gen(3))[:20]
    for log,f in ((None,lambda o: o), (True,torch.abs)):
        ax = rec.plot_diagonal(20, 3, log=log)
        x,y = (torch.as_tensor(o) for o in ax.lines[0].get_data())
        assert torch.allclose(x, f(exact[idxs]), atol=SAME) and torch.allclose(y, f(est[idxs]), atol=SAME)
        assert ax.get_ylabel()=='estimate of 3 probes' and ax.get_xlabel()==('exact |diagonal|' if log else 'exact diagonal')
    line, = rec.plot_density(7, 2, color='r').lines
    assert np.allclose(line.get_ydata(), want) and line.get_color()=='r'

@pytest.mark.parametrize('log,ends', [(False,(-.05,.05)),(True,(.5,2.))])
def test_a_diagonal_of_zeros_has_a_picture(log, ends):
    learn = concave()
    learn.loss_func = lambda z,y: z.mean()
    learn.add_cb(rec := CurvatureRecorder(every=1))
    with learn.no_bar(),learn.no_logging(): learn.fit(1, .1)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*identical')
        ax = rec.plot_diagonal(log=log)
    assert ax.get_xlim()==ax.get_ylim()==pytest.approx(ends) and ax.lines[0].get_xdata().tolist()==[0.]

def test_crosses_of_several_groups_do_not_cover_each_other():
    opt = types.SimpleNamespace(noise_record=[(i, torch.tensor([2.,r,0.])) for i,r in enumerate((0.,3.))])
    lines = plot_noise(opt).lines
    assert [o.get_ydata().tolist() for o in lines[1:6:2]]==[[],[pytest.approx(.05)],[pytest.approx(.08)]*2]

def test_names_of_groups():
    "The first and the last trained layer, one alone, and none"
    learn = learner(splitter=lambda m: [list(m[0].parameters()),list(m[1].parameters()),[*m[5].parameters()]])
    learn.create_opt()
    learn.model[0].requires_grad_(False)
    learn.opt.param_lists[1].append(learn.model[5].weight)
    assert group_names(learn)==['frozen','1 BatchNorm2d … 5 Linear','5 Linear']

def test_what_is_logged():
    "Finite numbers, at the step of the training"
    scalars = []
    class Board(Callback):
        def before_fit(self): pass
    learn,board = narrow(),Board()
    learn.add_cbs([board, rec := CurvatureRecorder(every=1)])
    board.writer,learn.train_iter,rec.n_seen = types.SimpleNamespace(add_scalar=lambda *args: scalars.append(args)),5,3
    rec.log_out(dict(batch=3, trace=2., snr=math.inf, edge=math.nan, lambda_max=-1., layers={}))
    assert scalars==[('curvature/trace',2.,5),('curvature/lambda_max',-1.,5)]

@pytest.mark.parametrize('train', [True,False])
def test_a_product_in_evaluation_mode(train):
    "Batch norm with its running statistics then, which training never had"
    learn = learner()
    learn.model[3].p = 0.
    b = learn.dls.valid.one_batch()
    params = learner_params(learn)
    twin = conv().double().train(train)
    twin.load_state_dict(learn.model.state_dict())
    twin[3].p = 0.
    H = dense_hessian(lambda: F.cross_entropy(twin(b[0].double()), b[1]), list(twin.parameters()), chunk_size=256)
    v = [torch.randn(p.shape, generator=gen()) for p in params]
    got = flat(learn.curvature_product(batches=[b], train=train)(v))
    assert (H.float()@flat(v)-got).norm()<1e-4*got.norm() and learn.model.training

@pytest.mark.parametrize('where', ['loader','sampler'])
def test_a_generator_stays_wherever_a_loader_of_pytorch_has_it(where):
    ds,g = TensorDataset(torch.zeros(8, 1)),gen()
    dl = torch.utils.data.DataLoader(ds, 4, **(dict(generator=g) if where=='loader' else dict(sampler=torch.utils.data.RandomSampler(ds, generator=g))))
    state = g.get_state()
    assert len(first_batches(dl, 2))==2 and torch.equal(g.get_state(), state)
    list(dl)
    assert not torch.equal(g.get_state(), state)

def test_a_loader_is_passed_through_whole_and_in_order():
    "Also one that shuffles and drops what is left of its batches"
    learn,seen = narrow(),mock.Mock() # What a loss keeps in a list would be put back
    x,y = learn.dls.valid.one_batch()
    rows = list(zip(x, y))
    learn.dls = DataLoaders.from_dsets(rows, rows, bs=10, num_workers=0, device='cpu')
    v = [torch.ones_like(p) for p in learner_params(learn)]
    want = flat(learn.curvature_product(batches=[(x,y)])(v))
    learn.loss_func = lambda z,y: (seen(y.tolist()),F.cross_entropy(z, y))[1]
    got = flat(learn.curvature_product(batches=learn.dls.train)(v))
    assert torch.allclose(got, want, atol=SAME) and [o for c in seen.call_args_list for o in c.args[0]]==y.tolist()

@pytest.mark.parametrize('n', [1,2])
def test_a_product_over_so_many_batches(n):
    learn = narrow()
    v = [torch.ones_like(p) for p in learner_params(learn)]
    got,want,other = (flat(learn.curvature_product(**o)(v)) for o in (dict(n_batches=n),*(dict(batches=first_batches(learn.dls.train, m)) for m in (n,3-n))))
    assert torch.equal(got, want) and not torch.allclose(got, other)

def test_a_product_for_a_parameter_of_the_loss():
    "That of L·e⁻ˢ is L at s=0"
    learn,scale = narrow(),nn.Parameter(torch.zeros(()))
    learn.loss_func,learn.splitter = lambda z,y: F.cross_entropy(z, y)*torch.exp(-scale),lambda m: [list(m.parameters()),[scale]]
    (x,y), = batches = first_batches(learn.dls.train)
    got, = learn.curvature_product([scale], batches)([torch.ones(())])
    assert got.item()==pytest.approx(F.cross_entropy(learn.model(x), y).item())

def test_the_record_of_a_layer_is_of_its_part_of_the_probes():
    "With a seed for each measurement, and the noise of the optimizer's nine probes; at a rate of zero nothing moves"
    learn = narrow()
    learn.dls,learn.opt_func = dls(bs=64),partial(adahessian, n_samples=9)
    learn.add_cb(rec := CurvatureRecorder(every=1, per_layer=True, seed=3))
    began = time.perf_counter()
    with learn.no_bar(),learn.no_logging(): learn.fit(2, 0.)
    assert rec.spent==pytest.approx(sum(r['seconds'] for r in rec.records)) and rec.spent<time.perf_counter()-began
    params,batches = learner_params(learn),first_batches(learn.dls.train)
    for k,r in enumerate(rec.records):
        with products_of(learn, batches, params) as of: res,st = curvature_stats(of(), params, generator=gen(3+k))
        assert (r['trace'],r['snr'])==pytest.approx((res['trace'],3*res['snr']), rel=EIGEN)
        for layer,idxs in (('1 Linear',[0,1]),('3 Linear',[2,3])):
            want = dict(trace=st.trace(idxs)[0], rms_diag=st.power(idxs)[0]**.5, snr=3*st.snr(idxs))
            assert {n: r['layers'][layer][n] for n in want}==pytest.approx(want, rel=EIGEN)

class Concave(nn.Module):
    "Its loss is `-‖xᵀw‖²`, so the largest eigenvalue is zero and nothing but rounding"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(6))
    def forward(self, x): return x@self.w

@pytest.mark.parametrize('seed', range(5))
def test_no_limit_is_made_of_rounding(seed):
    torch.manual_seed(seed)
    rows = list(zip(torch.randn(8,6), torch.zeros(8)))
    learn = Learner(DataLoaders.from_dsets(rows, rows, bs=8, num_workers=0), Concave(), lambda pred,y: -pred.square().mean(), opt_func=SGD)
    assert learn.stability(batches=[learn.dls.train.one_batch()]).limit==math.inf

def test_a_limit_that_was_not_found_is_none():
    "One product says next to nothing; what the error advises finds it"
    learn = narrow()
    few = learn.stability(max_iter=1)
    assert math.isnan(few.limit) and few.lambda_max<=few.bound and 'larger max_iter' in repr(few)
    assert 0<learn.stability(max_iter=200).limit<math.inf

def test_parameters_may_come_from_a_generator():
    model,product = nn.Linear(2,1),lambda v: [2*o for o in v]
    assert curvature_stats(product, model.parameters())[0]['trace']==pytest.approx(6) and ProbeStats(product, model.parameters()).trace()[0]==pytest.approx(6)
    opt = SGD(list(model.parameters()), lr=0.5)
    assert edge_of_stability(opt, product, model.parameters())==pytest.approx(0.5)

def test_a_product_of_the_learner_takes_each_parameter_once():
    learn = narrow()
    ps = learner_params(learn)
    with pytest.raises(ValueError, match='each tensor once'): learn.curvature_product(params=[*ps,ps[0]])

def test_a_small_curvature_beside_a_large_negative_one_has_its_limit():
    "Eigenvalues -100 and 0.5, where the first look is sure to 1 only"
    class Saddle(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(6, dtype=torch.double))
        def forward(self, x): return self.w
    h = torch.tensor([-100.,0.5,-40.,-3.,0.1,-20.], dtype=torch.double)
    rows = list(zip(torch.randn(4,2), torch.zeros(4)))
    dls = DataLoaders.from_dsets(rows, rows, bs=4, num_workers=0)
    learn = Learner(dls, Saddle(), lambda w,y: (h*w**2).sum()/2, opt_func=SGD)
    assert learn.stability(batches=[learn.dls.train.one_batch()], tol=0.05).limit==pytest.approx(4, rel=.02)


def test_a_summary_of_given_batches_is_that_of_their_mean():
    "Two copies of one batch are that batch"
    learn = learner('no_dropout')
    b = learn.dls.train.one_batch()
    few = dict(lr=0.1, n_samples=2, max_iter=3)
    first,second = (learn.curvature_summary(batches=bs, **few).split('network')[1].split()[:3] for bs in ([b], [b,b]))
    assert [float(o) for o in first if o!='±']==pytest.approx([float(o) for o in second if o!='±'], rel=1e-3)
    assert '2 batches' in learn.curvature_summary(batches=[b,b], **few)

def test_an_eigenvalue_within_its_rounding_is_no_curvature():
    "Half of `up` times one square, less another: up=1e-7 is below the rounding of single precision beside -2"
    class Point(nn.Module):
        def __init__(self): self.w = super().__init__() or nn.Parameter(torch.ones(2))
        def forward(self, x): return self.w*1
    d = DataLoaders(*(TfmdDL(TensorDataset(torch.zeros(4, 1), torch.zeros(4)), bs=4, num_workers=0) for _ in range(2)))
    def seen(up): return Learner(d, Point(), lambda p,y: up/2*p[0]**2-p[1]**2, opt_func=partial(SGD, mom=0.)).stability(1)
    flat_one,curved = seen(1e-7),seen(.5)
    assert 0<flat_one.lambda_max<=flat_one.bound and flat_one.limit==math.inf and curved.limit==pytest.approx(2/.5, rel=EIGEN)

@pytest.mark.parametrize('kwargs', [dict(seed=7), dict(seed=7, max_iter=2)])
def test_the_limit_in_the_summary_has_its_seed_and_its_steps(kwargs):
    "Before training the scale of the steps comes from probes, so each seed and number of steps has a limit of its own"
    learn = learner('no_dropout', adahessian)
    said = repr(learn.stability(1, **kwargs))
    assert said in learn.curvature_summary(n_samples=2, **kwargs) and said!=repr(learn.stability(1, **{**kwargs, 'seed': 42}))

def test_the_rate_without_a_training_is_that_of_the_last_group():
    learn = opted_out(SGD)
    learn = Learner(learn.dls, learn.model, MSELossFlat(), opt_func=SGD, splitter=lambda m: [list(o.parameters()) for o in m])
    learn.create_opt()
    learn.opt.set_hyper('lr', slice(.01,.3))
    assert [o['lr'] for o in learn.opt.hypers]==pytest.approx([.01,.3]) and trained_lr(learn)==pytest.approx(.3)

def test_a_limit_knows_the_averages_that_are_there_beside_fresh_ones():
    "The second layer joins after a training without it; larger averages of the first one make its steps shorter"
    learn = opted_out(adahessian)
    for p in learn.model[1].parameters(): p.requires_grad_(False)
    with learn.no_bar(),learn.no_logging(): learn.fit(2, 1e-3)
    for p in learn.model[1].parameters(): p.requires_grad_(True)
    limits = []
    for k in (1,1e8):
        for p in learn.model[0].parameters(): learn.opt.state[p]['sqr_avg_diag_hessian'].mul_(k)
        limits.append(learn.stability(1).limit)
    assert 0<limits[0]<limits[1]/1.1
