"Threads and interrupts: no switch of the process, no hook, no graph and no moved parameter is left behind"
import linecache,random,sys,threading
import pytest,torch,torch.autograd.forward_ad as fwAD,torch.nn.functional as F
from fastai.basics import DataLoader,DataLoaders,Learner
from functools import partial
from torch import nn
from adahessian_fastai.all import AdaHessian,AdaHessianWrapper,adahessian,sophia
from adahessian_fastai.hvp import SharedContext,all_bits
from adahessian_fastai.steppers import Perturbation
from helpers_learner import data
from test_leaks import hooks,settings

def switches():
    "Those of `settings`, all kernels of attention, and oneDNN"
    fused = [getattr(torch.backends.cuda, f'{k}_sdp_enabled')() for k in ('flash','mem_efficient','math','cudnn')]
    return (*settings(), *fused, torch.backends.mkldnn.enabled, torch.is_inference_mode_enabled(), fwAD._current_level,
        torch._C._len_torch_function_stack())


class Net(nn.Module):
    "Attention, a recurrent layer and a norm: every switch that there is has to be set"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb,self.body = nn.Linear(5,4),nn.TransformerEncoderLayer(4, 2, 6, 0., activation='gelu', batch_first=True)
        self.rnn,self.head = nn.GRU(4, 4, batch_first=True),nn.Linear(4,3)
    def forward(self, x): return self.head(self.rnn(self.body(self.emb(x)))[0][:,-1])


def rho(params, lr=0.05, along='momentum', **kwargs): return AdaHessianWrapper(AdaHessian(params, lr, eps=1e-2), perturb=Perturbation(0.1, along), **kwargs)

OPTS = dict(  # chkstyle: ignore-node
    reverse=adahessian, forward=partial(adahessian, hvp='forward'), difference=partial(adahessian, hvp='finite_difference'),
    ggn=partial(adahessian, curvature='ggn'), ride=partial(adahessian, curvature='ggn', hvp='forward'), rows=partial(adahessian, hessian_bs=0.5),
    gnb=partial(adahessian, estimator='gnb'), n_acc=partial(adahessian, n_acc=2), sophia=sophia, moved=rho, moved_up=partial(rho, along='gradient'))


def made(name, n=12, shape=(3,5)):
    x,y = data(n, shape, dtype=torch.float)
    ds = list(zip(x, y))
    dls = DataLoaders(DataLoader(ds, bs=4), DataLoader(ds[:4], bs=4), device=torch.device('cpu'))
    learn = Learner(dls, Net(), F.cross_entropy, opt_func=OPTS[name])
    learn.create_opt()
    return learn


# Threads

@pytest.mark.filterwarnings('ignore')
def test_learners_in_threads_leave_every_switch_as_it_was():
    "They enter and leave the same contexts in every order; each ends as it does alone"
    torch.manual_seed(0)
    names = ['reverse','forward','ggn','gnb']
    before,errors = switches(),[]
    learners = {n: made(n) for n in names}
    gate = threading.Barrier(len(names))
    def run(learn):
        try:
            gate.wait()
            loop(learn, 6)
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=run, args=[o]) for o in learners.values()]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for t in threads: t.start()
        for t in threads: t.join(120)
    finally: sys.setswitchinterval(switch)
    assert not errors and not any(t.is_alive() for t in threads) and switches()==before
    for n,o in learners.items():
        alone = made(n)
        alone.opt.counts.seed = o.opt.counts.seed
        loop(alone, 6)
        assert o.opt.n_estimates==alone.opt.n_estimates>0
        assert all(torch.allclose(p, q, atol=1e-5) for p,q in zip(o.model.parameters(), alone.model.parameters()))


