"Nothing is left behind: no cycle, no memory, no hook, no global setting, whatever ended the training"
import gc,weakref
import pytest,torch,torch._dynamo
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner,defaults
from torch import nn
from functools import partial
from helpers_learner import HYPERS,ROUNDING,Noted,data,distance,fit,given,learner,mlp,one_loss,split
from twin import Twin


def settings():
    "The global settings that the package touches for the time of a forward pass, and those it must never touch"
    return (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cudnn.enabled, torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled('cpu'),
        torch._dynamo.eval_frame._stance.stance, len(nn.modules.module._global_forward_hooks), tuple(defaults.callbacks),
        Learner._backward, Learner._do_one_batch)


def hooks(model):
    own = [p._backward_hooks for p in model.parameters()]
    return [dict(h or {}) for h in own],[len(m._forward_hooks)+len(m._forward_pre_hooks)+len(m._backward_hooks) for m in model.modules()]


class Raising(Callback):
    "Raises `ex` at `when` in training batch 2"
    run_valid,order = False,40
    def __init__(self, when, ex):
        def f():
            if self.train_iter==2: raise ex('stopped')
        setattr(self, when, f)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body,self.head = nn.LSTM(5, 4, batch_first=True),nn.Linear(4,3)
    def forward(self, x): return self.head(self.body(x)[0][:,-1])


@pytest.mark.parametrize('ex', [KeyboardInterrupt,RuntimeError])
@pytest.mark.parametrize('when', ['after_pred','after_loss','before_backward','after_backward','before_step','after_step'])
def test_an_exception_in_the_middle_leaves_nothing_and_training_goes_on(when, ex):
    "Two steps, an exception in the third, then the rest: as if the third batch had not been, or had just been completed"
    x,y = data(30, (4,5))
    model = Recurrent().double()
    learn = learner(model, x, y, probe=given(), cbs=[Raising(when, ex)])
    before = settings(),hooks(model)
    with pytest.raises(ex): fit(learn)
    assert (settings(),hooks(model))==before
    assert not learn.opt.diags and learn.opt.n_batches==0 and all(p.grad is None for p in model.parameters())
    stepped = when=='after_step'
    assert learn.opt.n_steps==2+stepped
    learn.remove_cbs(Raising)
    n = learn.opt.n_steps
    fit(learn)
    assert learn.opt.n_steps==n+5 and all(p.isfinite().all() for p in model.parameters())
    if stepped or when in ('after_pred','after_loss','before_backward'):
        b = split(x,y,6)
        want,probe = Recurrent().double(),given()
        twin = Twin([dict(params=list(want.parameters()), **HYPERS)], probe)
        for i,(s,t) in enumerate(b[:n]+b): twin.step([partial(one_loss, want, F.cross_entropy, s, t, i if i<n else i-n)])
        assert distance(model, want)<ROUNDING


def test_an_exception_inside_the_estimate():
    "Interrupted while a probe is drawn"
    probe,state = given(),dict(n=0)
    def broken(p, g):
        state['n'] += 1
        if state['n']==15: raise KeyboardInterrupt
        return probe(p, g)
    x,y = data(24)
    learn = learner(mlp(), x, y, probe=broken)
    before = settings(),hooks(learn.model)
    with pytest.raises(KeyboardInterrupt): fit(learn)
    assert (settings(),hooks(learn.model))==before and not learn.opt.diags
    assert all(p.grad is None for p in learn.model.parameters())
    fit(learn)
    assert learn.opt.n_steps==6


@pytest.mark.parametrize('kwargs', [{}, dict(update_each=3), dict(n_acc=2)], ids=str)
def test_no_reference_cycle_holds_the_optimizer(kwargs):
    "With the collector off, optimizer, averages and graphs die with their last name"
    x,y = data(30)
    learn = fit(learner(mlp(), x, y, **kwargs))
    opt,avg = weakref.ref(learn.opt),weakref.ref(next(iter(learn.opt.opt.state.values()))['sqr_avg_diag_hessian'])
    gc.collect()
    gc.disable()
    try:
        learn.opt = None
        assert opt() is None and avg() is None
    finally: gc.enable()


def test_no_graph_is_alive_after_a_step():
    x,y = data(24)
    grads = Noted('after_step', lambda l: [p.grad for p in l.model.parameters()])
    learn = fit(learner(mlp(), x, y, cbs=[grads]))
    held = grads.notes[-1] + [v for s in learn.opt.opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert all(o.grad_fn is None and not o.requires_grad for o in held)


def test_deleting_the_learner_frees_model_and_optimizer():
    x,y = data(24)
    learn = fit(learner(mlp(), x, y))
    refs = [weakref.ref(o) for o in (learn,learn.opt,learn.model,learn.model[0].weight)]
    del learn
    gc.collect()
    assert [r() for r in refs]==[None]*4


def tensors():
    "Count and bytes of the tensors that the collector knows"
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) in (torch.Tensor,nn.Parameter)]
    return len(found),sum(o.untyped_storage().nbytes() for o in found)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::FutureWarning','ignore::DeprecationWarning')
@pytest.mark.parametrize('kwargs', [{}, dict(n_acc=3, update_each=2)], ids=str)
def test_memory_is_flat_over_1000_steps(kwargs, cpu_amp):
    "Tensors after 100 and after 900 batches, first in float32 and then under mixed precision"
    x,y = data(200, dtype=torch.float)
    seen = {}
    class Count(Callback):
        run_valid = False
        def before_batch(self):
            if self.train_iter in (100,900): seen[self.train_iter] = tensors()
    learn = learner(mlp().float(), x, y, bs=2, **kwargs)
    learn.remove_cb(learn.recorder)
    learn.add_cb(Count())
    with learn.no_bar(),learn.no_logging(): learn.fit(10)
    assert learn.opt.n_steps==1000//kwargs.get('n_acc',1) and seen[900]==seen[100]
    learn.to_fp16()
    with learn.no_bar(),learn.no_logging(): learn.fit(10)
    # the scale of `GradScaler` and the two tensors of its growth
    assert seen[900][0]-seen[100][0]<=3


def test_importing_the_package_changes_eight_methods_and_no_default():
    ours = [k for k,v in vars(Learner).items() if getattr(v, '__module__', '').startswith('adahessian_fastai')]
    replaced = {k for k in ours if getattr(getattr(Learner, f'_orig_{k}', None), '__module__', '').startswith('fastai')}
    assert replaced=={'_backward','_do_one_batch','create_opt','load','save','fine_tune','lr_find','__getstate__'}
    assert [c.__module__.split('.')[0] for c in defaults.callbacks]==['fastai']*len(defaults.callbacks)