def loop(learn, n):
    "Training without fastai's progress bar, which is one for the process"
    with learn.no_bar(),learn.no_logging(): learn.fit(n//3, 0.01)


def test_contexts_that_overlap_and_are_left_in_the_order_of_entry():
    "Two in one thread, first in, first out: the switches come back with the last one, and no sooner"
    from adahessian_fastai.hvp import twice_differentiable
    before,net = switches(),Net()
    a,b = twice_differentiable(net),twice_differentiable(net, forward=True)
    a.__enter__(), b.__enter__()
    assert switches()!=before
    a.__exit__(None, None, None)
    assert not torch.backends.cuda.flash_sdp_enabled()
    b.__exit__(None, None, None)
    assert switches()==before


# Interrupts

class At:
    "Raises `KeyboardInterrupt` at the `n`-th line that the package executes; the few that count who holds a switch are left out"
    def __init__(self, n): self.n,self.i = n,0
    def __call__(self, frame, event, arg):
        name = frame.f_code.co_filename
        if 'adahessian_fastai' not in name or isinstance(frame.f_locals.get('self'), SharedContext): return None
        return self.line
    def line(self, frame, event, arg):
        if event=='line':
            self.i += 1
            if self.i==self.n:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.line


def traced(learn, at):
    "Train until `at` interrupts"
    sys.settrace(at)
    try: loop(learn, 3)
    finally: sys.settrace(None)


def left(learn, before, home):
    "What an interrupted training left behind"
    found = []
    if switches()!=before[0]: found.append(f'switches {[(a,b) for a,b in zip(switches(), before[0]) if a!=b]}')
    if hooks(learn.model)!=before[1]: found.append('hooks')
    if learn.opt.perturb.kept: found.append('moved parameters')
    if any(not p.requires_grad or not p.is_leaf for p in learn.model.parameters()): found.append('leaves')
    if any(p.grad is not None and p.grad.grad_fn is not None for p in learn.model.parameters()): found.append('a graph')
    if home is not None and not all(torch.equal(p, o) for p,o in zip(learn.model.parameters(), home)): found.append('parameters elsewhere')
    return found


def interrupted(name, n):
    "Interrupt at line `n`; what is left, and whether it got so far"
    learn = made(name)
    before = switches(),hooks(learn.model)
    try: traced(learn, At(n))
    except KeyboardInterrupt:
        learn.opt.zero_grad()
        return left(learn, before, None),True
    return left(learn, before, None),False


def n_lines(name):
    at = At(-1)
    traced(made(name), at)
    return at.i


def put_back():
    "Leave every switch that is held, so that one fault is found once"
    for o in SharedContext.every:
        while o.held: o.__exit__(None, None, None)
    while fwAD._current_level>=0: fwAD.exit_dual_level()
    while torch._C._len_torch_function_stack(): torch._C._pop_torch_function_stack()


def interrupts(n, seed=0, names=tuple(OPTS)):
    "`n` interrupts at random lines over `names` in turn: what was left behind, where; and whether most of them came to pass"
    rng,lines,bad,hits = random.Random(seed),{k: n_lines(k) for k in names},{},0
    for i in range(n):
        name = names[i%len(names)]
        k = rng.randint(1, lines[name])
        found,hit = interrupted(name, k)
        put_back()
        hits += hit
        if found: bad[name,k] = found
    return bad if hits>=n//2 else {**bad, 'reached': f'{hits} of {n} lines'}


@pytest.mark.filterwarnings('ignore')
def test_an_interrupt_anywhere_leaves_nothing_behind(): assert interrupts(len(OPTS))=={}


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_two_hundred_interrupts_leave_nothing_behind(): assert interrupts(200, 1)=={}


# Where a `with` begins and ends, and what stands in a `finally`: an interrupt there finds its context half entered or half left

class Edges(At):
    "Counts, and notes the numbers of the lines that begin with `with`"
    def __init__(self): super().__init__(-1), setattr(self, 'seen', {})
    def line(self, frame, event, arg):
        super().line(frame, event, arg)
        at = frame.f_code.co_filename,frame.f_lineno
        if event=='line' and linecache.getline(*at).lstrip().startswith('with '): self.seen.setdefault(at, []).append(self.i)
        return self.line


def edges(name, first=2, last=2):
    "The numbers of lines that enter or leave a context, the first and last times of each"
    n_lines(name) # What is done once
    at = Edges()
    traced(made(name), at)
    return sorted({i for v in at.seen.values() for i in (*v[:first], *v[-last:])})


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', OPTS)
def test_an_interrupt_at_the_edge_of_a_context_leaves_nothing_behind(name):
    bad,hits = {},[]
    for i in edges(name):
        found,hit = interrupted(name, i)
        put_back()
        hits.append(hit)
        if found: bad[i] = found
    assert bad=={} and sum(hits)>=5 and all(hits)


@pytest.mark.filterwarnings('ignore')
def test_an_interrupt_while_dual_numbers_begin():
    def broken(p, g): raise KeyboardInterrupt
    learn = made('ride')
    learn.opt_func = partial(adahessian, curvature='ggn', hvp='forward', probe=broken)
    learn.create_opt()
    before = switches()
    with pytest.raises(KeyboardInterrupt) as held: loop(learn, 3)
    after = held and switches() # A notebook too keeps the traceback
    put_back()
    assert after==before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, 'conv'), reason='older PyTorch has one switch for all')
def test_precision_by_its_new_names_comes_back():
    "Where somebody has set one of the new switches, PyTorch refuses to name the old one"
    cudnn = torch.backends.cudnn
    old = cudnn.conv.fp32_precision
    try:
        cudnn.conv.fp32_precision = 'ieee'
        with pytest.raises(RuntimeError): cudnn.allow_tf32
        before = cudnn.conv.fp32_precision,cudnn.rnn.fp32_precision
        with all_bits: assert 'tf32' not in (cudnn.conv.fp32_precision,cudnn.rnn.fp32_precision)
        assert (cudnn.conv.fp32_precision,cudnn.rnn.fp32_precision)==before==('ieee','tf32')
    finally: cudnn.allow_tf32 = True # All of them as they are at the start of a process
    assert cudnn.allow_tf32 and cudnn.conv.fp32_precision==old
